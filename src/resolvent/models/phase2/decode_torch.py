"""Decoding of one token at a time on the CPU, in a third of the operations of a forward pass.

On a CPU a forward pass of one token takes about as long to launch its operations from Python as to compute them. Here
the narrow projections of a block are one product, constants are computed once, and the state is updated in place.

Shapes: B sequences, D model width, H heads, K = V head width, W convolution width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers import GatedFeedForward
from ...layers.linear import is_plain
from ...ops import Consolidation, MemoryState, consolidate, local_attention_step, resolvent_step
from ...ops.dispatch import count_run
from ...ops.memory_rotation import rotate_queries_keys
from ...ops.normalize import LENGTH_EPS, RMS_EPS
from ...ops.precision import wide_dtype
from .block import Phase2Block, Phase2Model, blocks_of
from .state import LayerState, Phase2State


class PlainStep:
    """Step of one token per sequence, which updates the state in place.

    It holds copies of the small parameters, so that training has no effect on it.

    Args:
        model: a model without an ``obstacle``.
        state: state of the sequences, with the position on the CPU; every token changes it.
    """

    def __init__(self, model: Phase2Model, state: Phase2State) -> None:
        self.model, self.state = model, state
        self.blocks = [_BlockStep(block) for block in blocks_of(model)]

    @staticmethod
    def obstacle(model: Phase2Model) -> str | None:
        """Return the reason why this step cannot take the place of a forward pass, or None."""
        config = model.config
        if config.ar_ssm_rank or config.conv_size < 2 or model.state_grows:
            return "it has a semiseparable branch or no short convolution, or attends to all tokens"
        if config.memory_rotation:
            return "its memory rotates"
        if wide_dtype(weight := cast(Tensor, model.ln_f.weight)) != weight.dtype or torch.is_autocast_enabled("cpu"):
            return "it computes in half precision"
        narrow = [layer for block in blocks_of(model) for layer in _narrow_maps(block)]
        return None if all(map(is_plain, narrow)) else "one of its narrow projections is no nn.Linear, or has a hook"

    def __call__(self, token: Tensor) -> Tensor:
        """Read a token of every sequence, int64 (B,), and return the logits of the next, (B, vocabulary)."""
        model, position = self.model, self.state.position
        embedded = model._add_positions(model._embed_tokens(token.unsqueeze(1)), position.unsqueeze(1))
        x, readout, ended = embedded.squeeze(1), None, (position + 1) % model.config.consolidation_interval == 0
        rows = ended.nonzero().squeeze(1) if ended.any() else None
        for block, state in zip(self.blocks, self.state.layers, strict=True):
            x, readout = block(x, readout, state, position, rows)
        position.add_(1)
        return model.logits(model.ln_f(x))


class _BlockStep:
    """Step of one block.

    Attributes:
        narrow: weight and bias of the maps to V - E, to Γ before its softplus, and to the narrow side of the gate.
        feedback: map of the previous block's read-out to V, transposed; None without.
        taps: taps of the convolution, that of the oldest token first, (W, C).
        scale: factors of the RMS-normalised queries and keys, (2, 1, 1) or (2, H, 1): keys of a memory get η.
    """

    def __init__(self, block: Phase2Block) -> None:
        layer = block.mixer
        assert layer.conv_weight is not None
        # Attributes of this object: a module looks its own up in Python.
        self.block, self.ln1, self.ln2, self.ffn = block, block.ln1, block.ln2, block.ffn
        self.layer, self.qkv_proj, self.out_proj = layer, layer.qkv_proj, layer.out_proj
        self.heads, self.width, self.norm_weight = layer.num_heads, layer.head_dim, layer.norm_weight
        self.taps = layer.conv_weight.flip(0)
        self.scale = self.taps.new_full((2, self.heads, 1), self.width**-0.5)
        if block.hebbian is not None:
            self.scale[1] *= block.hebbian.eta.unsqueeze(-1)
        self.rule = block.consolidation()
        self._join_narrow_maps()

    def _join_narrow_maps(self) -> None:
        """Join the narrow maps of the tokens, and compute what the resolvent needs."""
        gate, bk = self.layer.gate_down, self.block.dissipative_bk
        self.feedback, weights, biases = None, [], []
        if bk is not None:
            potential = bk.potential
            of_gamma, of_readout = potential.gamma_proj, potential.memory_to_potential
            of_v, zeros = potential.v_proj.weight, torch.zeros_like(potential.v_proj.weight)
            weights, biases = [of_v, zeros if of_gamma is None else of_gamma.weight], [-bk.energy, potential.gamma_bias]
            self.minus_kappa, self.minus_zeta, self.coupling = bk.kappa.abs().neg(), bk.zeta.neg(), bk.coupling
            if of_readout is not None:
                self.feedback = potential.memory_scale * of_readout.weight.T
        if gate is not None:
            weights, biases = [*weights, gate.weight], [*biases, gate.weight.new_zeros(gate.out_features)]
        self.narrow = (torch.cat(weights), torch.cat(biases)) if weights else None

    def __call__(
        self, x: Tensor, readout: Tensor | None, state: LayerState, position: Tensor, ended: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream (B, D) behind the block and its read-out (B, HV).

        ``readout`` is that of the block before, ``ended`` the rows whose memory is consolidated.
        """
        block, heads = self.block, self.heads
        # 1. The maps of the tokens.
        given = self.ln1(x)
        qkv = self.qkv_proj(given)
        narrow = None if self.narrow is None else F.linear(given, *self.narrow)
        # 2. BK-Core.
        gamma = None
        if narrow is not None and block.dissipative_bk is not None and block.bk_proj is not None:
            potential, gamma_logit, narrow = narrow.tensor_split((heads, 2 * heads), dim=-1)
            if self.feedback is not None and readout is not None:
                potential = torch.addmm(potential, readout, self.feedback)
            gamma = F.softplus(gamma_logit).add_(block.dissipative_bk.potential.least_decay)
            x = torch.addmm(x, self._features(potential, gamma, state), block.bk_proj.weight.T)
        # 3. Memory or attention.
        q, k, v = self._heads(qkv, state)
        if block.hebbian is None:
            readout = self._attend(q, k, v, state, position)
        else:
            assert gamma is not None
            readout = self._remember(q, k, v, gamma * block.hebbian.dt, state, ended)
        readout = (F.rms_norm(readout, (self.width,), eps=RMS_EPS) if self.layer.output_norm else readout).flatten(1)
        if self.norm_weight is not None:
            readout = readout * self.norm_weight
        gated = readout if narrow is None else self.layer.gate(readout, narrow)
        x = x + self.out_proj(gated)
        # 4. Feed-forward network.
        return x + self._feed_forward(self.ln2(x)), readout

    def _features(self, potential_BH: Tensor, gamma_BH: Tensor, state: LayerState) -> Tensor:
        """Advance the resolvent; return its features, (B, 2H)."""
        assert state.resolvent is not None
        count_run("resolvent_diagonal", "torch")
        alpha_BH = torch.complex(potential_BH, torch.addcmul(self.minus_zeta, self.minus_kappa, gamma_BH))
        state.resolvent.copy_(resolvent_step(alpha_BH, self.coupling, state.resolvent))
        return torch.view_as_real(state.resolvent).mT.flatten(1)

    def _heads(self, qkv_BC: Tensor, state: LayerState) -> tuple[Tensor, Tensor, Tensor]:
        """Convolve and normalise queries, keys and values, (B, H, K) each."""
        count_run("queries_keys_values", "torch")
        rows_BWC = torch.cat([state.conv_tail, qkv_BC.unsqueeze(1)], dim=1)
        state.conv_tail.copy_(rows_BWC[:, 1:])
        heads_B3HK = F.silu((rows_BWC * self.taps).sum(1)).unflatten(-1, (3, self.heads, -1))
        q, k = (F.rms_norm(heads_B3HK[:, :2], (self.width,), eps=LENGTH_EPS) * self.scale).unbind(1)
        return q, k, heads_B3HK[:, 2]

    def _remember(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: LayerState, ended: Tensor | None
    ) -> Tensor:
        """Write to the memory and read it: (B, H, V)."""
        assert state.memory is not None
        count_run("dissipative_memory", "torch")
        memory_BHKV, forgetting_BH = state.memory
        memory_BHKV.mul_(torch.exp(-decay)[..., None, None]).addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
        readout_BHV = (q.unsqueeze(-2) @ memory_BHKV).squeeze(-2)
        if self.rule is not None:
            forgetting_BH.add_(decay)
            if ended is not None:
                _consolidate(state.memory, self.rule, ended)
        return readout_BHV

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, state: LayerState, position: Tensor) -> Tensor:
        """Read the window, which is updated in place: (B, H, V)."""
        layer = self.block.attention
        assert layer is not None and state.window is not None
        turns = layer.turns(position.unsqueeze(1))
        q, k = (x.squeeze(1) for x in rotate_queries_keys(q.unsqueeze(1), k.unsqueeze(1), turns))
        return local_attention_step(q, k, v, layer.temperature, layer.window, state.window, position)[0]

    def _feed_forward(self, x: Tensor) -> Tensor:
        ffn = self.ffn
        if not isinstance(ffn, GatedFeedForward):
            return ffn(x)
        gate, value = ffn.in_proj(x).chunk(2, dim=-1)
        return ffn.out_proj(F.silu(gate).mul_(value))


def _consolidate(memory: MemoryState, rule: Consolidation, rows: Tensor) -> None:
    """Filter the memories of some rows in place."""
    memory.memory[rows] = consolidate(memory.memory[rows], memory.forgetting[rows], rule)
    memory.forgetting[rows] = 0.0


def _narrow_maps(block: Phase2Block) -> list[nn.Module]:
    """Return the maps of a block that are computed from their weights alone."""
    potential = None if block.dissipative_bk is None else block.dissipative_bk.potential
    found = [block.mixer.gate_down, block.bk_proj]
    if potential is not None:
        found += [potential.v_proj, potential.gamma_proj, potential.memory_to_potential]
    return [cast(nn.Module, layer) for layer in found if layer is not None]
