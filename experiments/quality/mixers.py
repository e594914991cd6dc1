"""Token mixers of the peers: (B, N, D) -> (B, N, D), causal, without norm and residual around them.

Each has ``state_bytes(length)``: the bytes of its state after a sequence of a length, in float32.

Shapes: B batch, N sequence, D model width, H heads, K key width, V value width.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.quality.cores import gated_delta_rule, gated_linear_attention
from resolvent.benchmark.peers import rotate, rotations
from resolvent.ops import dissipative_memory
from resolvent.ops.memory_rotation import angles_of
from resolvent.ops.normalize import unit_length, unit_rms
from resolvent.ops.precision import at_least_float32
from resolvent.ops.prefix_sum import prefix_sum
from resolvent.ops.short_conv import causal_conv

FLOAT_BYTES = 4


class Mixer(nn.Module):
    """Token mixer. ``out_proj`` projects to the residual stream."""

    out_proj: nn.Linear

    def reset(self, generator: torch.Generator) -> None:
        """Initialise parameters other than matrices of linear maps, with random numbers of the CPU."""

    def state_bytes(self, length: int) -> int:
        raise NotImplementedError


class Attention(Mixer):
    """Softmax attention with rotary positions.

    Args:
        width: D.
        heads: H; D / H is even.
    """

    stacked: ClassVar[dict[str, int]] = {"qkv_proj": 3}

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        rotation = rotations(0, x.shape[1], q.shape[-1], x.device)
        q, k = (rotate(at_least_float32(y), rotation).to(v.dtype) for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(-2))

    def state_bytes(self, length: int) -> int:
        return FLOAT_BYTES * length * 2 * self.out_proj.in_features


class GLA(Mixer):
    """Gated linear attention (Yang et al., 2024): keys of half the width, a decay per channel, a gated read-out.

    Args:
        width: D.
        heads: H; K = D / 2H and V = D / H.
    """

    GATE_RANK, GATE_NORMALIZER = 16, 16
    FASTEST_DECAY = -2.4
    """Largest log decay of a token such that the factors of a chunk stay within the range of float32."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = (nn.Linear(width, width // 2, bias=False) for _ in range(2))
        self.v_proj, self.gate_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.decay_down = nn.Linear(width, self.GATE_RANK, bias=False)
        self.decay_up = nn.Linear(self.GATE_RANK, width // 2)
        self.norm_weight = nn.Parameter(torch.ones(width // heads))
        self.out_proj = nn.Linear(width, width, bias=False)

    def reset(self, generator: torch.Generator) -> None:
        self.norm_weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, decay = (
            y.unflatten(-1, (self.heads, -1))
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x), self.decay_up(self.decay_down(x)))
        )
        log_decay = (F.logsigmoid(at_least_float32(decay)) / self.GATE_NORMALIZER).clamp(min=self.FASTEST_DECAY)
        y = gated_linear_attention(q * q.shape[-1] ** -0.5, k, v, log_decay)
        y = (unit_rms(y) * self.norm_weight).flatten(-2)
        return self.out_proj(y * F.silu(self.gate_proj(x)))

    def state_bytes(self, length: int) -> int:
        width = self.out_proj.in_features
        return FLOAT_BYTES * width * width // 2 // self.heads


class Mamba2(Mixer):
    """Mamba-2 (Dao & Gu, 2024): a scalar decay per head, inputs and outputs shared by all heads, a gated norm.

    Its core is our memory operator without consolidation, with a learning rate of one.

    Args:
        width: D; the inner width is 2 D.
        head_dim: V.
        state: K.
    """

    CONV = 4

    def __init__(self, width: int, head_dim: int = 64, state: int = 64) -> None:
        super().__init__()
        inner = 2 * width
        self.heads, self.head_dim, self.state = inner // head_dim, head_dim, state
        self.in_proj = nn.Linear(width, 2 * inner + 2 * state + self.heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.CONV, inner + 2 * state))
        self.dt_bias, self.log_a, self.skip = (nn.Parameter(torch.empty(self.heads)) for _ in range(3))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def reset(self, generator: torch.Generator) -> None:
        reset_conv(self.conv_weight)
        reset_rates(self.dt_bias, self.log_a, generator)
        self.skip.fill_(1.0)
        self.norm_weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.heads * self.head_dim
        gate, mixed, dt = self.in_proj(x).split([inner, inner + 2 * self.state, self.heads], dim=-1)
        values, keys, queries = F.silu(short_conv(mixed, self.conv_weight)).split([inner, *[self.state] * 2], dim=-1)
        values = values.unflatten(-1, (self.heads, -1))
        dt = F.softplus(at_least_float32(dt) + self.dt_bias)
        q, k = (y.unsqueeze(-2).expand(-1, -1, self.heads, -1) for y in (queries, keys))
        written = (values * dt.unsqueeze(-1)).to(values.dtype)
        y, _ = dissipative_memory(q, k, written, dt * self.log_a.exp(), torch.ones_like(self.skip))
        y = (y + self.skip.unsqueeze(-1) * values).flatten(-2)
        return self.out_proj(unit_rms(y * F.silu(gate)) * self.norm_weight)

    def state_bytes(self, length: int) -> int:
        tail = (self.CONV - 1) * self.conv_weight.shape[1]
        return FLOAT_BYTES * (self.heads * self.head_dim * self.state + tail)


