"""The kernels of the gated prefix sum against float64: interpreted on the CPU, compiled where there is a GPU."""

import pytest
import torch

from resolvent.ops import dispatch, gated_prefix_sum, gated_prefix_sum_reference

pytest.importorskip("triton")

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def inputs(length, batch=2, rank=11, sequences=None):
    """Gates, values and a state in float64, as float32 holds them."""
    shape = (batch, length, rank)
    start = torch.randn(sequences or batch, rank)
    return [x.float().double() for x in (torch.rand(shape), torch.randn(shape), start)]


def run(gates, values, start, **options):
    """Both results and the gradients of a loss that reads both."""
    leaves = [x.detach().clone().requires_grad_() for x in (gates, values, start)]
    sums, final = gated_prefix_sum(*leaves[:2], initial_state=leaves[2], **options)
    weights = torch.cos(torch.arange(sums.numel(), dtype=torch.float64)).view(sums.shape).to(sums.device)
    loss = (weights * sums).sum() + final.square().sum()
    return [sums, final], torch.autograd.grad(loss, leaves)


def check(given, device, dtype=torch.float32, tolerance=1e-6, **options):
    """Hold the kernels to what torch computes in float64, gradients included."""
    expected, expected_gradients = run(*given, backend="torch", **options)
    gates, values, start = (x.to(device) for x in given)
    found, gradients = run(gates.to(dtype), values.to(dtype), start, backend="triton", **options)
    for ours, exact in zip([*found, *gradients], [*expected, *expected_gradients], strict=True):
        assert ours.shape == exact.shape
        assert (ours.cpu().double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_the_kernels_are_the_reference_gradients_included(length, device):
    given = inputs(length)
    check(given, device)
    check(given, device, torch.float64, 1e-13)
    found, _ = gated_prefix_sum(*(x.to(device) for x in given[:2]), initial_state=given[2].to(device), backend="triton")
    torch.testing.assert_close(found.cpu(), gated_prefix_sum_reference(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_packed_sequences_with_states(device):
    lengths = [0, 5, 64, 1, 0, 130, 0]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    check(inputs(sum(lengths), batch=1, sequences=len(lengths)), device, cu_seqlens=offsets)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("read", ["sums", "state"])
def test_a_loss_may_read_one_result(read, device):
    gates, values, start = inputs(30)
    leaves = [x.to(device).requires_grad_() for x in (gates, values, start)]
    for backend in ("torch", "triton"):
        results = gated_prefix_sum(*leaves[:2], initial_state=leaves[2], backend=backend)
        gradients = torch.autograd.grad(results[0 if read == "sums" else 1].square().sum(), leaves)
        if backend == "torch":
            expected = gradients
    for ours, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_is_widened_before_it_is_summed(device):
    gates, values, start = inputs(300)
    gates, values = (x.bfloat16().double() for x in (gates, values))
    found = gated_prefix_sum(
        *(x.to(device, torch.bfloat16) for x in (gates, values)), initial_state=start.to(device), backend="triton"
    )[0]
    assert found.dtype == torch.float32
    exact = gated_prefix_sum_reference(gates, values, start)
    assert (found.cpu() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_empty_input_keeps_the_state(device):
    gates, values, start = (x.to(device) for x in inputs(0))
    sums, after = gated_prefix_sum(gates, values, initial_state=start, backend="triton")
    assert sums.shape == (2, 0, 11)
    assert torch.equal(after, start)


@pytest.mark.parametrize("device", DEVICES)
def test_launches_are_counted(device):
    gates, values, _ = (x.to(device) for x in inputs(3))
    before = dispatch.calls.copy()
    gated_prefix_sum(gates, values, backend="triton")
    assert dispatch.calls - before == {("gated_prefix_sum", "triton"): 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU")
@pytest.mark.parametrize("packed", [False, True])
def test_the_operators_keep_the_rules_of_torch_library(packed):
    gates, values, start = inputs(5, batch=1, sequences=2 if packed else 1)
    offsets = torch.tensor([0, 2, 5]) if packed else None
    operands = [x.requires_grad_() for x in (gates.float(), values.float(), start)]
    torch.library.opcheck(torch.ops.resolvent.prefix_sum.default, (*operands, offsets))
    plain = [x.detach() for x in operands]
    upstream = torch.randn_like(plain[0]), torch.randn_like(plain[2])
    torch.library.opcheck(torch.ops.resolvent.prefix_sum_backward.default, (*upstream, *plain[:2], offsets))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU")
def test_compiles_without_a_graph_break():
    gates, values, start = inputs(5)
    leaves = [x.requires_grad_() for x in (gates.float(), values.float(), start)]

    def loss(gates, values, start):
        sums, final = gated_prefix_sum(gates, values, initial_state=start, backend="triton")
        return sums.square().sum() + final.square().sum()

    expected, found = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)
