"""The kernels of the BK-Core on the GPU, at the sizes they are made for, against complex128."""

import pytest
import torch

from resolvent.ops import dispatch, resolvent_diagonal, resolvent_diagonal_reference

pytest.importorskip("triton")
from resolvent.ops.triton import bk_core

from .chains import STRONG, WEAK, chain, check, relative, run, states

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _on_the_gpu():
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("damping", [WEAK, STRONG])
@pytest.mark.parametrize("length", [1, 2, 63, 255, 256, 257, 1000, 2047, 2048, 2049, 5000, 9001])
def test_results_and_gradients(length, damping, with_state):
    alpha, coupling = chain(length, batch=2, damping=damping)
    check(alpha, coupling, states(2) if with_state else None)


@pytest.mark.parametrize(
    ("batch", "length", "heads"),
    [(64, 2048, 1), (16, 1024, 8), (8, 2048, 16), (300, 4096, 4), (2000, 7, 8), (1, 100_000, 1), (1, 131_072, 8)],
)
def test_shapes_of_training(batch, length, heads):
    alpha, coupling = chain(length, heads, batch, damping=0.1)
    check(alpha, coupling, states(batch, heads))


@pytest.mark.parametrize("damping", [WEAK, STRONG])
def test_one_chain_of_a_million_sites(damping):
    alpha, coupling = chain(1_048_576, heads=1, damping=damping)
    check(alpha, coupling, states(1, 1))


@pytest.mark.parametrize("damping", [WEAK, STRONG])
def test_matches_the_dense_inverse(damping):
    alpha, coupling = chain(2048, heads=1, damping=damping)
    single = (alpha.to(torch.complex64), coupling.float())
    two_sided, _ = resolvent_diagonal(*single, form="two_sided")
    assert relative(two_sided, resolvent_diagonal_reference(alpha, coupling, "two_sided")) <= 1e-5
    sites = [0, 1, 7, 8, 255, 256, 1000, 2047]
    blocks = [resolvent_diagonal_reference(alpha[:, : i + 1], coupling, "two_sided")[:, -1] for i in sites]
    assert relative(resolvent_diagonal(*single)[0][:, sites], torch.stack(blocks, 1)) <= 1e-5


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1000])
def test_any_block_size(block_size):
    alpha, coupling = chain(20_000, heads=2)
    check(alpha, coupling, states(1, 2), block_size)


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "lengths", [[0, 1, 2, 63, 0, 1000, 3000, 0], [5, 40_000, 0, 700], [511] * 32], ids=["mixed", "one long", "even"]
)
def test_packed(lengths, where):
    alpha, coupling = chain(sum(lengths))
    offsets = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(where)
    check(alpha, coupling, states(len(lengths)), cu_seqlens=offsets)
    check(alpha, coupling, cu_seqlens=offsets, form="two_sided")


def test_two_runs_agree_to_the_bit():
    for batch, length, heads in ((64, 2048, 1), (1, 100_000, 2)):
        alpha, coupling = chain(length, heads, batch)
        for one, other in zip(run(alpha, coupling), run(alpha, coupling), strict=True):
            assert torch.equal(one, other)


def test_strided_and_conjugated_inputs():
    alpha, coupling = chain(700, heads=4, batch=2)
    alpha, coupling = alpha.to(torch.complex64), coupling.float()
    expected, _ = resolvent_diagonal(alpha, coupling, backend="triton")
    for other in (
        alpha.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([alpha, alpha], -1)[..., 1],
        alpha.conj().resolve_conj().conj(),
    ):
        assert torch.equal(resolvent_diagonal(other, coupling, backend="triton")[0], expected)
    shifted = torch.cat([alpha[:1, :1], alpha[:1]], 1)[:, 1:]  # contiguous, and not aligned to 16 bytes for one head
    assert torch.equal(resolvent_diagonal(shifted, coupling, backend="triton")[0], expected[:1])
    one_head = torch.cat([alpha[:1, :1, :1], alpha[:1, :, :1]], 1)[:, 1:]
    assert one_head.is_contiguous() and one_head.data_ptr() % 16
    assert torch.equal(resolvent_diagonal(one_head, coupling[:1], backend="triton")[0], expected[:1, :, :1])


def test_a_new_length_compiles_nothing():
    def variants():
        device = torch.cuda.current_device()
        return [len(kernel.device_caches[device][0]) for kernel in (bk_core._forward_kernel, bk_core._backward_kernel)]

    coupling = torch.ones(1)
    for heads in (1, 2, 16):
        run(*chain(1025, heads))
    before = variants()
    assert min(before) > 0
    for length in (1026, 1500, 2000, 2047, 2048, 2049, 4097, 8192):
        run(*chain(length, heads=1))
        run(*chain(length, heads=16, batch=3))
    assert variants() == before
    for length in range(1, 3000, 37):
        resolvent_diagonal(chain(length, 1)[0].to(torch.complex64), coupling)
    assert variants()[0] <= before[0] + 3


def test_offsets_beyond_32_bits():
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    length, heads = 2**26 + 100, 17
    alpha = torch.randn(1, length, heads, 2)
    alpha[..., 1] = -3 - alpha[..., 1].abs()
    alpha = torch.view_as_complex(alpha)
    g, last = resolvent_diagonal(alpha, torch.ones(heads))
    # So strongly damped a chain remembers some ten sites: its end does not know where it began.
    end, state = resolvent_diagonal(alpha[:, -300:].to(torch.complex128), torch.ones(heads).double(), backend="torch")
    assert relative(g[:, -200:], end[:, -200:]) <= 1e-5
    assert relative(last, state) <= 1e-5


def test_the_choice_by_device_and_precision():
    alpha, coupling = chain(10)
    before = dispatch.calls.copy()
    resolvent_diagonal(alpha.to(torch.complex64), coupling.float())
    resolvent_diagonal(alpha, coupling)
    counted = dispatch.calls - before
    assert counted["resolvent_diagonal", "triton"] == 1
    assert counted["resolvent_diagonal", "torch"] == 1


@pytest.mark.parametrize("packed", [False, True])
def test_never_synchronizes(packed):
    alpha, coupling = chain(300)
    inputs = (alpha.to(torch.complex64).requires_grad_(), coupling.float().requires_grad_())
    offsets = torch.tensor([0, 100, 300], device="cpu") if packed else None

    def step():
        g, last = resolvent_diagonal(*inputs, cu_seqlens=offsets)
        torch.autograd.grad(torch.view_as_real(g).sum() + torch.view_as_real(last).sum(), inputs)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
