"""The step of one token on the CPU, beside the forward pass."""

import pytest
import torch
from torch import nn

from resolvent.models.decoding import TokenReader, read_token
from resolvent.models.phase2.decode_torch import PlainStep, StepProgram

from .conftest import small_model

OPTIONS = {
    "all": {},
    "full strength": dict(snr_trained=False),
    "bare": dict(snr_enabled=False, resonance_enabled=False, memory_feedback=False, output_gate=False),
    "fixed decay": dict(ffn_gated=False, adaptive_decay=False, output_norm=False, conv_size=2, resonance_enabled=False),
    "norm weights": dict(memory_norm_weight=True, output_norm=False, output_gate=False),
    "biases": dict(qkv_bias=True, norm="rmsnorm", hebbian_dt=0.5),
    "window": dict(attention_layers=(1,), attention_window=24),
    "windows alone": dict(attention_layers=(0, 1), attention_window=100, output_gate=False, bk_core=False),
    "tensor train": dict(htt_rank=4),
    "no positions": dict(zeta_positions=False),
}


def perturbed_model(dtype=torch.float64, **options):
    """Return a model in which every parameter has an effect."""
    torch.manual_seed(0)
    model = small_model(n_layers=2, **options).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def start(model, read=60):
    """Return the state after ``read`` and ``read + 2`` tokens: boundaries come at different steps."""
    mask = torch.ones(2, read + 2, dtype=torch.int64)
    mask[0, :2] = 0
    return model.hidden_states(torch.randint(model.vocab_size, (2, read + 2)), attention_mask=mask)[1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_steps_equal_the_forward_pass(options, dtype, tolerance):
    model = perturbed_model(dtype, **options)
    state = start(model)
    reader = TokenReader(model, state)
    for _ in range(6):
        token = torch.randint(model.vocab_size, (2,))
        expected, state = read_token(model, token, state)
        found = reader(token)
        assert (found - expected).norm() <= tolerance * expected.norm()
    assert isinstance(reader._step, PlainStep)
    assert torch.equal(reader.state.position, state.position)
    for found, expected in zip(reader.state.tensors()[1:], state.tensors()[1:], strict=True):
        assert (found - expected).norm() <= 10 * tolerance * (1 + expected.norm())


@torch.no_grad()
def test_reader_keeps_the_given_state():
    model = perturbed_model(attention_layers=(1,), attention_window=24)
    state = start(model)
    before = [x.clone() for x in state.tensors()]
    TokenReader(model, state)(torch.zeros(2, dtype=torch.int64))
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before, strict=True))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(ar_ssm_rank=4), "semiseparable"),
        (dict(conv_size=1), "convolution"),
        (dict(attention_layers=(1,), attention_window=None), "attends to all"),
        (dict(memory_rotation=True), "rotates"),
    ],
)
@torch.no_grad()
def test_reader_falls_back_to_the_forward_pass(options, reason):
    model = perturbed_model(**options)
    state = start(model)
    assert reason in StepProgram.obstacle(model)
    reader, token = TokenReader(model, state), torch.zeros(2, dtype=torch.int64)
    expected, after = read_token(model, token, state)
    assert torch.equal(reader(token), expected)
    assert torch.equal(reader.state.position, after.position)


@pytest.mark.parametrize("options", [{}, OPTIONS["window"], OPTIONS["norm weights"], OPTIONS["biases"]])
@torch.no_grad()
def test_steps_in_half_precision_are_as_exact_as_the_forward_pass(options):
    model = perturbed_model(torch.bfloat16, **options)
    exact = perturbed_model(torch.float64, **options)
    exact.load_state_dict(model.state_dict())
    state = start(model)
    wide = state.map(lambda x: x.to(torch.promote_types(x.dtype, torch.float64)) if x.dtype != torch.int64 else x)
    tokens = torch.randint(model.vocab_size, (2, 6))
    expected, reader, found, forward = exact(tokens, state=wide), TokenReader(model, state), [], []
    for token in tokens.T:
        found.append(reader(token).clone())
        logits, state = read_token(model, token, state)
        forward.append(logits)
    errors = [(torch.stack(x, 1) - expected).norm() / expected.norm() for x in (found, forward)]
    assert isinstance(reader._step, PlainStep)
    assert errors[0] <= min(1e-2, 1.1 * errors[1])
    for a, b in zip(reader.state.tensors(), state.tensors(), strict=True):
        assert a.dtype == b.dtype


def test_autocast_and_replaced_maps_are_obstacles():
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in StepProgram.obstacle(small_model())
    model = small_model()
    model.blocks[1].bk_proj = nn.Sequential(model.blocks[1].bk_proj)
    assert "narrow projections" in StepProgram.obstacle(model)


@torch.no_grad()
def test_wide_maps_may_be_replaced():
    model = perturbed_model()
    model.blocks[1].hebbian.out_proj = nn.Sequential(model.blocks[1].hebbian.out_proj, nn.Tanh())
    state, token = start(model), torch.zeros(2, dtype=torch.int64)
    expected, _ = read_token(model, token, state)
    reader = TokenReader(model, state)
    torch.testing.assert_close(reader(token), expected)
    assert isinstance(reader._step, PlainStep)


@pytest.mark.parametrize("name", ["blocks.0", "blocks.1.ffn", "blocks.1.hebbian.out_proj", "blocks.0.dissipative_bk"])
@torch.no_grad()
def test_hooks_run(name):
    model, calls = perturbed_model(), []
    state, token = start(model), torch.zeros(2, dtype=torch.int64)
    model.get_submodule(name).register_forward_hook(lambda *arguments: calls.append(name))
    expected, _ = read_token(model, token, state)
    (count,) = {len(calls)}
    assert torch.equal(TokenReader(model, state)(token), expected)
    assert count > 0 and len(calls) == 2 * count
