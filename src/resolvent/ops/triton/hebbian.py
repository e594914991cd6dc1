"""The dissipative Hebbian memory in Triton: launches, the operator and its gradient.

What the kernels do is told in ``hebbian_kernels``; one token at a time is ``hebbian_step``.

Shapes: B batch, N sequence, T = B N tokens, H heads, K key width, V value width, S sequences, G segments, M chunks,
C tokens of a chunk.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ..consolidation import Consolidation
from ..dispatch import count_run
from ..library import operator
from ..memory_state import CHUNK, MemoryState
from ..packed import count_sequences
from . import hebbian_kernels as kernels
from .consolidation import constants_of, parts_of
from .hebbian_step import memory_step
from .launch import contiguous
from .segments import Layout, layout_of, most_chunks, tables_on_device

_LAUNCH = {
    "narrow": {
        "walk": dict(num_warps=4, num_stages=3),
        "walk_back": dict(num_warps=4, num_stages=2, STAGES=2),
        "chunk_gradients": dict(num_warps=4, num_stages=1),
        "join": dict(num_warps=8),
        "join_back": dict(num_warps=8),
    },
    "wide": {
        "walk": dict(num_warps=8, num_stages=2),
        "walk_back": dict(num_warps=8, num_stages=1, STAGES=1),
        "chunk_gradients": dict(num_warps=8, num_stages=1),
        "join": dict(num_warps=8),
        "join_back": dict(num_warps=8),
    },
}
"""How kernels are launched for heads up to a width of 64, by measurement, and above it, where they have to fit."""


# ------------------------------------------------------------------------------------------------------- the launches

_Optional = Tensor | None
_State = tuple[_Optional, _Optional, _Optional]
"""Memory, writes and Γ̄, or their gradients."""
_NO_FILTERS = dict(SNR=False, RESONANCE=False)


class _Call:
    """One call of the operator: its inputs as the kernels want them, and the kernels' launches."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        eta: Tensor,
        strength: _Optional,
        basis: _Optional,
        sharpness: _Optional,
        bias: _Optional,
        position: _Optional,
        cu_seqlens: _Optional,
        segments: _Optional,
        chunks: _Optional,
        interval: int,
        snr: list[float],
        energy: float,
    ):
        if segments is not None and chunks is not None:
            self.layout = Layout(segments, chunks)
        else:
            self.layout = layout_of(q, position, cu_seqlens, interval)
        self.heads = q.shape[2]
        self.tokens = [_rows(x.to(kernels.product_dtype(q, k, v))) for x in (q, k, v)]
        self.eta = eta.float().contiguous()
        self.filters = [contiguous(x, torch.float32) for x in (strength, basis, sharpness, bias)]
        self.strides = [stride for x in self.tokens for stride in x.stride()[:2]]
        self.interval, self.constants = interval, constants_of(snr, energy, interval)
        self.sizes: dict[str, Any] = dict(kernels.sizes_of(q, k, v), C=CHUNK)
        self.mechanisms = dict(SNR=len(snr) > 0, RESONANCE=basis is not None)
        self.segments = len(self.layout.segments)
        self.launch = _LAUNCH["narrow" if max(self.sizes["K"], self.sizes["V"]) <= 64 else "wide"]
        self.decays = self._sums_of(decay)

    def _sums_of(self, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cumulative decays of every chunk, in two floats (M, H, C), and their totals (M, H)."""
        chunks = len(self.layout.chunks)
        high, rows = self.eta.new_empty((chunks, self.heads, CHUNK)), _rows(decay)
        low = high if self.sizes["HALF"] else torch.empty_like(high)
        totals = self.eta.new_empty((chunks, self.heads))
        if chunks:
            with torch.cuda.device_of(decay):
                kernels.sum_decays[(chunks, self.heads)](
                    rows,
                    self.layout.segments,
                    self.layout.chunks,
                    high,
                    low,
                    totals,
                    *rows.stride(),
                    self.heads,
                    C=CHUNK,
                    HALF=self.sizes["HALF"],
                    num_warps=1,
                )
        return high, low, totals

    def segment_memories(self) -> Tensor:
        """Room for a memory, or its gradient, of every segment."""
        return self.eta.new_empty((self.segments, self.heads, self.sizes["K"], self.sizes["V"]))

    def segment_decays(self) -> Tensor:
        """Room for the total decay of every segment."""
        return self.eta.new_empty((self.segments, self.heads))

    def segment_states(self) -> tuple[Tensor, Tensor, Tensor]:
        """Room for the state, or its gradient, of every segment."""
        return self.segment_memories(), self.segment_memories(), self.segment_decays()

    def walk(
        self,
        readout: _Optional,
        start: _State,
        final: _State,
        before: _Optional,
        met: _State = (None, None, None),
        consolidate: bool = True,
    ) -> None:
        """Read the segments from their ``start`` into ``readout`` and their ``final`` states, and save the memory
        ``before`` every chunk and the states that ``met`` the boundaries. Segments that end at boundaries leave it to
        others to ``consolidate``."""
        with torch.cuda.device_of(self.eta):
            kernels.walk[(self.segments, self.heads)](
                *self.tokens,
                *self.decays,
                self.eta,
                self.layout.segments,
                *map(contiguous, start),
                *self.filters,
                readout,
                *final,
                before,
                *met,
                *self.strides,
                *self.constants,
                self.heads,
                READ=readout is not None,
                SAVE=before is not None,
                STATE=start[0] is not None,
                **self.launch["walk"],
                **self.sizes,
                **(self.mechanisms if consolidate else _NO_FILTERS),
            )

    def walk_back(
        self,
        grad_readout: Tensor,
        grad_final: _State,
        saved: tuple[Tensor, Tensor, Tensor] | None,
        grad_start: tuple[_Optional, ...],
        met: _State = (None, None, None),
        left: _Optional = None,
        of_left: _Optional = None,
        consolidate: bool = True,
    ) -> None:
        """Carry the gradient of the memory back to the start of the segments, as ``walk`` went.

        ``saved`` holds the memory before every chunk, and room for the gradients of what it wrote and of its total
        decay. At the end ``left`` is what the memory still has from before the last boundary; where ``join_back``
        consolidates, it found ``of_left``.
        """
        before, grad_written, grad_total = saved or (None, None, None)
        with torch.cuda.device_of(self.eta):
            kernels.walk_back[(self.segments, self.heads)](
                self.tokens[0],
                *self.decays,
                self.layout.segments,
                grad_readout,
                *map(contiguous, grad_final),
                *self.filters,
                before,
                *met,
                left,
                of_left,
                grad_written,
                grad_total,
                *grad_start,
                *self.strides[:2],
                *self.constants,
                self.heads,
                SAVE=before is not None,
                FINAL=grad_final[0] is not None,
                CARRY=self.interval > 0 and grad_start[1] is not None,
                **self.launch["walk_back"],
                **self.sizes,
                **(self.mechanisms if consolidate else _NO_FILTERS),
            )

    def chunk_gradients(
        self, grad_readout: Tensor, before: Tensor, grad_written: Tensor, grad_total: Tensor, grads: tuple[Tensor, ...]
    ) -> None:
        """The gradients of q, k, v, decay and eta, a row a chunk of the last."""
        with torch.cuda.device_of(self.eta):
            kernels.chunk_gradients[(len(self.layout.chunks), self.heads)](
                *self.tokens,
                *self.decays,
                self.eta,
                self.layout.segments,
                self.layout.chunks,
                grad_readout,
                before,
                grad_written,
                grad_total,
                *grads,
                *self.strides,
                self.heads,
                **self.launch["chunk_gradients"],
                **self.sizes,
            )

    def chain(
        self, ends: Tensor, decays: Tensor, start: _Optional, starts: Tensor, last: Tensor, reverse: bool
    ) -> None:
        """Join the segments: ``ends`` of their walks from nothing, from ``start`` to ``last`` through ``starts``."""
        size, block = self.sizes["K"] * self.sizes["V"], 256
        with torch.cuda.device_of(self.eta):
            kernels.chain[(len(last), self.heads, triton.cdiv(size, block))](
                ends,
                decays,
                self.layout.first_segment,
                contiguous(start),
                starts,
                last,
                self.heads,
                size,
                BLOCK=block,
                START=start is not None,
                REVERSE=reverse,
            )

    def join(self, ends: Tensor, decays: Tensor, start: _State, starts: Tensor, final: _State, met: _State) -> None:
        """``chain`` with consolidation, forwards: from the state ``start`` to ``final`` through ``starts``, saving the
        states that ``met`` the boundaries."""
        with torch.cuda.device_of(ends):
            kernels.join[self._over_sequences()](
                ends,
                decays,
                self.layout.segments,
                self.layout.first_segment,
                *map(contiguous, start),
                *self.filters,
                starts,
                *final,
                *met,
                *self.constants,
                self.heads,
                SAVE=met[0] is not None,
                STATE=start[0] is not None,
                **self.launch["join"],
                **self.sizes,
                **self.mechanisms,
            )

    def join_back(
        self,
        ends: Tensor,
        decays: Tensor,
        grad_final: _State,
        met: tuple[Tensor, Tensor, Tensor],
        left: _Optional,
        starts: _State,
        of_left: Tensor,
        grad_start: tuple[Tensor, ...],
    ) -> None:
        """``chain`` with consolidation, backwards: through ``starts`` and ``of_left`` to ``grad_start``."""
        with torch.cuda.device_of(ends):
            kernels.join_back[self._over_sequences()](
                self.layout.segments,
                self.layout.first_segment,
                ends,
                decays,
                *map(contiguous, grad_final),
                *self.filters,
                *met,
                left,
                *starts,
                of_left,
                *grad_start,
                *self.constants,
                self.heads,
                FINAL=grad_final[0] is not None,
                **self.launch["join_back"],
                **self.sizes,
                **self.mechanisms,
            )

    def _over_sequences(self) -> tuple[int, int]:
        """The grid of a program for each head of a sequence."""
        assert self.layout.first_segment is not None
        return len(self.layout.first_segment) - 1, self.heads


def _rows(x: Tensor) -> Tensor:
    """(B, N, H, ...) -> (T, H, ...) with neighbours in the last axis; a view where the layout allows it."""
    x = x.flatten(0, 1)
    return x if x.dim() == 2 or x.stride(-1) == 1 else x.contiguous()


# ------------------------------------------------------------------------------------------------------- the operator


def dissipative_memory(
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
    parameters, constants = parts_of(consolidation)
    tensors = (q, k, v, decay, eta, *(state or (None, None, None)), *parameters)
    needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if q.shape[1] == 1 and cu_seqlens is None and state is not None and not needs_gradient:
        if position is None:
            position = torch.zeros(len(q), dtype=torch.long)
        readout, memory, writes, forgetting = memory_step(*tensors, position.to(q.device), **constants)
    else:
        tables = tables_on_device(cu_seqlens, position, q.shape[1], constants["interval"])
        outputs = _memory(*tensors, position, cu_seqlens, *tables, **constants, save=needs_gradient)
        readout, memory, writes, forgetting, *_ = outputs
    if constants["interval"]:
        return readout, MemoryState(memory, writes, forgetting)
    # Nothing reads the rest without consolidation: it stays as it was.
    kept = (state.writes, state.forgetting) if state else (torch.zeros_like(memory), memory.new_zeros(memory.shape[:2]))
    return readout, MemoryState(memory, *kept)


@operator("memory")
def _memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    eta: Tensor,
    memory: Tensor | None,
    writes: Tensor | None,
    forgetting: Tensor | None,
    strength: Tensor | None,
    basis: Tensor | None,
    sharpness: Tensor | None,
    bias: Tensor | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: Tensor | None,
    chunks: Tensor | None,
    interval: int,
    snr: list[float],
    energy: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The read-out, the final state, and what the gradient needs: the memory before every chunk, and the states that
    met the boundaries.

    ``snr`` holds threshold, temperature, gamma_boost and eta_boost, or nothing; ``interval`` is 0 without
    consolidation, and then the final writes and Γ̄ mean nothing. What is saved has a row for every chunk and boundary
    there may be.
    ``segments`` and ``chunks`` are what ``tables_on_device`` gives; without them Python reads the offsets.
    """
    call = _Call(
        q, k, v, decay, eta, strength, basis, sharpness, bias, position, cu_seqlens, segments, chunks, interval, snr,
        energy,
    )  # fmt: skip
    outputs = _room(q, k, v, decay, position, cu_seqlens, interval, save)
    readout, final, final_writes, final_forgetting, before, met, met_writes, met_forgetting = outputs
    start, last = (memory, writes, forgetting), (final, final_writes, final_forgetting)
    count_run("dissipative_memory", "triton")
    to_save, to_meet = (before, (met, met_writes, met_forgetting)) if save else (None, (None, None, None))
    if not call.layout.segmented:
        call.walk(readout, start, last, to_save, to_meet)
        return outputs
    ends, starts, decays = call.segment_memories(), call.segment_memories(), call.segment_decays()
    call.walk(None, (None, None, None), (ends, None, decays), None, consolidate=False)
    if interval:
        call.join(ends, decays, start, starts, last, to_meet)
    else:
        call.chain(ends, decays, memory, starts, final, reverse=False)
    call.walk(readout, (starts, None, None), (ends, None, decays), to_save, consolidate=False)
    return outputs


@torch.library.register_fake("resolvent::memory")
def _(
    q, k, v, decay, eta, memory, writes, forgetting, strength, basis, sharpness, bias, position, cu_seqlens, segments,
    chunks, interval, snr, energy, save,
):  # fmt: skip
    return _room(q, k, v, decay, position, cu_seqlens, interval, save)


def _room(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    position: _Optional,
    cu_seqlens: _Optional,
    interval: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``_memory`` returns, yet to be filled."""
    (batch, length, heads, key), value = q.shape, v.shape[-1]
    sequences = count_sequences(batch, cu_seqlens)
    # A bound that follows from the shapes alone: a sequence that goes on inside a chunk may touch one more.
    if cu_seqlens is None:
        chunks = batch * -(-length // CHUNK) + (sequences if position is not None else 0)
    else:
        chunks = most_chunks(length, sequences, position is not None)
    chunks = chunks if save else 0
    most = batch * (length // interval) + (sequences if position is not None else 0) if interval else 0
    boundaries = most if save else 0

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return decay.new_empty(shape, dtype=dtype)

    return (
        room(batch, length, heads, value, dtype=v.dtype),
        room(sequences, heads, key, value),
        room(sequences if interval else 0, heads, key, value),
        room(sequences, heads),
        room(chunks, heads, key, value, dtype=kernels.product_dtype(q, k, v)),
        # The gradient of a consolidation asks for digits that products do not.
        room(boundaries, heads, key, value),
        room(boundaries, heads, key, value),
        room(boundaries, heads),
    )


@operator("memory_backward")
def _memory_backward(
    grad_readout: Tensor,
    grad_memory: Tensor | None,
    grad_writes: Tensor | None,
    grad_forgetting: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    eta: Tensor,
    strength: Tensor | None,
    basis: Tensor | None,
    sharpness: Tensor | None,
    bias: Tensor | None,
    last: Tensor,
    last_writes: Tensor,
    before: Tensor,
    met: Tensor,
    met_writes: Tensor,
    met_forgetting: Tensor,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: Tensor | None,
    chunks: Tensor | None,
    interval: int,
    snr: list[float],
    energy: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, decay, eta, the initial state, the strength, the sharpness and the bias.

    That of eta has a row for every chunk, those of the last three one for every sequence, to be summed up.
    """
    call = _Call(
        q, k, v, decay, eta, strength, basis, sharpness, bias, position, cu_seqlens, segments, chunks, interval, snr,
        energy,
    )  # fmt: skip
    outputs = _room_for_gradients(grad_readout, q, k, v, decay, before, strength, basis, cu_seqlens, interval)
    grad_q, grad_k, grad_v, grad_decay, grad_eta, grad_initial, *others = outputs
    upstream = grad_readout.to(call.tokens[0].dtype).contiguous()
    grad_written = before.new_empty(before.shape, dtype=upstream.dtype)
    grad_total = before.new_empty(before.shape[:2], dtype=torch.float32)
    saved, final = (before, grad_written, grad_total), (grad_memory, grad_writes, grad_forgetting)
    state, start = (met, met_writes, met_forgetting), (grad_initial, *others)
    left = last - last_writes if interval and grad_memory is not None else None
    if not call.layout.segmented:
        call.walk_back(upstream, final, saved, start, state, left)
    else:
        ends, of_left, decays = call.segment_memories(), call.segment_decays(), call.segment_decays()
        nowhere = (None, None, None)
        call.walk_back(upstream, nowhere, None, (ends, None, decays, *nowhere), consolidate=False)
        if interval:
            behind = call.segment_states()
            call.join_back(ends, decays, final, state, left, behind, of_left, start)
            # A program reads the gradient behind its segment before it writes the one before it.
            to_segments = (*behind, *nowhere)
        else:
            behind = (call.segment_memories(), None, None)
            call.chain(ends, decays, grad_memory, behind[0], grad_initial, reverse=True)
            to_segments = (ends, None, decays, *nowhere)
        call.walk_back(upstream, behind, saved, to_segments, of_left=of_left, consolidate=False)
    call.chunk_gradients(upstream, before, grad_written, grad_total, (grad_q, grad_k, grad_v, grad_decay, grad_eta))
    return outputs


@torch.library.register_fake("resolvent::memory_backward")
def _(
    grad_readout, grad_memory, grad_writes, grad_forgetting, q, k, v, decay, eta, strength, basis, sharpness, bias,
    last, last_writes, before, met, met_writes, met_forgetting, position, cu_seqlens, segments, chunks, interval, snr,
    energy,
):  # fmt: skip
    return _room_for_gradients(grad_readout, q, k, v, decay, before, strength, basis, cu_seqlens, interval)


def _room_for_gradients(
    grad_readout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    before: Tensor,
    strength: _Optional,
    basis: _Optional,
    cu_seqlens: _Optional,
    interval: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``_memory_backward`` returns, yet to be filled; rows of chunks that are not there stay zero."""
    (batch, length, heads, key), value = q.shape, v.shape[-1]
    sequences = count_sequences(batch, cu_seqlens)

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return decay.new_empty(shape, dtype=dtype)

    return (
        room(batch, length, heads, key, dtype=q.dtype),
        room(batch, length, heads, key, dtype=k.dtype),
        room(batch, length, heads, value, dtype=v.dtype),
        room(batch, length, heads, dtype=decay.dtype),
        decay.new_zeros(before.shape[:2], dtype=torch.float32),
        room(sequences, heads, key, value),
        room(sequences if interval else 0, heads, key, value),
        room(sequences, heads),
        room(sequences if strength is not None else 0, heads),
        room(sequences if basis is not None else 0, heads),
        room(sequences if basis is not None else 0, heads),
    )


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.interval, ctx.snr, ctx.energy, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:3], *output[4:])
    ctx.mark_non_differentiable(*output[4:])
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any,
    grad_readout: _Optional,
    grad_memory: _Optional,
    grad_writes: _Optional,
    grad_forgetting: _Optional,
    *_: Any,
) -> Any:
    q, k, v, decay, eta, memory, writes, forgetting, strength, basis, sharpness, bias, *others = ctx.saved_tensors
    (position, cu_seqlens, segments, chunks), saved = others[:4], others[4:]
    final: list[_Optional] = [grad_memory, grad_writes, grad_forgetting]
    if not ctx.interval:
        final[1:] = None, None
    if any(x is not None for x in final):
        sequences = count_sequences(q.shape[0], cu_seqlens)
        matrix = (sequences, *q.shape[2:], v.shape[-1])
        shapes = (matrix, matrix, matrix[:2])
        final = [
            saved[0].new_zeros(n, dtype=torch.float32) if x is None else x for x, n in zip(final, shapes, strict=True)
        ]
    grad_q, grad_k, grad_v, grad_decay, grad_eta, *others = _memory_backward(
        grad_readout if grad_readout is not None else torch.zeros_like(v),
        *final,
        *(q, k, v, decay, eta, strength, basis, sharpness, bias, *saved),
        *(position, cu_seqlens, segments, chunks),
        ctx.interval,
        ctx.snr,
        ctx.energy,
    )
    grad_state, (grad_strength, grad_sharpness, grad_bias) = others[:3], others[3:]
    of_state = [None if x is None else grad for x, grad in zip((memory, writes, forgetting), grad_state, strict=True)]
    if not ctx.interval:
        of_state[1:] = None, None
    of_strength = grad_strength.sum(0) if strength is not None else None
    of_resonance = (None, grad_sharpness.sum(0), grad_bias.sum(0)) if basis is not None else (None, None, None)
    grads = (grad_q, grad_k, grad_v, grad_decay, grad_eta.sum(0).to(eta.dtype), *of_state, of_strength, *of_resonance)
    return *grads, *[None] * 8


torch.library.register_autograd("resolvent::memory", _gradient, setup_context=_keep_for_gradient)
