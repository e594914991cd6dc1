"""`torch.compile` takes the whole model as one graph, and the graph computes what the model computes."""

import pytest
import torch

from resolvent.ops import backend as backends

from .conftest import small_model

needs_interpreter = pytest.mark.skipif(not backends.interpreting(), reason="Triton compiles for the GPU here")


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


def check(backend, ids, calls):
    model = small_model(spread=0.1, backend=backend, n_layers=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for options in calls:
        expected, gradients = loss_and_gradients(model, model, ids, **options)
        expected, gradients = expected.clone(), [x.clone() for x in gradients]
        found, found_gradients = loss_and_gradients(compiled, model, ids, **options)
        assert (found - expected).abs() <= 1e-5 * expected.abs()
        for a, b in zip(found_gradients, gradients, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
def test_a_rectangle_is_one_graph(backend):
    check(backend, torch.randint(0, 97, (2, 31)), [{}])


@needs_interpreter
def test_packed_sequences_are_one_graph_however_many_they_are():
    offsets = ([0, 10, 30], [0, 5, 7, 30])
    check("triton", torch.randint(0, 97, (1, 31)), [{"cu_seqlens": torch.tensor(x)} for x in offsets])
