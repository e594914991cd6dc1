"""Local attention: softmax attention of every token over the last ``window`` tokens, itself among them.

    y_t = sum_s softmax_s(temperature q_t · k_s) v_s,        t - window < s <= t

The keys and values of the window are the state, a ring buffer: token p is in slot ``p mod window``, row by row. Without
a window, every token attends to all before it, and the buffer grows in blocks.

Three forms compute the same: a dense mask in float64 (the reference), one token at a time (generation), and bands
(training): blocks of W queries against the W keys before the block and its own. No form but the reference makes a
matrix of N x N scores. On CUDA, in half precision, the kernel is PyTorch's ``varlen_attn``, but for
whole sequences that the window does not cut: ``scaled_dot_product_attention`` knows faster ones.

Shapes: B batch, N sequence, H heads of queries, J heads of keys and values (H is a multiple of J), K key width,
V value width, S sequences, W window or capacity of the buffer, T tokens in all.
"""

import functools
import inspect
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention_window import (
    GROWTH,
    Layout,
    ReusedWindow,
    WindowState,
    capacity_for,
    empty_window,
    first_buffer,
    in_blocks,
    in_order,
    next_buffer,
    padded,
    with_capacity,
)
from .dispatch import Implementation, beyond_float32, count_run, select
from .packed import check_shape, count_sequences, sequence_numbers
from .precision import without_autocast

_LEAST_BLOCK = 128
"""Queries of a block where the window is narrower: few blocks, at little waste."""
_NO_SEQUENCE = -1
"""Number of the sequence of padding and of empty slots."""
_WIDEST_HEAD = 256
"""Width of a head up to which FlashAttention has kernels."""
_LEAST_PLANNED = 4096
"""Tokens from which on a plan of cuDNN pays where no gradient is needed."""
_WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels of ``scaled_dot_product_attention`` but for cuDNN's."""


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor | float,
    window: int | None,
    *,
    initial_state: WindowState | None = None,
    position: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    return_state: bool = True,
) -> tuple[Tensor, WindowState | None]:
    """Attend to the last tokens.

    Args:
        q: queries, (B, N, H, K).
        k: keys, (B, N, J, K), where H is a multiple of J: head h of the queries reads head ``h // (H / J)``.
        v: values, (B, N, J, V).
        temperature: factor of the scores q · k, (H,), or one for all heads.
        window: number of tokens that a token attends to, itself among them; None for all.
        initial_state: window before the first token, a row per sequence; needs ``position``. None where nothing was
            read before.
        position: tokens that each sequence has read before, integer (B,) or (S,). Python reads it for the next state
            where ``window`` is None, and for one token where it is on the CPU.
        cu_seqlens: offsets of S packed sequences, integer (S + 1,), from 0 to N; needs B = 1. Python reads them for the
            next state where ``window`` is None, and otherwise only where they are on the CPU.
        backend: ``auto``, ``torch`` or ``triton``, which stands for ``varlen_attn`` here. One token of every sequence
            (N = 1) is read by ``local_attention_step``. ``auto`` reads whole sequences, whose tokens attend to all
            before them, with PyTorch's ``scaled_dot_product_attention``, which has the faster kernels for them.
        return_state: compute the window after the last token.

    Returns:
        The read-out (B, N, H, V) in the dtype of ``v``, and the window after the last token, or None. Both are
        differentiable in every real-valued input, the initial state included.

    Raises:
        ConfigError: the backend cannot run these tensors.
        ValueError: shapes do not fit, or there is a state without positions.

    Example:
        >>> q, k, v = torch.randn(3, 1, 70, 2, 16)  # 70 tokens, 2 heads of width 16
        >>> readout, state = local_attention(q, k, v, torch.full((2,), 10.0), window=32)
        >>> two = local_attention(q, k, v, torch.full((2,), 10.0), 32, cu_seqlens=torch.tensor([0, 5, 70]))
        >>> readout.shape, state.keys.shape, two[1].keys.shape  # a window per packed sequence
        (torch.Size([1, 70, 2, 16]), torch.Size([1, 32, 2, 16]), torch.Size([2, 32, 2, 16]))
    """
    _check_shapes(q, k, v, temperature, window, initial_state, position, cu_seqlens)
    if q.numel() == 0:
        state = initial_state or empty_window(count_sequences(q.shape[0], cu_seqlens), window or GROWTH, k, v)
        return v.new_zeros(*q.shape[:3], v.shape[-1]), state if return_state else None
    with without_autocast(q.device):  # it would change the dtype of float32 tensors
        if q.shape[1] == 1 and cu_seqlens is None and initial_state is not None and position is not None:
            readout, state = local_attention_step(
                q.squeeze(1), k.squeeze(1), v.squeeze(1), temperature, window, initial_state, position, backend
            )
            return readout.unsqueeze(1), state if return_state else None
        chosen = attention_implementation(backend, q.device, q.dtype, k.shape[-1], v.shape[-1])
        if backend == "auto" and _is_whole(q, window, initial_state, cu_seqlens):
            chosen = "torch"
        count_run("local_attention", chosen)
        if initial_state is not None:
            initial_state = WindowState(*(x.to(k.dtype) for x in initial_state))
        sources = window, initial_state, position, cu_seqlens
        readout = _attend(chosen, q, k, v, temperature, *sources)
        return readout, _window_after(k, v, *sources) if return_state else None


