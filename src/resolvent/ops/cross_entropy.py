r"""Cross-entropy of a linear head, a chunk of tokens at a time: the logits of all tokens never lie in memory together.

``loss = mean over t of (logsumexp(W h_t) - (W h_t)[label_t])``. The gradient of a token's logits is
``softmax(W h_t) - onehot(label_t)``: known as soon as the logits are, it takes their place in memory. So one walk
over the chunks leaves the loss and both gradients, and backward only scales them. Sums over the vocabulary and over the
tokens are taken in at least float32, whatever the dtype of the products: precision does not depend on the chunks.

Shapes: T tokens, D width, V vocabulary, C tokens of a chunk.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from .dispatch import count_run, select
from .library import operator

IGNORED = -100
"""Label of a position that does not count."""

_CPU_LOGITS_BYTES = 2**27
"""Memory for the logits of a chunk on the CPU: not much more than its cache."""
LOGITS_BYTES = 2**29
"""Memory for the logits of a chunk elsewhere, where long products run best."""
_ALIGNMENT = 64
"""Multiple to which rows of logits are padded, for matrix units and wide loads."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORED,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the negative log-likelihood of the labels under ``softmax(hidden @ weight.T)``.

    Where a label counts, it is that of ``F.cross_entropy``.

    Args:
        hidden: (T, D). Under autocast, it and ``weight`` are cast to autocast's dtype for the products.
        weight: (V, D).
        labels: tokens, int64 (T,), in 0..V - 1, or ``ignore_index`` for positions that do not count.
        ignore_index: label of positions that do not count.
        reduction: the mean over the labels that count, or their sum.
        chunk_tokens: tokens whose logits are held at once; by default as many as suit the device.
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        Nats of the labels that count, a scalar of at least float32; where none counts, exactly zero with zero gradients
        (``F.cross_entropy`` has NaN, which would spoil every weight). Differentiable, once, in ``hidden`` and
        ``weight``, whose gradients come in their own dtypes.

    Raises:
        ValueError: shapes do not fit, a label is no token, ``chunk_tokens`` is not above zero, or there is no such
            reduction. Labels on a device are not read: a wrong one makes the loss NaN, or stops it.

    Example:
        >>> hidden, weight = torch.randn(70, 16), torch.randn(257, 16)  # all tokens in one axis, packed or not
        >>> labels = torch.randint(257, (70,)).index_fill(0, torch.tensor([4, 69]), IGNORED)  # ends of two sequences
        >>> loss = linear_cross_entropy(hidden, weight, labels)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, labels))
        True
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, labels))
        raise ValueError(f"expected hidden (T, D), weight (V, D) and labels (T,), got {shapes}")
    _check_labels(labels, len(weight), ignore_index)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk_tokens}")
    device, dtype = hidden.device.type, torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    total, _, _ = _linear_cross_entropy(hidden, weight, labels, ignore_index, chunk_tokens, dtype, backend, *wanted)
    return total if reduction == "sum" else total / (labels != ignore_index).sum().clamp(min=1)


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = labels[((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)]
    if len(wrong):
        raise ValueError(
            f"label {wrong[0]} is outside the vocabulary of {vocabulary} (0..{vocabulary - 1}); places that do not "
            f"count are labelled {ignore_index}"
        )


def _allocate(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    chunk_tokens: int | None,
    dtype: torch.dtype,
    backend: str,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the results of ``_linear_cross_entropy``."""
    total = hidden.new_empty((), dtype=torch.promote_types(dtype, torch.float32))
    return (
        total,
        hidden.new_empty(hidden.shape if wants_hidden else 0),
        weight.new_empty(weight.shape if wants_weight else 0),
    )


@operator("linear_cross_entropy", _allocate)
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    chunk_tokens: int | None,
    dtype: torch.dtype,
    backend: str,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the losses, and its gradients in ``hidden`` and ``weight``; empty where they are not wanted.

    ``dtype`` is that of the products; the other arguments are those of ``linear_cross_entropy``.
    """
    device, tokens, vocabulary = hidden.device, len(hidden), len(weight)
    if select(backend, device, "softmax_cross_entropy") == "triton":
        from .triton.cross_entropy import softmax_cross_entropy as run
    else:
        run = softmax_cross_entropy_torch
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(device.type, enabled=False):
        table = _aligned(weight, dtype)
        chunk = chunk_tokens or _chunk_tokens(tokens, len(table), dtype, device)
        buffer = torch.empty(min(chunk, tokens), len(table), dtype=dtype, device=device)
        total = torch.zeros((), dtype=wide, device=device)
        grad_hidden = torch.empty(hidden.shape if wants_hidden else 0, dtype=hidden.dtype, device=device)
        grad_table = torch.empty(table.shape if wants_weight else 0, dtype=wide, device=device)
        for start in range(0, max(tokens, 1), chunk):
            part = slice(start, start + chunk)
            # 1. The logits of a chunk.
            hidden_CD = hidden[part].to(dtype)
            logits_CV = torch.mm(hidden_CD, table.T, out=buffer[: len(hidden_CD)])
            # 2. Its losses; the gradient takes the place of the logits.
            total += run(logits_CV[:, :vocabulary], labels[part], ignore_index, wants_hidden or wants_weight).sum()
            # 3. The gradients of the hidden states and of the head.
            if wants_hidden:
                grad_hidden[part] = logits_CV @ table
            if wants_weight:
                _accumulate(grad_table, logits_CV.T, hidden_CD, beta=1 if start else 0)
    return total, grad_hidden, grad_table[:vocabulary].to(weight.dtype)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, *gradients = output
    ctx.wanted = inputs[-2:]
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)


@torch.autograd.function.once_differentiable
def _scale_gradients(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    scaled = [x * grad_total if wanted else None for x, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)]
    return *scaled, *[None] * 7


torch.library.register_autograd("resolvent::linear_cross_entropy", _scale_gradients, setup_context=_keep_gradients)


def softmax_cross_entropy_torch(logits: Tensor, labels: Tensor, ignore_index: int, wants_gradient: bool) -> Tensor:
    """Compute the negative log-likelihood of each row's label, zero where it is ignored.

    Args:
        logits: (C, V), any float; replaced by the gradient of the losses in them. Rows may be views of longer ones,
            which end in zeros; then these stay, or become zeros again.
        labels: int64 (C,).
        ignore_index: label of rows that do not count.
        wants_gradient: False leaves anything in ``logits``.

    Returns:
        losses in nats (C,), at least float32.
    """
    count_run("softmax_cross_entropy", "torch")
    ignored = labels == ignore_index
    label = torch.where(ignored, 0, labels).unsqueeze(1)
    narrow = logits.dtype in (torch.bfloat16, torch.float16)
    if narrow:
        log_probability = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    else:
        log_probability = torch.log_softmax(logits, dim=-1, out=logits)
    nats = torch.where(ignored, 0.0, -log_probability.gather(1, label).squeeze(1))
    if wants_gradient:
        gradient = log_probability.exp_()
        gradient.scatter_add_(1, label, gradient.new_full((), -1.0).expand_as(label))
        gradient[ignored] = 0.0
        if narrow:
            logits.copy_(gradient)
    return nats


def _aligned(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the head in the dtype of the products, with rows of zeros added up to an aligned vocabulary.

    Their logits are zero, which is their gradient, too. On the CPU they gain nothing and would cost a copy.
    """
    if weight.device.type == "cpu" and weight.dtype == dtype:
        return weight
    rows = -(-len(weight) // _ALIGNMENT) * _ALIGNMENT
    table = weight.new_zeros(rows, weight.shape[1], dtype=dtype)
    table[: len(weight)] = weight
    return table


def _chunk_tokens(tokens: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the tokens of a chunk, for as few chunks of equal size as the memory for their logits allows."""
    budget = _CPU_LOGITS_BYTES if device.type == "cpu" else LOGITS_BYTES
    most = max(1, budget // (vocabulary * dtype.itemsize))
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


def _accumulate(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """Compute ``total = beta total + a @ b`` in the dtype of ``total``, which may be wider than that of the factors."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)
