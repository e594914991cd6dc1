r"""Dissipative Hebbian memory: fast weights that learn and forget, in linear time.

``dS/dt = η k vᵀ - Γ S`` discretised per token and head, read by the query:

    S_t = exp(-Γ_t dt) S_{t-1} + η k_t v_tᵀ,        y_t = S_tᵀ q_t

and consolidated every ``interval`` tokens (see ``ops.consolidation``). Three forms compute the same: a loop in float64
(the reference), one token at a time (generation), and chunks of 64 tokens (training): inside a chunk a masked ``QKᵀ``,
between chunks the state. Sums of decays are subtracted in float64 and only their differences are exponentiated, so that
a token which erases everything does not blur its neighbours.

Names of Γ: ``gamma`` is the rate, ``decay`` Γ dt of a token, ``cumulative`` its running sum within a chunk, ``total``
the sum over a chunk, ``forgetting`` the sum since the last boundary.

Shapes: B batch, N sequence, H heads, K key width, V value width, S packed sequences, M chunks, C tokens of a chunk.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .consolidation import Consolidation, consolidate, consolidate_gradient
from .dispatch import Implementation, beyond_float32, count_run, select
from .memory_rotation import rotate_queries_keys
from .memory_state import CHUNK, MemoryState, empty_state, lengths_and_elapsed
from .packed import check_shape, count_sequences
from .precision import wide_dtype
from .prefix_sum import prefix_sum

_WIDEST_HEAD = 128
"""Width of a head up to which a program of a kernel holds its memory in registers."""


def dissipative_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    eta: Tensor,
    *,
    initial_state: MemoryState | None = None,
    position: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    consolidation: Consolidation | None = None,
    phases: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MemoryState]:
    """Write every token into the memory and read it back.

    Args:
        q: queries, (B, N, H, K).
        k: keys, (B, N, H, K).
        v: values, (B, N, H, V).
        decay: Γ dt >= 0, dimensionless, (B, N, H).
        eta: learning rate η > 0, (H,).
        initial_state: state before the first token, a row per sequence; empty if None.
        position: tokens that each sequence has read before, integer (B,) or (S,), from which its next boundary follows.
        cu_seqlens: offsets of S packed sequences, integer (S + 1,), from 0 to N; needs B = 1. Python reads both
            ``position`` and ``cu_seqlens``: on the CPU it need not wait for the device. Only the ``position`` of single
            tokens (N = 1) is read where the tensors are, and so is the kernels' ``cu_seqlens`` on a device.
        consolidation: filters that act at the boundaries; None for a plain decaying memory.
        phases: phases behind every token, in turns, float64 (B, N, K / 2), by which the pairs of key channels j and
            j + K/2 are rotated (``ops.memory_rotation``); None for no rotation.
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        The read-out (B, N, H, V) in the dtype of ``v``, and the state after the last token. Both are differentiable in
        every real-valued input, the parameters of ``consolidation`` and the initial state included.

    Raises:
        ValueError: shapes do not fit, or the consolidation interval is no multiple of the chunk.

    Example:
        >>> q, k, v = torch.randn(3, 1, 70, 2, 16)  # 70 tokens, 2 heads of width 16
        >>> readout, state = dissipative_memory(q, k, v, torch.rand(1, 70, 2), torch.ones(2))
        >>> two = dissipative_memory(q, k, v, torch.rand(1, 70, 2), torch.ones(2), cu_seqlens=torch.tensor([0, 5, 70]))
        >>> readout.shape, state.memory.shape, two[1].memory.shape  # a memory per packed sequence
        (torch.Size([1, 70, 2, 16]), torch.Size([1, 2, 16, 16]), torch.Size([2, 2, 16, 16]))
    """
    if q.dim() != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3] or decay.shape != q.shape[:3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, decay))
        raise ValueError(f"expected q, k (B, N, H, K), v (B, N, H, V) and decay (B, N, H), got {shapes}")
    sequences, heads = count_sequences(q.shape[0], cu_seqlens), q.shape[2]
    check_shape("eta", eta, (heads,))
    if position is not None:
        check_shape("position", position, (sequences,))
    if initial_state is not None:
        check_shape("initial_state.memory", initial_state.memory, (sequences, heads, q.shape[3], v.shape[3]))
        check_shape("initial_state.forgetting", initial_state.forgetting, (sequences, heads))
    if consolidation is not None and consolidation.interval % CHUNK:
        raise ValueError(f"the consolidation interval must be a multiple of {CHUNK}, got {consolidation.interval}")
    if phases is not None:
        check_shape("phases", phases, (*q.shape[:2], q.shape[3] // 2))
    turning = phases is not None and consolidation is not None
    widths = q.shape[-1], v.shape[-1]
    # Autocast would turn the float32 products of the state into half precision.
    with torch.autocast(q.device.type, enabled=False):
        if phases is not None:
            q, k = rotate_queries_keys(q, k, phases)
        if memory_implementation(backend, q.device, q.dtype, *widths, turning=turning) == "triton":
            from .triton.hebbian import dissipative_memory as run

            return run(q, k, v, decay, eta, initial_state, position, cu_seqlens, consolidation)
        of_boundaries = phases if turning else None
        return _dissipative_memory_torch(
            q, k, v, decay, eta, initial_state, position, cu_seqlens, consolidation, of_boundaries
        )


def memory_implementation(
    backend: str, device: torch.device, dtype: torch.dtype, *widths: int, turning: bool = False
) -> Implementation:
    """Return what ``dissipative_memory`` runs for heads of these ``widths`` of keys and values: see ``select``.

    ``turning`` memories are both rotated and consolidated.
    """
    obstacle = beyond_float32(dtype)
    if obstacle is None and turning:
        obstacle = "its kernel does not consolidate a memory that is rotated"
    if obstacle is None and max(widths) > _WIDEST_HEAD:
        obstacle = f"its kernel holds heads up to a width of {_WIDEST_HEAD}, got {max(widths)}"
    return select(backend, device, "dissipative_memory", obstacle)


def dissipative_memory_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    eta: Tensor,
    state: MemoryState,
    position: Tensor,
    consolidation: Consolidation | None = None,
    phases: Tensor | None = None,
) -> tuple[Tensor, MemoryState]:
    """Write one token of every sequence into the memory and read it back.

    Args:
        q: queries, (B, H, K).
        k: keys, (B, H, K).
        v: values, (B, H, V).
        decay: Γ dt, (B, H).
        eta: learning rate η, (H,).
        state: state before the token.
        position: tokens that each sequence has read before, integer (B,).
        consolidation: filters that act at the boundaries.
        phases: phases behind the token, in turns, float64 (B, K / 2); None for no rotation.

    Returns:
        The read-out (B, H, V) in the dtype of ``v``, and the next state.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 16)  # one sequence, 2 heads of width 16
        >>> state, position = empty_state(1, q, v), torch.zeros(1, dtype=torch.int64)
        >>> readout, state = dissipative_memory_step(q, k, v, torch.rand(1, 2), torch.ones(2), state, position)
        >>> readout.shape, state.memory.shape
        (torch.Size([1, 2, 16]), torch.Size([1, 2, 16, 16]))
    """
    if phases is not None:
        q, k = (x.squeeze(1) for x in rotate_queries_keys(q.unsqueeze(1), k.unsqueeze(1), phases.unsqueeze(1)))
    return _step(q, k, v, decay, eta, state, position, consolidation, phases)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    eta: Tensor,
    state: MemoryState,
    position: Tensor,
    consolidation: Consolidation | None,
    phases: Tensor | None,
) -> tuple[Tensor, MemoryState]:
    """Compute ``dissipative_memory_step`` for queries and keys that are rotated already."""
    dtype = wide_dtype(q)
    memory_BHKV, forgetting_BH = state
    kept_BH11 = torch.exp(-decay.to(dtype))[..., None, None]
    written_BHKV = (eta.to(dtype)[:, None] * k.to(dtype)).unsqueeze(-1) * v.to(dtype).unsqueeze(-2)
    memory_BHKV = kept_BH11 * memory_BHKV + written_BHKV
    readout_BHV = (q.to(dtype).unsqueeze(-2) @ memory_BHKV).squeeze(-2).to(v.dtype)
    if consolidation is None:
        return readout_BHV, MemoryState(memory_BHKV, forgetting_BH)
    state = MemoryState(memory_BHKV, forgetting_BH + decay.to(dtype))
    boundary_B = (position + 1) % consolidation.interval == 0
    if boundary_B.device.type == "cpu" and not boundary_B.any():  # on a device, reading it would have to wait
        return readout_BHV, state
    return readout_BHV, _consolidate_where(boundary_B, state, consolidation, phases)


def dissipative_memory_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    eta: Tensor,
    initial_state: MemoryState | None = None,
    position: int = 0,
    consolidation: Consolidation | None = None,
    phases: Tensor | None = None,
) -> tuple[Tensor, MemoryState]:
    """Compute the definition, token by token in float64 with autograd through all of time; shapes as in the operator.

    Example:
        >>> q, k, v = torch.randn(3, 1, 70, 2, 16)
        >>> exact, _ = dissipative_memory_reference(q, k, v, torch.rand(1, 70, 2), torch.ones(2))
        >>> exact.shape, exact.dtype
        (torch.Size([1, 70, 2, 16]), torch.float64)
    """
    q, k, v, decay, eta = (x.to(torch.float64) for x in (q, k, v, decay, eta))
    if phases is not None:
        q, k = (_turn(x, phases) for x in (q, k))
    if initial_state is None:
        initial_state = empty_state(q.shape[0], q, v)
    memory, forgetting = (x.to(torch.float64) for x in initial_state)
    readouts = []
    for t in range(q.shape[1]):
        kept = torch.exp(-decay[:, t])[..., None, None]
        written = eta[:, None, None] * torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        memory, forgetting = kept * memory + written, forgetting + decay[:, t]
        readouts.append(torch.einsum("bhkv,bhk->bhv", memory, q[:, t]))
        if consolidation is not None and (position + t + 1) % consolidation.interval == 0:
            now = None if phases is None else phases[:, t]
            memory, forgetting = consolidate(memory, forgetting, consolidation, now), torch.zeros_like(forgetting)
    if consolidation is None:
        forgetting = initial_state.forgetting
    return torch.stack(readouts, dim=1), MemoryState(memory, forgetting)


def _turn(x_BNHK: Tensor, phases_BNP: Tensor) -> Tensor:
    """Rotate as complex numbers: pairs of channels times ``exp(2πi phase)``."""
    turned = torch.complex(*x_BNHK.chunk(2, dim=-1)) * torch.exp(2j * math.pi * phases_BNP).unsqueeze(-2)
    return torch.cat([turned.real, turned.imag], dim=-1)


def _dissipative_memory_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    eta: Tensor,
    state: MemoryState | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    consolidation: Consolidation | None,
    phases: Tensor | None,
) -> tuple[Tensor, MemoryState]:
    """Compute ``dissipative_memory`` for queries and keys that are rotated; ``phases`` are those of consolidation."""
    batch, length = q.shape[:2]
    sequences = count_sequences(batch, cu_seqlens)
    if state is None:
        state = empty_state(sequences, q, v)
    if q.numel() == 0:
        return torch.zeros_like(v), state
    count_run("dissipative_memory", "torch")
    if length == 1 and cu_seqlens is None:
        if position is None:
            position = torch.zeros(sequences, dtype=torch.long)
        step = (q[:, 0], k[:, 0], v[:, 0], decay[:, 0], eta)
        readout, state = _step(*step, state, position, consolidation, None if phases is None else phases[:, 0])
        return readout.unsqueeze(1), state
    lengths, elapsed = lengths_and_elapsed(q, position, cu_seqlens, consolidation.interval if consolidation else 0)
    layout = _chunk_layout(lengths, elapsed, q.device)
    return _chunked_memory(layout, consolidation, q, k, v, decay, eta, state, phases)


@dataclass(frozen=True)
class _ChunkLayout:
    """Layout of ragged sequences on a grid of chunks that is aligned with the boundaries.

    A sequence that has read ``since`` tokens since its last boundary starts ``since`` slots into its first chunk. The
    sequences are ranked by how far they reach, so that those which still have a j-th chunk are always the first
    ``active[j]``, those which fill it the first ``full[j]``, and the chunks of round j lie side by side.
    """

    slots: Tensor  # (tokens,) grid slot of every token, in the order of the flat input
    order: Tensor  # (S,) sequence of each rank
    active: list[int]  # sequences with a chunk in round j
    full: list[int]  # sequences which reach the end of chunk j
    rectangle: bool  # all sequences fill the same number of chunks: the grid is a view of the input

    @property
    def chunks(self) -> int:
        return sum(self.active)

    def at_boundary(self, j: int, interval: int) -> int:
        """Return the number of sequences that stand at a boundary after round j."""
        return 0 if (j + 1) * CHUNK % interval else self.full[j]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept for later calls must serve training, too
def _chunk_layout(lengths: tuple[int, ...], elapsed: tuple[int, ...], device: torch.device) -> _ChunkLayout:
    reach = [length + since for length, since in zip(lengths, elapsed, strict=True)]
    order = sorted(range(len(reach)), key=lambda sequence: -reach[sequence])
    rounds = -(-max(reach) // CHUNK)
    active = _count_exceeding([-(-r // CHUNK) for r in reach], rounds)
    full = _count_exceeding([r // CHUNK for r in reach], rounds)
    first_chunk = torch.tensor([0, *itertools.accumulate(active)])
    ranks = {sequence: rank for rank, sequence in enumerate(order)}
    slots = []
    for sequence, (length, since) in enumerate(zip(lengths, elapsed, strict=True)):
        index = torch.arange(since, since + length)
        slots.append((first_chunk[index // CHUNK] + ranks[sequence]) * CHUNK + index % CHUNK)
    rectangle = len(set(lengths)) == 1 and lengths[0] % CHUNK == 0 and not any(elapsed)
    return _ChunkLayout(torch.cat(slots).to(device), torch.tensor(order).to(device), active, full, rectangle)


def _count_exceeding(counts: list[int], limit: int) -> list[int]:
    """Return the number of counts that exceed 0, 1, ..., limit - 1."""
    tally = [0] * (max(counts) + limit + 1)
    for count in counts:
        tally[count] += 1
    return [len(counts) - fewer for fewer in itertools.accumulate(tally[:limit])]


def _chunked_memory(
    layout: _ChunkLayout,
    consolidation: Consolidation | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    eta: Tensor,
    state: MemoryState,
    phases: Tensor | None,
) -> tuple[Tensor, MemoryState]:
    """Compute the chunked form in differentiable torch code; arguments as in the operator."""
    dtype = wide_dtype(q)
    # 1. Lay the tokens out in chunks, keys times η, and sum up the decays of every chunk.
    q_MHCK, k_MHCK, v_MHCV = (_to_chunks(x, layout).to(dtype) for x in (q, eta[:, None] * k, v))
    cumulative_MHC = prefix_sum(_to_chunks(decay.to(torch.float64).unsqueeze(-1), layout).squeeze(-1))
    total_MH = cumulative_MHC[..., -1]

    # 2. Within a chunk: masked QKᵀ.
    readout_MHCV = _WithinChunk.apply(q_MHCK, k_MHCK, v_MHCV, cumulative_MHC)

    # 3. What a chunk adds to the memory by its end: KᵀV, decayed from every token to the end.
    to_end_MHC = torch.exp(cumulative_MHC - total_MH[..., None]).to(dtype)
    written_MHKV = (v_MHCV.mT @ (k_MHCK * to_end_MHC[..., None])).mT

    # 4. Between chunks: carry the state from chunk to chunk, and consolidate it at the boundaries.
    resonance = consolidation.resonance if consolidation else None
    if consolidation is not None and resonance is not None:  # cast the basis once, not at every boundary
        consolidation = replace(consolidation, resonance=replace(resonance, basis=resonance.basis.to(dtype)))
    parameters = consolidation.parameters if consolidation else ()
    phases_MP = None if phases is None else _to_chunks(phases.unsqueeze(2), layout)[:, 0, -1]
    carried = (written_MHKV, total_MH.to(dtype), phases_MP, *state, *parameters)
    before_MHKV, *final = _Carry.apply(layout, consolidation, *carried)

    # 5. Across chunks: every token reads the memory before its chunk, decayed from the start of the chunk.
    from_start_MHC = torch.exp(-cumulative_MHC).to(dtype)
    readout_MHCV = readout_MHCV + (q_MHCK * from_start_MHC[..., None]) @ before_MHKV
    return _from_chunks(readout_MHCV, layout, v.shape).to(v.dtype), MemoryState(*final)


def _consolidated(state: MemoryState, consolidation: Consolidation, phases: Tensor | None) -> MemoryState:
    """Return the state behind a boundary."""
    memory = consolidate(state.memory, state.forgetting, consolidation, phases)
    return MemoryState(memory, torch.zeros_like(state.forgetting))


def _consolidate_where(
    boundary_B: Tensor, state: MemoryState, consolidation: Consolidation, phases: Tensor | None
) -> MemoryState:
    """Consolidate the rows at which ``boundary_B`` is set."""
    new = _consolidated(state, consolidation, phases)
    boundary_B = boundary_B.to(state.memory.device)
    pairs = zip(new, state, strict=True)
    return MemoryState(*(torch.where(boundary_B.view(-1, *[1] * (b.dim() - 1)), a, b) for a, b in pairs))


def _first(state: MemoryState, count: int) -> MemoryState:
    """Return the first rows of ``state``."""
    return state if count == len(state.memory) else MemoryState(*(x[:count] for x in state))


def _replace_first(state: MemoryState, new: MemoryState) -> MemoryState:
    """Return ``state`` with its first rows replaced by the rows of ``new``."""
    if len(new.memory) == len(state.memory):
        return new
    return MemoryState(*(torch.cat([a, b[len(a) :]]) for a, b in zip(new, state, strict=True)))


def _to_chunks(x_BNHX: Tensor, layout: _ChunkLayout) -> Tensor:
    """Lay (B, N, H, X) out as (M, H, C, X), with zeros in empty slots."""
    if layout.rectangle:
        grid = x_BNHX.reshape(len(layout.order), len(layout.active), CHUNK, *x_BNHX.shape[2:])
        return grid.permute(1, 0, 3, 2, 4).flatten(0, 1)
    flat = x_BNHX.reshape(-1, *x_BNHX.shape[2:])
    grid = flat.new_zeros(layout.chunks * CHUNK, *flat.shape[1:]).index_copy_(0, layout.slots, flat)
    return grid.unflatten(0, (layout.chunks, CHUNK)).transpose(1, 2)


def _from_chunks(x_MHCV: Tensor, layout: _ChunkLayout, shape: torch.Size) -> Tensor:
    """Lay (M, H, C, V) out as (B, N, H, V)."""
    if layout.rectangle:
        grid = x_MHCV.unflatten(0, (len(layout.active), len(layout.order)))
        return grid.permute(1, 0, 3, 2, 4).reshape(shape)
    return x_MHCV.transpose(1, 2).flatten(0, 1).index_select(0, layout.slots).view(shape)


class _WithinChunk(torch.autograd.Function):
    """Read-out of tokens from their own chunk: ``y_t = sum_{s <= t} exp(L_s - L_t) (q_t . k_s) v_s``.

    q, k (M, H, C, K), v (M, H, C, V) and the cumulative decay L (M, H, C) float64 -> (M, H, C, V). Backward computes
    the C x C factors again instead of keeping them.
    """

    @staticmethod
    def forward(ctx: Any, q_MHCK: Tensor, k_MHCK: Tensor, v_MHCV: Tensor, cumulative_MHC: Tensor) -> Tensor:
        ctx.save_for_backward(q_MHCK, k_MHCK, v_MHCV, cumulative_MHC)
        return (q_MHCK @ k_MHCK.mT).mul_(_decay_between(cumulative_MHC, q_MHCK.dtype)) @ v_MHCV

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_MHCV: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        q_MHCK, k_MHCK, v_MHCV, cumulative_MHC = ctx.saved_tensors
        # 1. The factors of the forward pass.
        scores_MHCC, between_MHCC = q_MHCK @ k_MHCK.mT, _decay_between(cumulative_MHC, q_MHCK.dtype)
        # 2. Through the scores to q and k.
        grad_scores_MHCC = (grad_MHCV @ v_MHCV.mT).mul_(between_MHCC)
        grad_q_MHCK, grad_k_MHCK = grad_scores_MHCC @ k_MHCK, grad_scores_MHCC.mT @ q_MHCK
        # 3. Through the decay. A token's own term does not depend on it: left out, it costs the others no digits.
        exponents_MHCC = (grad_scores_MHCC * scores_MHCC).tril_(-1)
        grad_cumulative_MHC = exponents_MHCC.sum(-2) - exponents_MHCC.sum(-1)
        # 4. To v.
        grad_v_MHCV = scores_MHCC.mul_(between_MHCC).mT @ grad_MHCV
        return grad_q_MHCK, grad_k_MHCK, grad_v_MHCV, grad_cumulative_MHC.to(cumulative_MHC.dtype)


def _decay_between(cumulative_MHC: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``exp(L_s - L_t)`` for s <= t and zero elsewhere: (M, H, C) float64 -> (M, H, C, C)."""
    shape = (*cumulative_MHC.shape, cumulative_MHC.shape[-1])
    between_MHCC = torch.empty(shape, dtype=dtype, device=cumulative_MHC.device)
    torch.sub(cumulative_MHC.unsqueeze(-2), cumulative_MHC.unsqueeze(-1), out=between_MHCC)
    return between_MHCC.exp_().tril_()


