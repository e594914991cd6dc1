"""Non-Hermitian potential ``V - iΓ`` of the tokens, and the BK-Core layers.

Shapes: B batch, N sequence, D model width, H heads.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import effective_diagonal, resolvent_features
from ..ops.precision import at_least_float32, for_products
from .linear import Projected, is_plain, products


class NonHermitianPotential(nn.Module):
    """Potential V and decay rate Γ of every head.

    ``V = v_proj(x) + s memory_to_potential(r)``, ``Γ = least_decay + softplus(gamma_proj(x) + gamma_bias)``.

    Γ is a rate per unit time. Its bias sets the initial Γ of the heads at rest: that of the first and slowest is
    ``base_decay``; those of the others are spaced geometrically, ``Γ dt`` from one twentieth to one half, memories of
    twenty tokens down to two, with which text is learnt faster. Training can slow every head down to ``least_decay``.

    Args:
        d_model: width D of x.
        num_heads: heads H.
        base_decay: initial Γ of the slowest head, > 0.
        adaptive_decay: let Γ depend on the token; otherwise it is one trainable number per head.
        dt: time per token.
        memory_width: width of the memory read-out r that feeds back into V; 0 for no feedback.
        memory_scale: s; None for ``1 / sqrt(memory_width)``. Without it, training learns this feedback so fast that it
            overfits.
        least_decay: least Γ, in (0, base_decay); None for the smaller of 1e-4 and a tenth of ``base_decay``.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        base_decay: float = 0.01,
        adaptive_decay: bool = True,
        dt: float = 1.0,
        memory_width: int = 0,
        memory_scale: float | None = None,
        least_decay: float | None = None,
    ):
        super().__init__()
        self.num_heads, self.base_decay, self.dt = num_heads, base_decay, dt
        self.least_decay = min(1e-4, base_decay / 10) if least_decay is None else least_decay
        self.v_proj = nn.Linear(d_model, num_heads, bias=False)
        self.gamma_proj = nn.Linear(d_model, num_heads, bias=False) if adaptive_decay else None
        self.gamma_bias = nn.Parameter(torch.empty(num_heads))
        self.memory_scale = max(1, memory_width) ** -0.5 if memory_scale is None else memory_scale
        self.memory_to_potential = nn.Linear(memory_width, num_heads, bias=False) if memory_width else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters with a fixed start: the spacing of Γ, and a feedback of zero."""
        slowest = self.base_decay * self.dt
        slow, fast = max(1 / 20, slowest), max(1 / 2, 2 * slowest)
        others = slow * (fast / slow) ** torch.linspace(0, 1, max(1, self.num_heads - 1), dtype=torch.float64)
        self.set_decays(torch.cat([others.new_tensor([slowest]), others])[: self.num_heads])
        if self.memory_to_potential is not None:
            self.memory_to_potential.weight.zero_()

    @torch.no_grad()
    def set_decays(self, decays: Tensor) -> None:
        """Let every head decay by ``Γ dt`` at rest, float64 (H,), each above ``least_decay dt``."""
        gamma = decays / self.dt - self.least_decay
        self.gamma_bias.copy_(gamma + torch.log(-torch.expm1(-gamma)))  # the inverse of softplus

    @property
    def projections(self) -> tuple[nn.Linear, nn.Linear | None]:
        """The maps of the tokens: ``v_proj`` and ``gamma_proj``."""
        return self.v_proj, self.gamma_proj

    def forward(
        self, x: Tensor, readout: Tensor | None = None, projected: Projected | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map x and the previous block's read-out to V and Γ, at least float32 (B, N, H).

        Args:
            x: tokens, (B, N, D).
            readout: the previous block's read-out, (B, N, memory_width).
            projected: products of x with ``projections``, where they are known.
        """
        of_v, adaptive = products(for_products(x), self.projections) if projected is None else projected
        assert of_v is not None
        potential = at_least_float32(of_v)
        if self.memory_to_potential is not None and readout is not None:
            potential = potential + self.memory_scale * self.memory_to_potential(readout)
        gamma_logit = self.gamma_bias.expand_as(potential) if adaptive is None else self.gamma_bias + adaptive
        return potential, F.softplus(at_least_float32(gamma_logit)) + self.least_decay


