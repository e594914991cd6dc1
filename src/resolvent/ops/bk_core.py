r"""BK-Core: the diagonal of the resolvent of a tridiagonal, non-Hermitian Hamiltonian, in linear time.

Per head, the tokens are the sites of a chain. With ``alpha_i = h0_diag + V_i - i kappa Gamma_i - z`` and the coupling
``m = h0_super * h0_sub >= 0`` between neighbours,

* the **causal** form ``g_i = 1 / (alpha_i - m g_{i-1})`` is the last diagonal entry of ``(H - z)^-1`` restricted to the
  sites 0..i: it sees no later token, and one complex number is its whole state;
* the **two-sided** form ``G_ii = 1 / (alpha_i - m g+_{i-1} - m g-_{i+1})`` is the diagonal of ``(H - z)^-1`` itself.

``m >= 0`` and ``Im alpha_i <= -zeta < 0`` bound both: ``|g_i| <= 1 / |Im alpha_i|``. Nothing is clamped or repaired.

A step is the Möbius map of ``[[0, 1], [-m, alpha_i]]``. Maps compose by 2x2 products, which matter only up to a factor
and are renormalised at every product, so that a scan of logarithmic depth replaces the loop over tokens. The adjoint of
that nonlinear recurrence is a *linear* one, run backwards:
``lambda_i = gbar_i + conj(m g_{i+1}^2) lambda_{i+1}``, ``alphabar_i = -conj(g_i^2) lambda_i``,
``mbar = sum_i conj(g_i^2 g_{i-1}) lambda_i``.

Shapes: B batch, N sequence, H heads, S packed sequences. Complex dtypes throughout: complex64 at run time.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .dispatch import count_run, select
from .packed import check_shape, count_sequences

Form = Literal["causal", "two_sided"]


def effective_diagonal(
    potential: Tensor, gamma: Tensor, kappa: Tensor, energy: Tensor, zeta: Tensor, h0_diag: float = 0.0
) -> Tensor:
    """``alpha = h0_diag + V - i kappa Gamma - (E + i zeta)``: the diagonal of ``H - z``.

    Args:
        potential: V, real, (B, N, H).
        gamma: Γ >= 0, rate per unit time, (B, N, H).
        kappa: strength >= 0 with which Γ enters the Hamiltonian, (H,).
        energy: E, real part of the spectral point, (H,).
        zeta: ζ > 0, imaginary part of the spectral point, (H,).
        h0_diag: constant diagonal of the free chain.

    Returns:
        complex (B, N, H).
    """
    # Not torch.complex, of which torch.compile makes a kernel of its own.
    return torch.view_as_complex(torch.stack((h0_diag + potential - energy, -(kappa * gamma + zeta)), dim=-1))


def resolvent_diagonal(
    alpha: Tensor,
    coupling: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: Form = "causal",
    backend: str = "auto",
    block_size: int = 256,
) -> tuple[Tensor, Tensor | None]:
    """Diagonal of the resolvent of every chain of a batch.

    Args:
        alpha: diagonal of ``H - z``, complex (B, N, H), imaginary part < 0.
        coupling: ``m >= 0``, real (H,).
        initial_state: ``g_{-1}``, complex (B, H), or (S, H) for packed sequences; zero if not given. Causal form only.
        cu_seqlens: offsets of S packed sequences, integer (S + 1,), from 0 to N; needs B = 1.
        form: ``causal`` or ``two_sided``.
        backend: ``auto``, ``torch`` or ``triton``.
        block_size: sites that one program of a kernel holds; it changes speed, never the result.

    Returns:
        The diagonal, complex (B, N, H), and the state after the last site, complex (B, H) or (S, H); the two-sided
        form has no state and returns None. Both are differentiable in ``alpha``, ``coupling`` and ``initial_state``.

    Raises:
        ValueError: shapes do not fit, or a state is given to the two-sided form.
    """
    if form not in ("causal", "two_sided"):
        raise ValueError(f"form must be 'causal' or 'two_sided', got {form!r}")
    if form == "causal":
        g, state = _causal(alpha, coupling, initial_state, cu_seqlens, backend, block_size)
        return torch.view_as_complex(g), torch.view_as_complex(state)
    if initial_state is not None:
        raise ValueError("the two-sided form sees the whole chain at once and takes no initial_state")
    # 1. Causal runs over the chain, and over the chain turned around.
    g_left, _ = _causal(alpha, coupling, None, cu_seqlens, backend, block_size)
    mirrored = None if cu_seqlens is None else alpha.shape[1] - cu_seqlens.flip(0)
    g_right, _ = _causal(alpha.flip(1), coupling, None, mirrored, backend, block_size)
    # 2. Every site between its two sides.
    sides = torch.view_as_complex(g_left), torch.view_as_complex(g_right)
    return _join_sides(alpha, *sides, coupling, cu_seqlens), None


def resolvent_features(
    alpha: Tensor,
    coupling: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    block_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """``[Re g, Im g]`` of all heads of the causal form, real (B, N, 2H), and the state: see ``resolvent_diagonal``.

    The diagonal stays real all the way: a backward pass that ``torch.compile`` made does not know that a complex
    number and its two parts share their memory, and may overwrite the one before it reads the other.
    """
    g, state = _causal(alpha, coupling, initial_state, cu_seqlens, backend, block_size)
    return g.transpose(-1, -2).flatten(-2), torch.view_as_complex(state)


def _causal(
    alpha: Tensor,
    coupling: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Run the causal form; complex numbers come back as pairs of real ones, (B, N, H, 2) and (S, H, 2)."""
    if alpha.dim() != 3 or coupling.shape != alpha.shape[2:]:
        raise ValueError(
            f"expected alpha (B, N, H) and coupling (H,), got {tuple(alpha.shape)}, {tuple(coupling.shape)}"
        )
    sequences = count_sequences(alpha.shape[0], cu_seqlens)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (sequences, alpha.shape[2]))
    pairs = torch.view_as_real(alpha.resolve_conj())
    state = None if initial_state is None else torch.view_as_real(initial_state.resolve_conj())
    single = alpha.dtype == torch.complex64
    obstacle = None if single else f"its kernel computes in complex64, the tensors are {alpha.dtype}"
    if select(backend, alpha.device, "resolvent_diagonal", obstacle) == "torch":
        return _causal_torch(pairs, coupling, state, cu_seqlens)
    from .triton.bk_core import causal_diagonal

    state = None if state is None else state.to(pairs.dtype)
    return causal_diagonal(pairs, coupling.to(pairs.dtype), state, cu_seqlens, block_size)


