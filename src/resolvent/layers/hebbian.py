"""Dissipative Hebbian layer: fast weights that learn from every token and decay at the rate Γ.

Shapes: B batch, N sequence, D model width, H heads, K = V head width, F features, S packed sequences, W
convolution width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import Consolidation, MemoryState, dissipative_memory
from ..ops.memory_rotation import accumulate_phases, turns_by_order
from ..ops.packed import count_sequences
from ..ops.precision import at_least_float32, for_products
from ..ops.rotary import Scaling, rotary_turns
from .heads import Given, HeadsLayer
from .linear import is_plain


class HebbianOutput(NamedTuple):
    """Output and state of the layer.

    Attributes:
        gated: gated read-out, which ``out_proj`` takes to the residual stream, with the features behind it,
            (B, N, HV + F).
        readout: read-out of the memory, normalised and not gated, (B, N, HV).
        values: values written to the memory, (B, N, H, V).
        state: memory after the last token.
        conv_tail: conv state: the last inputs of the convolution, (B, W - 1, 3HK) or (S, W - 1, 3HK).
        phases: phases behind the last token, in turns, float64 (B, K / 2) or (S, K / 2); None without rotation.
    """

    gated: Tensor
    readout: Tensor
    values: Tensor
    state: MemoryState
    conv_tail: Tensor
    phases: Tensor | None


class DissipativeHebbianLayer(HeadsLayer):
    """Memory per head: tokens write ``S_t = exp(-Γ_t dt) S_{t-1} + η k_t v_tᵀ`` and read ``y_t = S_tᵀ q_t``.

    A short causal convolution mixes neighbouring tokens before q, k and v. Queries and keys are L2-normalised; η is one
    positive number per head. The read-out of each head is RMS-normalised and multiplied by a gate of low rank. With
    ``rotation``, every token rotates the pairs of channels of q and k of all heads by
    ``turns_by_order(rotation_proj(x), rotation_orders) dt`` turns; with ``rotary``, the map has a bias that starts at
    rotary positions.

    Args:
        d_model: width D.
        num_heads: heads H.
        head_dim: width of keys and values.
        eta: initial learning rate η.
        dt: time per token.
        conv_size: tokens W that the convolution spans; 1 for none.
        output_norm: RMS-normalise the read-out of each head.
        output_gate: gate the read-out with ``sigmoid`` of a projection of rank ``head_dim``.
        backend: ``auto``, ``torch`` or ``triton``.
        rotation: rotate queries and keys; ``head_dim`` is even.
        num_kv_heads: heads of keys and values, of which H is a multiple; None for H. Heads that share them have
            memories of their own.
        qkv_bias: add biases to q, k and v.
        norm_weight: RMS-normalise the read-out, whatever ``output_norm``, and multiply it by trained weights.
        rotary: base and scaling of the rotary positions at which a trained bias of the angles starts; None for no bias.
        rotation_orders: orders n of equal groups of pairs, whose turns rest at multiples of 1 / n; their number divides
            ``head_dim / 2``.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        eta: float = 0.1,
        dt: float = 1.0,
        conv_size: int = 4,
        output_norm: bool = True,
        output_gate: bool = True,
        backend: str = "auto",
        rotation: bool = False,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        norm_weight: bool = False,
        rotary: tuple[float, Scaling | None] | None = None,
        rotation_orders: tuple[int, ...] = (2,),
    ):
        super().__init__(
            d_model,
            num_heads,
            head_dim,
            conv_size,
            output_norm,
            output_gate,
            backend,
            num_kv_heads=num_kv_heads,
            qk_norm=True,
            qkv_bias=qkv_bias,
            norm_weight=norm_weight,
        )
        self.initial_eta, self.dt, self.rotary, self.rotation_orders = eta, dt, rotary, rotation_orders
        self.rotation_proj = nn.Linear(d_model, head_dim // 2, bias=rotary is not None) if rotation else None
        self.log_eta = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters with a fixed start: η, the bias of the angles, and what passes the token through."""
        super().reset_parameters()
        self.log_eta.fill_(self.initial_eta).log_()
        if self.rotation_proj is not None and self.rotary is not None:
            turns = rotary_turns(torch.ones((), dtype=torch.int64), self.head_dim, *self.rotary)
            self.rotation_proj.bias.copy_(turns / self.dt + 0.25)  # the inverse of plateau_turns

    @property
    def eta(self) -> Tensor:
        """Learning rate of every head, (H,) float32 or wider."""
        return at_least_float32(self.log_eta).exp()

    def phases(self, x: Tensor, start: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Return the phases behind every token x (B, N, D) and behind the last ones; None without rotation."""
        if self.rotation_proj is None:
            return None
        if start is None:
            sequences = count_sequences(x.shape[0], cu_seqlens)
            start = torch.zeros(sequences, self.head_dim // 2, dtype=torch.float64, device=x.device)
        if is_plain(self.rotation_proj):  # in float32: the error of an angle stays for good
            with torch.autocast(x.device.type, enabled=False):
                weight, bias = self.rotation_proj.weight, self.rotation_proj.bias
                bias = None if self.rotary is None else at_least_float32(bias)
                projected = F.linear(at_least_float32(x), at_least_float32(weight), bias)
        else:
            projected = at_least_float32(self.rotation_proj(x))
        return accumulate_phases(turns_by_order(projected, self.rotation_orders) * self.dt, start, cu_seqlens)

    @property
    def state_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one sequence's memory (H, K, V) and convolution tail (W - 1, 3HK)."""
        return (self.num_heads, self.head_dim, self.head_dim), self.conv_shape

    def forward(
        self,
        x: Tensor,
        gamma: Tensor,
        state: MemoryState | None = None,
        conv_tail: Tensor | None = None,
        position: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        consolidation: Consolidation | None = None,
        phases: Tensor | None = None,
        given: Given | None = None,
        features: Tensor | None = None,
    ) -> HebbianOutput:
        """Write tokens to the memory and read it.

        Args:
            x: tokens, (B, N, D).
            gamma: Γ, float32 (B, N, H).
            state: memory before the first token, one row per sequence.
            conv_tail: conv state before the first token, (B, W - 1, 3HK) or (S, W - 1, 3HK) float32.
            position: tokens that each sequence has read before, (B,) or (S,).
            cu_seqlens: offsets of S packed sequences.
            consolidation: filters that act on the memory at its boundaries.
            phases: phases before the first token, in turns, float64 (B, K / 2) or (S, K / 2); zeros if None.
            given: inputs that were computed from x before; None to compute them.
            features: put behind the gated read-out, (B, N, F); None for none.
        """
        x = for_products(x)
        heads, narrow, _ = self.given(x, conv_tail, cu_seqlens)[0] if given is None else given
        if (repeats := self.num_heads // self.num_kv_heads) > 1:  # every head has a memory of its own
            k, v = (part.repeat_interleave(repeats, dim=-2) for part in (heads.k, heads.v))
            heads = heads._replace(k=k, v=v)
        turned, after = self.phases(x, phases, cu_seqlens) or (None, None)
        readout, state = dissipative_memory(
            heads.q,
            heads.k,
            heads.v,
            gamma * self.dt,
            self.eta,
            initial_state=state,
            position=position,
            cu_seqlens=cu_seqlens,
            consolidation=consolidation,
            phases=turned,
            backend=self.backend,
        )
        readout, gated = self.gated(readout, narrow, features)
        return HebbianOutput(gated, readout, heads.v, state, heads.conv_tail, after)


class LyapunovStabilityMonitor:
    """Energy ``E = ||S||²`` of a memory, its rate of change, and its bound.

    With Γ_min the least rate of a stretch, ``η max|v|`` its largest write, s the strength of an SNR filter with boosts
    >= 1 (0 without one), and

        ``W = η max|v| / (1 - exp(-Γ_min dt))``,      ``A = 1 / (1 - s (1 - 1 / eta_boost))``,

    ``||S_t|| <= A max(||S_0||, W) <= A (||S_0|| + W)`` for all t. Proof, with ``c = 1 - 1 / A`` in [0, 1):

    1. A write adds at most ``η |k| |v| = η |v|`` to ``||S||``, and a token keeps ``exp(-Γ dt)`` of it. After n tokens
       that forgot g in all, a memory of norm x has at most ``exp(-g) x + (1 - exp(-g)) W``: the sum of the decayed
       writes is at most ``W (1 - exp(-n Γ_min dt))``, and ``g >= n Γ_min dt``.
    2. At a boundary the SNR filter divides every component by ``1 + m u``, with ``u = 1 - exp(-Γ̄)`` in [0, 1) and
       ``m >= -c``, and so multiplies ``||S||`` by at most ``1 / (1 - c u)``, which is at most A.
    3. Let ``M = max(||S_0||, W)``. Up to the first boundary ``||S|| <= M`` by 1, and behind it ``||S|| <= A M`` by 2.
    4. Behind any boundary ``||S|| <= A M``, then. In front of the next one ``||S|| <= (1 - u) A M + u M`` by 1, and
       since ``(1 - u) A + u = A (1 - c u)``, behind it ``||S|| <= A M`` again by 2, and before it by 1.
    5. The resonance multiplies the modes of the memory by σ <= 1 in an orthonormal basis: ``||S||`` does not grow.
    """

    @staticmethod
    def bound(initial: Tensor, largest_write: Tensor, least_decay: Tensor, amplification: Tensor) -> Tensor:
        """Return the bound on E: ``||S_0||``, ``η max|v|``, ``min Γ dt`` (B, H) and A (H,) or () -> (B, H)."""
        return (amplification * (initial + largest_write / -torch.expm1(-least_decay))).square()

    @staticmethod
    def metrics(
        before: MemoryState,
        after: MemoryState,
        largest_write: Tensor,
        least_decay: Tensor,
        elapsed: Tensor,
        amplification: Tensor,
    ) -> dict[str, Tensor]:
        """Return the stability metrics of a stretch of tokens.

        Args:
            before: memory before it.
            after: memory after it.
            largest_write: ``η max|v|`` of its tokens, (B, H).
            least_decay: ``min Γ dt`` of its tokens, (B, H).
            elapsed: its duration ``N dt``, (B,).
            amplification: A of the SNR filter, (H,) or (), 1 without one.

        Returns:
            ``energy``, ``energy_rate`` (mean dE/dt over the stretch) and ``energy_bound``, each (B, H).
        """
        energy_before, memory_energy = (s.memory.square().sum(dim=(-2, -1)) for s in (before, after))
        bound = LyapunovStabilityMonitor.bound(energy_before.sqrt(), largest_write, least_decay, amplification)
        return {
            "energy": memory_energy,
            "energy_rate": (memory_energy - energy_before) / elapsed.unsqueeze(-1),
            "energy_bound": bound,
        }
