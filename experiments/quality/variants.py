"""Phase 2 with its mechanisms on and off, by name.

`phase2` is the default configuration. Behind it, parted by slashes, stands what differs:

    phase2/no-snr                without the SNR filter
    phase2/no-snr/no-resonance   without both
    phase2/bare                  without any mechanism: a decaying memory and a feed-forward part
    phase2/bare/bk               and with BK-Core alone
    phase2/no-snr-training       with the SNR filter at full strength
    phase2/original              with the report's original initialisation
    phase2/hybrid                with attention in every third block, over half of a training sequence
    phase2/hybrid/window-512     ... over the last 512 tokens
    phase2/hybrid/window-all     ... over all tokens
    phase2/one                   with attention in the block in the middle alone, over half of a training sequence
    phase2/at-2-5                with attention in the second and the fifth block, over half of a training sequence
    phase2/heads-4               with 4 heads of a quarter of the width, in place of heads of 64
    phase2/attention             with attention over all tokens in every block
    phase2/rotation              with rotating memories
    phase2/rotation/orders-2-3   ... with plateaus at halves of a turn in half of the pairs, and at thirds in the others
    phase2/rotation-0.1          ... whose projection to angles starts at a tenth of the spread of other projections
    phase2/hybrid/short-64       ... over the last 64 in half of the training's steps, none of them at its end
    phase2/attention/no-qk-norm  with q and k as they are, and scores that are divided by the root of a head's width
    phase2/gamma-rate-10         with ten times the learning rate for the biases of Γ

BK-Core, Γ in the Hamiltonian and the positions have no switch in the configuration: what leads them to the stream (the
projection `bk_proj`, the strength κ, the positions' gain) is held at zero instead.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from experiments.quality.attention import with_plain_scores
from resolvent.evaluation import switched_off
from resolvent.layers import LocalAttentionLayer, NonHermitianPotential, ZetaInitializer
from resolvent.layers.zeta import zeta_zeros
from resolvent.models.phase2 import Phase2Config, Phase2IntegratedModel
from resolvent.models.phase2.block import blocks_of

HEAD_DIM = 64


@dataclass(frozen=True)
class Switch:
    """Switch of a mechanism.

    Attributes:
        config: fields of the configuration that switch it off.
        zeros: endings of names of parameters that are held at zero.
        part: name of what blocks can do without once they are trained.
    """

    config: dict[str, Any] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()
    part: str | None = None

    @contextmanager
    def off(self, model: Phase2IntegratedModel) -> Iterator[None]:
        """Do without it in a model that was trained with it."""
        weights = [parameter.data for parameter in _ending(model, self.zeros)]
        kept = [weight.clone() for weight in weights]
        try:
            for weight in weights:
                weight.zero_()
            with switched_off(model, self.part) if self.part else nullcontext():
                yield
        finally:
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


MECHANISMS = {
    "bk": Switch(zeros=("bk_proj.weight",)),  # features of the resolvent
    "kappa": Switch(zeros=("dissipative_bk.kappa",)),  # Γ damps the Hamiltonian
    "feedback": Switch({"memory_feedback": False}, ("memory_to_potential.weight",)),  # memory in the next potential
    "snr": Switch({"snr_enabled": False}, part="snr_filter"),
    "resonance": Switch({"resonance_enabled": False}, part="resonance"),
    "zeta-init": Switch({"use_zeta_init": False}),  # zeta spectrum of the potential
    "positions": Switch(zeros=("position_embedding.gain",)),  # zeta positions
}
"""Mechanisms that the report names."""

OPTIONS = {
    "adaptive-decay": Switch({"adaptive_decay": False}),  # Γ depends on the token
    "conv": Switch({"conv_size": 1}),  # short convolution before q, k, v
    "norm": Switch({"output_norm": False}),  # norm of the read-out
    "gate": Switch({"output_gate": False}),  # gate of the read-out
    "gated-ffn": Switch({"ffn_gated": False}),  # SwiGLU instead of Linear, GELU, Linear
    "scale": Switch({"embedding_scale": 1.0}),  # tokens enter at the size of what blocks add
    "snr-training": Switch({"snr_trained": False}),  # the SNR filter's strength is trained
    # The slowest head starts at 1 % per token, instead of 0.015 %.
    "base-decay": Switch({"base_decay": 1.5e-4, "least_decay": 1e-4}),
    # The least decay is 0.01 % per token, instead of 1 %.
    "reach": Switch({"base_decay": 0.015, "least_decay": 0.01}),
}
"""Further switches, which the report does not name."""

ORIGINAL = {
    "base_decay": 0.015,
    "least_decay": 0.01,
    "tie_embeddings": False,
    "embedding_scale": 1.0,
    "ffn_gated": False,
    "snr_trained": False,
}
"""Fields of the report's original."""

ABLATION = ("phase2", *(f"phase2/no-{name}" for name in MECHANISMS), "phase2/bare", "phase2/original")


