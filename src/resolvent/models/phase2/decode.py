"""Decoding of one token at a time with the kernels of ``decode_kernels``: six launches per block.

Where a block attends, torch code reads the window between these kernels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ...layers import GatedFeedForward, LocalAttentionLayer
from ...layers.linear import is_plain
from ...ops import Consolidation, local_attention_step
from ...ops.hebbian import memory_implementation
from .block import Phase2Block, Phase2Model, blocks_of
from .state import LayerState, Phase2State

if TYPE_CHECKING:  # it imports Triton
    from .decode_kernels import Norm

MOST_SEQUENCES = 8
"""With more sequences, products of matrices are faster than products with one vector after another."""


class TokenStep:
    """Step of one token per sequence, which updates the state in place; everything but the weights is float32.

    Args:
        model: a model without an ``obstacle``.
        state: state of the sequences, with the position on the device; every token changes it.
    """

    def __init__(self, model: Phase2Model, state: Phase2State) -> None:
        from . import decode_kernels

        self.kernels, self.model, self.state = decode_kernels, model, state
        config, sequences, device = model.config, len(state), state.device
        width = config.num_heads * config.head_dim

        def allocate(*shape: int) -> Tensor:
            return torch.empty(sequences, *shape, device=device)

        self.x, self.logits = allocate(config.d_model), allocate(config.vocab_size)
        self.projected, self.readout, self.gated = allocate(3 * width), allocate(width), allocate(width)
        self.gamma, self.gate, self.inner = (
            allocate(config.num_heads),
            allocate(config.head_dim),
            allocate(config.ffn_width),
        )
        self.table = cast(nn.Embedding, model.token_embedding).weight
        waves = model.position_embedding
        assert waves is not None
        self.pace, self.amplitude = waves.pace, waves.amplitude
        self.consolidations = [_in_float32(block.consolidation()) for block in blocks_of(model)]

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
        if model.position_embedding is None or model.position_embedding.trainable:
            return "it has no positions, or their frequencies are trained"
        if config.norm != "layernorm" or config.qkv_bias or not config.bk_core:
            return "its norm is no LayerNorm, its projections have biases, or it has no BK-Core"
        if not all(map(is_plain, _projections(model))):
            return "one of its projections is no nn.Linear, or has a hook"
        dtype = model.lm_head.weight.dtype
        ran_by = memory_implementation(config.backend, state.device, dtype, config.head_dim)
        return None if ran_by == "triton" else "its operators run in torch"

    def __call__(self, token: Tensor) -> Tensor:
        """Read a token of every sequence, int64 (B,), and return the logits of the next, (B, vocabulary).

        The next call overwrites the logits.
        """
        model, kernels = self.model, self.kernels
        kernels.embed(token, self.state.position, self.table, self.pace, self.amplitude, model.embedding_factor, self.x)
        for i, (block, layer) in enumerate(zip(blocks_of(model), self.state.layers, strict=True)):
            self._read(block, layer, self.consolidations[i], first=i == 0)
        kernels.linear(self.x, model.lm_head.weight, None, self.logits, self._norm(model.ln_f))
        self.state.position.add_(1)
        return self.logits

    def _read(self, block: Phase2Block, state: LayerState, rule: Consolidation | None, first: bool) -> None:
        """Run one block, branch after branch."""
        kernels, x, layer = self.kernels, self.x, block.mixer
        assert state.resolvent is not None and block.dissipative_bk is not None and block.bk_proj is not None
        chain, norm = torch.view_as_real(state.resolvent), self._norm(block.ln1)
        gate, readout = (None, self.readout) if layer.gate_down is None else (self.gate, self.gated)
        gating = None if layer.gate_down is None else (layer.gate_down.weight, self.gate)
        kernels.linear(x, layer.qkv_proj.weight, None, self.projected, norm, other=gating)
        kernels.scatter(  # after what else reads x: it adds the features to x
            x,
            None if first else self.readout,
            norm,
            block.dissipative_bk,
            block.bk_proj.weight,
            chain,
            self.gamma,
        )
        if block.attention is not None:
            self._attend(block.attention, state)
        else:
            assert block.hebbian is not None and state.memory is not None
            kernels.remember(
                self.projected,
                self.gamma,
                gate,
                self.state.position,
                block.hebbian,
                rule,
                None if block.snr_filter is None else block.snr_filter.strength_logit,
                state.memory,
                state.conv_tail,
                self.readout,
                self.gated,
            )
        kernels.linear(readout, layer.out_proj.weight, None, x, add=True)
        inner, outer = _maps(block)
        activation = "swiglu" if isinstance(block.ffn, GatedFeedForward) else "gelu"
        kernels.linear(x, inner.weight, inner.bias, self.inner, self._norm(block.ln2), activation)
        kernels.linear(self.inner, outer.weight, outer.bias, x, add=True)

    def _attend(self, layer: LocalAttentionLayer, state: LayerState) -> None:
        """Read the window of a block, which is updated in place."""
        assert state.window is not None
        heads = layer.heads(self.projected.unsqueeze(1), state.conv_tail, None)
        q, k = layer.rotated(heads, self.state.position.unsqueeze(1))
        out, _ = local_attention_step(
            q.squeeze(1), k.squeeze(1), heads.v.squeeze(1), layer.temperature, layer.window, state.window,
            self.state.position,
        )  # fmt: skip
        state.conv_tail.copy_(heads.conv_tail)
        self.readout.copy_(layer.normalize(out))
        if layer.gate_up is not None:
            weight, bias = layer.gate_up.weight.float(), layer.gate_up.bias.float()
            torch.mul(self.readout, torch.addmm(bias, self.gate, weight.mT).sigmoid(), out=self.gated)

    def _norm(self, layer: nn.Module) -> Norm:
        assert isinstance(layer, nn.LayerNorm)
        return self.kernels.Norm(layer.weight, layer.bias, layer.eps)


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