class DissipativeBKLayer(nn.Module):
    """BK-Core: features ``[Re g, Im g]`` of the resolvent of every head's causal chain, ``(B, N, 2H)``.

    Per head there is one pair of hoppings (the modulus of their product, ``m >= 0``, couples neighbours), one strength
    κ >= 0 with which Γ damps the Hamiltonian, and one spectral point ``z = E + iζ``, ζ > 0, all trainable. The features
    obey ``|g| <= 1 / (κ Γ + ζ)`` for all parameters.

    Args:
        potential: computes V and Γ.
        zeta: initial ζ.
        backend: ``auto``, ``torch`` or ``triton``.
        block_size: sites that one program of a kernel holds.
    """

    def __init__(
        self, potential: NonHermitianPotential, zeta: float = 0.5, backend: str = "auto", block_size: int = 256
    ):
        super().__init__()
        self.potential = potential
        self.initial_zeta, self.backend, self.block_size = zeta, backend, block_size
        heads = potential.num_heads
        self.h0_super = nn.Parameter(torch.empty(heads))
        self.h0_sub = nn.Parameter(torch.empty(heads))
        self.kappa = nn.Parameter(torch.empty(heads))
        self.energy = nn.Parameter(torch.empty(heads))
        self.log_zeta = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set unit hoppings, and energies of the heads that are spread over the band of the chain, [-2, 2]."""
        for ones in (self.h0_super, self.h0_sub, self.kappa):
            ones.fill_(1.0)
        self.energy.copy_(torch.linspace(-1, 1, len(self.energy)) if len(self.energy) > 1 else torch.zeros(1))
        self.log_zeta.fill_(math.log(self.initial_zeta))

    @property
    def zeta(self) -> Tensor:
        """ζ > 0 of every head, (H,) float32 or wider."""
        return at_least_float32(self.log_zeta).exp()

    @property
    def coupling(self) -> Tensor:
        """Modulus m >= 0 of the product of the hoppings of every head, (H,) float32 or wider."""
        return (at_least_float32(self.h0_super) * at_least_float32(self.h0_sub)).abs()

    def forward(
        self,
        x: Tensor,
        readout: Tensor | None = None,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        projected: Projected | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the features of the tokens.

        Args:
            x: (B, N, D).
            readout: the previous block's memory read-out, (B, N, memory_width).
            state: g of the last token read, complex64 (B, H) or (S, H).
            cu_seqlens: offsets of S packed sequences.
            projected: products of x with the potential's ``projections``, where they are known.

        Returns:
            features (B, N, 2H) float32, Γ (B, N, H) float32 and the next state.
        """
        potential, gamma = self.potential(x, readout, projected)
        # Outside autocast: a resolvent near its pole has no digits to spare.
        with torch.autocast(x.device.type, enabled=False):
            kappa = _modulus(at_least_float32(self.kappa))
            alpha = effective_diagonal(potential, gamma, kappa, at_least_float32(self.energy), self.zeta)
            features, new_state = resolvent_features(
                alpha,
                self.coupling,
                initial_state=state,
                cu_seqlens=cu_seqlens,
                backend=self.backend,
                block_size=self.block_size,
            )
        return features, gamma, new_state


class StaticBKLayer(nn.Module):
    """BK-Core of a fixed Hamiltonian: features ``[Re g, Im g]`` of every head's causal chain, ``(B, N, 2H)``.

    The free chain has the diagonal -2 and unit hoppings, the spectral point is ``z = i``, and nothing dissipates; only
    the potential ``V = v_proj(x)`` is trained. So ``|g| <= 1``.

    Args:
        d_model: width D of x.
        num_heads: heads H.
        backend: ``auto``, ``torch`` or ``triton``.
    """

    H0_DIAG, ENERGY, ZETA, HOPPING = -2.0, 0.0, 1.0, 1.0

    def __init__(self, d_model: int, num_heads: int, backend: str = "auto"):
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.v_proj = nn.Linear(d_model, num_heads)

    @property
    def energy(self) -> Tensor:
        """Energy of the heads, ``E - h0_diag - bias``, at least float32 (H,).

        It is minus the constant of ``alpha = h0_diag + W x + bias - E - iζ``. A converted Phase 2 model, whose chain
        has a diagonal of zero, starts from this energy.
        """
        return self.ENERGY - self.H0_DIAG - at_least_float32(self.v_proj.bias)

    def forward(
        self, x: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map x (B, N, D) to features (B, N, 2H), at least float32, and the next state.

        Further inputs are g of the last token read (complex, one row per sequence) and the offsets of packed sequences.
        """
        # The bias is part of the energy, unless another module wraps the projection.
        plain = is_plain(self.v_proj)
        potential = at_least_float32(F.linear(x, self.v_proj.weight) if plain else self.v_proj(x))
        with torch.autocast(x.device.type, enabled=False):
            constant = potential.new_ones(self.num_heads)
            no_decay = torch.zeros_like(potential)
            energy = self.energy if plain else (self.ENERGY - self.H0_DIAG) * constant
            alpha = effective_diagonal(potential, no_decay, 0 * constant, energy, self.ZETA * constant)
            features, new_state = resolvent_features(
                alpha,
                self.HOPPING**2 * constant,
                initial_state=state,
                cu_seqlens=cu_seqlens,
                backend=self.backend,
            )
        return features, new_state


def _modulus(x: Tensor) -> Tensor:
    """Return ``|x|``, with the slope 1 at zero, where that of ``abs`` is 0: training can move a strength of zero."""
    return torch.where(x < 0, -x, x)
