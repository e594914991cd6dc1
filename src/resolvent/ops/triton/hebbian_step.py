"""One token of the dissipative Hebbian memory, for generation: ``ops.hebbian.dissipative_memory_step`` in Triton.

Shapes: B sequences, H heads, K key width, V value width.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import count_run
from ..library import operator
from .arguments import Filters, Rule, State, Tokens, constants_of, constexpr, variant_of
from .consolidation import consolidate
from .hebbian_kernels import VARYING, cells_of, load_state, resonance_of, strength_of
from .launch import contiguous

_kernel: Any = triton.jit


class Token(NamedTuple):
    """Query, key and value of one token (B, H, K or V) and its decay (B, H); in a kernel, of one head."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor


class _TokenStrides(NamedTuple):
    """Strides of a ``Token``, from sequence to sequence and from head to head."""

    q_row: int
    q_head: int
    k_row: int
    k_head: int
    v_row: int
    v_head: int
    decay_row: int
    decay_head: int


@_kernel
def advance(token, state, new, boundary, strength, filters, row, head, cells, constants, variant: constexpr):
    """Write a token, its key times η, into a memory, read its query, consolidate and store the memory.

    ``state`` are the values of the memory, ``new`` the pointers to store them at; ``cells`` are the indices and the
    mask of a matrix. Returns the read-out.
    """
    square, in_square = cells
    square += row * variant.K * variant.V
    memory, forgetting = state
    memory = memory * tl.exp(-token.decay) + token.k[:, None] * token.v[None, :]
    readout = tl.sum(memory * token.q[:, None], 0)
    if variant.SNR or variant.RESONANCE:
        forgetting += token.decay
        if boundary:
            basis, sharpness, bias = resonance_of(filters, head, tl.arange(0, variant.BK), variant)
            of_head = Filters(strength, basis, sharpness, bias)
            memory = consolidate(State(memory, forgetting), of_head, constants, variant)
            forgetting = 0.0
        tl.store(new.forgetting + row, forgetting)
    tl.store(new.memory + square, memory, mask=in_square)
    return readout


@_kernel(do_not_specialize=VARYING)
def _step(
    token, eta, state, position, filters, readout, new, strides, constants, heads, variant: constexpr
):  # fmt: skip
    """Read one token of a head of a sequence."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    K: tl.constexpr = variant.K
    V: tl.constexpr = variant.V
    keys, values = tl.arange(0, variant.BK), tl.arange(0, variant.BV)
    row = sequence * heads + head
    at_q = token.q + sequence * strides.q_row + head * strides.q_head
    at_k = token.k + sequence * strides.k_row + head * strides.k_head
    at_v = token.v + sequence * strides.v_row + head * strides.v_head
    query = tl.load(at_q + keys, mask=keys < K, other=0.0).to(tl.float32)
    key = tl.load(at_k + keys, mask=keys < K, other=0.0).to(tl.float32)
    value = tl.load(at_v + values, mask=values < V, other=0.0).to(tl.float32)
    boundary = (tl.load(position + sequence) + 1) % tl.maximum(constants.interval, 1) == 0
    decay = tl.load(token.decay + sequence * strides.decay_row + head * strides.decay_head).to(tl.float32)
    square, in_square = cells_of(keys, values, K, V)
    memory, forgetting = load_state(state, row, square, in_square, variant, variant.SNR or variant.RESONANCE)
    out = advance(
        Token(query, key * tl.load(eta + head), value, decay), State(memory, forgetting), new, boundary,
        strength_of(filters.strength, head), filters, row, head, (square, in_square), constants, variant,
    )  # fmt: skip
    tl.store(readout + row * V + values, out.to(readout.dtype.element_ty), mask=values < V)


def _allocate_step(
    tokens: Tokens, decay: Tensor, eta: Tensor, state: State, filters: Filters, position: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results of ``memory_step``."""
    memory, forgetting = state
    assert memory is not None and forgetting is not None

    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(tokens.v), like(memory), like(forgetting) if rule.interval else forgetting.new_empty(0)


@operator("memory_step", _allocate_step)
def memory_step(
    tokens: Tokens, decay: Tensor, eta: Tensor, state: State, filters: Filters, position: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the read-out of one token of every sequence, (B, 1, H, V), and the state after it.

    ``position`` is on the device. The operator has no gradient, and Python reads none of its tensors: a CUDA graph can
    capture it.
    """
    outputs = _allocate_step(tokens, decay, eta, state, filters, position, rule)
    readout, *new = outputs
    batch, _, heads, _ = tokens.q.shape
    token = Token(*(x[:, 0] if x.stride(-1) == 1 or x.dim() == 3 else x[:, 0].contiguous() for x in (*tokens, decay)))
    count_run("dissipative_memory", "triton")
    with torch.cuda.device_of(readout):
        _step[(batch, heads)](
            token,
            eta.float(),
            State(*map(contiguous, state)),
            position,
            Filters(*(contiguous(x, torch.float32) for x in filters)),
            readout,
            State(*new),
            _TokenStrides(*(stride for x in token for stride in x.stride()[:2])),
            constants_of(rule),
            heads,
            variant_of(tokens, filters, rule),
            num_warps=8,
        )
    return outputs
