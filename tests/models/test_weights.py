"""Weights for generation on a CPU: stored by columns, or rounded to int8."""

import pytest
import torch

from resolvent.errors import ConfigError
from resolvent.layers.int8_linear import Int8Linear
from resolvent.models.storage import load_model, save_model
from resolvent.models.weights import prepare_weights

from .small import PHASE1, PHASE2

WIDE = dict(d_model=256, num_heads=4, head_dim=64, n_layers=1, vocab_size=300)


@torch.no_grad()
def test_columns_change_no_number(tmp_path):
    model = PHASE2.model()
    ids = torch.randint(model.vocab_size, (2, 20))
    before, weights = model(ids), {name: x.clone() for name, x in model.state_dict().items()}
    assert prepare_weights(model) is model
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert model.blocks[0].hebbian.qkv_proj.weight.T.is_contiguous()
    torch.testing.assert_close(model(ids), before)
    save_model(model, tmp_path / "model")
    torch.testing.assert_close(load_model(tmp_path / "model", "cpu")(ids), before)


def test_tied_head_stays_as_the_table():
    model = prepare_weights(PHASE2.model(tie_embeddings=True))
    assert model.tied
    assert model.token_embedding.weight.is_contiguous()


@pytest.mark.parametrize("shape", [(1, 256), (3, 16, 256), (5, 7, 256)], ids=["one token", "many", "a few"])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_int8_products_equal_those_of_the_rounded_weights(shape, bias):
    layer, x = torch.nn.Linear(256, 320, bias=bias), torch.randn(shape).bfloat16().float()
    rounded = Int8Linear.of(layer)
    weight = rounded.weight.double() * rounded.scale.double().unsqueeze(1)
    exact = torch.nn.functional.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())
    assert (rounded(x) - exact).norm() <= 3e-3 * exact.norm()
    # Half a step of the weight: a 254th of the largest of a row, and as much again in bfloat16 where it is cut.
    assert ((weight - layer.weight).abs().amax(1) <= layer.weight.abs().amax(1) * (1 / 254 + 1 / 256)).all()


@pytest.mark.parametrize("width", [256, 257, 264, 280, 300])
@pytest.mark.parametrize("tokens", [1, 20])
@torch.no_grad()
def test_int8_products_take_any_width(width, tokens):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, 259) for _ in range(10)]  # memory beside a matrix decides what is read of it
    x = torch.randn(tokens, width)
    for layer in layers:
        exact = layer(x)
        assert (Int8Linear.of(layer)(x) - exact).norm() <= 2e-2 * exact.norm()


@torch.no_grad()
def test_int8_of_zeros_is_zero():
    assert torch.equal(Int8Linear(torch.zeros(300, 256))(torch.ones(1, 256)), torch.zeros(1, 300))


@pytest.mark.parametrize("tie_embeddings", [True, False])
@torch.no_grad()
def test_int8_models_generate_what_they_read(tie_embeddings):
    torch.manual_seed(0)
    model = PHASE2.model(**WIDE, tie_embeddings=tie_embeddings)
    ids = torch.randint(300, (1, 40))
    exact = model(ids)
    prepare_weights(model, "int8")
    assert isinstance(model.lm_head, Int8Linear) and isinstance(model.blocks[0].mixer.qkv_proj, Int8Linear)
    assert type(model.blocks[0].dissipative_bk.potential.gamma_proj) is torch.nn.Linear
    found = model(ids)
    assert 0 < (found - exact).norm() < 0.05 * exact.norm()
    _, state = model(ids[:, :30], return_state=True)
    steps = []
    for token in ids[:, 30:].T:
        logits, state = model(token.unsqueeze(1), state=state, return_state=True)
        steps.append(logits)
    assert (torch.cat(steps, 1) - found[:, 30:]).norm() < 0.02 * found[:, 30:].norm()
    assert model.generate(ids, 5, temperature=0).shape == (1, 45)


def test_int8_is_refused_where_it_has_no_effect():
    with pytest.raises(ConfigError, match="at least 256 rows and columns"):
        prepare_weights(PHASE1.model(), "int8")
    with pytest.raises(ConfigError, match="full or int8, got 'int4'"):
        prepare_weights(PHASE1.model(), "int4")


@pytest.mark.gpu
def test_int8_is_refused_on_cuda():
    with pytest.raises(ConfigError, match="the model is on cuda"):
        prepare_weights(PHASE2.model(**WIDE).cuda(), "int8")
