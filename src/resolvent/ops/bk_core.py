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
    """Return ``alpha = h0_diag + V - i kappa Gamma - (E + i zeta)``, the diagonal of ``H - z``.

    Args:
        potential: V, real, (B, N, H).
        gamma: Γ >= 0, rate per unit time, (B, N, H).
        kappa: strength >= 0 with which Γ enters the Hamiltonian, (H,).
        energy: E, real part of the spectral point, (H,).
        zeta: ζ > 0, imaginary part of the spectral point, (H,).
        h0_diag: constant diagonal of the free chain.

    Returns:
        complex (B, N, H).

    Example:
        >>> potential, gamma = torch.randn(1, 70, 2), torch.rand(1, 70, 2)  # 70 tokens, packed or not, 2 heads
        >>> kappa, energy, zeta = torch.ones(2), torch.zeros(2), torch.full((2,), 0.5)
        >>> effective_diagonal(potential, gamma, kappa, energy, zeta).dtype
        torch.complex64
    """
    # torch.compile makes a kernel of its own of torch.complex.
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
    """Compute the diagonal of the resolvent of every chain of a batch.

    Args:
        alpha: diagonal of ``H - z``, complex (B, N, H), imaginary part < 0.
        coupling: ``m >= 0``, real (H,).
        initial_state: ``g_{-1}``, complex (B, H), or (S, H) for packed sequences; zero if None. Causal form only.
        cu_seqlens: offsets of S packed sequences, integer (S + 1,), from 0 to N; needs B = 1.
        form: ``causal`` or ``two_sided``.
        backend: ``auto``, ``torch`` or ``triton``.
        block_size: sites that one program of a kernel holds; affects speed, never the result.

    Returns:
        The diagonal, complex (B, N, H), and the state after the last site, complex (B, H) or (S, H); the two-sided
        form has no state and returns None. Both are differentiable in ``alpha``, ``coupling`` and ``initial_state``.

    Raises:
        ValueError: shapes do not fit, or a state is given to the two-sided form.

    Example:
        >>> alpha, coupling = torch.randn(1, 70, 2) - 0.5j, torch.ones(2)  # 70 tokens, 2 heads
        >>> diagonal, state = resolvent_diagonal(alpha, coupling)
        >>> _, states = resolvent_diagonal(alpha, coupling, cu_seqlens=torch.tensor([0, 5, 70]))
        >>> diagonal.shape, state.shape, states.shape  # a state per packed sequence
        (torch.Size([1, 70, 2]), torch.Size([1, 2]), torch.Size([2, 2]))
    """
    if form not in ("causal", "two_sided"):
        raise ValueError(f"form must be 'causal' or 'two_sided', got {form!r}")
    if form == "two_sided" and initial_state is not None:
        raise ValueError("the two-sided form sees the whole chain at once and takes no initial_state")
    pairs, state = _as_pairs(alpha, coupling, initial_state, cu_seqlens)
    if form == "causal":
        g, final = _causal(pairs, coupling, state, cu_seqlens, backend, block_size)
        return torch.view_as_complex(g), torch.view_as_complex(final)
    # 1. Causal runs over the chain, and over the chain turned around.
    mirrored = None if cu_seqlens is None else alpha.shape[1] - cu_seqlens.flip(0)
    g_left, _ = _causal(pairs, coupling, None, cu_seqlens, backend, block_size)
    g_right, _ = _causal(pairs.flip(1), coupling, None, mirrored, backend, block_size)
    # 2. Every site between its two sides.
    sides = torch.view_as_complex(g_left), torch.view_as_complex(g_right)
    return _join_sides(torch.view_as_complex(pairs), *sides, coupling, cu_seqlens), None


def resolvent_features(
    alpha: Tensor,
    coupling: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    block_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Return ``[Re g, Im g]`` of all heads of the causal form, real (B, N, 2H), and the state.

    Arguments are those of ``resolvent_diagonal``. No complex tensor is on the way: a backward pass that
    ``torch.compile`` made does not know that a complex number and its two parts share their memory, and may overwrite
    the one before it reads the other.

    Example:
        >>> alpha, coupling = torch.randn(1, 70, 2) - 0.5j, torch.ones(2)
        >>> features, state = resolvent_features(alpha, coupling)
        >>> packed, states = resolvent_features(alpha, coupling, cu_seqlens=torch.tensor([0, 5, 70]))
        >>> features.shape, states.shape
        (torch.Size([1, 70, 4]), torch.Size([2, 2]))
    """
    pairs, state = _as_pairs(alpha, coupling, initial_state, cu_seqlens)
    g, final = _causal(pairs, coupling, state, cu_seqlens, backend, block_size)
    return g.transpose(-1, -2).flatten(-2), torch.view_as_complex(final)


def _as_pairs(
    alpha: Tensor, coupling: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Check the shapes, and return complex numbers as pairs of real ones, (B, N, H, 2) and (S, H, 2)."""
    if alpha.dim() != 3 or coupling.shape != alpha.shape[2:]:
        raise ValueError(
            f"expected alpha (B, N, H) and coupling (H,), got {tuple(alpha.shape)}, {tuple(coupling.shape)}"
        )
    sequences = count_sequences(alpha.shape[0], cu_seqlens)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (sequences, alpha.shape[2]))
    state = None if initial_state is None else torch.view_as_real(initial_state.resolve_conj())
    return torch.view_as_real(alpha.resolve_conj()), state