@torch.compiler.assume_constant_result
def attention_implementation(backend: str, device: torch.device, dtype: torch.dtype, *widths: int) -> Implementation:
    """Return what ``local_attention`` runs for heads of these ``widths`` of keys and values: see ``select``."""
    obstacle = None
    if device.type != "cuda":
        obstacle = f"its kernel runs on CUDA, the tensors are on {device.type}"
    elif not_flash := _beyond_flash(dtype, *widths):
        obstacle = not_flash
    elif not {"window_size", "scale"} <= _varlen_parameters():
        obstacle = f"varlen_attn of PyTorch {torch.__version__} takes no window"
    return "varlen" if select(backend, device, "local_attention", obstacle) == "triton" else "torch"


def _beyond_flash(dtype: torch.dtype, *widths: int) -> str | None:
    """Return the obstacle of FlashAttention and of cuDNN's kernel; None if they take heads of these widths."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its kernel takes float16 and bfloat16, the tensors are {dtype}"
    if len(set(widths)) > 1 or widths[0] % 8 or widths[0] > _WIDEST_HEAD:
        return f"its kernel takes keys and values of one width, a multiple of 8 up to {_WIDEST_HEAD}, got {widths}"
    return None


def local_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor | float,
    window: int | None,
    state: WindowState,
    position: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, WindowState]:
    """Attend from one token of every sequence.

    Args:
        q: queries, (B, H, K).
        k: keys, (B, J, K).
        v: values, (B, J, V).
        temperature: factor of the scores, (H,), or one for all heads.
        window: number of tokens that a token attends to; None for all.
        state: window before the token. A ``ReusedWindow`` is overwritten, and keeps its dtype; without a window it has
            a slot for the token already where the position is on a device, which Python then does not read.
        position: tokens that each sequence has read before, integer (B,).
        backend: ``auto``, ``torch`` or ``triton``. A kernel serves a ``ReusedWindow`` with its position on the device.

    Returns:
        The read-out (B, H, V) in the dtype of ``v``, and the next window.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 16)  # one sequence, 2 heads of width 16
        >>> state, position = empty_window(1, 32, k, v), torch.zeros(1, dtype=torch.int64)
        >>> readout, state = local_attention_step(q, k, v, torch.ones(2), 32, state, position)
        >>> torch.equal(readout, v), state.keys.shape  # the first token sees itself
        (True, torch.Size([1, 32, 2, 16]))
    """
    place = _one_place(position)
    if window is None and (position.device.type == "cpu" or not isinstance(state, ReusedWindow)):
        state = with_capacity(state, capacity_for(1, position) if place is None else in_blocks(place + 1))
    capacity = state.keys.shape[1]
    if isinstance(temperature, Tensor):
        q, temperature = _scaled(q, temperature), 1.0
    if _has_kernel(backend, q, state, position):
        from .triton.attention_step import attention_step

        assert isinstance(state, ReusedWindow)
        return attention_step(q, k, v, temperature, state, position), state
    count_run("local_attention_step", "torch")
    # 1. Write the token; find the slots that are filled.
    if place is not None:
        state, mask = _with_token(state, k, v, place % capacity), None
        filled = WindowState(*(x[:, : place + 1] for x in state))
    else:
        position = position.to(k.device, non_blocking=True)
        state = _with_tokens(state, k, v, (torch.arange(len(position), device=k.device), position % capacity))
        mask = (torch.arange(capacity, device=k.device) <= position.unsqueeze(1))[:, None, None]
        filled = state
    # 2. Attend: the queries of the G heads that share a key are rows of one product.
    keys_BJWK, values_BJWV = (x.to(q.dtype).transpose(1, 2) for x in filled)
    query_BJGK = q.unflatten(1, (k.shape[1], -1))
    readout = F.scaled_dot_product_attention(query_BJGK, keys_BJWK, values_BJWV, mask, scale=temperature)
    return readout.flatten(1, 2).to(v.dtype), state


def _has_kernel(backend: str, q: Tensor, state: WindowState, position: Tensor) -> bool:
    """Return True if a kernel reads a token of every sequence."""
    in_place = isinstance(state, ReusedWindow) and position.device == q.device and not torch.compiler.is_compiling()
    if not in_place or max(q.shape[-1], state.values.shape[-1]) > _WIDEST_HEAD:
        return False
    return select(backend, q.device, "local_attention_step", beyond_float32(q.dtype)) == "triton"


def _one_place(position: Tensor) -> int | None:
    """Return the position of all sequences where Python reads it without waiting, and it is one; None otherwise."""
    if position.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    places = set(position.tolist())
    return places.pop() if len(places) == 1 else None


def _with_token(state: WindowState, k: Tensor, v: Tensor, slot: int) -> WindowState:
    """Return the window with keys and values (B, J, K) in one slot; a ``ReusedWindow`` is overwritten."""
    if isinstance(state, ReusedWindow):
        for buffer, token in zip(state, (k, v), strict=True):
            buffer[:, slot] = token
        return state
    pairs = zip(state, (k, v), strict=True)
    return WindowState(*(torch.select_scatter(buffer.to(token.dtype), token, 1, slot) for buffer, token in pairs))


def _with_tokens(state: WindowState, k: Tensor, v: Tensor, at: tuple[Tensor, Tensor]) -> WindowState:
    """Return the window with keys and values (B, J, K), each row in a slot of its own, likewise."""
    pairs = zip(state, (k, v), strict=True)
    if isinstance(state, ReusedWindow):
        for buffer, token in pairs:
            buffer.index_put_(at, token.to(buffer.dtype))
        return state
    return WindowState(*(buffer.to(token.dtype).index_put(at, token) for buffer, token in pairs))


def local_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    window: int | None,
    initial_state: WindowState | None = None,
    position: int = 0,
) -> tuple[Tensor, WindowState]:
    """Compute the definition in float64, with a dense mask; shapes as in the operator, ``position`` for all rows.

    The window after the last token has as many slots as ``initial_state``, and without one as there are tokens.

    Example:
        >>> q, k, v = torch.randn(3, 1, 70, 2, 16)
        >>> exact, _ = local_attention_reference(q, k, v, torch.full((2,), 10.0), window=32)
        >>> exact.shape, exact.dtype
        (torch.Size([1, 70, 2, 16]), torch.float64)
    """
    q, k, v, temperature = (x.to(torch.float64) for x in (q, k, v, temperature))
    if initial_state is None:
        initial_state = empty_window(q.shape[0], window or position + q.shape[1], k, v)
    capacity, end = initial_state.keys.shape[1], position + q.shape[1]
    # 1. Keys and values of the tokens that the window holds, in their order, and those of the new tokens.
    held = list(range(max(0, position - capacity), position))
    old = [x.to(torch.float64)[:, [p % capacity for p in held]] for x in initial_state]
    keys, values = torch.cat([old[0], k], 1), torch.cat([old[1], v], 1)
    # 2. Dense scores, masked.
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bqhk,bshk->bhqs", q * temperature[:, None], keys.repeat_interleave(group, 2))
    back = torch.arange(position, end)[:, None] - torch.tensor([*held, *range(position, end)])
    visible = (back >= 0) & (back < (window or end))
    weights = scores.masked_fill(~visible.to(q.device), -torch.inf).softmax(-1)
    readout = torch.einsum("bhqs,bshv->bqhv", weights, values.repeat_interleave(group, 2))
    # 3. Put the last tokens into their slots.
    after = [x.to(torch.float64).clone() for x in initial_state]
    for buffer, tokens in zip(after, (k, v), strict=True):
        for p in range(max(position, end - capacity), end):
            buffer[:, p % capacity] = tokens[:, p - position]
    return readout, WindowState(*after)


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor | float,
    window: int | None,
    state: WindowState | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    same = q.dim() == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2] and k.shape[2] == v.shape[2]
    if not same or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            "expected q (B, N, H, K), k (B, N, J, K) and v (B, N, J, V) with H a multiple of J, got " + shapes
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be >= 1 or None, got {window}")
    sequences = count_sequences(q.shape[0], cu_seqlens)
    if isinstance(temperature, Tensor):
        check_shape("temperature", temperature, (q.shape[2],))
    if position is not None:
        check_shape("position", position, (sequences,))
    if state is None:
        return
    if position is None:
        raise ValueError("initial_state needs position: the number of tokens tells which slots are filled")
    capacity = window or state.keys.shape[1]
    check_shape("initial_state.keys", state.keys, (sequences, capacity, *k.shape[2:]))
    check_shape("initial_state.values", state.values, (sequences, capacity, *v.shape[2:]))


def _is_whole(q: Tensor, window: int | None, state: WindowState | None, cu_seqlens: Tensor | None) -> bool:
    """Return True if the tokens are whole sequences, of one length, in which each attends to all before it."""
    return state is None and cu_seqlens is None and (window is None or q.shape[1] <= window)


def _attend(
    chosen: Implementation,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor | float,
    window: int | None,
    state: WindowState | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Compute the forms for many tokens; arguments as in the operator."""
    if chosen == "torch" and _is_whole(q, window, state, cu_seqlens):
        if isinstance(temperature, Tensor):
            q, temperature = _scaled(q, temperature), 1.0
        return _attend_causally(q, k, v, temperature)
    scaled, layout = _scaled(q, temperature), Layout.of(k, position, cu_seqlens)
    if chosen == "varlen":
        return _varlen(scaled, k, v, window, state, layout, cu_seqlens)
    if window is None:
        return _attend_all(scaled, k, v, state, layout, cu_seqlens)
    return _attend_in_bands(scaled, k, v, window, state, layout, cu_seqlens)


