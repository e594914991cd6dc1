"""The kernels of the BK-Core in Triton's interpreter. A lane holds eight sites of a block: four lanes make it 32."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resolvent.errors import ConfigError
from resolvent.ops import dispatch, effective_diagonal, resolvent_diagonal, resolvent_diagonal_reference

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("Triton compiles for the GPU: see test_bk_core_cuda.py", allow_module_level=True)
import triton
import triton.language as tl
from triton.runtime.interpreter import ScanOps

from resolvent.ops.triton import bk_core

from .chains import STRONG, WEAK, chain, check, relative, run, states

REMEMBERING = {"damping": 0.03, "disorder": 0.1}
"""A chain that remembers some thirty sites: what several lanes hold."""


@pytest.fixture(autouse=True)
def _scan_as_a_tree(monkeypatch):
    """Join neighbours in the order of a GPU: the interpreter's own scan only ever adds one element at the end."""

    def scan(self, inputs):
        values, step = [x.handle.data for x in inputs], 1
        while step < len(values[0]):
            parts = [np.roll(v, step) for v in values] + values
            joined = self.combine_fn.fn(*(self.to_tensor(v, x.dtype) for v, x in zip(parts, inputs * 2, strict=True)))
            whole = np.arange(len(values[0])) < step  # reaches back to the first already
            values = [np.where(whole, v, j.handle.data) for v, j in zip(values, joined, strict=True)]
            step *= 2
        return [self.to_tensor(v, x.dtype) for v, x in zip(values, inputs, strict=True)]

    monkeypatch.setattr(ScanOps, "generic_scan", scan)


@pytest.mark.parametrize(
    ("length", "form"), [*((n, "causal") for n in (1, 2, 31, 32, 33, 63)), (1, "two_sided"), (33, "two_sided")]
)
def test_matches_the_dense_inverse(length, form):
    alpha, coupling = chain(length)
    found, _ = resolvent_diagonal(
        alpha.to(torch.complex64), coupling.float(), form=form, backend="triton", block_size=4
    )
    assert found.dtype == torch.complex64
    assert relative(found, resolvent_diagonal_reference(alpha, coupling, form)) <= 1e-5


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    ("length", "heads", "batch", "block_size"),
    [(1, 3, 2, 4), (33, 2, 1, 4), (70, 1, 1, 4), (300, 1, 1, 256)],
    ids=["one site", "two blocks", "three blocks", "one block of many lanes"],
)
def test_results_and_gradients(length, heads, batch, block_size, with_state):
    alpha, coupling = chain(length, heads, batch, **REMEMBERING)
    check(alpha, coupling, states(batch, heads) if with_state else None, block_size)


@pytest.mark.parametrize(("damping", "disorder"), [(0.03, 0.1), (WEAK, 2.0), (STRONG, 2.0)])
def test_long_chains_are_cut_into_segments(damping, disorder):
    alpha, coupling = chain(150, 1, 1, damping, disorder)
    plan = bk_core._plan(torch.view_as_real(alpha), None, 4)
    assert (plan.segments, plan.span) == (3, 64)  # two blocks each, and the last one is not full
    check(alpha, coupling, states(1, 1), 4)


def test_the_plan_covers_every_site():
    for length in (0, 1, 255, 256, 2048, 2049, 8192, 8193, 100_000, 1_048_576, 10**9):
        for batch, heads in ((1, 1), (64, 16)):
            plan = bk_core._plan(torch.empty(1, device="meta").expand(batch, length, heads, 2), None, 256)
            assert plan.span % (plan.lanes * bk_core.SITES) == 0
            assert (plan.segments - 1) * plan.span < max(length, 1) <= plan.segments * plan.span
            assert plan.segments <= plan.lanes <= 256


@pytest.mark.parametrize(
    ("lengths", "block_size"),
    [([0, 1, 40, 0, 7, 1, 0], 4), ([3, 66, 0, 1], 2)],
    ids=["short", "with one that is cut"],
)
def test_packed_is_separate(lengths, block_size):
    alpha, coupling = chain(sum(lengths), heads=1, **REMEMBERING)
    initial = states(len(lengths), 1)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    check(alpha, coupling, initial, block_size, cu_seqlens=offsets)

    options = {"backend": "triton", "block_size": block_size}
    alpha, coupling, initial = alpha.to(torch.complex64), coupling.float(), initial.to(torch.complex64)
    packed, last = resolvent_diagonal(alpha, coupling, initial_state=initial, cu_seqlens=offsets, **options)
    for i, length in enumerate(lengths):
        span = slice(offsets[i], offsets[i + 1])
        if length == 0:
            assert torch.equal(last[i], initial[i])
        elif length < 10:
            g, alone = resolvent_diagonal(alpha[:, span], coupling, initial_state=initial[i : i + 1], **options)
            assert torch.equal(packed[:, span], g)
            assert torch.equal(last[i], alone[0])


