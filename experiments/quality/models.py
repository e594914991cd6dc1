"""Entries by name, equal in parameters through the width of their feed-forward parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from experiments.quality.attention import WindowedAttention
from experiments.quality.mixers import GLA, Attention, GatedDeltaNet, Mamba2, Mamba3, Mixer
from experiments.quality.variants import HEAD_DIM, parse_variant
from resolvent.layers import GatedFeedForward
from resolvent.models.phase2 import Phase2Block, Phase2IntegratedModel
from resolvent.ops import linear_cross_entropy

FFN_STEP = 16
TOLERANCE = 0.02

PEERS: dict[str, Callable[[int], Mixer]] = {
    "transformer": lambda width: Attention(width, width // HEAD_DIM),
    "gla": lambda width: GLA(width, max(1, width // (2 * HEAD_DIM))),
    "mamba2": lambda width: Mamba2(width),
    "mamba3": lambda width: Mamba3(width),
    "gated-deltanet": lambda width: GatedDeltaNet(width, width // HEAD_DIM),
}
"""Mixers of a width. Keys are 64 wide; GLA, Gated DeltaNet and Phase 2 hold memories of the same size, Mamba-2 and
Mamba-3 of twice the size. Behind a name may stand `/hybrid`, for the attention layers of our hybrids in every third
block, over half of a training sequence, and `/hybrid/window-512` or `/hybrid/window-all` for another window."""


@dataclass(frozen=True)
class Size:
    """Sizes that all entries of a comparison share.

    Attributes:
        vocabulary: tokens.
        width: of the residual stream, a multiple of 128.
        layers: blocks.
        parameters: of each, within 2 %.
        length: tokens of a training sequence.
        dropout: of what enters the stream, and what each branch adds to it.
    """

    vocabulary: int
    width: int
    layers: int
    parameters: int
    length: int
    dropout: float = 0.0


class PeerBlock(nn.Module):
    """A mixer and a feed-forward part, each with its norm before and its residual around it.

    Args:
        mixer: mixes the tokens.
        width: D.
        hidden: width of the feed-forward part; 0 for none.
        dropout: of what a branch adds.
    """

    def __init__(self, mixer: Mixer, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.RMSNorm(width, eps=1e-5), mixer
        self.norm2 = nn.RMSNorm(width, eps=1e-5) if hidden else None
        self.ffn = GatedFeedForward(width, hidden) if hidden else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.mixer(self.norm1(x)))
        if self.norm2 is not None and self.ffn is not None:
            x = x + self.dropout(self.ffn(self.norm2(x)))
        return x


class PeerModel(nn.Module):
    """A language model of a peer's blocks, with a head that is the embedding's table.

    Args:
        size: its sizes.
        mixer: makes a block's mixer.
        hidden: width of the feed-forward parts; 0 for none.
        embedding_factor: factor of the embeddings; sqrt(width), as in Phase 2, if None.
        third: makes the mixer of every third block; None for ``mixer``.
    """

    def __init__(
        self,
        size: Size,
        mixer: Callable[[int], Mixer],
        hidden: int,
        embedding_factor: float | None = None,
        third: Callable[[int], Mixer] | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = size.vocabulary
        self.embedding_factor = size.width**0.5 if embedding_factor is None else embedding_factor
        self.token_embedding = nn.Embedding(size.vocabulary, size.width)
        self.dropout = nn.Dropout(size.dropout)
        makers = [third if third and i % 3 == 2 else mixer for i in range(size.layers)]
        self.blocks = nn.ModuleList(PeerBlock(make(size.width), size.width, hidden, size.dropout) for make in makers)
        self.ln_f = nn.RMSNorm(size.width, eps=1e-5)
        self.lm_head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.lm_head.weight = self.token_embedding.weight

    def hidden_states(self, input_ids: Tensor) -> tuple[Tensor, None]:
        """Return final hidden states (B, N, D) of tokens (B, N), and None for the state of Phase 2."""
        x = self.dropout(self.token_embedding(input_ids) * self.embedding_factor)
        for block in self.blocks:
            x = block(x)
        return self.ln_f(x), None

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the mean nats of labels (B, N) after tokens (B, N)."""
        hidden, _ = self.hidden_states(input_ids)
        return linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, labels.flatten())

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw fresh weights in place as Phase 2 does.

        Weights are N(0, 1/fan_in) in the blocks and N(0, 0.02²) in the table; those that add to the stream shrink with
        the depth.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and module is not self.lm_head:
                scale = (2 * len(self.blocks)) ** -0.5 if name.endswith("out_proj") else 1.0
                normal(module.weight, scale * module.in_features**-0.5, generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, Mixer):
                module.reset(generator)
        normal(self.token_embedding.weight, 0.02, generator)

    def state_bytes(self, length: int) -> int:
        return sum(block.mixer.state_bytes(length) for block in self.blocks)