def _window_after(
    k: Tensor,
    v: Tensor,
    window: int | None,
    state: WindowState | None,
    position: Tensor | None,
    cu_seqlens: Tensor | None,
) -> WindowState:
    """Return the window after the last token; arguments as in the operator."""
    capacity = window or capacity_for(k.shape[1], position, cu_seqlens)
    if state is None and position is None and cu_seqlens is None:
        return WindowState(first_buffer(k, capacity), first_buffer(v, capacity))
    layout, old = Layout.of(k, position, cu_seqlens), (None, None)
    if state is not None:
        old = with_capacity(state, capacity)
        capacity = old.keys.shape[1]
    return WindowState(*(next_buffer(x, b, layout, capacity) for x, b in zip((k, v), old, strict=True)))


def _scaled(q: Tensor, temperature: Tensor | float) -> Tensor:
    """Return the queries times the temperature, in their dtype."""
    return (q * (temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)).to(q.dtype)


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat keys or values (..., J, K) for H heads of queries: (..., H, K)."""
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], dim=-2)


# ----------------------------------------------------------------------------------------------------------- the bands


def _attend_in_bands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    state: WindowState | None,
    layout: Layout,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Attend within a window: lay the tokens out so that every row has ``window`` slots before its first query."""
    batch, length = q.shape[:2]
    if state is None:
        numbers = q.new_zeros(batch, length, dtype=torch.int64)
        if cu_seqlens is not None:
            numbers = sequence_numbers(cu_seqlens.to(q.device, non_blocking=True), length).unsqueeze(0)
        numbers = F.pad(numbers, (window, 0), value=_NO_SEQUENCE)
        return _bands(q, padded(k, window, 0), padded(v, window, 0), numbers, window)
    old_keys, old_values, filled = in_order(state, layout.start)
    if cu_seqlens is None:
        numbers = F.pad(filled.long() - 1, (0, length))  # 0 for filled slots and tokens, -1 for empty slots
        return _bands(q, torch.cat([old_keys, k], 1), torch.cat([old_values, v], 1), numbers, window)
    return _packed_bands(q, (k, v), (old_keys, old_values), filled, layout, window)