class _Carry(torch.autograd.Function):
    """Walk over the rounds of chunks with the state, consolidating at the boundaries.

    Args:
        written_MHKV: what each chunk adds to the memory by its end.
        total_MH: the sum of Γ dt of each chunk.
        phases_MP: phases at the end of each chunk, where the memory is consolidated in a turning frame.
        memory, forgetting: the state, a row per sequence, in the caller's order.
        parameters: those of the consolidation, named here to be differentiated.

    Returns:
        The memory before each chunk (M, H, K, V), and the final memory and forgetting.

    The gradient walks back over the memories before the chunks and needs nothing else of the way forward, but Γ̄.
    All memories lie with their keys innermost, where the resonance multiplies them: every operation then meets tensors
    of one layout, and no product has to turn them around. A of the shapes below are the sequences of a round.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layout: _ChunkLayout,
        consolidation: Consolidation | None,
        written_MHKV: Tensor,
        total_MH: Tensor,
        phases_MP: Tensor | None,
        memory: Tensor,
        forgetting: Tensor,
        *parameters: Tensor,
    ) -> Any:
        # 1. Rank the sequences by how far they reach.
        running = MemoryState(_keys_innermost(memory[layout.order]), forgetting[layout.order])
        written_MHKV = _keys_innermost(written_MHKV)
        kept_MH11 = torch.exp(-total_MH)[..., None, None]
        before, accumulated = [], []
        rounds = zip(*(x.split(layout.active) for x in (kept_MH11, written_MHKV, total_MH)), strict=True)
        for j, (kept_AH11, written_AHKV, total_AH) in enumerate(rounds):
            # 2. Keep what the gradient needs of the state before the chunk.
            memory, forgetting = _first(running, layout.active[j])
            before.append(memory)
            accumulated.append(forgetting)
            # 3. Decay the state and write the chunk.
            memory = torch.addcmul(written_AHKV, kept_AH11, memory)
            if consolidation is not None:
                forgetting = forgetting + total_AH
            new = MemoryState(memory, forgetting)
            # 4. Consolidate the sequences that stand at a boundary.
            if consolidation is not None and (full := layout.at_boundary(j, consolidation.interval)):
                now = _of_round(phases_MP, layout, j, full)
                new = _replace_first(new, _consolidated(_first(new, full), consolidation, now))
            running = _replace_first(running, new)
        # 5. Back to the caller's order.
        back = torch.argsort(layout.order)
        ctx.layout, ctx.consolidation, ctx.accumulated, ctx.phases_MP = layout, consolidation, accumulated, phases_MP
        before_MHKV = torch.cat([x.mT for x in before]).mT
        ctx.save_for_backward(before_MHKV, kept_MH11, written_MHKV, total_MH)
        return before_MHKV, *(x[back] for x in running)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_before_MHKV: Tensor, *grad_final: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        layout, consolidation = ctx.layout, ctx.consolidation
        # 1. Rank the sequences as forward did.
        grad_memory, grad_forgetting = (x[layout.order] for x in grad_final)
        grad = MemoryState(_keys_innermost(grad_memory), grad_forgetting)
        grad_phases_MP = None if ctx.phases_MP is None else torch.zeros_like(ctx.phases_MP)
        grad_parameters = [torch.zeros_like(p) for p in (consolidation.parameters if consolidation else ())]
        grad_written, grad_total = [], []
        rounds = [x.split(layout.active) for x in (*ctx.saved_tensors, _keys_innermost(grad_before_MHKV))]
        for j, of_round in reversed(list(enumerate(zip(*rounds, strict=True)))):
            memory_AHKV, kept_AH11, written_AHKV, total_AH, grad_before_AHKV = of_round
            now = _first(grad, layout.active[j])
            # 2. Back through the consolidation of the sequences that stood at a boundary.
            if consolidation is not None and (full := layout.at_boundary(j, consolidation.interval)):
                found = consolidate_gradient(
                    now.memory[:full],
                    torch.addcmul(written_AHKV, kept_AH11, memory_AHKV)[:full],
                    (ctx.accumulated[j] + total_AH)[:full],
                    consolidation,
                    _of_round(ctx.phases_MP, layout, j, full),
                )
                if (of_phases := _of_round(grad_phases_MP, layout, j, full)) is not None and found.phases is not None:
                    of_phases.copy_(found.phases)
                now = _replace_first(now, MemoryState(found.memory, found.forgetting))
                grad_parameters = [a + b for a, b in zip(grad_parameters, found.parameters, strict=True)]
            # 3. To what the chunk wrote, and through its decay to its total.
            grad_total_AH = -kept_AH11[..., 0, 0] * (now.memory * memory_AHKV).sum(dim=(-2, -1))
            if consolidation is not None:
                grad_total_AH = grad_total_AH + now.forgetting
            grad_written.append(now.memory)
            grad_total.append(grad_total_AH)
            # 4. To the memory before the chunk, which the chunk read.
            grad = _replace_first(grad, now._replace(memory=torch.addcmul(grad_before_AHKV, kept_AH11, now.memory)))
        # 5. Back to the caller's order.
        back = torch.argsort(layout.order)
        grad_state = (x[back] for x in grad)
        grads = (torch.cat([x.mT for x in grad_written[::-1]]).mT, torch.cat(grad_total[::-1]), grad_phases_MP)
        return None, None, *grads, *grad_state, *grad_parameters


def _of_round(phases_MP: Tensor | None, layout: _ChunkLayout, j: int, count: int) -> Tensor | None:
    """Return the rows of the first ``count`` sequences in round j, a view."""
    first = sum(layout.active[:j])
    return None if phases_MP is None else phases_MP[first : first + count]


def _keys_innermost(memory_MHKV: Tensor) -> Tensor:
    """Return the same (..., K, V) tensor, laid out with neighbouring keys side by side."""
    return memory_MHKV.mT.contiguous().mT