@dataclass(frozen=True)
class Entry:
    """Model that can be initialised again.

    Attributes:
        name: name of the entry.
        model: has ``hidden_states`` and ``forward(input_ids, labels=...)``.
        reset: draws fresh weights in place, from a seed.
        state_bytes: size of its state at the end of a training sequence, in float32.
        rate_factors: factors of the learning rate of AdamW, by the endings of the names of parameters.
        short_window: tokens to which attention is held in half of the steps; None for none.
    """

    name: str
    model: Any
    reset: Callable[[int], None]
    state_bytes: int
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    short_window: int | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters, without those that are held at zero."""
        return count_parameters(self.model)


def build(name: str, size: Size, device: torch.device | str = "cpu") -> Entry:
    """Build an entry of a size, with uninitialised weights.

    Raises:
        ValueError: there is none of this name, or it cannot have so few or so many parameters.
    """
    base = name.partition("/")[0]
    # A variant keeps the widths of Phase 2, and so its weights, if it can; other heads change most weights anyway.
    keeps = base == "phase2" and parse_variant(name).heads is None
    for like in (base, name) if keeps else (name,):
        entry = _maker(name, size)(_feed_forward_width(_maker(like, size), size.parameters))
        if abs(entry.parameters / size.parameters - 1) <= TOLERANCE:
            entry.model.to(device)
            return entry
    raise ValueError(f"{name} has {entry.parameters:,} parameters, not {size.parameters:,}: change the width")


def _feed_forward_width(make: Callable[[int], Entry], parameters: int) -> int:
    with torch.device("meta"):
        few, many = (make(hidden).parameters for hidden in (FFN_STEP, 2 * FFN_STEP))
    return FFN_STEP * max(1, 1 + round((parameters - few) / (many - few)))


def _maker(name: str, size: Size) -> Callable[[int], Entry]:
    return _peer(name, size) if name.partition("/")[0] in PEERS else _phase2(name, size)


def _peer(name: str, size: Size) -> Callable[[int], Entry]:
    base, *parts = name.split("/")
    third = _attention_of_hybrid(name, parts, size) if parts else None

    def make(hidden: int) -> Entry:
        model = PeerModel(size, PEERS[base], hidden, third=third)
        return Entry(name, model, model.reset, model.state_bytes(size.length))

    return make


def _attention_of_hybrid(name: str, parts: list[str], size: Size) -> Callable[[int], Mixer]:
    """Return what makes the attention of a peer's hybrid, given the parts behind the peer's name."""
    found = re.fullmatch(r"hybrid(?:/window-(all|[1-9]\d*))?", "/".join(parts))
    if not found or size.layers < 3:
        raise ValueError(
            f"there is no {name!r} of {size.layers} blocks: a peer's variants are /hybrid, with three "
            "blocks and more, and /hybrid/window-512, say"
        )
    chosen = found[1] or str(size.length // 2)
    window = None if chosen == "all" else int(chosen)
    return lambda width: WindowedAttention(width, width // HEAD_DIM, window)


def _phase2(name: str, size: Size) -> Callable[[int], Entry]:
    if name.partition("/")[0] != "phase2":
        raise ValueError(
            f"there is no model {name!r}; known are {', '.join(PEERS)}, phase2 and its variants phase2/..."
        )
    variant = parse_variant(name).at(size.layers, size.length)

    def make(hidden: int) -> Entry:
        model = variant.build(
            vocab_size=size.vocabulary,
            d_model=size.width,
            n_layers=size.layers,
            n_seq=size.length,
            ffn_dim=3 * hidden,  # of which a gated network takes two thirds
            dropout=size.dropout,
            tie_embeddings=True,
        )
        state_bytes = phase2_state_bytes(model, size.length)
        return Entry(
            name,
            model,
            lambda seed: variant.reset(model, seed),
            state_bytes,
            variant.rate_factors,
            variant.short_window,
        )

    return make


def phase2_state_bytes(model: Phase2IntegratedModel, length: int) -> int:
    """Return the bytes of the state after a sequence; Γ̄ counts if there is an SNR filter, which alone reads it."""
    return sum(_block_state_bytes(block, length) for block in model.blocks if isinstance(block, Phase2Block))


def _block_state_bytes(block: Phase2Block, length: int) -> int:
    if block.attention is not None:
        resolvent, *others, keys, values = block.state_shapes()
        slots = [(min(length, block.attention.window or length), *shape[1:]) for shape in (keys, values)]
        return 8 * resolvent[0] + 4 * sum(torch.Size(shape).numel() for shape in (*others, *slots))
    resolvent, memory, forgetting, *others = (torch.Size(shape).numel() for shape in block.state_shapes())
    filtered = forgetting if block.snr_filter is not None else 0
    phases = 0 if block.hebbian.rotation_proj is None else block.hebbian.head_dim // 2  # of eight bytes, not four
    return 8 * resolvent + 4 * (memory + filtered + sum(others) + phases)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Draw from N(0, std²) on the CPU."""
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)