def _packed_bands(
    q_1THK: Tensor,
    new: tuple[Tensor, Tensor],
    old: tuple[Tensor, Tensor],
    filled_SW: Tensor,
    layout: Layout,
    window: int,
) -> Tensor:
    """Attend in packed sequences, each of which has a window before its first token.

    In one row L of all windows and tokens, every sequence has its window before its tokens.
    """
    sequences, tokens = len(filled_SW), q_1THK.shape[1]
    device, before = q_1THK.device, window * torch.arange(1, sequences + 1, device=q_1THK.device)
    # 1. Look up the source of each entry of the row: slots of windows and tokens, which stay in their order.
    begin = layout.offset + before - window
    number_L = sequence_numbers(
        torch.cat([begin, begin.new_full((1,), tokens) + before[-1]]), sequences * window + tokens
    )
    index_L = torch.arange(len(number_L), device=device) - begin[number_L]
    is_token_L = index_L >= window
    token_L = (layout.offset[number_L] + index_L - window).clamp(0, tokens - 1)
    slot_L = (number_L * window + index_L).clamp(max=sequences * window - 1)
    source_L = torch.where(is_token_L, sequences * window + token_L, slot_L)
    keys, values = (torch.cat([a.flatten(0, 1), b[0]])[source_L].unsqueeze(0) for a, b in zip(old, new, strict=True))
    seen_L = is_token_L | filled_SW.flatten()[slot_L]
    numbers_1L = torch.where(seen_L, number_L, _NO_SEQUENCE).unsqueeze(0)
    # 2. Attend from every entry behind the first window, and keep what the tokens read.
    readout = _bands(q_1THK[:, token_L[window:]], keys, values, numbers_1L, window)
    number_T = sequence_numbers(torch.cat([layout.offset, layout.offset.new_full((1,), tokens)]), tokens)
    return readout[:, torch.arange(tokens, device=device) + window * number_T]