def resolvent_step(alpha: Tensor, coupling: Tensor, state: Tensor) -> Tensor:
    """One site of the causal form: ``alpha`` (B, H), ``coupling`` (H,), ``state`` (B, H) -> the next g (B, H)."""
    return 1 / (alpha - coupling * state)


def resolvent_diagonal_reference(alpha: Tensor, coupling: Tensor, form: Form = "causal") -> Tensor:
    """The definition, by dense inverses in complex128: alpha (B, N, H), coupling (H,) -> (B, N, H). O(N^4)."""
    alpha_BHN = alpha.to(torch.complex128).transpose(1, 2)
    hopping_H = coupling.to(torch.float64).sqrt()
    dense = torch.diag_embed(alpha_BHN)
    for offset in (-1, 1):
        off_diagonal = hopping_H[:, None].expand(*alpha_BHN.shape[:-1], alpha_BHN.shape[-1] - 1)
        dense = dense + torch.diag_embed(off_diagonal, offset)
    if form == "two_sided":
        diagonal = torch.linalg.inv(dense).diagonal(dim1=-2, dim2=-1)
    else:
        leading = [torch.linalg.inv(dense[..., :i, :i])[..., -1, -1] for i in range(1, dense.shape[-1] + 1)]
        diagonal = torch.stack(leading, dim=-1)
    return diagonal.transpose(1, 2)


