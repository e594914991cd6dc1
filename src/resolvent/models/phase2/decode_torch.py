"""Decoding of one token at a time on the CPU, in a third of the operations of a forward pass.

On a CPU a forward pass of one token takes about as long to launch its operations from Python as to compute them. Here
the narrow projections of a block are one product, constants are computed once, and the state is updated in place. What
a token computes is one function of tensors, which ``torch.compile`` takes as a whole (``models.compilation``).

Everything but the weights of the wide products and the windows is float32, or wider in a wider model.

Shapes: B sequences, D model width, H heads, K = V head width, W convolution width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers import GatedFeedForward
from ...layers.linear import is_plain
from ...ops import Consolidation, MemoryState, consolidate, local_attention_step, resolvent_step_of_parts
from ...ops.dispatch import count_run
from ...ops.memory_rotation import Rotation, rotate
from ...ops.normalize import LENGTH_EPS, RMS_EPS
from ...ops.precision import at_least_float32
from .block import Phase2Block, Phase2Model, blocks_of
from .state import LayerState, Phase2State

Program = Callable[[Tensor, Tensor, tuple[LayerState, ...]], Tensor]
"""Computation of a token: tokens int64 (B,), positions int64 (B,), and states, which it updates -> logits (B, V).

The resolvent of a state is a pair of real numbers, (B, H, 2).
"""


class PlainStep:
    """Step of one token per sequence, which updates the state in place.

    Args:
        program: the computation.
        state: state of the sequences, with the position on the CPU; every token changes it.
    """

    def __init__(self, program: StepProgram, state: Phase2State) -> None:
        self.program, self.state = program, state
        self.layers = tuple(
            x if x.resolvent is None else x._replace(resolvent=torch.view_as_real(x.resolvent)) for x in state.layers
        )

    def __call__(self, token: Tensor) -> Tensor:
        """Read a token of every sequence, int64 (B,), and return the logits of the next, (B, vocabulary)."""
        position, program = self.state.position, self.program
        logits = program.run(token, position, self.layers)
        position.add_(1)
        if (ended := position % program.interval == 0).any():
            program.consolidate(self.layers, ended.nonzero().squeeze(1))
        return logits


class StepProgram:
    """Computation of a step of a model.

    It holds copies of the small parameters, so that training has no effect on it.

    Args:
        model: a model in evaluation mode, without an ``obstacle``.

    Attributes:
        run: ``compute``, or compiled code of it.
        interval: tokens between two consolidations.
    """

    def __init__(self, model: Phase2Model) -> None:
        self.model, self.interval = model, model.config.consolidation_interval
        self.blocks = [_BlockStep(block) for block in blocks_of(model)]
        self.dtype = self.blocks[0].dtype
        self.norm = _norm(model.ln_f)
        self.run: Program = self.compute

    @staticmethod
    def obstacle(model: Phase2Model) -> str | None:
        """Return the reason why this step cannot take the place of a forward pass, or None."""
        config = model.config
        if config.ar_ssm_rank or config.conv_size < 2 or model.state_grows:
            return "it has a semiseparable branch or no short convolution, or attends to all tokens"
        if config.memory_rotation:
            return "its memory rotates"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        narrow = [layer for block in blocks_of(model) for layer in _narrow_maps(block)]
        return None if all(map(is_plain, narrow)) else "one of its narrow projections is no nn.Linear, or has a hook"

    def compute(self, token: Tensor, position: Tensor, layers: tuple[LayerState, ...]) -> Tensor:
        """Read a token of every sequence, but for the consolidation behind it."""
        model = self.model
        vectors = at_least_float32(model._embed_tokens(token.unsqueeze(1)))
        x, readout = model._add_positions(vectors, position.unsqueeze(1)).squeeze(1), None
        rotation = model._rotation(position.unsqueeze(1), x.dtype)
        for block, state in zip(self.blocks, layers, strict=True):
            x, readout = block(x, readout, state, position, rotation)
        return model.logits(self.norm(x).to(self.dtype))

    def consolidate(self, layers: tuple[LayerState, ...], rows: Tensor) -> None:
        """Consolidate the memories of some rows, which nothing reads before the next token."""
        for block, state in zip(self.blocks, layers, strict=True):
            if block.rule is not None and state.memory is not None:
                _consolidate(state.memory, block.rule, rows)


class _BlockStep:
    """Step of one block.

    Attributes:
        dtype: dtype of the weights of the wide products.
        narrow: weight and bias of the maps to V - E, to Γ before its softplus, and to the narrow side of the gate.
        feedback: map of the previous block's read-out to V, transposed; None without.
        taps: taps of the convolution, that of the oldest token first, (W, C).
        scale: factors of the RMS-normalised queries and keys, (2, 1, 1) or (2, H, 1): keys of a memory get η.
    """

    def __init__(self, block: Phase2Block) -> None:
        layer = block.mixer
        assert layer.conv_weight is not None
        # Attributes of this object: a module looks its own up in Python.
        self.block, self.ln1, self.ln2, self.ffn = block, _norm(block.ln1), _norm(block.ln2), block.ffn
        self.layer, self.qkv_proj, self.out_proj, self.gate_up = layer, layer.qkv_proj, layer.out_proj, layer.gate_up
        self.heads, self.width, self.dtype = layer.num_heads, layer.head_dim, layer.conv_weight.dtype
        self.norm_weight = None if layer.norm_weight is None else at_least_float32(layer.norm_weight)
        self.taps = at_least_float32(layer.conv_weight.flip(0))
        self.scale = self.taps.new_full((2, self.heads, 1), self.width**-0.5)
        if block.hebbian is not None:
            self.scale[1] *= block.hebbian.eta.unsqueeze(-1)
        self.rule = block.consolidation()
        self._join_narrow_maps()

    def _join_narrow_maps(self) -> None:
        """Join the narrow maps of the tokens, and compute what the resolvent needs."""
        gate, bk, wide = self.layer.gate_down, self.block.dissipative_bk, self.taps.dtype
        self.feedback, self.of_features, weights, biases = None, None, [], []
        if bk is not None:
            assert self.block.bk_proj is not None
            potential = bk.potential
            of_gamma, of_readout = potential.gamma_proj, potential.memory_to_potential
            of_v, zeros = potential.v_proj.weight, torch.zeros_like(potential.v_proj.weight)
            weights, biases = [of_v, zeros if of_gamma is None else of_gamma.weight], [-bk.energy, potential.gamma_bias]
            self.minus_kappa, self.minus_zeta = at_least_float32(bk.kappa).abs().neg(), bk.zeta.neg()
            self.coupling, self.of_features = bk.coupling, at_least_float32(self.block.bk_proj.weight.T)
            if of_readout is not None:
                self.feedback = potential.memory_scale * at_least_float32(of_readout.weight.T)
        if gate is not None:
            weights, biases = [*weights, gate.weight], [*biases, gate.weight.new_zeros(gate.out_features)]
        self.narrow = (torch.cat(weights).to(wide), torch.cat(biases).to(wide)) if weights else None

    def __call__(
        self, x: Tensor, readout: Tensor | None, state: LayerState, position: Tensor, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream (B, D) behind the block and its read-out (B, HV).

        ``readout`` is that of the block before, ``rotation`` that of the tokens' positions.
        """
        block, heads = self.block, self.heads
        # 1. The maps of the tokens.
        given = self.ln1(x)
        qkv = self._product(self.qkv_proj, given)
        narrow = None if self.narrow is None else F.linear(given, *self.narrow)
        # 2. BK-Core.
        gamma = None
        if narrow is not None and block.dissipative_bk is not None and self.of_features is not None:
            potential, gamma_logit, narrow = narrow.tensor_split((heads, 2 * heads), dim=-1)
            if self.feedback is not None and readout is not None:
                potential = torch.addmm(potential, readout, self.feedback)
            gamma = F.softplus(gamma_logit) + block.dissipative_bk.potential.least_decay
            x = torch.addmm(x, self._features(potential, gamma, state), self.of_features)
        # 3. Memory or attention.
        q, k, v = self._heads(qkv, state)
        if block.hebbian is None:
            assert rotation is not None
            readout = self._attend(q, k, v, state, position, rotation)
        else:
            assert gamma is not None
            readout = self._remember(q, k, v, gamma * block.hebbian.dt, state)
        readout = (F.rms_norm(readout, (self.width,), eps=RMS_EPS) if self.layer.output_norm else readout).flatten(1)
        if self.norm_weight is not None:
            readout = readout * self.norm_weight
        gated = readout
        if narrow is not None and self.gate_up is not None:
            gated = readout * torch.sigmoid(self._product(self.gate_up, narrow))
        x = x + self._product(self.out_proj, gated)
        # 4. Feed-forward network.
        return x + self._feed_forward(self.ln2(x)), readout

    def _product(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the product of a map, which multiplies in the dtype of its weights."""
        return layer(x.to(self.dtype)).to(x.dtype)

    def _features(self, potential_BH: Tensor, gamma_BH: Tensor, state: LayerState) -> Tensor:
        """Advance the resolvent; return its features, (B, 2H)."""
        assert state.resolvent is not None
        count_run("resolvent_diagonal", "torch")
        damping_BH = torch.addcmul(self.minus_zeta, self.minus_kappa, gamma_BH)
        g_BH2 = resolvent_step_of_parts(potential_BH, damping_BH, self.coupling, state.resolvent)
        state.resolvent.copy_(g_BH2)
        return g_BH2.mT.flatten(1)

    def _heads(self, qkv_BC: Tensor, state: LayerState) -> tuple[Tensor, Tensor, Tensor]:
        """Convolve and normalise queries, keys and values, (B, H, K) each."""
        count_run("queries_keys_values", "torch")
        rows_BWC = torch.cat([state.conv_tail, qkv_BC.unsqueeze(1)], dim=1)
        state.conv_tail.copy_(rows_BWC[:, 1:])
        heads_B3HK = F.silu((rows_BWC * self.taps).sum(1)).unflatten(-1, (3, self.heads, -1))
        q, k = (F.rms_norm(heads_B3HK[:, :2], (self.width,), eps=LENGTH_EPS) * self.scale).unbind(1)
        return q, k, heads_B3HK[:, 2]

    def _remember(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: LayerState) -> Tensor:
        """Write to the memory and read it: (B, H, V)."""
        assert state.memory is not None
        count_run("dissipative_memory", "torch")
        memory_BHKV, forgetting_BH = state.memory
        memory_BHKV.mul_(torch.exp(-decay)[..., None, None]).addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
        if self.rule is not None:
            forgetting_BH.add_(decay)
        return (q.unsqueeze(-2) @ memory_BHKV).squeeze(-2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: LayerState, position: Tensor, rotation: Rotation
    ) -> Tensor:
        """Read the window, which is updated in place: (B, H, V)."""
        layer = self.block.attention
        assert layer is not None and state.window is not None
        q, k = (rotate(x.unsqueeze(1), rotation).squeeze(1).to(self.dtype) for x in (q, k))
        heads, of_window = (q, k, v.to(self.dtype)), (layer.window, state.window, position)
        return local_attention_step(*heads, layer.temperature, *of_window)[0].to(v.dtype)

    def _feed_forward(self, x: Tensor) -> Tensor:
        ffn = self.ffn
        if not isinstance(ffn, GatedFeedForward):
            return self._product(ffn, x)
        gate, value = self._product(ffn.in_proj, x).chunk(2, dim=-1)
        return self._product(ffn.out_proj, F.silu(gate) * value)


def _norm(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a norm of the residual stream, whose parameters are at least float32."""
    assert isinstance(layer, nn.LayerNorm | nn.RMSNorm) and isinstance(layer.weight, Tensor)
    weight = at_least_float32(layer.weight)
    if isinstance(layer, nn.RMSNorm):
        return partial(F.rms_norm, normalized_shape=layer.normalized_shape, weight=weight, eps=layer.eps)
    bias = None if layer.bias is None else at_least_float32(layer.bias)
    return partial(F.layer_norm, normalized_shape=layer.normalized_shape, weight=weight, bias=bias, eps=layer.eps)


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
