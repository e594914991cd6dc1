"""Decoding of one token at a time with the kernels of ``decode_products`` and ``decode_kernels``.

A block is five launches: the products with its normed tokens, BK-Core with memory or attention, the product of read-out
and features, and two for the feed-forward network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ...layers import GatedFeedForward
from ...layers.linear import is_plain
from ...ops import Consolidation
from ...ops.hebbian import memory_implementation
from .block import Phase2Block, Phase2Model, blocks_of
from .state import Phase2State

if TYPE_CHECKING:  # it imports Triton
    from .decode_kernels import Chains, Reading
    from .decode_products import Norm

MOST_SEQUENCES = 256
"""With more sequences, the products of cuBLAS are faster."""


class TokenStep:
    """Step of one token per sequence, which updates the state in place; everything but the weights is float32.

    Args:
        model: a model without an ``obstacle``.
        state: state of the sequences, with the position on the device; every token changes it.
    """

    def __init__(self, model: Phase2Model, state: Phase2State) -> None:
        from . import decode_kernels, decode_products

        self.kernels, self.products, self.model, self.state = decode_kernels, decode_products, model, state
        config, sequences, device = model.config, len(state), state.device
        heads, width = config.num_heads, config.num_heads * config.head_dim

        def allocate(*shape: int) -> Tensor:
            return torch.empty(sequences, *shape, device=device)

        self.x, self.logits = allocate(config.d_model), allocate(config.vocab_size)
        self.projected, self.gated, self.gate = allocate(3 * width), allocate(width), allocate(config.head_dim)
        self.readouts = allocate(width), allocate(width)  # of this block and of the block before, in turn
        self.v, self.gamma, self.features = allocate(heads), allocate(heads), allocate(2 * heads)
        self.inner = allocate(config.ffn_width)
        self.table = cast(nn.Embedding, model.token_embedding).weight
        waves = model.position_embedding
        assert waves is not None
        self.pace, self.amplitude = waves.pace, waves.amplitude
        self.consolidations = [_in_float32(block.consolidation()) for block in blocks_of(model)]
        one = torch.ones((), dtype=torch.int64, device=device)
        self.parts = [None if x.window is None else decode_kernels.allocate_parts(x.window) for x in state.layers]
        self.turns = [None if layer is None else layer.turns(one) for layer in (b.attention for b in blocks_of(model))]

    @staticmethod
    def obstacle(model: Phase2Model, state: Phase2State) -> str | None:
        """Return the reason why a model cannot use these kernels, or None."""
        config = model.config
        if len(state) > MOST_SEQUENCES:
            return f"{len(state)} sequences are more than {MOST_SEQUENCES}"
        if not isinstance(model.token_embedding, nn.Embedding) or config.ar_ssm_rank or config.conv_size < 2:
            return "it has a tensor-train embedding, a semiseparable branch or no short convolution"
        if config.memory_rotation or config.memory_norm_weight:
            return "its memory rotates, or the norm of its read-out has weights"
        if model.state_grows:
            return "it attends to all tokens"
        if model.position_embedding is None or model.position_embedding.trainable:
            return "it has no positions, or their frequencies are trained"
        if config.norm != "layernorm" or config.qkv_bias or not config.bk_core:
            return "its norm is no LayerNorm, its projections have biases, or it has no BK-Core"
        if config.rotary_scaling is not None and config.rotary_scaling.kind == "dynamic":
            return "the scaling of its rotary positions depends on the position"
        if not all(map(is_plain, _projections(model))):
            return "one of its projections is no nn.Linear, or has a hook"
        if len({module.weight.dtype for module in _projections(model)}) > 1:
            return "its projections have several dtypes"
        dtype = model.lm_head.weight.dtype
        ran_by = memory_implementation(config.backend, state.device, dtype, config.head_dim)
        return None if ran_by == "triton" else "its operators run in torch"

    def __call__(self, token: Tensor) -> Tensor:
        """Read a token of every sequence, int64 (B,), and return the logits of the next, (B, vocabulary).

        The next call overwrites the logits.
        """
        model, position, waves = self.model, self.state.position, (self.pace, self.amplitude)
        self.products.embed(token, position, self.table, *waves, model.embedding_factor, self.x)
        for i in range(model.n_layers):
            self._read(i)
        self.products.linear(self.x, [(model.lm_head.weight, self.logits)], norm=self._norm(model.ln_f))
        return self.logits

    def _read(self, i: int) -> None:
        """Run block ``i``."""
        block, state, x, linear = blocks_of(self.model)[i], self.state.layers[i], self.x, self.products.linear
        # 1. One norm and one product in.
        layer, bk, narrow = block.mixer, block.dissipative_bk, None
        assert bk is not None and block.bk_proj is not None and state.resolvent is not None
        adaptive, gamma = bk.potential.gamma_proj, None
        products = [(layer.qkv_proj.weight, self.projected), (bk.potential.v_proj.weight, self.v)]
        if adaptive is not None:
            gamma = self.gamma
            products.append((adaptive.weight, gamma))
        if layer.gate_down is not None:
            narrow = self.gate
            products.append((layer.gate_down.weight, narrow))
        linear(x, products, norm=self._norm(block.ln1))
        # 2. BK-Core, and memory or attention.
        readout, before = self.readouts[i % 2], self.readouts[1 - i % 2] if i else None
        reading = self.kernels.Reading(
            self.projected, narrow, self.state.position, state.conv_tail, readout, self.gated
        )
        g = torch.view_as_real(state.resolvent)
        self._mix(i, reading, self.kernels.Chains(bk, self.v, gamma, before, g, self.features))
        # 3. One product out.
        features = self.products.Features(self.features, block.bk_proj.weight, block.bk_proj.in_features)
        linear(readout if narrow is None else self.gated, [(layer.out_proj.weight, x)], add=True, features=features)
        # 4. Feed-forward network.
        inner, outer = _maps(block)
        activation = "swiglu" if isinstance(block.ffn, GatedFeedForward) else "gelu"
        norm = self._norm(block.ln2)
        linear(x, [(inner.weight, self.inner)], bias=inner.bias, norm=norm, activation=activation)
        linear(self.inner, [(outer.weight, x)], bias=outer.bias, add=True)

    def _mix(self, i: int, reading: Reading, chains: Chains) -> None:
        """Read the memory of block ``i``, or its window."""
        block, state, turns, parts = blocks_of(self.model)[i], self.state.layers[i], self.turns[i], self.parts[i]
        if block.attention is not None:
            assert state.window is not None and turns is not None and parts is not None
            self.kernels.attend(reading, chains, block.attention, turns, state.window, parts)
            return
        assert block.hebbian is not None and state.memory is not None
        strength = None if block.snr_filter is None else block.snr_filter.strength_logit
        self.kernels.remember(reading, chains, block.hebbian, self.consolidations[i], strength, state.memory)

    def _norm(self, layer: nn.Module) -> Norm:
        assert isinstance(layer, nn.LayerNorm)
        return self.products.Norm(layer.weight, layer.bias, layer.eps)


def _maps(block: Phase2Block) -> tuple[nn.Linear, nn.Linear]:
    """Return the two linear maps of the feed-forward network."""
    ffn = block.ffn
    if isinstance(ffn, GatedFeedForward):
        return ffn.in_proj, ffn.out_proj
    return cast(nn.Linear, ffn[0]), cast(nn.Linear, ffn[2])


def _projections(model: Phase2Model) -> list[nn.Module]:
    """Return the modules that multiply by a matrix."""
    found: list[nn.Module | None] = [model.lm_head]
    for block in blocks_of(model):
        mixer = block.mixer
        if block.dissipative_bk is not None:
            potential = block.dissipative_bk.potential
            found += [potential.v_proj, potential.gamma_proj, potential.memory_to_potential, block.bk_proj]
        found += [mixer.qkv_proj, mixer.gate_down, mixer.gate_up, mixer.out_proj, *_maps(block)]
    return [layer for layer in found if layer is not None]


def _in_float32(rule: Consolidation | None) -> Consolidation | None:
    """Return the filters with their basis in float32, as the kernels read it."""
    if rule is None or rule.resonance is None:
        return rule
    return replace(rule, resonance=replace(rule.resonance, basis=rule.resonance.basis.float()))
