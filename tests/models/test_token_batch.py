"""Masks, labels and offsets that do not fit are named; labels of which none counts are worth nothing."""

import pytest
import torch

from resolvent.ops import IGNORED

from .small import PHASE1, PHASE2, tokens


@pytest.fixture(params=[PHASE1, PHASE2], ids=["phase1", "phase2"], scope="module")
def model(request):
    return request.param.model()


MASKS = {
    "nan": ([1.0, torch.nan, 1.0], "got nan"),
    "every value nan": ([torch.nan] * 3, "got nan"),
    "negative": ([1, -1, 1], "got -1"),
    "added to scores": ([0.0, -torch.inf, 0.0], "got -inf"),
    "twos": ([2, 2, 2], "got 2"),
    "part of one": ([1.0, 0.5, 1.0], "got 0.5"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_mask_values_other_than_0_and_1_are_refused(model, kind):
    values, message = MASKS[kind]
    mask, ids = torch.tensor([values, [1, 1, 1]]), tokens(3)
    for attempt in (model, lambda ids, **options: model.generate(ids, 2, **options)):
        with pytest.raises(ValueError, match=f"attention_mask must be 1 for tokens and 0 for padding, {message}"):
            attempt(ids, attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_mask_dtype_does_not_matter(model, dtype):
    mask, ids = torch.tensor([[0, 1, 1], [1, 1, 0]]), tokens(3)
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)), model(ids, attention_mask=mask))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int32), r"labels must be int64, got torch.int32; use labels.long\(\)"),
        (torch.zeros(2, 3), r"labels must be int64, got torch.float32; use labels.long\(\)"),
        (torch.zeros(1, 3, dtype=torch.int64), r"labels must have the shape of input_ids, \(2, 3\), got \(1, 3\)"),
        (torch.zeros(2, 3, dtype=torch.int64, device="meta"), r"labels is on meta, input_ids on cpu; use labels.to"),
        (torch.full((2, 3), 97), r"label 97 is outside the vocabulary of 97 \(0..96\)"),
        (torch.full((2, 3), -1), "label -1 is outside the vocabulary"),
        ([[0] * 3] * 2, "labels must be a tensor"),
    ],
    ids=["int32", "float", "batch", "device", "beyond", "below", "list"],
)
def test_mismatched_labels_are_refused(model, labels, message):
    with pytest.raises(ValueError, match=message):
        model(tokens(3), labels=labels)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.tensor([0.0, 3.0]), "got torch.float32 of shape"),
        (torch.tensor([False, True]), "got torch.bool"),
        (torch.tensor([0, 3], dtype=torch.uint8), "got torch.uint8"),
        (torch.tensor([[0, 3]]), r"of shape \(1, 2\)"),
        (torch.tensor([0, 4]), "must rise from 0 to the number of tokens 3"),
        (torch.tensor([0, 3], device="meta"), "cu_seqlens is on meta, input_ids on cpu; use cu_seqlens.to"),
        ([0, 3], "cu_seqlens must be a tensor"),
    ],
    ids=["float", "bool", "uint8", "matrix", "beyond", "device", "list"],
)
def test_mismatched_offsets_are_refused(model, offsets, message):
    with pytest.raises(ValueError, match=message):
        model(tokens(3, batch=1), cu_seqlens=offsets)


def test_loss_without_counted_labels_is_zero(model):
    """And gradients of zero: NaN, as F.cross_entropy has it, would spoil all weights."""
    ids = tokens(20)
    loss = model(ids, labels=torch.full_like(ids, IGNORED))
    assert loss == 0 and loss.requires_grad
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    assert not any(gradient.any() for gradient in gradients)
