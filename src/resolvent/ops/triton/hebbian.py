"""The dissipative Hebbian memory in Triton: launches, the operator and its gradient.

The kernels are in ``hebbian_kernels``; one token at a time is in ``hebbian_step``.

Shapes: B batch, N sequence, T = B N tokens, H heads, K key width, V value width, S sequences, G segments, M chunks,
C tokens of a chunk.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..consolidation import Consolidation
from ..dispatch import count_run
from ..library import operator
from ..memory_state import CHUNK, MemoryState
from ..packed import count_sequences
from . import hebbian_kernels as kernels
from .arguments import (
    Decays,
    Filters,
    Gradients,
    Met,
    Rule,
    State,
    Strides,
    Tokens,
    constants_of,
    parts_of,
    product_dtype,
    variant_of,
)
from .hebbian_step import memory_step
from .launch import contiguous
from .segments import Layout, layout_of, most_chunks, tables_on_device

_LAUNCH = {
    "narrow": {
        "walk": dict(num_warps=4, num_stages=3),
        "walk_back": dict(num_warps=8, num_stages=3, STAGES=3),
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
"""Launch options for heads up to a width of 64, by measurement, and above it, where the kernels have to fit."""


class Sequences(NamedTuple):
    """Positions and offsets of sequences, and the tables of ``segments.tables_on_device``; each may be None."""

    position: Tensor | None
    cu_seqlens: Tensor | None
    segments: Tensor | None
    chunks: Tensor | None


class Saved(NamedTuple):
    """Tensors that ``walk_back`` and ``chunk_gradients`` share, a row per chunk.

    Attributes:
        before: the memory before the chunk, (M, H, K, V).
        grad_written: allocated for the gradient of what the chunk wrote, (M, H, K, V).
        grad_total: allocated for the gradient of its total decay, (M, H).
    """

    before: Tensor | None = None
    grad_written: Tensor | None = None
    grad_total: Tensor | None = None


_NO_STATE, _NOT_SAVED, _NOT_MET = State(), Saved(), Met()


# ------------------------------------------------------------------------------------------------------- the launches


class _Launches:
    """Launches of one call of the operator, with its inputs as the kernels take them."""

    def __init__(self, tokens: Tokens, decay: Tensor, eta: Tensor, filters: Filters, sequences: Sequences, rule: Rule):
        if sequences.segments is not None and sequences.chunks is not None:
            self.layout = Layout(sequences.segments, sequences.chunks)
        else:
            self.layout = layout_of(tokens.q, sequences.position, sequences.cu_seqlens, rule.interval)
        self.variant = variant_of(tokens, filters, rule)
        self.plain_variant = self.variant._replace(SNR=False, RESONANCE=False)
        self.heads = tokens.q.shape[2]
        self.tokens = Tokens(*(_rows(x.to(product_dtype(tokens))) for x in tokens))
        self.strides = Strides(*(stride for x in self.tokens for stride in x.stride()[:2]))
        self.eta = eta.float().contiguous()
        self.filters = Filters(*map(contiguous, filters))
        self.constants = constants_of(rule)
        self.segments = len(self.layout.segments)
        self.options = _LAUNCH["narrow" if max(self.variant.K, self.variant.V) <= 64 else "wide"]
        self.decays = self._sum_decays(decay)

    def _sum_decays(self, decay: Tensor) -> Decays:
        """Sum up the decays of every chunk."""
        chunks, half, rows = len(self.layout.chunks), self.variant.HALF, _rows(decay)
        cumulative = self.eta.new_empty((chunks, self.heads, CHUNK))
        rest = cumulative if half else torch.empty_like(cumulative)
        decays = Decays(cumulative, rest, self.eta.new_empty((chunks, self.heads)))
        if chunks:
            with torch.cuda.device_of(decay):
                kernels.sum_decays[(chunks, self.heads)](
                    rows,
                    *rows.stride(),
                    self.layout.segments,
                    self.layout.chunks,
                    decays,
                    self.heads,
                    CHUNK,
                    half,
                    num_warps=1,
                )
        return decays

    def allocate_memories(self) -> Tensor:
        """Allocate a memory, or its gradient, for every segment."""
        return self.eta.new_empty((self.segments, self.heads, self.variant.K, self.variant.V))

    def allocate_totals(self) -> Tensor:
        """Allocate the total decay of every segment."""
        return self.eta.new_empty((self.segments, self.heads))

    def walk(
        self,
        readout: Tensor | None,
        start: State,
        final: State,
        before: Tensor | None,
        met: Met = _NOT_MET,
        consolidate: bool = True,
    ) -> None:
        """Walk over the segments from their ``start`` to their ``final`` states, and fill ``readout``.

        Saves the memory ``before`` every chunk and the states that ``met`` the boundaries. Segments that end at
        boundaries do not ``consolidate``: ``join`` does.
        """
        with torch.cuda.device_of(self.eta):
            kernels.walk[(self.segments, self.heads)](
                self.tokens,
                self.decays,
                self.eta,
                self.layout.segments,
                State(*map(contiguous, start)),
                self.filters,
                readout,
                final,
                before,
                met,
                self.strides,
                self.constants,
                self.heads,
                self.variant if consolidate else self.plain_variant,
                **self.options["walk"],
            )

    def walk_back(
        self,
        grad_readout: Tensor,
        grad_final: State,
        saved: Saved,
        grads: Gradients,
        met: Met = _NOT_MET,
        consolidate: bool = True,
    ) -> None:
        """Carry the gradient of the memory back to the start of the segments."""
        with torch.cuda.device_of(self.eta):
            kernels.walk_back[(self.segments, self.heads)](
                self.tokens.q,
                self.decays,
                self.layout.segments,
                grad_readout,
                State(*map(contiguous, grad_final)),
                self.filters,
                saved,
                met,
                grads,
                self.strides,
                self.constants,
                self.heads,
                self.variant if consolidate else self.plain_variant,
                **self.options["walk_back"],
            )

    def chunk_gradients(
        self, grad_readout: Tensor, saved: Saved, grads: Tokens, grad_decay: Tensor, grad_eta: Tensor
    ) -> None:
        """Compute the gradients of q, k, v, decay and, a row per chunk, of eta."""
        with torch.cuda.device_of(self.eta):
            kernels.chunk_gradients[(len(self.layout.chunks), self.heads)](
                self.tokens,
                self.decays,
                self.eta,
                self.layout.segments,
                self.layout.chunks,
                grad_readout,
                saved,
                grads,
                grad_decay,
                grad_eta,
                self.strides,
                self.heads,
                self.plain_variant,
                **self.options["chunk_gradients"],
            )

    def chain(
        self, ends: Tensor, totals: Tensor, start: Tensor | None, starts: Tensor, last: Tensor, reverse: bool
    ) -> None:
        """Join the ``ends`` of segments that walked from zero: from ``start`` through ``starts`` to ``last``."""
        size, block = self.variant.K * self.variant.V, 256
        with torch.cuda.device_of(self.eta):
            kernels.chain[(len(last), self.heads, triton.cdiv(size, block))](
                ends,
                totals,
                self.layout.first_segment,
                contiguous(start),
                starts,
                last,
                self.heads,
                size,
                block,
                reverse,
            )

    def join(self, ends: Tensor, totals: Tensor, start: State, starts: Tensor, final: State, met: Met) -> None:
        """Join with consolidation, from the state ``start`` through ``starts`` to ``final``.

        Saves the states that ``met`` the boundaries.
        """
        with torch.cuda.device_of(ends):
            kernels.join[self._over_sequences()](
                ends,
                totals,
                self.layout.segments,
                self.layout.first_segment,
                State(*map(contiguous, start)),
                self.filters,
                starts,
                final,
                met,
                self.constants,
                self.heads,
                self.variant,
                **self.options["join"],
            )

    def join_back(
        self,
        ends: Tensor,
        totals: Tensor,
        grad_final: State,
        met: Met,
        behind: State,
        grads: Gradients,
    ) -> None:
        """Join gradients with consolidation, through ``behind`` to ``grads``."""
        with torch.cuda.device_of(ends):
            kernels.join_back[self._over_sequences()](
                self.layout.segments,
                self.layout.first_segment,
                ends,
                totals,
                State(*map(contiguous, grad_final)),
                self.filters,
                met,
                behind,
                grads,
                self.constants,
                self.heads,
                self.variant,
                **self.options["join_back"],
            )

    def _over_sequences(self) -> tuple[int, int]:
        """Return the grid of a program for each head of a sequence."""
        assert self.layout.first_segment is not None
        return len(self.layout.first_segment) - 1, self.heads


def _rows(x: Tensor) -> Tensor:
    """Return (B, N, H, ...) as (T, H, ...) with neighbours in the last axis; a view where the layout allows it."""
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
    """See ``ops.dissipative_memory``."""
    filters, rule = parts_of(consolidation)
    inputs = (q, k, v, decay, eta, *(state or _NO_STATE), *filters)
    needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if q.shape[1] == 1 and cu_seqlens is None and state is not None and not needs_gradient:
        if position is None:
            position = torch.zeros(len(q), dtype=torch.long)
        readout, memory, forgetting = memory_step(*inputs, position.to(q.device), *rule)
    else:
        tables = tables_on_device(cu_seqlens, position, q.shape[1], rule.interval)
        outputs = _memory(*inputs, position, cu_seqlens, *tables, *rule, needs_gradient)
        readout, memory, forgetting, *_ = outputs
    if not rule.interval:  # nothing reads Γ̄: it stays as it was
        forgetting = state.forgetting if state else memory.new_zeros(memory.shape[:2])
    return readout, MemoryState(memory, forgetting)


def _allocate(
    tokens: Tokens,
    decay: Tensor,
    eta: Tensor,
    start: State,
    filters: Filters,
    sequences: Sequences,
    rule: Rule,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results of ``_memory``."""
    (batch, length, heads, key), value = tokens.q.shape, tokens.v.shape[-1]
    count, goes_on = count_sequences(batch, sequences.cu_seqlens), sequences.position is not None
    # Bounds from the shapes alone: a sequence that goes on inside a chunk may touch one more.
    if sequences.cu_seqlens is None:
        chunks = batch * -(-length // CHUNK) + (count if goes_on else 0)
    else:
        chunks = most_chunks(length, count, goes_on)
    chunks = chunks if save else 0
    most = batch * (length // rule.interval) + (count if goes_on else 0) if rule.interval else 0
    boundaries = most if save else 0

    def allocate(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return decay.new_empty(shape, dtype=dtype)

    of_products = product_dtype(tokens)
    of_units = torch.float32 if of_products == torch.float32 else torch.float16
    return (
        allocate(batch, length, heads, value, dtype=tokens.v.dtype),
        allocate(count, heads, key, value),
        allocate(count, heads),
        allocate(chunks, heads, key, value, dtype=of_products),
        # In units of their rms, float16 keeps the digits that the gradient of a consolidation asks for.
        allocate(boundaries, heads, key, value, dtype=of_units),
        allocate(boundaries, heads),
        allocate(boundaries, heads),
    )


@operator("memory", _allocate)
def _memory(
    tokens: Tokens,
    decay: Tensor,
    eta: Tensor,
    start: State,
    filters: Filters,
    sequences: Sequences,
    rule: Rule,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the read-out, the final state and, with ``save``, the tensors that the gradient needs.

    These are the memory before every chunk and the states that met the boundaries, with a row for every chunk and
    boundary that there may be. Without consolidation the final Γ̄ has no meaning. Without tables in ``sequences`` Python
    reads the offsets.
    """
    launches = _Launches(tokens, decay, eta, filters, sequences, rule)
    outputs = _allocate(tokens, decay, eta, start, filters, sequences, rule, save)
    readout, *final, before, met_unit, met_rms, met_forgetting = outputs
    last = State(*final)
    to_save, to_meet = (before, Met(met_unit, met_rms, met_forgetting)) if save else (None, _NOT_MET)
    count_run("dissipative_memory", "triton")
    if not launches.layout.segmented:
        launches.walk(readout, start, last, to_save, to_meet)
        return outputs
    # 1. All segments at once, from an empty memory.
    ends, starts, totals = launches.allocate_memories(), launches.allocate_memories(), launches.allocate_totals()
    to_ends = State(ends, totals)
    launches.walk(None, _NO_STATE, to_ends, None, consolidate=False)
    # 2. The memory before each of them.
    if rule.interval:
        launches.join(ends, totals, start, starts, last, to_meet)
    else:
        launches.chain(ends, totals, start.memory, starts, final[0], reverse=False)
    # 3. All segments at once, from that memory.
    launches.walk(readout, State(starts), to_ends, to_save, consolidate=False)
    return outputs


def _allocate_gradients(
    grad_readout: Tensor,
    grad_final: State,
    tokens: Tokens,
    decay: Tensor,
    eta: Tensor,
    filters: Filters,
    before: Tensor,
    met: Met,
    sequences: Sequences,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results of ``_memory_backward``; rows of chunks that do not exist stay zero."""
    (batch, length, heads, key), value = tokens.q.shape, tokens.v.shape[-1]
    count = count_sequences(batch, sequences.cu_seqlens)

    def allocate(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return decay.new_empty(shape, dtype=dtype)

    return (
        allocate(batch, length, heads, key, dtype=tokens.q.dtype),
        allocate(batch, length, heads, key, dtype=tokens.k.dtype),
        allocate(batch, length, heads, value, dtype=tokens.v.dtype),
        allocate(batch, length, heads, dtype=decay.dtype),
        decay.new_zeros(before.shape[:2], dtype=torch.float32),
        allocate(count, heads, key, value),
        allocate(count, heads),
        allocate(count if filters.strength is not None else 0, heads),
        allocate(count if filters.basis is not None else 0, heads),
        allocate(count if filters.basis is not None else 0, heads),
    )


@operator("memory_backward", _allocate_gradients)
def _memory_backward(
    grad_readout: Tensor,
    grad_final: State,
    tokens: Tokens,
    decay: Tensor,
    eta: Tensor,
    filters: Filters,
    before: Tensor,
    met: Met,
    sequences: Sequences,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, decay, eta, the initial state, the strength, the sharpness and the bias.

    The gradient of eta has a row per chunk, the last three have a row per sequence: the caller sums them up.
    """
    launches = _Launches(tokens, decay, eta, filters, sequences, rule)
    outputs = _allocate_gradients(grad_readout, grad_final, tokens, decay, eta, filters, before, met, sequences, rule)
    grad_q, grad_k, grad_v, grad_decay, grad_eta, *of_state, grad_strength, grad_sharpness, grad_bias = outputs
    upstream = grad_readout.to(launches.tokens.q.dtype).contiguous()
    grad_written = before.new_empty(before.shape, dtype=upstream.dtype)
    saved = Saved(before, grad_written, before.new_empty(before.shape[:2], dtype=torch.float32))
    grads = Gradients(State(*of_state), Filters(grad_strength, None, grad_sharpness, grad_bias))
    if not launches.layout.segmented:
        launches.walk_back(upstream, grad_final, saved, grads, met)
    else:
        # 1. All segments at once, back from a gradient of zero.
        ends, totals = launches.allocate_memories(), launches.allocate_totals()
        launches.walk_back(upstream, _NO_STATE, _NOT_SAVED, Gradients(State(ends, totals)), consolidate=False)
        # 2. The gradients behind each of them.
        if rule.interval:
            behind = State(launches.allocate_memories(), launches.allocate_totals())
            launches.join_back(ends, totals, grad_final, met, behind, grads)
            # A program reads the gradient behind its segment before it writes the one before it.
            to_segments = behind
        else:
            memories = launches.allocate_memories()
            behind, to_segments = State(memories), State(ends, totals)
            launches.chain(ends, totals, grad_final.memory, memories, of_state[0], reverse=True)
        # 3. All segments at once, back from those gradients.
        launches.walk_back(upstream, behind, saved, Gradients(to_segments), consolidate=False)
    launches.chunk_gradients(upstream, saved, Tokens(grad_q, grad_k, grad_v), grad_decay, grad_eta)
    return outputs


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, interval, snr, energy_threshold, _ = inputs
    ctx.rule = Rule(interval, snr, energy_threshold)
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_readout: Tensor | None, *grad_outputs: Tensor | None) -> Any:
    tensors, rule = ctx.saved_tensors, ctx.rule
    inputs, start, filters, sequences, saved = tensors[:5], tensors[5:7], tensors[7:11], tensors[11:15], tensors[15:]
    (q, _, v, decay, eta), (strength, basis, _, _) = inputs, filters

    grad_final = grad_outputs[:2] if rule.interval else (grad_outputs[0], None)
    if rule.interval and any(x is not None for x in grad_final):
        memories = (count_sequences(len(q), sequences[1]), *q.shape[2:], v.shape[-1])
        shapes = (memories, memories[:2])
        grad_final = [
            decay.new_zeros(n, dtype=torch.float32) if x is None else x for x, n in zip(grad_final, shapes, strict=True)
        ]
    grad_readout = grad_readout if grad_readout is not None else torch.zeros_like(v)
    grads = _memory_backward(grad_readout, *grad_final, *inputs, *filters, *saved, *sequences, *rule)
    of_tokens, grad_eta, of_state, of_filters = grads[:4], grads[4], grads[5:7], grads[7:]

    grad_state = [None if x is None else grad for x, grad in zip(start, of_state, strict=True)]
    if not rule.interval:
        grad_state[1] = None
    grad_strength = of_filters[0].sum(0) if strength is not None else None
    grad_resonance = (None, of_filters[1].sum(0), of_filters[2].sum(0)) if basis is not None else (None, None, None)
    grad_inputs = (*of_tokens, grad_eta.sum(0).to(eta.dtype), *grad_state, grad_strength, *grad_resonance)
    return *grad_inputs, *[None] * 8


torch.library.register_autograd("resolvent::memory", _gradient, setup_context=_keep_for_gradient)