def test_two_sided_gradients():
    alpha, coupling = chain(40, heads=1)
    check(alpha, coupling, None, 4, form="two_sided", cu_seqlens=torch.tensor([0, 0, 33, 40]))


def test_the_state_is_the_last_site_and_carries_on():
    alpha, coupling = (x.to(y) for x, y in zip(chain(45, 1), (torch.complex64, torch.float32), strict=True))
    whole, last = resolvent_diagonal(alpha, coupling, backend="triton", block_size=4)
    assert torch.equal(last, whole[:, -1])
    pieces, state = [], None
    for piece in alpha.split([1, 32, 12], 1):
        g, state = resolvent_diagonal(piece, coupling, initial_state=state, backend="triton", block_size=4)
        pieces.append(g)
    assert relative(torch.cat(pieces, 1), whole) <= 1e-6


def test_strided_and_conjugated_inputs():
    alpha, coupling = chain(3, heads=2, batch=2)
    alpha, coupling = alpha.to(torch.complex64), coupling.float()
    expected, last = resolvent_diagonal(alpha, coupling, backend="triton", block_size=4)
    others = (
        alpha.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([alpha, alpha], -1)[..., 1],
        alpha.conj().resolve_conj().conj(),
    )
    for other in others:
        assert not other.is_contiguous() or other.is_conj()
        wide_coupling = torch.stack([coupling, coupling], -1)[:, 0]
        found, state = resolvent_diagonal(other, wide_coupling, backend="triton", block_size=4)
        assert torch.equal(found, expected)
        assert torch.equal(state, last)


def test_empty_chains():
    initial = states(2).to(torch.complex64).requires_grad_()
    coupling = torch.ones(3, requires_grad=True)
    g, last = resolvent_diagonal(initial.new_zeros(2, 0, 3), coupling, initial_state=initial, backend="triton")
    assert g.shape == (2, 0, 3)
    assert torch.equal(last, initial)
    torch.view_as_real(last).square().sum().backward()
    assert torch.equal(initial.grad, 2 * initial)
    assert not coupling.grad.any()
    g, last = resolvent_diagonal(initial.new_zeros(0, 5, 3), coupling, backend="triton")
    assert g.shape == (0, 5, 3) and last.shape == (0, 3)


def test_an_unused_result_needs_no_gradient():
    alpha, coupling = chain(20, heads=1)
    for read in (0, 1):
        gradients = []
        for dtype, name in ((torch.complex64, "triton"), (torch.complex128, "torch")):
            inputs = (alpha.to(dtype).requires_grad_(), coupling.to(dtype.to_real()).requires_grad_())
            result = resolvent_diagonal(*inputs, backend=name, block_size=4)[read]
            gradients.append(torch.autograd.grad(torch.view_as_real(result).square().sum(), inputs))
        for ours, reference in zip(*gradients, strict=True):
            assert relative(ours, reference) <= 1e-4


def test_two_runs_agree_to_the_bit():
    alpha, coupling = chain(40, heads=1)
    options = {"backend": "triton", "block_size": 4}
    for one, other in zip(run(alpha, coupling, **options), run(alpha, coupling, **options), strict=True):
        assert torch.equal(one, other)


@settings(max_examples=15, deadline=None)
@given(
    potentials=st.lists(
        st.one_of(st.floats(-3, 3), st.floats(-1e30, 1e30).filter(lambda x: abs(x) > 1e-30)), min_size=1, max_size=40
    ),
    gamma=st.floats(0, 1e3),
    kappa=st.floats(0, 10),
    zeta=st.floats(1e-3, 10),
    coupling=st.floats(0, 100),
)
def test_bounded_by_construction(potentials, gamma, kappa, zeta, coupling):
    potential = torch.tensor(potentials, dtype=torch.float32).view(1, -1, 1)
    one = torch.ones(1)
    alpha = effective_diagonal(potential, gamma * one.expand_as(potential), kappa * one, 0 * one, zeta * one)
    g, _ = resolvent_diagonal(alpha, coupling * one, backend="triton", block_size=4)
    assert torch.view_as_real(g).isfinite().all()
    assert (g.abs() * alpha.imag.abs() <= 1 + 1e-5).all()
    assert (g.imag >= 0).all()


def test_non_finite_input_stays_visible_and_in_its_sequence():
    alpha, coupling = chain(20, heads=1)
    alpha[0, 3] = complex(float("nan"), -1)
    alpha = alpha.to(torch.complex64)
    offsets = torch.tensor([0, 10, 20])
    g, last = resolvent_diagonal(alpha, coupling.float(), cu_seqlens=offsets, backend="triton", block_size=4)
    assert torch.view_as_real(g)[0, :3].isfinite().all()
    assert g[0, 3:10].isnan().all() and last[0].isnan().all()
    assert torch.view_as_real(g)[0, 10:].isfinite().all()