class Mamba3(Mixer):
    """The form of Mamba-3 (2026): no convolution, keys and queries with norm and bias, rotation by data, trapezoid.

    The state turns by the angle ``π tanh(a_t) Δ_t`` and decays by ``exp(-Δ_t A_t)``. A token writes ``k_t v_tᵀ`` twice:
    times ``λ_t Δ_t`` at once, and times ``(1 - λ) Δ`` of the next token with the decay and the turn of that. Half of
    the channels of keys and queries turn. The gated read-out is normalised, as in Mamba-2.

    Args:
        width: D; the inner width is 2 D.
        head_dim: V.
        state: K, a multiple of 4.
    """

    LEAST_RATE = 1e-4

    def __init__(self, width: int, head_dim: int = 64, state: int = 64) -> None:
        super().__init__()
        inner = 2 * width
        self.heads, self.head_dim, self.state = inner // head_dim, head_dim, state
        self.parts = [inner, inner, state, state, *[self.heads] * 3, state // 4]
        self.in_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.dt_bias, self.skip = (nn.Parameter(torch.empty(self.heads)) for _ in range(2))
        self.key_weight, self.query_weight = (nn.Parameter(torch.empty(state)) for _ in range(2))
        self.key_bias, self.query_bias = (nn.Parameter(torch.empty(self.heads * state)) for _ in range(2))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def reset(self, generator: torch.Generator) -> None:
        reset_rates(self.dt_bias, torch.empty_like(self.dt_bias), generator)
        vectors = (self.skip, self.key_weight, self.query_weight, self.key_bias, self.query_bias, self.norm_weight)
        for parameter in vectors:
            parameter.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        gate, v, k, q, dt, rate, mix, angle = self.in_proj(x).split(self.parts, dim=-1)
        v = v.unflatten(-1, (self.heads, -1))
        dt = F.softplus(at_least_float32(dt) + self.dt_bias)
        decay = dt * F.softplus(at_least_float32(rate)).clamp(min=self.LEAST_RATE)
        now = dt * torch.sigmoid(at_least_float32(mix))
        turns = 0.5 * torch.tanh(at_least_float32(angle)).unsqueeze(-2) * dt.unsqueeze(-1)
        phases = prefix_sum(turns.double(), dim=1)
        k = self._turned(unit_rms(k) * self.key_weight, self.key_bias, phases)
        q = self._turned(unit_rms(q) * self.query_weight, self.query_bias, phases)
        ones = torch.ones_like(self.skip)
        y, _ = dissipative_memory(q, k, (v * now.unsqueeze(-1)).to(v.dtype), decay, ones)
        late = ((dt - now) * torch.exp(-decay)).unsqueeze(-1) * one_later(v)
        y_late, _ = dissipative_memory(q, one_later(k), late.to(v.dtype), decay, ones)
        y = (y + y_late + self.skip.unsqueeze(-1) * v).flatten(-2)
        return self.out_proj(unit_rms(y * F.silu(gate)) * self.norm_weight)

    def _turned(self, x: Tensor, bias: Tensor, phases: Tensor) -> Tensor:
        """Add the bias of each head to keys (B, N, K), and turn half of the channels by phases (B, N, H, K / 4)."""
        heads = (x.unsqueeze(-2) + bias.view(self.heads, -1)).to(x.dtype)
        turning, still = heads.chunk(2, dim=-1)
        angles = angles_of(phases, at_least_float32(heads).dtype)
        cos, sin = angles.cos(), angles.sin()
        a, b = turning.chunk(2, dim=-1)
        return torch.cat([(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype), still], dim=-1)

    def state_bytes(self, length: int) -> int:
        """Bytes of memory, phases (eight each), and the key and value of the last token."""
        memory = self.heads * self.head_dim * self.state
        last = self.heads * (self.state + self.head_dim)
        return FLOAT_BYTES * (memory + last + 2 * self.heads * self.state // 4)


def one_later(x: Tensor) -> Tensor:
    """Shift tokens (B, N, H, X) by one; the first is zero."""
    return F.pad(x[:, :-1], (0, 0, 0, 0, 1, 0))


class GatedDeltaNet(Mixer):
    """Gated DeltaNet (Yang et al., 2025): short convolutions, the gated delta rule, a gated norm of the read-out.

    Args:
        width: D.
        heads: H; K = D / H.
        expand: V / K.
    """

    CONV = 4

    def __init__(self, width: int, heads: int, expand: int = 1) -> None:
        super().__init__()
        self.heads, value_width = heads, expand * width
        self.q_proj, self.k_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.v_proj, self.gate_proj = (nn.Linear(width, value_width, bias=False) for _ in range(2))
        self.beta_proj, self.decay_proj = (nn.Linear(width, heads, bias=False) for _ in range(2))
        self.conv_weight = nn.Parameter(torch.empty(self.CONV, 2 * width + value_width))
        self.dt_bias, self.log_a = (nn.Parameter(torch.empty(heads)) for _ in range(2))
        self.norm_weight = nn.Parameter(torch.ones(value_width // heads))
        self.out_proj = nn.Linear(value_width, width, bias=False)

    def reset(self, generator: torch.Generator) -> None:
        reset_conv(self.conv_weight)
        reset_rates(self.dt_bias, self.log_a, generator)
        self.norm_weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        width = self.q_proj.out_features
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        qkv = F.silu(short_conv(qkv, self.conv_weight)).split([width, width, self.v_proj.out_features], dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in qkv)
        log_decay = -self.log_a.exp() * F.softplus(at_least_float32(self.decay_proj(x)) + self.dt_bias)
        beta = torch.sigmoid(at_least_float32(self.beta_proj(x)))
        y = gated_delta_rule(unit_length(q) * q.shape[-1] ** -0.5, unit_length(k), v, log_decay, beta)
        y = (unit_rms(y) * self.norm_weight).flatten(-2)
        return self.out_proj(y * F.silu(self.gate_proj(x)))

    def state_bytes(self, length: int) -> int:
        memory = self.q_proj.out_features // self.heads * self.out_proj.in_features
        return FLOAT_BYTES * (memory + (self.CONV - 1) * self.conv_weight.shape[1])


def short_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Compute a causal depthwise convolution of x (B, N, D) with weight (W, D), from a fresh start."""
    tail = x.new_zeros(x.shape[0], len(weight) - 1, x.shape[-1])
    return causal_conv(x, weight.to(x.dtype), tail)


def reset_conv(weight: Tensor) -> None:
    """Let a convolution (W, D) pass the token through, as in Phase 2, so that all entries start alike."""
    weight.zero_()[0] = 1.0


def reset_rates(dt_bias: Tensor, log_a: Tensor, generator: torch.Generator) -> None:
    """Initialise as Mamba-2: steps log-uniform in 0.001..0.1 behind the softplus, rates uniform in 1..16."""
    dt = torch.exp(torch.rand(dt_bias.shape, generator=generator) * math.log(100) + math.log(1e-3))
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    log_a.copy_((1 + 15 * torch.rand(log_a.shape, generator=generator)).log())
