"""PyTorch's kernel for local attention against the reference, and steps that are captured."""

import pytest
import torch
from torch.nn import functional as F

from resolvent.ops import (
    ReusedWindow,
    WindowState,
    local_attention,
    local_attention_reference,
    local_attention_step,
)
from resolvent.ops.attention import attention_implementation
from resolvent.ops.attention_window import GROWTH
from resolvent.ops.dispatch import calls

pytestmark = pytest.mark.gpu


def inputs(length, batch=1, heads=4, groups=4, width=64, dtype=torch.bfloat16):
    """q, k, v in a dtype, and the temperature in float32, on CUDA."""
    q, k, v = (torch.randn(batch, length, h, width, device="cuda") for h in (heads, groups, groups))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return [*(x.to(dtype) for x in (q, k, v)), 5 + 5 * torch.rand(heads, device="cuda")]


def relative(x, reference):
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def test_the_kernel_runs_where_it_can():
    device = torch.device("cuda")
    assert attention_implementation("auto", device, torch.bfloat16, 64, 64) == "varlen"
    assert attention_implementation("auto", device, torch.float32, 64, 64) == "torch"


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("window", [1, 100, 512, None])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("fresh", [True, False])
def test_matches_the_reference_gradients_included(backend, window, groups, fresh):
    lengths, starts = [700, 3, 130], [0, 40, 900]
    values = [x.requires_grad_() for x in inputs(sum(lengths), groups=groups)]
    state, options = [], {}
    if not fresh:
        state = [x.requires_grad_() for x in inputs(window or 4 * GROWTH, batch=3, groups=groups)[1:3]]
        options = dict(initial_state=WindowState(*state), position=torch.tensor(starts))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    before = calls["local_attention", "varlen"]
    found, after = local_attention(*values, window, cu_seqlens=offsets, backend=backend, **options)
    assert calls["local_attention", "varlen"] - before == (backend == "triton")
    pieces, kept = [], []
    for i, (first, length) in enumerate(zip(offsets, lengths, strict=False)):
        span = slice(int(first), int(first) + length)
        own = None if fresh else WindowState(*(x[[i]] for x in state))
        if own is not None and window is None:
            own = WindowState(*(F.pad(x, (0, 0, 0, 0, 0, after.keys.shape[1] - x.shape[1])) for x in own))
        q, k, v = (x[:, span] for x in values[:3])
        piece, window_after = local_attention_reference(q, k, v, values[3], window, own, 0 if fresh else starts[i])
        pieces.append(piece)
        kept.append(window_after)
    expected = torch.cat(pieces, 1)
    assert relative(found, expected) <= 1e-2
    if not fresh:
        for name in WindowState._fields:
            assert torch.equal(getattr(after, name).double(), torch.cat([getattr(x, name) for x in kept]))
    weights = torch.cos(torch.arange(found.numel(), device="cuda")).view_as(found)
    sources = [*values, *state]
    gradients = torch.autograd.grad((found.float() * weights).sum(), sources)
    exact = torch.autograd.grad((expected * weights).sum(), sources)
    largest = max(b.double().norm() for b in exact)
    for a, b in zip(gradients, exact, strict=True):
        assert a.isfinite().all()
        if b.double().norm() > 1e-9 * largest:
            assert relative(a, b) <= 2e-2
        else:  # the softmax over a window of one token is constant: no gradient reaches queries and keys
            assert window == 1 and a.double().norm() <= 1e-4 * largest


@torch.no_grad()
def test_a_captured_step_equals_the_forward_pass():
    *values, temperature = inputs(90, batch=2, dtype=torch.float32)
    whole, _ = local_attention(*values, temperature, 32)
    _, state = local_attention(*(x[:, :30] for x in values), temperature, 32)
    reused = ReusedWindow(*(x.clone() for x in state))
    token, position = [x[:, 0].clone() for x in values], torch.tensor([30, 30], device="cuda")
    local_attention_step(*token, temperature, 32, ReusedWindow(*(x.clone() for x in state)), position)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = local_attention_step(*token, temperature, 32, reused, position)
        position.add_(1)
    for t in range(30, 90):
        for held, x in zip(token, values, strict=True):
            held.copy_(x[:, t])
        graph.replay()
        assert relative(out, whole[:, t]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offsets_on_the_device_are_not_read(dtype):
    values = inputs(300, dtype=dtype)
    offsets = torch.tensor([0, 100, 300], device="cuda")
    for window in (64, None):
        expected, _ = local_attention(*values, window, cu_seqlens=offsets.cpu())
        torch.cuda.set_sync_debug_mode("error")
        try:
            found, _ = local_attention(*values, window, cu_seqlens=offsets, return_state=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert relative(found, expected) <= 1e-2


def test_whole_sequences_match_the_reference_gradients_included():
    for groups, window in ((4, None), (2, None), (2, 400)):
        q, k, v, _ = inputs(333, batch=2, groups=groups)
        values = [x.requires_grad_() for x in (q, k, v)]
        before = calls["local_attention", "torch"]
        found, _ = local_attention(*values, 5.0, window, return_state=False)
        assert calls["local_attention", "torch"] == before + 1
        expected, _ = local_attention_reference(*values, torch.full((4,), 5.0, device="cuda"), window)
        assert relative(found, expected) <= 5e-3
        weights = torch.cos(torch.arange(found.numel(), device="cuda")).view_as(found)
        gradients = torch.autograd.grad((found.float() * weights).sum(), values)
        for a, b in zip(gradients, torch.autograd.grad((expected * weights).sum(), values), strict=True):
            assert relative(a, b) <= 1e-2


@pytest.mark.parametrize("window", [64, None])
def test_the_kernel_compiles_without_a_break(window):
    values = [x.requires_grad_() for x in inputs(300)]
    offsets = torch.tensor([0, 100, 300], device="cuda")
    compiled = torch.compile(local_attention, fullgraph=True)
    found, _ = compiled(*values, window, cu_seqlens=offsets, return_state=False)
    expected, _ = local_attention(*values, window, cu_seqlens=offsets)
    assert relative(found, expected) <= 1e-3
    gradients = torch.autograd.grad(found.float().sin().sum(), values)
    for a, b in zip(gradients, torch.autograd.grad(expected.float().sin().sum(), values), strict=True):
        assert relative(a, b) <= 1e-2
