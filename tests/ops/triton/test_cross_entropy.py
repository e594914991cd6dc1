"""The kernel: interpreted on the CPU, compiled where there is a GPU."""

import pytest
import torch
import torch.nn.functional as F

from resolvent.ops import IGNORED, linear_cross_entropy

from ..test_cross_entropy import error, inputs, loss_and_gradients, reference

pytest.importorskip("triton")
from resolvent.ops.triton.cross_entropy import BLOCK, softmax_cross_entropy

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocabulary", [5, 64, 101, BLOCK, BLOCK + 13, 2 * BLOCK + 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_rows_of_any_length(device, vocabulary, dtype, tolerance):
    logits = (5 * torch.randn(6, vocabulary, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(vocabulary, (6,))
    labels[0], labels[1], labels[2] = IGNORED, vocabulary - 1, 0
    expected = F.cross_entropy(logits, labels, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    padded = torch.full((6, -(-vocabulary // 64) * 64), 1e4, dtype=dtype, device=device)
    rows = padded[:, :vocabulary]
    rows.copy_(logits.detach())
    untouched = rows.clone()
    nats = softmax_cross_entropy(rows, labels.to(device), IGNORED, False)
    assert torch.equal(rows, untouched)
    assert torch.equal(nats, softmax_cross_entropy(rows, labels.to(device), IGNORED, True))
    assert error(nats, expected.detach()) < tolerance
    assert error(rows, gradient) < tolerance
    assert not padded[:, vocabulary:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_extreme_logits_and_invalid_labels(device):
    logits = torch.tensor([[1e30, 0.0, -1e30], [-1e30, -1e30, -1e30], [0.0, 1.0, 2.0]], device=device)
    labels = torch.tensor([1, 2, 7], device=device)
    nats = softmax_cross_entropy(logits, labels, IGNORED, True)
    torch.testing.assert_close(nats[:2].cpu(), torch.tensor([1e30, torch.tensor(3.0).log()]))
    assert nats[2].isnan()
    expected = torch.tensor([[1.0, -1.0, 0.0], [1 / 3, 1 / 3, -2 / 3]])
    torch.testing.assert_close(logits[:2].cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_operator_with_the_kernel(device, dtype, tolerance):
    given = inputs(dtype=dtype, device=device)
    found = loss_and_gradients(*given, chunk_tokens=16, backend="triton")
    for ours, exact in zip(found, reference(*given), strict=True):
        assert error(ours, exact) < tolerance


@pytest.mark.parametrize("device", DEVICES)
def test_the_ignored_label_may_be_a_token(device):
    hidden, weight, labels = inputs(device=device)
    labels = torch.where(labels == IGNORED, 100, labels)
    found, expected = (
        loss_and_gradients(hidden, weight, labels, ignore_index=100, backend=backend) for backend in ("triton", "torch")
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1000, 257), (1000, 50257), (64, BLOCK)])
def test_bfloat16_on_the_gpu(tokens, vocabulary, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    hidden, weight, labels = inputs(tokens, 128, vocabulary, dtype, "cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = loss_and_gradients(hidden, weight, labels, chunk_tokens=300, backend="triton")
        again = loss_and_gradients(hidden, weight, labels, chunk_tokens=300, backend="triton")
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    for ours, exact in zip(found, reference(hidden, weight, labels), strict=True):
        assert error(ours, exact) < 5e-3


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    vocabulary = 50257
    rows = 2**31 // vocabulary + 10
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    labels = torch.full((rows,), 7, device="cuda")
    nats = softmax_cross_entropy(logits, labels, IGNORED, True)
    torch.testing.assert_close(nats, torch.full_like(nats, vocabulary).log())
    assert (logits[:, 7] == -1).all()
    assert (logits[-1, 8:] == logits[0, 8]).all() and logits[0, 8] > 0


@pytest.mark.gpu
def test_never_synchronizes_and_holds_one_chunk():
    given = inputs(2048, 64, 50257, torch.bfloat16, "cuda")
    linear_cross_entropy(*given, chunk_tokens=256).backward()  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(*given, chunk_tokens=256).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 2048 * 50257 * 2 / 2
