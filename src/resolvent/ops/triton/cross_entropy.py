"""Triton kernel of the softmax cross-entropy of rows of logits, with the gradient in the place of the logits.

A program walks over a row twice: first for its greatest logit and the sum of exponentials relative to it, then to
replace each logit by its gradient. The second walk finds most of the row in the cache.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import count_run
from ..precision import wide_dtype

BLOCK = 4096


def softmax_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int, wants_gradient: bool) -> Tensor:
    """Compute ``ops.cross_entropy.softmax_cross_entropy_torch`` on whole rows, whose loads are aligned."""
    wide = wide_dtype(logits)
    nats = torch.empty(len(logits), dtype=wide, device=logits.device)
    if not len(logits):
        return nats
    count_run("softmax_cross_entropy", "triton")
    with torch.cuda.device_of(logits):
        launch: Any = _softmax_cross_entropy[(len(logits),)]  # a launch takes more than the kernel's own arguments
        launch(
            logits,
            labels,
            nats,
            logits.shape[1],
            logits.stride(0),
            ignore_index,
            wants_gradient,
            tl.float64 if wide == torch.float64 else tl.float32,
            BLOCK,
            num_warps=8,
        )
    return nats


@triton.jit
def _softmax_cross_entropy(
    logits,
    labels,
    nats,
    vocabulary,
    stride,
    ignore_index,
    WANTS_GRADIENT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    ignored = label == ignore_index
    # The loss of a label that is no token is NaN. Load its logit before the row is overwritten.
    chosen = tl.load(logits + label, mask=(label >= 0) & (label < vocabulary), other=float("nan")).to(WIDE)

    most, total = tl.full((), -float("inf"), WIDE), tl.zeros((), WIDE)
    for start in range(0, stride, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < stride, other=-float("inf")).to(WIDE)
        x = tl.where(column < vocabulary, x, -float("inf"))
        greater = tl.maximum(most, tl.max(x, 0))
        total = total * tl.exp(most - greater) + tl.sum(tl.exp(x - greater), 0)
        most = greater
    tl.store(nats + row, tl.where(ignored, 0.0, tl.log(total) - (chosen - most)))

    if WANTS_GRADIENT:
        scale = tl.where(ignored, 0.0, 1.0 / total)
        for start in range(0, stride, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits + column, mask=column < stride, other=-float("inf")).to(WIDE)
            probability = tl.exp(tl.where(column < vocabulary, x, -float("inf")) - most) * scale
            gradient = tl.where((column == label) & (label != ignore_index), probability - 1.0, probability)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < stride)