def _bands(q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, window: int) -> Tensor:
    """Attend from blocks of queries to their band of keys.

    Args:
        q: scaled queries, (R, N, H, K).
        k: keys, (R, W + N, J, K): the key of query i is at W + i.
        v: values, (R, W + N, J, V).
        numbers: sequence of every key, (R, W + N): a query attends to keys of its own number only.
        window: W.

    Queries that pad the last block, and those of no sequence, read keys of no sequence: no row of a mask is empty.
    """
    rows, length, heads = q.shape[:3]
    block = min(length, max(window, _LEAST_BLOCK))
    blocks, span = -(-length // block), window + block
    padding = blocks * block - length
    q, k, v = (padded(x, 0, padding) for x in (q, k, v))
    numbers = F.pad(numbers, (0, padding), value=_NO_SEQUENCE)
    # 1. Cut the rows into blocks, G of them: queries (G, H, C, K), keys and values (G, H, W + C, K).
    q_GHCK = q.unflatten(1, (blocks, block)).flatten(0, 1).transpose(1, 2)
    k_GHLK, v_GHLV = (_for_heads(_spans(x, span, block), heads).transpose(1, 2) for x in (k, v))
    # 2. Mask: the band, within the sequence.
    ahead_CL = torch.arange(span, device=q.device) - torch.arange(block, device=q.device).unsqueeze(1)
    band_CL = (ahead_CL > 0) & (ahead_CL <= window)
    number_GL = numbers.unfold(1, span, block).flatten(0, 1)
    mask_GCL = band_CL & (number_GL[:, window:, None] == number_GL[:, None])
    # 3. Attend.
    readout = F.scaled_dot_product_attention(q_GHCK, k_GHLK, v_GHLV, mask_GCL.unsqueeze(1), scale=1.0)
    return readout.transpose(1, 2).unflatten(0, (rows, blocks)).flatten(1, 2)[:, :length]


def _spans(x: Tensor, span: int, block: int) -> Tensor:
    """Return overlapping spans of rows, one per block: (R, W + N, J, K) -> (G, W + C, J, K)."""
    return x.unfold(1, span, block).movedim(-1, 2).flatten(0, 1)


# ---------------------------------------------------------------------------------------------------------- all tokens


def _attend_causally(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """Attend to all tokens before, where none was read before them."""
    fits = q.device.type == "cuda" and _beyond_flash(q.dtype, q.shape[-1], v.shape[-1]) is None
    if fits and not torch.compiler.is_compiling():
        return _attend_causally_on_cuda(q, k, v, scale)
    q, k, v = (_for_heads(x, q.shape[2]).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


def _attend_causally_on_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend with the kernel of cuDNN or with FlashAttention 2, in half precision.

    The kernel of cuDNN is the faster one, but a plan of it for a length that is new takes as long as reading thousands
    of tokens. So it gets long sequences and those that are trained on, padded at the end to few different lengths.
    """
    length, trained = q.shape[1], torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    options: dict[str, Any] = dict(is_causal=True, scale=scale, enable_gqa=k.shape[2] != q.shape[2])
    if trained or length >= _LEAST_PLANNED:
        q, k, v = (padded(x, 0, _planned_length(length) - length).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)[:, :length]
    with sdpa_kernel(_WITHOUT_PLANS):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _planned_length(length: int) -> int:
    """Return the length of a plan for so many tokens: eight in every octave, multiples of 64."""
    step = max(64, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def _attend_all(
    q: Tensor, k: Tensor, v: Tensor, state: WindowState | None, layout: Layout, cu_seqlens: Tensor | None
) -> Tensor:
    """Attend to all tokens before: in packed sequences one after another, where Python reads their offsets."""
    if cu_seqlens is None:
        assert state is not None
        return _attend_behind(q, k, v, state, layout.start)
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return _attend_packed(q, k, v, state, layout)
    readouts = []
    for i, (first, last) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if first == last:
            continue
        own_q, own_k, own_v = (x[:, first:last] for x in (q, k, v))
        if state is None:
            readouts.append(_attend_causally(own_q, own_k, own_v))
        else:
            own = WindowState(*(x[i : i + 1] for x in state))
            readouts.append(_attend_behind(own_q, own_k, own_v, own, layout.start[i : i + 1]))
    return torch.cat(readouts, 1)


def _attend_behind(q: Tensor, k: Tensor, v: Tensor, state: WindowState, start: Tensor) -> Tensor:
    """Attend to the tokens in a buffer, of which ``start`` (B,) are filled, and to those before."""
    k, v = torch.cat([state.keys, k], 1), torch.cat([state.values, v], 1)
    of_queries = torch.zeros_like(q[..., 0, 0], dtype=torch.int64)
    of_slots = torch.where(_filled(state, start), 0, _NO_SEQUENCE)
    return _attend_in_blocks(q, k, v, of_queries, torch.cat([of_slots, of_queries], 1))


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, state: WindowState | None, layout: Layout) -> Tensor:
    """Attend in packed sequences whose offsets Python does not read: every token meets all keys, most of them masked.

    The windows of all sequences, if there are any, are before the first token.
    """
    offsets = torch.cat([layout.offset, layout.offset.new_full((1,), q.shape[1])])
    of_queries = of_keys = sequence_numbers(offsets, q.shape[1]).unsqueeze(0)
    if state is not None:
        k, v = (torch.cat([old.flatten(0, 1).unsqueeze(0), x], 1) for old, x in zip(state, (k, v), strict=True))
        own = torch.arange(len(layout.start), device=q.device).unsqueeze(1)
        of_slots = torch.where(_filled(state, layout.start), own, _NO_SEQUENCE)
        of_keys = torch.cat([of_slots.flatten().unsqueeze(0), of_queries], 1)
    return _attend_in_blocks(q, k, v, of_queries, of_keys)


def _filled(state: WindowState, start: Tensor) -> Tensor:
    """Return the slots (S, W) of a buffer without a window that hold a token, after ``start`` (S,) tokens."""
    return torch.arange(state.keys.shape[1], device=start.device) < start.unsqueeze(1)


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, of_queries: Tensor, of_keys: Tensor) -> Tensor:
    """Attend to the keys of the own sequence, block of queries by block.

    Args:
        q: scaled queries, (B, N, H, K).
        k: keys, (B, P + N, J, K): P of earlier tokens, then those of the queries' tokens.
        v: values, (B, P + N, J, V).
        of_queries: sequence of every query, (B, N).
        of_keys: sequence of every key, (B, P + N).
    """
    length = q.shape[1]
    before = k.shape[1] - length
    q, k, v = (_for_heads(x, q.shape[2]).transpose(1, 2) for x in (q, k, v))
    index = torch.arange(before + length, device=q.device)
    readouts = []
    for first in range(0, length, GROWTH):
        last = min(first + GROWTH, length)
        seen = slice(0, before + last)
        causal_CL = index[seen] <= before + torch.arange(first, last, device=q.device).unsqueeze(1)
        mask = (causal_CL & (of_keys[:, None, seen] == of_queries[:, first:last, None])).unsqueeze(1)
        readouts.append(
            F.scaled_dot_product_attention(q[:, :, first:last], k[:, :, seen], v[:, :, seen], mask, scale=1.0)
        )
    return torch.cat(readouts, 2).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------- the kernel


@torch.compiler.assume_constant_result
def _takes_groups() -> bool:
    """Return True if ``varlen_attn`` takes fewer heads of keys and values than of queries."""
    return "enable_gqa" in _varlen_parameters()


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    """Return the names of the parameters of PyTorch's ``varlen_attn``; none where there is no such function."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    state: WindowState | None,
    layout: Layout,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Attend with PyTorch's kernel for sequences of different lengths.

    Where a sequence has more keys than queries, its last query is at its last key.
    """
    from torch.nn.attention.varlen import varlen_attn

    batch, length, heads = q.shape[:3]
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    queries = torch.cat([layout.offset, layout.offset.new_full((1,), len(flat_q))])
    # Python does not read offsets on a device: all tokens are a bound on the longest.
    on_cpu = cu_seqlens is not None and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    longest = most = int(cu_seqlens.diff().max()) if cu_seqlens is not None and on_cpu else length
    keys = queries
    if state is not None:
        keys, flat_k, flat_v = _behind_windows(flat_k, flat_v, state, layout, queries)
        most += state.keys.shape[1]
    groups = heads != k.shape[2] and _takes_groups()
    if not groups:
        flat_k, flat_v = _for_heads(flat_k, heads), _for_heads(flat_v, heads)
    options: dict[str, Any] = {"enable_gqa": True} if groups else {}
    reach = (-1 if window is None else window - 1, 0)
    offsets = (queries.int(), keys.int(), longest, most)
    readout = varlen_attn(flat_q, flat_k, flat_v, *offsets, scale=1.0, window_size=reach, **options)
    assert isinstance(readout, Tensor)
    return readout.unflatten(0, (batch, length))


def _behind_windows(
    k_TJK: Tensor, v_TJV: Tensor, state: WindowState, layout: Layout, queries: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Put the tokens that the windows hold before those of each sequence; return offsets, keys and values.

    The row has an entry for every slot. Those of empty slots are behind the last sequence: zero, and without gradient,
    since the kernel does not write the gradients of keys that it does not read.
    """
    sequences, capacity = state.keys.shape[:2]
    held = layout.start.clamp(max=capacity)
    keys = F.pad((queries.diff() + held).cumsum(0), (1, 0))
    row = torch.arange(sequences * capacity + len(k_TJK), device=k_TJK.device)
    number = (torch.searchsorted(keys, row, right=True) - 1).clamp(max=sequences - 1)
    index = row - keys[number]
    slot = number * capacity + (layout.start - held)[number].add(index) % capacity
    token = sequences * capacity + (layout.offset - held)[number] + index
    source = torch.where(index < held[number], slot, token).clamp(max=len(row) - 1)
    used = (row < keys[-1])[:, None, None]
    k, v = (
        torch.where(used, torch.cat([old.flatten(0, 1), new])[source], new.new_zeros(()))
        for old, new in zip(state, (k_TJK, v_TJV), strict=True)
    )
    return keys, k, v
