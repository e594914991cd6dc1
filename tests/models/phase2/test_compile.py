"""`torch.compile` makes one graph of the whole model, with equal losses and gradients."""

from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from resolvent.ops import dispatch

from .conftest import small_model

needs_interpreter = pytest.mark.skipif(not dispatch.interpreting(), reason="Triton compiles for the GPU here")


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_and_gradients(forward, model, ids, **options):
    model.zero_grad()
    loss = forward(ids[:, :-1], labels=ids[:, 1:], **options)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def check(backend, ids, calls, compiler="aot_eager", recompute=False, layers=2, **sizes):
    model = small_model(spread=0.1, backend=backend, n_layers=layers, **sizes).train()
    for block in model.blocks:
        block.gradient_checkpointing = recompute
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for options in calls:
        expected, gradients = loss_and_gradients(model, model, ids, **options)
        expected, gradients = expected.clone(), [x.clone() for x in gradients]
        found, found_gradients = loss_and_gradients(compiled, model, ids, **options)
        assert (found - expected).abs() <= 1e-5 * expected.abs()
        for a, b in zip(found_gradients, gradients, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=[needs_interpreter, pytest.mark.slow])])
def test_rectangle_compiles_to_one_graph(backend):
    check(backend, torch.randint(0, 97, (2, 31)), [{}])


@pytest.mark.slow
@pytest.mark.parametrize("filters", [{}, {"snr_enabled": False, "resonance_enabled": False}])
def test_rotating_memories_compile_to_one_graph(filters):
    check("auto", torch.randint(0, 97, (2, 71)), [{}], memory_rotation=True, **filters)


@pytest.mark.slow
def test_checkpointed_blocks_compile_to_one_graph():
    check("torch", torch.randint(0, 97, (2, 31)), [{}], recompute=True)


@needs_interpreter
@pytest.mark.slow
def test_any_number_of_packed_sequences_compiles_to_one_graph():
    offsets = ([0, 10, 30], [0, 5, 7, 30])
    check("triton", torch.randint(0, 97, (1, 31)), [{"cu_seqlens": torch.tensor(x)} for x in offsets])


@needs_interpreter
def test_offsets_on_a_device_compile_to_one_graph_with_one_set_of_tables(monkeypatch):
    from resolvent.ops.triton import segments

    monkeypatch.setattr(segments, "_stays_on_device", lambda cu_seqlens: True)
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        searched = [node.args[0] for node in graph.graph.nodes if str(node.target) == "aten.searchsorted.Tensor"]
        assert not any("slice" in str(offsets.target) for offsets in searched), "see ops/packed.py"
        return make_boxed_func(graph.forward)

    offsets = [torch.tensor(x) for x in ([0, 10, 30], [0, 5, 7, 30, 30])]
    for x in offsets:
        torch._dynamo.mark_dynamic(x, 0)  # raises if any code reads their number
    compiler = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    check("triton", torch.randint(0, 97, (1, 31)), [{"cu_seqlens": x} for x in offsets], compiler, num_heads=1)
    forward, backward = graphs  # one of each for both offsets
    count = Counter(forward)
    assert count["resolvent.memory.default"] == count["resolvent.queries_keys_values.default"] == 2
    # One search for the chunks of the memory, and one for the tokens of positions and convolution together.
    assert count["aten.cumsum.default"] == 1
    assert count["aten.searchsorted.Tensor"] == 2
    assert not any(name in backward for name in ("aten.cumsum.default", "aten.searchsorted.Tensor"))


@needs_interpreter
def test_empty_sequences_at_the_end_change_no_kernel_result(monkeypatch):
    from resolvent.ops.triton import segments

    monkeypatch.setattr(segments, "_stays_on_device", lambda cu_seqlens: True)
    model, ids = small_model(spread=0.1, backend="triton", n_layers=1, num_heads=1), torch.randint(0, 97, (1, 71))
    loss, gradients = loss_and_gradients(model, model, ids, cu_seqlens=torch.tensor([0, 5, 70]))
    padded, found = loss_and_gradients(model, model, ids, cu_seqlens=torch.tensor([0, 5, 70, 70, 70]))
    assert (padded - loss).abs() <= 1e-6 * loss
    for a, b in zip(found, gradients, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm() + 1e-9


@pytest.mark.parametrize("sizes", [{}, {"attention_layers": (1,), "attention_window": 8}], ids=["pure", "hybrid"])
def test_each_block_compiles_to_one_graph(sizes):
    ids = torch.randint(0, 97, (2, 31))
    model = small_model(spread=0.1, backend="torch", n_layers=2, **sizes).train()
    expected, gradients = loss_and_gradients(model, model, ids)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    found, found_gradients = loss_and_gradients(model, model, ids)
    assert (found - expected).abs() <= 1e-5 * expected.abs()
    for a, b in zip(found_gradients, gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9


ALL_TOKENS = dict(attention_layers=(0,), attention_window=None)


@pytest.mark.parametrize(
    ("sizes", "offsets"),
    [
        (ALL_TOKENS, None),
        (ALL_TOKENS, [0, 10, 10, 30]),
        (dict(bk_core=False, conv_size=1, qk_norm=False, **ALL_TOKENS), None),
    ],
    ids=["rectangle", "packed", "as converted"],
)
def test_attention_to_all_tokens_compiles_to_one_graph(sizes, offsets):
    options = {} if offsets is None else {"cu_seqlens": torch.tensor(offsets)}
    check("torch", torch.randint(0, 97, (2 if offsets is None else 1, 31)), [options], layers=1, **sizes)
