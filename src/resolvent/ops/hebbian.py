r"""Dissipative Hebbian memory: fast weights that learn and forget, in linear time.

``dS/dt = η k vᵀ - Γ S`` discretised per token and head, read by the query:

    S_t = exp(-Γ_t dt) S_{t-1} + η k_t v_tᵀ,        y_t = S_tᵀ q_t

and consolidated every ``interval`` tokens (see ``ops.consolidation``). Three forms compute the same: a loop in float64
(the reference), one token at a time (generation), and chunks of 64 tokens (training): inside a chunk a masked ``QKᵀ``,
between chunks the state. Sums of decays are subtracted in float64 and only their differences are exponentiated, so that
a token which erases everything does not blur its neighbours.

Shapes: B batch, N sequence, H heads, K key width, V value width, S packed sequences, M chunks, C tokens of a chunk.
"""

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .consolidation import Consolidation, consolidate, consolidate_gradient
from .dispatch import Implementation, beyond_float32, count_run, select
from .memory_state import CHUNK, MemoryState, empty_state, lengths_and_phases
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
    backend: str = "auto",
) -> tuple[Tensor, MemoryState]:
    """Write every token into the memory and read it back.

    Args:
        q: queries and keys, (B, N, H, K).
        k: the same.
        v: values, (B, N, H, V).
        decay: Γ dt >= 0, dimensionless, (B, N, H).
        eta: learning rate η > 0, (H,).
        initial_state: memory at the start, one row a sequence; empty if not given.
        position: tokens that each sequence has read before, integer (B,) or (S,): where its next boundary lies.
        cu_seqlens: offsets of S packed sequences, integer (S + 1,), from 0 to N; needs B = 1. Python reads both
            ``position`` and ``cu_seqlens``: on the CPU it need not wait for the device. Only the ``position`` of single
            tokens (N = 1) is read where the tensors are, and what the kernels are given as ``cu_seqlens`` on a device.
        consolidation: what acts at the boundaries; None for a plain decaying memory.
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        The read-out (B, N, H, V) in the dtype of ``v``, and the state after the last token. Both are differentiable in
        every real-valued input, the parameters of ``consolidation`` and the initial state included.

    Raises:
        ValueError: shapes do not fit, or the consolidation interval is no multiple of the chunk.
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
        check_shape("initial_state.writes", initial_state.writes, initial_state.memory.shape)
        check_shape("initial_state.forgetting", initial_state.forgetting, (sequences, heads))
    if consolidation is not None and consolidation.interval % CHUNK:
        raise ValueError(f"the consolidation interval must be a multiple of {CHUNK}, got {consolidation.interval}")
    if memory_implementation(backend, q.device, q.dtype, q.shape[-1], v.shape[-1]) == "triton":
        from .triton.hebbian import dissipative_memory as run
    else:
        run = _dissipative_memory_torch
    # Autocast would turn the float32 products of the state into half precision.
    with torch.autocast(q.device.type, enabled=False):
        return run(q, k, v, decay, eta, initial_state, position, cu_seqlens, consolidation)


def memory_implementation(backend: str, device: torch.device, dtype: torch.dtype, *widths: int) -> Implementation:
    """Return what ``dissipative_memory`` runs for heads of these ``widths`` of keys and values: see ``select``."""
    obstacle = beyond_float32(dtype)
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
) -> tuple[Tensor, MemoryState]:
    """One token: q, k (B, H, K), v (B, H, V), decay (B, H), eta (H,), position (B,) -> read-out (B, H, V) and state."""
    dtype = wide_dtype(q)
    memory, writes, forgetting = state
    keep = torch.exp(-decay.to(dtype))[..., None, None]
    write = (eta.to(dtype)[:, None] * k.to(dtype)).unsqueeze(-1) * v.to(dtype).unsqueeze(-2)
    memory = keep * memory + write
    readout = (q.to(dtype).unsqueeze(-2) @ memory).squeeze(-2).to(v.dtype)
    if consolidation is None:
        return readout, MemoryState(memory, writes, forgetting)
    state = MemoryState(memory, keep * writes + write, forgetting + decay.to(dtype))
    boundary = (position + 1) % consolidation.interval == 0
    if boundary.device.type == "cpu" and not boundary.any():  # elsewhere a look at it would have to wait
        return readout, state
    return readout, _consolidate_where(boundary, state, consolidation)


def dissipative_memory_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    eta: Tensor,
    initial_state: MemoryState | None = None,
    position: int = 0,
    consolidation: Consolidation | None = None,
) -> tuple[Tensor, MemoryState]:
    """The definition, token by token in float64 with autograd through all of time; shapes as in the operator."""
    q, k, v, decay, eta = (x.to(torch.float64) for x in (q, k, v, decay, eta))
    if initial_state is None:
        initial_state = empty_state(q.shape[0], q, v)
    memory, writes, forgetting = (x.to(torch.float64) for x in initial_state)
    readouts = []
    for t in range(q.shape[1]):
        keep = torch.exp(-decay[:, t])[..., None, None]
        write = eta[:, None, None] * torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        memory, writes, forgetting = keep * memory + write, keep * writes + write, forgetting + decay[:, t]
        readouts.append(torch.einsum("bhkv,bhk->bhv", memory, q[:, t]))
        if consolidation is not None and (position + t + 1) % consolidation.interval == 0:
            memory = consolidate(memory, writes, forgetting, consolidation)
            writes, forgetting = torch.zeros_like(writes), torch.zeros_like(forgetting)
    if consolidation is None:
        writes, forgetting = initial_state.writes, initial_state.forgetting
    return torch.stack(readouts, dim=1), MemoryState(memory, writes, forgetting)


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
) -> tuple[Tensor, MemoryState]:
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
        readout, state = dissipative_memory_step(*step, state, position, consolidation)
        return readout.unsqueeze(1), state
    lengths, phases = lengths_and_phases(q, position, cu_seqlens, consolidation.interval if consolidation else 0)
    layout = _chunk_layout(lengths, phases, q.device)
    return _chunked_memory(layout, consolidation, q, k, v, decay, eta, state)


@dataclass(frozen=True)
class _ChunkLayout:
    """Where the tokens of ragged sequences lie on a grid of chunks that is aligned with the boundaries.

    A sequence that has read ``phase`` tokens since its last boundary starts ``phase`` slots into its first chunk. The
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
        """Sequences that stand at a boundary after round j."""
        return 0 if (j + 1) * CHUNK % interval else self.full[j]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept for later calls must serve training, too