def _causal_torch(
    alpha: Tensor, coupling: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    count_run("resolvent_diagonal", "torch")
    alpha = torch.view_as_complex(alpha)
    batch, length, heads = alpha.shape
    starts, ends = _bounds(alpha, cu_seqlens)
    links = _links(coupling, starts, length)
    if initial_state is None:
        state = alpha.new_zeros(batch * len(starts), heads)
    else:
        state = torch.view_as_complex(initial_state)
    if length == 0:
        return torch.view_as_real(alpha), torch.view_as_real(state)
    empty = (ends == starts).unsqueeze(-1)
    state = state.reshape(batch, len(starts), heads)
    if initial_state is not None:
        # A sequence that goes on is one that starts afresh with alpha_0 - m g_{-1} on its first site.
        carried = torch.where(empty, state.new_zeros(()), -coupling * state)
        alpha = alpha.index_add(1, starts.clamp(max=length - 1), carried)
    g = _Moebius.apply(alpha, links.expand_as(alpha))
    final_state = torch.where(empty, state, g[:, (ends - 1).clamp(min=0)])
    return torch.view_as_real(g), torch.view_as_real(final_state.reshape(-1, heads))


def _join_sides(alpha: Tensor, g_left: Tensor, g_right: Tensor, coupling: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return ``1 / (alpha_i - m g+_{i-1} - m g-_{i+1})`` from the causal diagonals of a chain, in both directions.

    Both, (B, N, H), enter as they are: the squares of their inverses, which a gradient would meet, overflow.
    """
    starts, ends = _bounds(alpha, cu_seqlens)
    from_left = _links(coupling, starts, alpha.shape[1]) * _shift(g_left)
    from_right = _links(coupling, alpha.shape[1] - ends, alpha.shape[1]) * _shift(g_right)
    return 1 / (alpha - from_left - from_right.flip(1))


def _bounds(alpha: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """First site of every sequence, and its last + 1, (S,), on the device of ``alpha`` (B, N, H)."""
    if cu_seqlens is None:
        starts = torch.zeros(1, dtype=torch.long, device=alpha.device)
        return starts, starts + alpha.shape[1]
    offsets = cu_seqlens.to(alpha.device, torch.long)
    return offsets[:-1], offsets[1:]


def _links(coupling: Tensor, starts: Tensor, length: int) -> Tensor:
    """(1, N, H): the coupling of each site to the one before it, zero where a sequence starts."""
    first = torch.zeros(length + 1, 1, dtype=torch.bool, device=coupling.device)
    first.index_fill_(0, starts, True)
    return torch.where(first[:length], coupling.new_zeros(()), coupling).unsqueeze(0)


def _shift(x: Tensor) -> Tensor:
    """x_{i-1} at i, zero at the start; x is (B, N, H)."""
    return torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0))


class _Moebius(torch.autograd.Function):
    """g_i = 1 / (alpha_i - links_i g_{i-1}), g_{-1} = 0; alpha complex (B, N, H), links real (B, N, H)."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, links: Tensor) -> Tensor:
        steps = (torch.zeros_like(alpha), torch.ones_like(alpha), -links.to(alpha.dtype), alpha)
        start = alpha.new_zeros(alpha.shape[0], alpha.shape[2])
        g = _scan(_renormalise(torch.stack(steps)), start, _compose_moebius, _apply_moebius)
        # One step of the recurrence from each neighbour: |dg_i/dg_{i-1}| contracts the rounding of the products.
        g = 1 / (alpha - links * _shift(g))
        ctx.save_for_backward(g, links)
        return g

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        g, links = ctx.saved_tensors
        slope = (links * g * g).conj()
        slope_from_next = torch.nn.functional.pad(slope[:, 1:], (0, 0, 0, 1))
        start = g.new_zeros(g.shape[0], g.shape[2])
        adjoint = _scan((slope_from_next.flip(1), grad.flip(1)), start, _compose_linear, _apply_linear).flip(1)
        through = (g * g).conj() * adjoint
        return -through, (through * _shift(g).conj()).real


Maps = tuple[Tensor, ...]


def _scan(
    maps: Maps, start: Tensor, compose: Callable[[Maps, Maps], Maps], apply: Callable[[Maps, Tensor], Tensor]
) -> Tensor:
    """x_i = map_i(x_{i-1}) for all i at logarithmic depth and linear work.

    Neighbouring maps are composed, the half as long chain is solved by recursion, and its values are pushed through
    the maps that were skipped.

    Args:
        maps: parameters of the maps, each (B, N, H), N >= 1.
        start: x_{-1}, (B, H).
        compose: (later, earlier) -> the parameters of their composition.
        apply: (maps, x) -> map(x).
    """
    length = maps[0].shape[1]
    if length == 1:
        return apply(maps, start.unsqueeze(1))
    even = tuple(p[:, 0::2] for p in maps)
    odd = tuple(p[:, 1::2] for p in maps)
    x_odd = _scan(compose(odd, tuple(p[:, : length // 2] for p in even)), start, compose, apply)
    x_before_even = torch.cat([start.unsqueeze(1), x_odd], dim=1)[:, : even[0].shape[1]]
    x = torch.empty_like(maps[0])
    x[:, 0::2] = apply(even, x_before_even)
    x[:, 1::2] = x_odd
    return x


def _compose_moebius(later: Maps, earlier: Maps) -> Maps:
    """Product of the 2x2 matrices (a, b; c, d) of two steps."""
    a2, b2, c2, d2 = later
    a1, b1, c1, d1 = earlier
    product = torch.stack([a2 * a1 + b2 * c1, a2 * b1 + b2 * d1, c2 * a1 + d2 * c1, c2 * b1 + d2 * d1])
    return _renormalise(product)


def _renormalise(entries: Tensor) -> Maps:
    """Divide 2x2 matrices (4, B, N, H) by their largest entry: a factor does not change the map, but it overflows."""
    return tuple(entries / torch.view_as_real(entries).abs().amax(dim=(0, -1)))


def _apply_moebius(maps: Maps, x: Tensor) -> Tensor:
    a, b, c, d = maps
    return (a * x + b) / (c * x + d)


def _compose_linear(later: Maps, earlier: Maps) -> Maps:
    return later[0] * earlier[0], later[0] * earlier[1] + later[1]


def _apply_linear(maps: Maps, x: Tensor) -> Tensor:
    return maps[0] * x + maps[1]
