"""Both phases return the loss of labels, alone and beside state, diagnostics and penalty."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resolvent.ops import IGNORED

from .phase1.conftest import small_model as phase1
from .phase2.conftest import small_model as phase2

pytestmark = pytest.mark.parametrize("make", [phase1, phase2])


def batch(sequences=2, length=70) -> tuple[Tensor, Tensor]:
    ids = torch.randint(97, (sequences, length + 1))
    labels = ids[:, 1:].clone()
    labels[0, 3:9] = IGNORED
    return ids[:, :-1], labels


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


@pytest.mark.parametrize("packed", [False, True])
def test_loss_equals_cross_entropy_of_logits(make, packed):
    model = make().double()
    ids, labels = batch(sequences=1 if packed else 2)
    options = {"cu_seqlens": torch.tensor([0, 30, 70])} if packed else {}
    expected = F.cross_entropy(model(ids, **options).flatten(0, 1), labels.flatten())
    loss = model(ids, labels=labels, **options)
    assert loss.shape == () and loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-8, atol=1e-10)


def test_padding_has_no_loss(make):
    model = make()
    ids, labels = batch()
    mask = torch.ones(2, 70)
    mask[0, :20] = 0
    padded = model(ids, labels=labels.masked_fill(mask == 0, IGNORED), attention_mask=mask)
    nats = F.cross_entropy(model(ids[:1, 20:])[0], labels[0, 20:], reduction="sum") + F.cross_entropy(
        model(ids[1:])[0], labels[1], reduction="sum"
    )
    torch.testing.assert_close(padded, nats / 120, rtol=1e-4, atol=1e-5)


def test_state_diagnostics_and_penalty_equal_those_with_logits(make):
    model = make()
    ids, labels = batch()
    _, first = model(ids[:, :30], return_state=True)
    options = dict(state=first, return_state=True, return_diagnostics=True)
    options |= {"return_penalty": True} if model.penalised else {}
    _, state, diagnostics, *penalty = model(ids[:, 30:], **options)
    loss, state_beside_loss, diagnostics_beside_loss, *penalty_beside_loss = model(
        ids[:, 30:], labels=labels[:, 30:], **options
    )
    assert loss.shape == ()
    assert torch.equal(state_beside_loss.position, state.position)
    assert torch.equal(diagnostics_beside_loss["final_hidden_states"], diagnostics["final_hidden_states"])
    assert penalty_beside_loss == penalty


def test_loss_is_float32_under_autocast(make):
    model = make(0.0)
    ids, labels = batch()
    exact = model(ids, labels=labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)


def test_residual_stream_has_the_dtype_of_autocast(make):
    model, seen = make(0.0), []
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):  # autocast gives it float32 on CUDA
            module.register_forward_hook(lambda module, args, output: output.float())
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.extend([args[0].dtype, output[0].dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        model(batch()[0])
    assert seen == 2 * len(model.blocks) * [torch.bfloat16]


def test_bfloat16_model_has_float32_loss(make):
    model = make(0.0)
    ids, labels = batch()
    exact = model(ids, labels=labels).item()
    half = model.to(torch.bfloat16)
    loss = half(ids, labels=labels)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact, rel=2e-2)
    assert half.lm_head.weight.grad.dtype == torch.bfloat16


def test_error_names_the_shape_of_wrong_labels(make):
    ids, labels = batch()
    with pytest.raises(ValueError, match=r"labels must have the shape of input_ids, \(2, 70\), got \(2, 69\)"):
        make()(ids, labels=labels[:, 1:])