def test_only_single_precision_runs_here_and_is_counted():
    alpha, coupling = chain(1)
    with pytest.raises(ConfigError, match=r"complex64, the tensors are torch\.complex128; use"):
        resolvent_diagonal(alpha, coupling, backend="triton")
    before = dispatch.calls["resolvent_diagonal", "triton"]
    resolvent_diagonal(alpha.to(torch.complex64), coupling.float(), backend="triton")
    assert dispatch.calls["resolvent_diagonal", "triton"] == before + 1


def test_a_compiled_graph_counts_its_launches():
    alpha, coupling = chain(3)
    inputs = alpha.to(torch.complex64), coupling.float()

    def features(alpha, coupling):
        return torch.view_as_real(resolvent_diagonal(alpha, coupling, backend="triton")[0]).sum()

    compiled, before = torch.compile(features, fullgraph=True, backend="aot_eager"), dispatch.calls.copy()
    for _ in range(3):
        compiled(*inputs)
    assert dispatch.calls - before == {("resolvent_diagonal", "triton"): 3}


@pytest.mark.parametrize("packed", [False, True])
def test_the_operators_keep_the_rules_of_torch_library(packed):
    heads, offsets = 1, torch.tensor([0, 0, 2, 3]) if packed else None
    sequences = 3 if packed else 1
    alpha = (torch.randn(1, 3, heads, 2) - torch.tensor([0.0, 3.0])).requires_grad_()
    coupling = torch.rand(heads, requires_grad=True)
    state = torch.rand(sequences, heads, 2, requires_grad=True) if packed else None
    torch.library.opcheck(bk_core.causal_diagonal, (alpha, coupling, state, offsets, 4))
    g = bk_core.causal_diagonal(alpha, coupling, state, offsets, 4)[0].detach()
    inputs = (torch.randn_like(g), torch.randn(sequences, heads, 2), g, coupling, state, offsets, 4)
    detached = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs)
    torch.library.opcheck(bk_core.causal_diagonal_backward, detached)


@pytest.mark.parametrize("form", ["causal", "two_sided"])
def test_compiles_without_a_graph_break(form):
    alpha, coupling = chain(10, heads=1)
    inputs = (alpha.to(torch.complex64).requires_grad_(), coupling.float().requires_grad_())

    def loss(alpha, coupling):
        results = resolvent_diagonal(alpha, coupling, form=form, backend="triton", block_size=4)
        return sum(torch.view_as_real(x).square().sum() for x in results if x is not None)

    expected = loss(*inputs)
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert relative(a, b) <= 1e-6


@triton.jit
def _join_pairs(first, second, joined, PAIRS: tl.constexpr):
    """Matrices (8, PAIRS) of blocks and of the next ones, as those of both together."""
    lane = tl.arange(0, PAIRS)
    a, b = (), ()
    for i in tl.static_range(8):
        a, b = (*a, tl.load(first + i * PAIRS + lane)), (*b, tl.load(second + i * PAIRS + lane))
    both = bk_core._join(*a, *b)
    for i in tl.static_range(8):
        tl.store(joined + i * PAIRS + lane, both[i])


def test_joining_blocks_composes_their_maps():
    """A scan in the order of a GPU joins any two neighbours: every entry of what it makes is used again."""

    def matrices(length):
        alpha = torch.complex(torch.randn(length, 16), -torch.rand(length, 16) - 0.1).to(torch.complex128)
        product = torch.eye(2).to(alpha.dtype)
        for site in alpha:
            step = torch.stack([0 * site, 1 + 0 * site, -1 + 0 * site, site], -1).unflatten(-1, (2, 2))
            product = step @ product
        return product

    def as_rows(matrix):
        entries = torch.view_as_real(matrix.flatten(-2)).flatten(-2)  # real and imaginary parts in turn
        return entries.T.float().contiguous()

    first, second = matrices(3), matrices(4)
    rows = torch.empty(8, 16)
    _join_pairs[(1,)](as_rows(first), as_rows(second), rows, 16)
    joined = torch.view_as_complex(rows.T.double().unflatten(-1, (4, 2)).contiguous()).unflatten(-1, (2, 2))
    factor = joined[:, :1, :1] / (second @ first)[:, :1, :1]
    assert relative(joined, factor * (second @ first)) <= 1e-5
    largest = torch.view_as_real(joined).abs().amax((1, 2, 3))
    assert ((largest >= 1) & (largest < 2)).all()
