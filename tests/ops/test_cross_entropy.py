import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resolvent.ops import IGNORED, cross_entropy, linear_cross_entropy
from resolvent.ops.cross_entropy import _chunk_tokens, _linear_cross_entropy

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def inputs(tokens=50, width=24, vocabulary=101, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a head with logits of standard deviation 2, and labels of which some do not count."""
    hidden = torch.randn(tokens, width, dtype=torch.float64).to(device, dtype).requires_grad_()
    weight = (2 * width**-0.5 * torch.randn(vocabulary, width, dtype=torch.float64)).to(device, dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,))
    labels[3::7] = IGNORED
    return hidden, weight, labels.to(device)


def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients in float64, by the definition."""
    hidden, weight = (x.detach().cpu().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, labels.cpu(), ignore_index=IGNORED)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def loss_and_gradients(hidden: Tensor, weight: Tensor, labels: Tensor, **options) -> tuple[Tensor, ...]:
    loss = linear_cross_entropy(hidden, weight, labels, **options)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to the root mean square of what is expected."""
    return ((found.cpu().double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 16, 50, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_loss_and_gradients_are_those_of_cross_entropy(device, chunk_tokens, dtype, tolerance):
    given = inputs(dtype=dtype, device=device)
    found = loss_and_gradients(*given, chunk_tokens=chunk_tokens, backend="torch")
    assert [x.dtype for x in found] == [dtype] * 3
    for ours, exact in zip(found, reference(*given), strict=True):
        assert error(ours, exact) < tolerance


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("chunk_tokens", [None, 48])
def test_bfloat16_inputs_stay_close(device, chunk_tokens):
    given = inputs(300, 64, 517, torch.bfloat16, device)
    loss, *gradients = loss_and_gradients(*given, chunk_tokens=chunk_tokens)
    assert loss.dtype == torch.float32
    assert [x.dtype for x in gradients] == [torch.bfloat16] * 2
    for ours, exact in zip((loss, *gradients), reference(*given), strict=True):
        assert error(ours, exact) < 5e-3


def test_precision_does_not_depend_on_the_chunks():
    """Gradients of many chunks are summed in float32, not in the bfloat16 of the products."""
    given = inputs(600, 32, 101)
    _, _, exact = reference(*given)
    with torch.autocast("cpu", torch.bfloat16):
        few, many = (loss_and_gradients(*given, chunk_tokens=tokens)[2] for tokens in (600, 6))
    assert few.dtype == torch.float32
    assert error(many, exact) < 1.01 * error(few, exact)
    assert error(many, few.double()) < 1e-6


def test_autocast_decides_the_dtype_of_the_products():
    given = inputs(40, 32, 101)
    narrow = [x.detach().bfloat16() for x in given[:2]]
    with torch.autocast("cpu", torch.bfloat16):
        loss, *gradients = loss_and_gradients(*given)
    assert [x.dtype for x in (loss, *gradients)] == [torch.float32] * 3
    assert torch.equal(loss, linear_cross_entropy(*narrow, given[2]))
    double = [x.detach().double() for x in given[:2]]
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_cross_entropy(*double, given[2]).dtype == torch.float64


def test_upstream_gradients_scale():
    hidden, weight, labels = inputs()
    plain = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    scaled = torch.autograd.grad(-3 * linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    for ours, one in zip(scaled, plain, strict=True):
        torch.testing.assert_close(ours, -3 * one)


def test_ignored_labels_add_nothing():
    hidden, weight, labels = inputs()
    _, grad_hidden, grad_weight = loss_and_gradients(hidden, weight, labels)
    assert not grad_hidden[labels == IGNORED].any()
    kept = labels != IGNORED
    _, grad_kept, grad_weight_kept = loss_and_gradients(
        hidden.detach()[kept].requires_grad_(), weight, labels[kept], chunk_tokens=7
    )
    torch.testing.assert_close(grad_hidden[kept], grad_kept)
    torch.testing.assert_close(grad_weight, grad_weight_kept)


def test_the_ignored_label_may_be_a_token():
    hidden, weight, labels = inputs()
    labels = torch.where(labels == IGNORED, 100, labels)
    loss = F.cross_entropy(hidden @ weight.T, labels, ignore_index=100)
    expected = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    found = loss_and_gradients(hidden, weight, labels, ignore_index=100)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_sum_of_the_labels():
    hidden, weight, labels = inputs()
    loss = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORED, reduction="sum")
    expected = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    found = loss_and_gradients(hidden, weight, labels, reduction="sum", chunk_tokens=16)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    nothing = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED), reduction="sum")
    assert nothing == 0 and not any(g.any() for g in torch.autograd.grad(nothing, (hidden, weight)))


def test_mean_without_counted_labels_is_zero():
    """F.cross_entropy gives NaN here."""
    hidden, weight, labels = inputs()
    nothing = torch.full_like(labels, IGNORED)
    assert F.cross_entropy(hidden @ weight.T, nothing).isnan()
    assert [x.any().item() for x in loss_and_gradients(hidden, weight, nothing)] == [False] * 3


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_costs_no_gradient(frozen):
    hidden, weight, labels = inputs()
    expected = dict(zip(("hidden", "weight"), loss_and_gradients(hidden, weight, labels)[1:], strict=True))
    given = dict(hidden=hidden, weight=weight)
    given[frozen] = given[frozen].detach()
    linear_cross_entropy(**given, labels=labels).backward()
    (name,) = given.keys() - {frozen}
    assert torch.equal(given[name].grad, expected[name])


def test_without_gradients_only_the_loss_is_computed(monkeypatch):
    hidden, weight, labels = inputs()
    seen = []
    run = cross_entropy.softmax_cross_entropy_torch
    monkeypatch.setattr(cross_entropy, "softmax_cross_entropy_torch", lambda *args: seen.append(args[3]) or run(*args))
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels)
    with torch.inference_mode():
        linear_cross_entropy(hidden, weight, labels)
    linear_cross_entropy(hidden.detach(), weight.detach(), labels)
    linear_cross_entropy(hidden, weight.detach(), labels)
    assert seen == [False, False, False, True]


def test_only_the_logits_of_a_chunk_are_held(monkeypatch):
    rows = []
    run = cross_entropy.softmax_cross_entropy_torch

    def seen(logits, *args):
        rows.append(logits.untyped_storage().nbytes())
        return run(logits, *args)

    monkeypatch.setattr(cross_entropy, "softmax_cross_entropy_torch", seen)
    linear_cross_entropy(*inputs(50), chunk_tokens=16).backward()
    assert rows == [16 * 101 * 4] * 4


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "dtype", "device", "expected"),
    [
        (1024, 257, torch.float32, "cpu", 1024),  # a small vocabulary is one chunk
        (1024, 50257, torch.float32, "cpu", 512),
        (16384, 50304, torch.bfloat16, "cuda", 4096),
        (8192, 50304, torch.bfloat16, "cuda", 4096),
        (5400, 50304, torch.bfloat16, "cuda", 2700),  # chunks of one size, no small rest
        (3, 2**30, torch.float32, "cpu", 1),
        (0, 257, torch.float32, "cpu", 1),
    ],
)
def test_chunks_suit_the_device(tokens, vocabulary, dtype, device, expected):
    assert _chunk_tokens(tokens, vocabulary, dtype, torch.device(device)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_the_operator_is_well_registered(dtype, wants):
    hidden, weight, labels = inputs()
    hidden, weight = hidden.detach().requires_grad_(wants[0]), weight.detach().requires_grad_(wants[1])
    torch.library.opcheck(_linear_cross_entropy, (hidden, weight, labels, IGNORED, 16, dtype, "torch", *wants))


def test_compiles_without_a_graph_break():
    hidden, weight, labels = inputs()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden.tanh(), weight, labels, chunk_tokens=16)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, expected = compiled(hidden, weight), loss(hidden, weight)
        assert torch.equal(found, expected)
        for ours, eager in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (found, expected)), strict=True):
            torch.testing.assert_close(ours, eager)


def test_wrong_calls_are_named():
    hidden, weight, labels = inputs()
    for wrong in ((hidden[:, :5], weight, labels), (hidden, weight, labels[:5]), (hidden[None], weight, labels)):
        with pytest.raises(ValueError, match=r"expected hidden \(T, D\), weight \(V, D\) and labels \(T,\)"):
            linear_cross_entropy(*wrong)
    with pytest.raises(ValueError, match="chunk_tokens must be >= 1, got 0"):
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=0)
    with pytest.raises(ValueError, match="reduction must be mean or sum, got 'none'"):
        linear_cross_entropy(hidden, weight, labels, reduction="none")
    with pytest.raises(ValueError, match=r"label 101 is outside the vocabulary of 101 \(0..100\).*labelled -100"):
        linear_cross_entropy(hidden, weight, labels.clamp(min=101))
    with pytest.raises(ValueError, match="label -1 is outside"):
        linear_cross_entropy(hidden, weight, labels.new_full(labels.shape, -1))
    with pytest.raises(ValueError, match=r"labels must be int64, got torch.float32"):
        linear_cross_entropy(hidden, weight, labels.float())
