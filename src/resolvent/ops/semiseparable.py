r"""Gated prefix sum: the token mixer of the adaptive-rank semiseparable layer (AR-SSM).

``c_t = sum_{s <= t} g_s u_s``, a channel at a time. Nothing decays, so ``|c_t|`` grows with the length: like its square
root for terms of changing sign, in proportion to it for terms of one sign. In float32 a sum of 10^7 terms no longer
notices the next one; the sum and its state are therefore kept in float64, which costs nothing beside the projections
around it, and only the result is rounded. So one forward, any split of it and one token at a time agree however much
was read.

Shapes: B batch, N sequence, R rank, S packed sequences.
"""

import torch
from torch import Tensor

from .dispatch import count_run, select
from .packed import check_shape, count_sequences, sequence_numbers
from .precision import at_least_float32, wide_dtype
from .prefix_sum import prefix_sum


def gated_prefix_sum(
    gates: Tensor,
    values: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute ``c_t = c_{-1} + sum_{s <= t} gates_s * values_s`` of every sequence and channel.

    Args:
        gates: (B, N, R).
        values: (B, N, R).
        initial_state: ``c_{-1}``, float64 (B, R), or (S, R) for packed sequences; zero if None.
        cu_seqlens: offsets of S packed sequences, integer (S + 1,), from 0 to N; needs B = 1.
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        c (B, N, R), at least float32, and c of each sequence's last token, float64 (B, R) or (S, R). Both are
        differentiable in ``gates``, ``values`` and ``initial_state``.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> gates, values = torch.rand(1, 70, 4), torch.randn(1, 70, 4)  # 70 tokens, rank 4
        >>> sums, state = gated_prefix_sum(gates, values)
        >>> _, states = gated_prefix_sum(gates, values, cu_seqlens=torch.tensor([0, 5, 70]))
        >>> sums.shape, state.dtype, states.shape  # a state per packed sequence
        (torch.Size([1, 70, 4]), torch.float64, torch.Size([2, 4]))
    """
    if gates.dim() != 3 or gates.shape != values.shape:
        raise ValueError(f"expected gates and values (B, N, R), got {tuple(gates.shape)}, {tuple(values.shape)}")
    sequences = count_sequences(gates.shape[0], cu_seqlens)
    if initial_state is None:
        initial_state = gates.new_zeros(sequences, gates.shape[2], dtype=torch.float64)
    check_shape("initial_state", initial_state, (sequences, gates.shape[2]))
    if select(backend, gates.device, "gated_prefix_sum") == "triton":
        from .triton.semiseparable import gated_prefix_sum as run
    else:
        run = _gated_prefix_sum_torch
    return run(gates, values, initial_state, cu_seqlens)


def gated_prefix_sum_step(gates: Tensor, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Add one token: gates, values (B, R), state float64 (B, R) -> c (B, R), at least float32, and the next state.

    Example:
        >>> state = torch.zeros(3, 4, dtype=torch.float64)  # a row per sequence, packed or not
        >>> c, state = gated_prefix_sum_step(torch.rand(3, 4), torch.randn(3, 4), state)
        >>> c.dtype, state.shape
        (torch.float32, torch.Size([3, 4]))
    """
    state = state + _terms(gates, values)
    return state.to(wide_dtype(values)), state


def gated_prefix_sum_reference(gates: Tensor, values: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """Compute the definition, token by token in float64: gates, values (B, N, R), state (B, R) -> c (B, N, R).

    Example:
        >>> gates, values = torch.rand(1, 70, 4), torch.randn(1, 70, 4)
        >>> exact = gated_prefix_sum_reference(gates, values)
        >>> torch.allclose(gated_prefix_sum(gates, values)[0].double(), exact, atol=1e-5)
        True
    """
    gates, values = gates.to(torch.float64), values.to(torch.float64)
    total = torch.zeros_like(gates[:, 0]) if initial_state is None else initial_state.to(torch.float64)
    sums = []
    for gate, value in zip(gates.unbind(1), values.unbind(1), strict=True):
        total = total + gate * value
        sums.append(total)
    return torch.stack(sums, dim=1)


def _gated_prefix_sum_torch(
    gates_BNR: Tensor, values_BNR: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    count_run("gated_prefix_sum", "torch")
    sums_BNR = prefix_sum(_terms(gates_BNR, values_BNR), dim=1, dtype=torch.float64)
    if cu_seqlens is None:
        sums_BNR = state.unsqueeze(1) + sums_BNR
        final_BR = sums_BNR[:, -1] if sums_BNR.shape[1] else state
        return sums_BNR.to(wide_dtype(values_BNR)), final_BR
    cu_seqlens = cu_seqlens.to(sums_BNR.device)
    # One sum over the whole row; each sequence then takes off the sum that the row had reached before it.
    reached_TR = torch.nn.functional.pad(sums_BNR[0], (0, 0, 1, 0))
    sequence_T = sequence_numbers(cu_seqlens, sums_BNR.shape[1])
    before_SR = reached_TR[cu_seqlens[:-1]]
    sums_TR = state[sequence_T] + (reached_TR[1:] - before_SR[sequence_T])
    return sums_TR.unsqueeze(0).to(wide_dtype(values_BNR)), state + (reached_TR[cu_seqlens[1:]] - before_SR)


def _terms(gates: Tensor, values: Tensor) -> Tensor:
    """Return the terms of the sum, at least float32."""
    values = at_least_float32(values)
    return gates.to(values.dtype) * values