def _causal(
    alpha_BNH2: Tensor,
    coupling_H: Tensor,
    state_SH2: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Run the causal form on pairs of real numbers."""
    kind = alpha_BNH2.dtype
    obstacle = (
        None if kind == torch.float32 else f"its kernel computes in complex64, the tensors are {kind.to_complex()}"
    )
    if select(backend, alpha_BNH2.device, "resolvent_diagonal", obstacle) == "torch":
        return _causal_torch(alpha_BNH2, coupling_H, state_SH2, cu_seqlens)
    from .triton.bk_core import causal_diagonal

    state_SH2 = None if state_SH2 is None else state_SH2.to(kind)
    return causal_diagonal(alpha_BNH2, coupling_H.to(kind), state_SH2, cu_seqlens, block_size)


def resolvent_step(alpha: Tensor, coupling: Tensor, state: Tensor) -> Tensor:
    """Compute one site of the causal form: alpha (B, H), coupling (H,), state (B, H) -> the next state g (B, H).

    Example:
        >>> state = torch.zeros(3, 2, dtype=torch.complex64)  # a row per sequence, packed or not
        >>> for alpha in torch.randn(70, 3, 2) - 0.5j:
        ...     state = resolvent_step(alpha, torch.ones(2), state)
        >>> state.shape
        torch.Size([3, 2])
    """
    return 1 / (alpha - coupling * state)


def resolvent_step_of_parts(alpha_re: Tensor, alpha_im: Tensor, coupling: Tensor, state: Tensor) -> Tensor:
    """Compute ``resolvent_step`` with real numbers: ``torch.compile`` makes no code of its own for complex ones.

    Args:
        alpha_re: real part of alpha, (B, H).
        alpha_im: imaginary part < 0, (B, H).
        coupling: ``m >= 0``, (H,).
        state: g of the site before, its real and imaginary part in the last axis, (B, H, 2).

    Returns:
        The next state, (B, H, 2).

    Example:
        >>> alpha, state = torch.randn(3, 2) - 0.5j, torch.randn(3, 2, 2)
        >>> parts = resolvent_step_of_parts(alpha.real, alpha.imag, torch.ones(2), state)
        >>> exact = resolvent_step(alpha, torch.ones(2), torch.view_as_complex(state))
        >>> torch.allclose(torch.view_as_complex(parts), exact, atol=1e-4)
        True
    """
    state_re, state_im = state.unbind(-1)
    x, y = alpha_re - coupling * state_re, alpha_im - coupling * state_im
    return torch.stack([x, -y], dim=-1) / (x * x + y * y).unsqueeze(-1)


def resolvent_diagonal_reference(alpha: Tensor, coupling: Tensor, form: Form = "causal") -> Tensor:
    """Compute the definition, by dense inverses in complex128: alpha (B, N, H), coupling (H,) -> (B, N, H). O(N^4).

    Example:
        >>> alpha, coupling = torch.randn(1, 9, 2) - 0.5j, torch.ones(2)
        >>> exact = resolvent_diagonal_reference(alpha, coupling)
        >>> torch.allclose(resolvent_diagonal(alpha, coupling)[0].to(exact.dtype), exact, atol=1e-4)
        True
    """
    alpha_BHN = alpha.to(torch.complex128).transpose(1, 2)
    hopping_H = coupling.to(torch.float64).sqrt()
    dense_BHNN = torch.diag_embed(alpha_BHN)
    for offset in (-1, 1):
        off_diagonal = hopping_H[:, None].expand(*alpha_BHN.shape[:-1], alpha_BHN.shape[-1] - 1)
        dense_BHNN = dense_BHNN + torch.diag_embed(off_diagonal, offset)
    if form == "two_sided":
        diagonal_BHN = torch.linalg.inv(dense_BHNN).diagonal(dim1=-2, dim2=-1)
    else:
        sites = range(1, dense_BHNN.shape[-1] + 1)
        leading = [torch.linalg.inv(dense_BHNN[..., :i, :i])[..., -1, -1] for i in sites]
        diagonal_BHN = torch.stack(leading, dim=-1)
    return diagonal_BHN.transpose(1, 2)


def _causal_torch(
    alpha_BNH2: Tensor, coupling_H: Tensor, initial_state_SH2: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    count_run("resolvent_diagonal", "torch")
    alpha_BNH = torch.view_as_complex(alpha_BNH2)
    batch, length, heads = alpha_BNH.shape
    if length == 1 and cu_seqlens is None and initial_state_SH2 is not None:
        final_BH = resolvent_step(alpha_BNH[:, 0], coupling_H, torch.view_as_complex(initial_state_SH2))
        pairs_BH2 = torch.view_as_real(final_BH)
        return pairs_BH2.unsqueeze(1), pairs_BH2
    starts, ends = _bounds(alpha_BNH, cu_seqlens)
    links_1NH = _links(coupling_H, starts, length)

    if initial_state_SH2 is None:
        state = alpha_BNH.new_zeros(batch * len(starts), heads)
    else:
        state = torch.view_as_complex(initial_state_SH2)
    if length == 0:
        return torch.view_as_real(alpha_BNH), torch.view_as_real(state)
    # 1. Fold the initial state into the first site of every sequence: alpha_0 <- alpha_0 - m g_{-1}.
    empty = (ends == starts).unsqueeze(-1)
    state_BSH = state.reshape(batch, len(starts), heads)
    if initial_state_SH2 is not None:
        carried_BSH = torch.where(empty, state_BSH.new_zeros(()), -coupling_H * state_BSH)
        alpha_BNH = alpha_BNH.index_add(1, starts.clamp(max=length - 1), carried_BSH)
    # 2. Solve all chains.
    g_BNH = _Moebius.apply(alpha_BNH, links_1NH.expand_as(alpha_BNH))
    # 3. The last g of every sequence; a sequence without sites keeps its state.
    final_state_BSH = torch.where(empty, state_BSH, g_BNH[:, (ends - 1).clamp(min=0)])
    return torch.view_as_real(g_BNH), torch.view_as_real(final_state_BSH.reshape(-1, heads))


def _join_sides(
    alpha_BNH: Tensor, left_BNH: Tensor, right_BNH: Tensor, coupling_H: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """Return ``1 / (alpha_i - m g+_{i-1} - m g-_{i+1})`` from the causal diagonals of a chain, in both directions.

    Both enter as they are: the squares of their inverses, which a gradient would meet, overflow.
    """
    starts, ends = _bounds(alpha_BNH, cu_seqlens)
    length = alpha_BNH.shape[1]
    from_left_BNH = _links(coupling_H, starts, length) * _shift(left_BNH)
    from_right_BNH = _links(coupling_H, length - ends, length) * _shift(right_BNH)
    return 1 / (alpha_BNH - from_left_BNH - from_right_BNH.flip(1))


def _bounds(alpha_BNH: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the first site of every sequence, and its last + 1, (S,), on the device of ``alpha_BNH``."""
    if cu_seqlens is None:
        starts = torch.zeros(1, dtype=torch.long, device=alpha_BNH.device)
        return starts, starts + alpha_BNH.shape[1]
    offsets = cu_seqlens.to(alpha_BNH.device, torch.long)
    return offsets[:-1], offsets[1:]


def _links(coupling_H: Tensor, starts: Tensor, length: int) -> Tensor:
    """Return the coupling of each site to the site before it, (1, N, H); zero where a sequence starts."""
    first = torch.zeros(length + 1, 1, dtype=torch.bool, device=coupling_H.device)
    first.index_fill_(0, starts, True)
    return torch.where(first[:length], coupling_H.new_zeros(()), coupling_H).unsqueeze(0)


def _shift(x_BNH: Tensor) -> Tensor:
    """Return x_{i-1} at i, zero at the start."""
    return torch.nn.functional.pad(x_BNH[:, :-1], (0, 0, 1, 0))


class _Moebius(torch.autograd.Function):
    """g_i = 1 / (alpha_i - links_i g_{i-1}), g_{-1} = 0; alpha complex (B, N, H), links real (B, N, H)."""

    @staticmethod
    def forward(ctx: Any, alpha_BNH: Tensor, links_BNH: Tensor) -> Tensor:
        # 1. Compose the Möbius maps of all sites.
        steps = (
            torch.zeros_like(alpha_BNH),
            torch.ones_like(alpha_BNH),
            -links_BNH.to(alpha_BNH.dtype),
            alpha_BNH,
        )
        start_BH = alpha_BNH.new_zeros(alpha_BNH.shape[0], alpha_BNH.shape[2])
        g_BNH = _scan(_renormalise(torch.stack(steps)), start_BH, _compose_moebius, _apply_moebius)
        # 2. One step of the recurrence from each neighbour: |dg_i/dg_{i-1}| contracts the rounding of the products.
        g_BNH = 1 / (alpha_BNH - links_BNH * _shift(g_BNH))
        ctx.save_for_backward(g_BNH, links_BNH)
        return g_BNH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BNH: Tensor) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        g_BNH, links_BNH = ctx.saved_tensors
        slope_BNH = (links_BNH * g_BNH * g_BNH).conj()
        from_next_BNH = torch.nn.functional.pad(slope_BNH[:, 1:], (0, 0, 0, 1))
        # 1. The adjoint: a linear recurrence from the end of the chain.
        start_BH = g_BNH.new_zeros(g_BNH.shape[0], g_BNH.shape[2])
        maps = (from_next_BNH.flip(1), grad_BNH.flip(1))
        adjoint_BNH = _scan(maps, start_BH, _compose_linear, _apply_linear).flip(1)
        # 2. To alpha and the links.
        through_BNH = (g_BNH * g_BNH).conj() * adjoint_BNH
        return -through_BNH, (through_BNH * _shift(g_BNH).conj()).real


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
    """Return the product of the 2x2 matrices (a, b; c, d) of two steps."""
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