@dataclass(frozen=True)
class Variant:
    """A Phase 2 model that differs from the default.

    Attributes:
        config: fields of its configuration.
        zeros: endings of names of parameters that are held at zero.
        original: whether the weights are drawn as in the report's original.
        attends: ``hybrid`` for attention in every third block, ``one`` for the block in the middle, ``attention`` for
            attention in all, or the numbers of the blocks, counted from 1.
        window: tokens to which they attend, ``all`` or a number; None for all tokens where every block attends, and
            for half a training sequence elsewhere.
        short_window: tokens to which they attend in half of the steps of training; None for ``window`` in all steps.
        heads: number of heads of memories and attention, which share the width; None for that of the sizes, or
            heads of 64.
        rotation_start: initial standard deviation of the projections to angles, over that of other projections; None
            for the model's own.
        plain_scores: whether attention takes q and k without L2 norm and temperature.
        rate_factors: factors of the learning rate, by the endings of names of parameters.
    """

    config: dict[str, Any]
    zeros: tuple[str, ...]
    original: bool = False
    attends: str | tuple[int, ...] | None = None
    window: str | None = None
    short_window: int | None = None
    heads: int | None = None
    rotation_start: float | None = None
    plain_scores: bool = False
    rate_factors: Mapping[str, float] = field(default_factory=dict)

    def at(self, layers: int, length: int) -> Variant:
        """Return the variant with the blocks that attend in a model of ``layers``, trained on ``length`` tokens.

        Raises:
            ValueError: a hybrid has no third block, or there is no block of a number.
        """
        if self.attends is None:
            return self
        chosen = _attending(self.attends, layers)
        window = self.window or ("all" if self.attends == "attention" else str(length // 2))
        fields = {"attention_layers": chosen, "attention_window": None if window == "all" else int(window)}
        return dataclasses.replace(self, config=self.config | fields)

    def build(self, **sizes: Any) -> Phase2IntegratedModel:
        """Return a model of these fields of the configuration, with weights yet to be drawn by ``reset``."""
        heads = {}
        if self.heads is not None or "num_heads" not in sizes:
            count = self.heads or sizes["d_model"] // HEAD_DIM
            heads = {"num_heads": count, "head_dim": sizes["d_model"] // count}
        model = Phase2IntegratedModel(Phase2Config(**(sizes | heads | self.config)), init=False)
        if self.plain_scores:
            with_plain_scores(model)
        for parameter in _ending(model, self.zeros):
            parameter.requires_grad_(False)
        return model

    @torch.no_grad()
    def reset(self, model: Phase2IntegratedModel, seed: int) -> None:
        """Draw fresh weights in place: those of the model without any change, wherever a change is none of them."""
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):  # which a fresh model has at one, and may leave to itself
                module.reset_parameters()
        model.init_weights(generator)
        if self.original:
            original_initialisation(model, generator)
        else:
            self._share(model, seed)
        for parameter in _ending(model, self.zeros):
            parameter.zero_()
        if self.rotation_start is not None:
            for weight in _ending(model, ("hebbian.rotation_proj.weight",)):
                spread = self.rotation_start * weight.shape[1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)

    def _share(self, model: Phase2IntegratedModel, seed: int) -> None:
        """Take the weights of the unchanged model: a part that is left out would else give all others other draws."""
        defaults = {name: getattr(Phase2Config(), name) for name in self.config}
        whole = Phase2IntegratedModel(dataclasses.replace(model.config, **defaults), init=False)
        whole.init_weights(torch.Generator().manual_seed(seed))
        weights = dict(whole.named_parameters())
        own = ".potential." if {"use_zeta_init", "base_decay"} & self.config.keys() else None
        for own_name, parameter in model.named_parameters():
            name = own_name.replace(".attention.", ".hebbian.")  # attention starts with the weights of the memory
            if name in weights and weights[name].shape == parameter.shape and not (own and own in name):
                parameter.copy_(weights[name])


def _attending(attends: str | tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Return the blocks that attend, counted from 0."""
    if isinstance(attends, tuple):
        if list(attends) != sorted({*attends} & {*range(1, layers + 1)}):
            raise ValueError(f"at-{'-'.join(map(str, attends))}: name blocks of 1 to {layers}, in ascending order")
        return tuple(block - 1 for block in attends)
    chosen = {
        "hybrid": tuple(range(2, layers, 3)),
        "one": (layers // 2,),
        "attention": tuple(range(layers)),
    }[attends]
    if not chosen:
        raise ValueError(f"a hybrid attends in every third block, and there are {layers}: take phase2/attention")
    return chosen


def _ending(model: Phase2IntegratedModel, endings: tuple[str, ...]) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith(endings)]


@contextmanager
def shortened(model: nn.Module, window: int) -> Iterator[None]:
    """Let every attention layer of a model attend to the last ``window`` tokens at most."""
    layers = [layer for layer in model.modules() if isinstance(layer, LocalAttentionLayer)]
    kept = [layer.window for layer in layers]
    try:
        for layer in layers:
            layer.window = min(window, layer.window or window)
        yield
    finally:
        for layer, whole in zip(layers, kept, strict=True):
            layer.window = whole


def mechanisms_of(name: str) -> dict[str, Switch]:
    """Return the mechanisms that are on in a variant and can be switched off after training, by name."""
    variant = parse_variant(name)
    on = {key: switch for key, switch in MECHANISMS.items() if not switch.config.keys() & variant.config.keys()}
    return {key: switch for key, switch in on.items() if switch.part or set(switch.zeros) - set(variant.zeros)}


def parse_variant(name: str) -> Variant:
    """Return the variant of a name such as `phase2/no-snr`.

    Raises:
        ValueError: a part of the name is unknown.
    """
    off, config, fields = set[str](), dict[str, Any](), dict[str, Any]()
    for part in name.split("/")[1:]:
        mechanism = part.removeprefix("no-")
        if part == "bare":
            off |= set(MECHANISMS)
        elif (found := _form(part)) is not None:
            config |= found.pop("config", {})
            fields |= found
        elif mechanism not in MECHANISMS | OPTIONS:
            known = ", ".join(["bare", "original", *MECHANISMS, *OPTIONS])
            raise ValueError(
                f"{name}: there is no {part!r}; known are {known}, each but the first two also with no-, hybrid, "
                "one, attention, at-2-5, window-all and window-512, short-64, heads-4, rotation and rotation-0.1, "
                "orders-2-3, no-qk-norm, gamma-rate-10, say"
            )
        elif part == mechanism:
            off.discard(part)
        else:
            off.add(mechanism)
    for form, given in (("window", fields.get("window")), ("short", fields.get("short_window"))):
        if given is not None and "attends" not in fields:
            raise ValueError(f"{name}: {form}-{given} needs hybrid, one, attention or at-2-5, say")
    switches = [switch for key, switch in (MECHANISMS | OPTIONS).items() if key in off]
    for switch in switches:
        config |= switch.config
    return Variant(config, tuple(zero for switch in switches for zero in switch.zeros), **fields)


def _form(part: str) -> dict[str, Any] | None:
    """Return the fields of a variant that a part of its name sets; None for a part that is a switch, or unknown."""
    if part == "original":
        return {"original": True, "config": ORIGINAL}
    if part in ("hybrid", "one", "attention"):
        return {"attends": part}
    if re.fullmatch(r"at(-[1-9]\d*)+", part):
        return {"attends": tuple(map(int, part.split("-")[1:]))}
    if heads := re.fullmatch(r"heads-([1-9]\d*)", part):
        return {"heads": int(heads[1])}
    if part == "no-qk-norm":
        return {"plain_scores": True}
    if window := re.fullmatch(r"window-(all|[1-9]\d*)", part):
        return {"window": window[1]}
    if short := re.fullmatch(r"short-([1-9]\d*)", part):
        return {"short_window": int(short[1])}
    if start := re.fullmatch(r"rotation(?:-(\d+(?:\.\d+)?))?", part):
        return {"rotation_start": None if start[1] is None else float(start[1]), "config": {"memory_rotation": True}}
    if orders := re.fullmatch(r"orders-([1-9]\d*(?:-[1-9]\d*)*)", part):
        return {"config": {"memory_rotation_orders": tuple(int(order) for order in orders[1].split("-"))}}
    if factor := re.fullmatch(r"gamma-rate-(\d+(?:\.\d+)?)", part):
        return {"rate_factors": {"gamma_bias": float(factor[1])}}
    return None


def original_initialisation(model: Phase2IntegratedModel, generator: torch.Generator) -> None:
    """Draw weights as the report's original did, in the layers that it had.

    Every linear map but the head has the singular values 0.02 / γ_i; the token table is a wave pattern of the token's
    number at the amplitude 0.02, beside positions of the amplitude one; and every head starts with Γ = softplus(0).
    The head, which is not tied, has the spread of torch's default, 1/sqrt(3 D).
    """
    zeta = ZetaInitializer(generator)
    joined = [block.mixer.qkv_proj for block in blocks_of(model)]  # three maps side by side
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            for weight in module.weight.chunk(3 if module in joined else 1):
                zeta(weight)
                weight.mul_((0.02 / zeta_zeros(min(weight.shape))).norm().item() / weight.norm())
        if isinstance(module, NonHermitianPotential):
            module.gamma_bias.zero_()
    table = model.token_embedding.weight
    table.copy_(0.02 * _token_waves(*table.shape))
    model.lm_head.weight.copy_(
        torch.randn(model.lm_head.weight.shape, generator=generator) / (3 * model.d_model) ** 0.5
    )
    model.position_embedding.scale = 1.0
    model.position_embedding.gain.fill_(math.atanh(1 - 1e-6))


def _token_waves(count: int, width: int) -> Tensor:
    phase = torch.arange(count, dtype=torch.float64)[:, None] * zeta_zeros((width + 1) // 2) / (2 * math.pi)
    return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-2)[:, :width].float()
