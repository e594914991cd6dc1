"""Kernels for one token: interpreted on the CPU, compiled on a GPU."""

import pytest
import torch

from resolvent.models.decoding import token_step
from resolvent.models.phase2.config import RotaryScaling
from resolvent.models.phase2.decode import MOST_SEQUENCES, TokenStep
from resolvent.ops import dispatch

from .conftest import small_model

pytest.importorskip("triton")
from resolvent.models.phase2.decode_products import MOST_VECTORS

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
OPTIONS = {
    "all": {},
    "full strength": dict(snr_trained=False),
    "bare": dict(snr_enabled=False, resonance_enabled=False, memory_feedback=False, output_gate=False),
    "fixed decay": dict(ffn_gated=False, adaptive_decay=False, output_norm=False, conv_size=2, resonance_enabled=False),
    "window": dict(attention_layers=(1,), attention_window=24, snr_enabled=False, resonance_enabled=False),
    "wide window": dict(attention_layers=(1,), attention_window=300, snr_enabled=False, resonance_enabled=False),
    "windows alone": dict(attention_layers=(0, 1), attention_window=100, output_gate=False),
    "other widths": dict(num_heads=1, head_dim=24, d_model=40, conv_size=3, snr_enabled=False, tie_embeddings=True),
}


def models_on(device, **options):
    """Return the same model with kernels and without."""
    plain = small_model(backend="torch", n_layers=2, **options)
    for name, parameter in plain.named_parameters():
        if name.endswith("strength_logit"):
            torch.nn.init.normal_(parameter)
    fused = small_model(backend="triton", n_layers=2, **options)
    fused.load_state_dict(plain.state_dict())
    return fused.to(device), plain.to(device)


@torch.no_grad()
def start(model, device, read=60, batch=2):
    """Return the state after ``read`` and ``read + 2`` tokens: boundaries come at different steps."""
    mask = torch.ones(batch, read + 2, dtype=torch.int64, device=device)
    mask[0, :2] = 0
    ids = torch.randint(model.vocab_size, (batch, read + 2), device=device)
    return model.hidden_states(ids, attention_mask=mask)[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_steps_equal_the_forward_pass(device, options):
    fused, model = models_on(device, **options)
    assert_steps_equal(fused, model, start(model, device), count=4)  # the boundary is behind token 64


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["all", "fixed decay", "window"])
@torch.no_grad()
def test_products_of_matrices_equal_the_forward_pass(device, kind):
    fused, model = models_on(device, **OPTIONS[kind])
    assert_steps_equal(fused, model, start(model, device, batch=MOST_VECTORS + 2), count=1)


def assert_steps_equal(fused, model, state, count):
    """Assert that ``count`` steps have the logits and the state of forward passes."""
    step = token_step(fused, state)
    assert isinstance(step, TokenStep)
    for _ in range(count):
        token = torch.randint(model.vocab_size, (len(state),), device=state.device)
        hidden, state = model.hidden_states(token.unsqueeze(1), state=state)
        expected, found = model.lm_head(hidden[:, -1]), step(token)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    for found, expected in zip(step.state.tensors(), state.tensors(), strict=True):
        torch.testing.assert_close(found.to(expected.device), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_steps_read_weights_that_change_in_place(device):
    fused, model = models_on(device)
    state, token = start(model, device, read=63), torch.zeros(2, dtype=torch.int64, device=device)
    step = token_step(fused, state)
    for changed in (fused, model):
        for block in changed.blocks:
            block.snr_filter.strength_logit += 3
            block.resonance.bias -= 3
    for _ in range(2):
        expected, state = model(token.unsqueeze(1), state=state, return_state=True)
        found = step(token)
        assert (found - expected[:, 0]).norm() <= 1e-5 * expected.norm()
    for found, expected in zip(step.state.tensors(), state.tensors(), strict=True):
        torch.testing.assert_close(found.to(expected.device), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_launches_are_counted_and_the_question_is_not(device):
    model, plain = models_on(device)
    state = start(plain, device, read=5)
    before = dispatch.calls.copy()
    step = token_step(model, state)
    assert dispatch.calls == before
    step(torch.zeros(2, dtype=torch.int64, device=device))
    blocks = len(model.blocks)
    assert dispatch.calls - before == {
        (name, "triton"): blocks for name in ("resolvent_diagonal", "dissipative_memory")
    }


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_step_keeps_the_given_state(device):
    fused, model = models_on(device)
    state = start(model, device)
    before = [x.clone() for x in state.tensors()]
    token_step(fused, state)(torch.zeros(2, dtype=torch.int64, device=device))
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("options", "batch", "reason"),
    [
        (dict(htt_rank=4), 2, "tensor-train"),
        (dict(ar_ssm_rank=4), 2, "semiseparable"),
        (dict(conv_size=1), 2, "convolution"),
        (dict(zeta_embedding_trainable=True), 2, "frequencies"),
        (dict(rotary_scaling=RotaryScaling("dynamic", 2.0), attention_layers=(1,), attention_window=24), 2, "scaling"),
        ({}, MOST_SEQUENCES + 1, "more than"),
    ],
)
@torch.no_grad()
def test_step_falls_back_to_the_forward_pass(device, options, batch, reason):
    model = small_model(**options).to(device)
    state = start(model, device, read=5, batch=batch)
    assert reason in TokenStep.obstacle(model, state)
    step, token = token_step(model, state), torch.zeros(batch, dtype=torch.int64, device=device)
    for _ in range(2):
        hidden, state = model.hidden_states(token.unsqueeze(1), state=state)
        torch.testing.assert_close(step(token), model.lm_head(hidden[:, -1]))


@torch.no_grad()
def test_projections_of_several_dtypes_are_an_obstacle():
    model, plain = models_on("cpu")
    model.blocks[1].bk_proj.to(torch.bfloat16)
    assert "several dtypes" in TokenStep.obstacle(model, start(plain, "cpu", read=5))


@torch.no_grad()
def test_replaced_projection_is_an_obstacle():
    model, plain = models_on("cpu")
    model.blocks[1].hebbian.out_proj = torch.nn.Sequential(model.blocks[1].hebbian.out_proj)
    assert "projection" in TokenStep.obstacle(model, start(plain, "cpu", read=5))


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "tolerance"), [(2, 5e-3), (20, 2e-2)])  # products of matrices round their inputs
@pytest.mark.parametrize("kind", ["all", "wide window"])
@torch.no_grad()
def test_half_precision_weights_equal_float64_on_the_gpu(kind, batch, tolerance):
    model, exact = models_on("cuda", **OPTIONS[kind])
    model.bfloat16()
    exact.load_state_dict(model.state_dict())
    exact.double()
    state = start(model, "cuda", batch=batch)
    wide = state.map(lambda x: x.to(torch.promote_types(x.dtype, torch.float64)) if x.dtype != torch.int64 else x)
    step, ids = token_step(model, state), torch.randint(model.vocab_size, (batch, 70), device="cuda")
    assert isinstance(step, TokenStep)
    found = torch.stack([step(token).clone() for token in ids.T], 1)
    expected = exact(ids, state=wide)
    assert (found - expected).norm() <= tolerance * expected.norm()