def _chunk_layout(lengths: tuple[int, ...], phases: tuple[int, ...], device: torch.device) -> _ChunkLayout:
    reach = [length + phase for length, phase in zip(lengths, phases, strict=True)]
    order = sorted(range(len(reach)), key=lambda sequence: -reach[sequence])
    rounds = -(-max(reach) // CHUNK)
    active = _how_many_exceed([-(-r // CHUNK) for r in reach], rounds)
    full = _how_many_exceed([r // CHUNK for r in reach], rounds)
    first_chunk = torch.tensor([0, *itertools.accumulate(active)])
    ranks = {sequence: rank for rank, sequence in enumerate(order)}
    slots = []
    for sequence, (length, phase) in enumerate(zip(lengths, phases, strict=True)):
        place = torch.arange(phase, phase + length)
        slots.append((first_chunk[place // CHUNK] + ranks[sequence]) * CHUNK + place % CHUNK)
    rectangle = len(set(lengths)) == 1 and lengths[0] % CHUNK == 0 and not any(phases)
    return _ChunkLayout(torch.cat(slots).to(device), torch.tensor(order).to(device), active, full, rectangle)


def _how_many_exceed(counts: list[int], limit: int) -> list[int]:
    """How many of the counts exceed 0, 1, ..., limit - 1."""
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
) -> tuple[Tensor, MemoryState]:
    """The chunked form, as differentiable torch code; arguments as in the operator."""
    dtype = wide_dtype(q)
    q_MHCK, k_MHCK, v_MHCV = (_to_chunks(x, layout).to(dtype) for x in (q, eta[:, None] * k, v))
    decay_MHC = prefix_sum(_to_chunks(decay.to(torch.float64).unsqueeze(-1), layout).squeeze(-1))
    total_MH = decay_MHC[..., -1]

    readout = _WithinChunk.apply(q_MHCK, k_MHCK, v_MHCV, decay_MHC)
    to_end = torch.exp(decay_MHC - total_MH[..., None]).to(dtype)
    written = (v_MHCV.mT @ (k_MHCK * to_end[..., None])).mT
    resonance = consolidation.resonance if consolidation else None
    if consolidation is not None and resonance is not None:  # cast the basis once, not at every boundary
        consolidation = replace(consolidation, resonance=replace(resonance, basis=resonance.basis.to(dtype)))
    parameters = consolidation.parameters if consolidation else ()
    before, *final = _Carry.apply(layout, consolidation, written, total_MH.to(dtype), *state, *parameters)
    from_start = torch.exp(-decay_MHC).to(dtype)
    readout = readout + (q_MHCK * from_start[..., None]) @ before
    return _from_chunks(readout, layout, v.shape).to(v.dtype), MemoryState(*final)


def _consolidated(state: MemoryState, consolidation: Consolidation) -> MemoryState:
    memory = consolidate(state.memory, state.writes, state.forgetting, consolidation)
    return MemoryState(memory, torch.zeros_like(state.writes), torch.zeros_like(state.forgetting))


def _consolidate_where(boundary: Tensor, state: MemoryState, consolidation: Consolidation) -> MemoryState:
    """Consolidate the rows at which ``boundary`` (B,) is set."""
    new = _consolidated(state, consolidation)
    boundary = boundary.to(state.memory.device)
    pairs = zip(new, state, strict=True)
    return MemoryState(*(torch.where(boundary.view(-1, *[1] * (b.dim() - 1)), a, b) for a, b in pairs))


def _first(state: MemoryState, count: int) -> MemoryState:
    """The first rows of ``state``."""
    return state if count == len(state.memory) else MemoryState(*(x[:count] for x in state))


def _replace_first(state: MemoryState, new: MemoryState) -> MemoryState:
    """``state`` with its first rows replaced by the rows of ``new``."""
    if len(new.memory) == len(state.memory):
        return new
    return MemoryState(*(torch.cat([a, b[len(a) :]]) for a, b in zip(new, state, strict=True)))


def _to_chunks(x: Tensor, layout: _ChunkLayout) -> Tensor:
    """(B, N, H, X) -> (M, H, C, X), zeros in empty slots."""
    if layout.rectangle:
        grid = x.reshape(len(layout.order), len(layout.active), CHUNK, *x.shape[2:])
        return grid.permute(1, 0, 3, 2, 4).flatten(0, 1)
    flat = x.reshape(-1, *x.shape[2:])
    grid = flat.new_zeros(layout.chunks * CHUNK, *flat.shape[1:]).index_copy_(0, layout.slots, flat)
    return grid.unflatten(0, (layout.chunks, CHUNK)).transpose(1, 2)


def _from_chunks(x: Tensor, layout: _ChunkLayout, shape: torch.Size) -> Tensor:
    """(M, H, C, V) -> (B, N, H, V)."""
    if layout.rectangle:
        grid = x.unflatten(0, (len(layout.active), len(layout.order)))
        return grid.permute(1, 0, 3, 2, 4).reshape(shape)
    return x.transpose(1, 2).flatten(0, 1).index_select(0, layout.slots).view(shape)


class _WithinChunk(torch.autograd.Function):
    """What tokens read of their own chunk: ``y_t = sum_{s <= t} exp(L_s - L_t) (q_t . k_s) v_s``.

    q, k (M, H, C, K), v (M, H, C, V) and the cumulative decay L (M, H, C) float64 -> (M, H, C, V). The C x C factors
    are computed anew in backward and never kept.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cumulative: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, cumulative)
        return (q @ k.mT).mul_(_decay_between(cumulative, q.dtype)) @ v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        q, k, v, cumulative = ctx.saved_tensors
        scores, decay = q @ k.mT, _decay_between(cumulative, q.dtype)
        grad_scores = (grad @ v.mT).mul_(decay)
        grad_q, grad_k = grad_scores @ k, grad_scores.mT @ q
        # A token's own term does not depend on the decay: left out, it costs the others no digits.
        exponents = (grad_scores * scores).tril_(-1)
        grad_cumulative = exponents.sum(-2) - exponents.sum(-1)
        grad_v = scores.mul_(decay).mT @ grad
        return grad_q, grad_k, grad_v, grad_cumulative.to(cumulative.dtype)


def _decay_between(cumulative: Tensor, dtype: torch.dtype) -> Tensor:
    """``exp(L_s - L_t)`` for s <= t and zero elsewhere: (M, H, C) float64 -> (M, H, C, C)."""
    between = torch.empty(*cumulative.shape, cumulative.shape[-1], dtype=dtype, device=cumulative.device)
    torch.sub(cumulative.unsqueeze(-2), cumulative.unsqueeze(-1), out=between)
    return between.exp_().tril_()


class _Carry(torch.autograd.Function):
    """Walk over the rounds of chunks with the state, consolidating at the boundaries.

    Args:
        written: what each chunk adds to the memory by its end, (M, H, K, V).
        total: the sum of Γ dt of each chunk, (M, H).
        memory, writes, forgetting: the state, one row a sequence, in the caller's order.
        parameters: those of the consolidation, named here to be differentiated.

    Returns:
        The memory before each chunk (M, H, K, V), and the final memory, writes and forgetting.

    The gradient walks back over the memories before the chunks and needs nothing else of the way forward, but ΔS.
    All memories lie with their keys innermost, where the resonance multiplies them: every operation then meets tensors
    of one layout, and no product has to turn them around.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layout: _ChunkLayout,
        consolidation: Consolidation | None,
        written: Tensor,
        total: Tensor,
        memory: Tensor,
        writes: Tensor,
        forgetting: Tensor,
        *parameters: Tensor,
    ) -> Any:
        running = MemoryState(
            _keys_innermost(memory[layout.order]), _keys_innermost(writes[layout.order]), forgetting[layout.order]
        )
        written = _keys_innermost(written)
        keep = torch.exp(-total)[..., None, None]
        before, accumulated = [], []
        rounds = zip(*(x.split(layout.active) for x in (keep, written, total)), strict=True)
        for j, (kept, write, decay) in enumerate(rounds):
            memory, writes, forgetting = _first(running, layout.active[j])
            before.append(memory)
            accumulated.append((writes, forgetting))
            memory = torch.addcmul(write, kept, memory)
            if consolidation is not None:
                writes = torch.addcmul(write, kept, writes)
                forgetting = forgetting + decay
            new = MemoryState(memory, writes, forgetting)
            if consolidation is not None and (full := layout.at_boundary(j, consolidation.interval)):
                new = _replace_first(new, _consolidated(_first(new, full), consolidation))
            running = _replace_first(running, new)
        back = torch.argsort(layout.order)
        ctx.layout, ctx.consolidation, ctx.accumulated = layout, consolidation, accumulated
        memories = torch.cat([x.mT for x in before]).mT
        ctx.save_for_backward(memories, keep, written, total)
        return memories, *(x[back] for x in running)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_before: Tensor, *grad_final: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        layout, consolidation = ctx.layout, ctx.consolidation
        grad_memory, grad_writes, grad_forgetting = (x[layout.order] for x in grad_final)
        grad = MemoryState(_keys_innermost(grad_memory), _keys_innermost(grad_writes), grad_forgetting)
        grad_parameters = [torch.zeros_like(p) for p in (consolidation.parameters if consolidation else ())]
        grad_written, grad_total = [], []
        rounds = [x.split(layout.active) for x in (*ctx.saved_tensors, _keys_innermost(grad_before))]
        for j, (memory, keep, write, decay, from_readout) in reversed(list(enumerate(zip(*rounds, strict=True)))):
            now = _first(grad, layout.active[j])
            writes, forgetting = ctx.accumulated[j]
            if consolidation is not None and (full := layout.at_boundary(j, consolidation.interval)):
                found = consolidate_gradient(
                    now.memory[:full],
                    torch.addcmul(write, keep, memory)[:full],
                    torch.addcmul(write, keep, writes)[:full],
                    (forgetting + decay)[:full],
                    consolidation,
                )
                now = _replace_first(now, MemoryState(found.memory, found.writes, found.forgetting))
                grad_parameters = [a + b for a, b in zip(grad_parameters, found.parameters, strict=True)]
            grad_write, grad_keep = now.memory, (now.memory * memory).sum(dim=(-2, -1))
            if consolidation is not None:
                grad_write = grad_write + now.writes
                grad_keep = grad_keep + (now.writes * writes).sum(dim=(-2, -1))
                now = now._replace(writes=keep * now.writes)
            grad_decay = -keep[..., 0, 0] * grad_keep
            if consolidation is not None:
                grad_decay = grad_decay + now.forgetting
            grad_written.append(grad_write)
            grad_total.append(grad_decay)
            grad = _replace_first(grad, now._replace(memory=torch.addcmul(from_readout, keep, now.memory)))
        back = torch.argsort(layout.order)
        grad_state = (x[back] for x in grad)
        grads = (torch.cat([x.mT for x in grad_written[::-1]]).mT, torch.cat(grad_total[::-1]), *grad_state)
        return None, None, *grads, *grad_parameters


def _keys_innermost(memory: Tensor) -> Tensor:
    """The same (..., K, V) tensor, laid out with neighbouring keys side by side."""
    return memory.mT.contiguous().mT
