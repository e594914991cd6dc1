import dataclasses
import json

import pytest
import torch

from resolvent import CheckpointError, Phase2Config, Phase2State, create_phase2_model, load_model, save_model
from resolvent.errors import VersionError
from resolvent.models.phase2 import RotaryScaling
from resolvent.tensors import read_tensors, write_tensors

from ...learning import moved_by_training
from ..small import tokens
from .conftest import SMALL, small_model


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 5), "must be integers"),
        (torch.zeros(5, dtype=torch.long), "shape"),
        (torch.zeros(2, 0, dtype=torch.long), "hold a token"),
        (torch.tensor([[1, 97]]), "token id 97 is outside the vocabulary of 97"),
        (torch.tensor([[1, -2]]), "token id -2"),
    ],
)
def test_error_names_wrong_tokens(model, ids, message):
    with pytest.raises(ValueError, match=message):
        model(ids)


def test_error_names_wrong_offsets_and_masks(model):
    ids = tokens(10, 1)
    for offsets in ([0, 5], [1, 10], [0, 7, 5, 10]):
        with pytest.raises(ValueError, match="rise from 0"):
            model(ids, cu_seqlens=torch.tensor(offsets))
    with pytest.raises(ValueError, match=r"shape \(1, T\)"):
        model(tokens(10, 2), cu_seqlens=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="integers"):
        model(ids, cu_seqlens=torch.tensor([0.0, 10.0]))
    for wrong in (dict(cu_seqlens=[0, 10]), dict(attention_mask=[[1] * 10]), dict(input_ids=[[1, 2]])):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))} must be a tensor, got \[.*torch.tensor"):
            model(**(dict(input_ids=ids) | wrong))
    with pytest.raises(ValueError, match="attention_mask must have the shape"):
        model(ids, attention_mask=torch.ones(1, 9))
    with pytest.raises(ValueError, match="not both"):
        model(ids, attention_mask=torch.ones(1, 10), cu_seqlens=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="without any token"):
        model.generate(ids, 1, attention_mask=torch.zeros(1, 10))


def test_early_tokens_reach_the_last_loss_of_a_fresh_model():
    model = create_phase2_model(preset="small", vocab_size=500, device="cpu").eval()
    ids = torch.randint(0, 500, (1, 512))
    other = ids.clone()
    other[:, :256] = torch.randint(0, 500, (1, 256))
    with torch.no_grad():
        a, b = model(ids)[:, -1], model(other)[:, -1]
    assert (a - b).norm() / a.norm() > 1e-2
    embedded = model.token_embedding(ids).detach().requires_grad_()
    model.token_embedding.forward = lambda _: embedded
    model(ids)[:, -1].square().sum().backward()
    norms = embedded.grad[0].norm(dim=-1)
    assert norms[0] > 1e-4 * norms[-1]


def test_diagnostics_change_no_logit_and_have_the_keys_of_the_report(model):
    ids = tokens(130)
    plain = model(ids)
    logits, state, diagnostics = model(ids, return_state=True, return_diagnostics=True)
    assert torch.equal(logits, plain)
    assert isinstance(state, Phase2State)
    for name in ("layer_outputs", "gamma_values", "snr_stats", "resonance_info", "stability_metrics"):
        assert len(diagnostics[name]) == 3
    assert diagnostics["gamma_values"][0].shape == (2, 130, 3)
    assert diagnostics["input_embeddings"].shape == diagnostics["final_hidden_states"].shape == (2, 130, 48)
    assert diagnostics["resonance_info"][0]["diag_energy"].shape == (2, 3, 16)
    for metrics in diagnostics["stability_metrics"]:
        assert (metrics["energy"] <= metrics["energy_bound"]).all()


def test_padded_diagnostics_equal_single(model):
    ids, mask = tokens(50), torch.ones(2, 50)
    mask[0, :20] = 0
    _, padded = model(ids, attention_mask=mask, return_diagnostics=True)
    _, alone = model(ids[:1, 20:], return_diagnostics=True)
    assert padded["gamma_values"][1].shape == (2, 50, 3)
    torch.testing.assert_close(padded["gamma_values"][1][0, 20:], alone["gamma_values"][1][0], rtol=1e-4, atol=1e-4)
    for name, value in alone["stability_metrics"][1].items():
        torch.testing.assert_close(padded["stability_metrics"][1][name][:1], value, rtol=1e-3, atol=1e-3)


def test_disabled_mechanisms_have_no_parameters():
    model = small_model(snr_enabled=False, resonance_enabled=False)
    assert model.blocks[0].consolidation() is None
    _, diagnostics = model(tokens(), return_diagnostics=True)
    assert diagnostics["snr_stats"] == [{}] * 3
    assert not any("resonance" in name for name, _ in model.named_parameters())


def test_bfloat16_model_has_float32_logits_and_state(model):
    half = model.to(torch.bfloat16)
    assert half(tokens()).dtype == torch.float32
    _, state = half(tokens(1), return_state=True)
    assert state.layers[0].memory.memory.dtype == torch.float32


@pytest.mark.parametrize("packed", [False, True])
def test_bfloat16_autocast_is_close_to_float32_with_gradients(packed):
    model, ids = small_model(spread=0.0), tokens(200, 1)
    model.token_embedding.weight.data.mul_(
        50 / model.embedding_factor
    )  # the first norm amplifies the rounding of a small embedding
    options = {"cu_seqlens": torch.tensor([0, 70, 200])} if packed else {}

    def logits_and_gradient():
        model.zero_grad()
        logits = model(ids, **options)
        logits.float().square().sum().backward()
        return logits.float(), torch.cat([p.grad.flatten() for p in model.parameters()])

    exact, exact_gradient = logits_and_gradient()
    with torch.autocast("cpu", torch.bfloat16):
        found, gradient = logits_and_gradient()
        _, state = model(ids, return_state=True)
    assert (found - exact).norm() / exact.norm() < 0.02
    assert (gradient - exact_gradient).norm() / exact_gradient.norm() < 0.03
    assert state.layers[1].memory.memory.dtype == torch.float32


FIELDS = {
    "base_decay": (0.01, 0.2),
    "least_decay": (None, 0.009),
    "adaptive_decay": (True, False),
    "hebbian_eta": (0.1, 0.7),
    "hebbian_dt": (1.0, 0.3),
    "num_heads": (3, 2),
    "head_dim": (16, 8),
    "snr_threshold": (2.0, 0.5),
    "snr_gamma_boost": (2.0, 5.0),
    "snr_eta_boost": (1.5, 3.0),
    "snr_temperature": (0.5, 2.0),
    "snr_trained": (True, False),
    "snr_enabled": (True, False),
    "resonance_enabled": (True, False),
    "resonance_energy_threshold": (0.1, 2.0),
    "use_zeta_init": (True, False),
    "d_model": (48, 32),
    "n_layers": (3, 2),
    "ffn_dim": (None, 40),
    "embedding_scale": (None, 1.0),
    "ffn_gated": (True, False),
    "vocab_size": (97, 120),
    "consolidation_interval": (64, 128),
    "memory_feedback": (True, False),
    "feedback_scale": (None, 1.0),
    "memory_rotation": (False, True),
    "memory_rotation_orders": ((2,), (2, 3)),
    "memory_rotation_bias": (False, True),
    "conv_size": (4, 2),
    "output_norm": (True, False),
    "memory_norm_weight": (False, True),
    "output_gate": (True, False),
    "attention_layers": ((), (1,)),
    "attention_window": (20, None),
    "attention_windows": ((20,), (0,)),
    "bk_core": (True, False),
    "norm": ("layernorm", "rmsnorm"),
    "norm_eps": (1e-5, 0.1),
    "num_kv_heads": (None, 1),
    "qk_norm": (True, False),
    "qkv_bias": (False, True),
    "rotary_base": (10_000.0, 100.0),
    "rotary_scaling": (None, RotaryScaling("linear", 4.0)),
    "zeta_positions": (True, False),
    "intermediate_size": (None, 40),
    "ar_ssm_rank": (0, 8),
    "ar_ssm_gate_hidden_dim": (None, 7),
    "ar_ssm_bounded": (True, False),
    "htt_rank": (None, 6),
    "htt_phase_encoding": (True, False),
    "tie_embeddings": (False, True),
}
"""Fields that change the logits, with two values each."""

NEEDS = {
    "memory_rotation_orders": {"memory_rotation": True},
    "memory_rotation_bias": {"memory_rotation": True},
    "memory_norm_weight": {"output_norm": False},
    "ar_ssm_gate_hidden_dim": dict(ar_ssm_rank=8),
    "ar_ssm_bounded": dict(ar_ssm_rank=8),
    "attention_window": dict(attention_layers=(1,)),
    "attention_windows": dict(attention_layers=(1,)),
    "bk_core": dict(attention_layers=(0, 1, 2)),
    "num_kv_heads": dict(conv_size=1),
    "qk_norm": dict(attention_layers=(0, 1, 2), conv_size=1),
    "rotary_base": dict(attention_layers=(1,)),
    "rotary_scaling": dict(attention_layers=(1,)),
    "htt_phase_encoding": dict(htt_rank=6),
}
"""Fields that need another field to be on."""

REACHES = {
    "use_triton_bk": ((True, False), lambda m: m.blocks[0].dissipative_bk.backend),
    "triton_block_size": ((256, 128), lambda m: m.blocks[0].dissipative_bk.block_size),
    "backend": (("auto", "torch"), lambda m: m.blocks[0].hebbian.backend),
    "zeta_embedding_trainable": ((False, True), lambda m: len(list(m.position_embedding.parameters()))),
    "n_seq": ((64, 128), lambda m: m.n_seq),
    "dropout": ((0.0, 0.5), lambda m: m.blocks[0].dropout.p + m.dropout.p),
}
"""Fields that change no logit in evaluation mode, with a function that reads them from the model."""

TARGETS = {"phase1_config", "target_vram_gb", "target_speedup_triton"}
"""Fields that state origin and targets."""


def test_every_field_has_a_test():
    assert {f.name for f in dataclasses.fields(Phase2Config)} == {*FIELDS, *REACHES, *TARGETS}


@pytest.mark.parametrize("name", FIELDS)
def test_field_changes_the_logits(name):
    def logits(value):
        torch.manual_seed(0)
        model = small_model(spread=0.1, **{name: value}, **NEEDS.get(name, {}))
        torch.manual_seed(1)
        return model(tokens(200))

    first, second = (logits(value) for value in FIELDS[name])
    assert first.shape != second.shape or not torch.equal(first, second)


@pytest.mark.parametrize("name", REACHES)
def test_field_reaches_its_part(name):
    values, look = REACHES[name]
    first, second = (look(small_model(**{name: value})) for value in values)
    assert first != second


def test_dropout_acts_in_training_only():
    model = small_model(dropout=0.5)
    ids = tokens()
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_every_trainable_parameter_moves_within_four_steps():
    model = create_phase2_model(**{**SMALL, "zeta_embedding_trainable": True})
    assert moved_by_training(model, (tokens(200) for _ in range(4))) == {name for name, _ in model.named_parameters()}


def test_loaded_model_equals_saved(model, tmp_path):
    save_model(model, tmp_path / "run")
    loaded = load_model(tmp_path / "run", device="cpu")
    ids = tokens()
    assert loaded.config == model.config
    assert torch.equal(loaded(ids), model(ids))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "cannot read"),
        (lambda d: (d / "config.json").write_text("{"), "cannot read"),
        (lambda d: (d / "config.json").write_text("{}"), "does not describe a resolvent model"),
        (lambda d: (d / "model.safetensors").unlink(), "cannot read"),
        (lambda d: (d / "model.safetensors").write_bytes(b"garbage" * 100), "cannot read"),
        (lambda d: _edit(d, format_version=99), "format version 99"),
        (lambda d: _edit(d, d_model=32), "do not fit"),
        (lambda d: _edit(d, base_decay=-1), "base_decay must be > 0"),
        (lambda d: _edit(d, surprise=1), "unknown field of Phase2Config: 'surprise'"),
    ],
)
def test_error_names_the_damage_of_a_folder(model, tmp_path, damage, message):
    save_model(model, tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, device="cpu")


def _edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_error_names_a_damaged_state(tmp_path):
    (tmp_path / "state").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="holds no saved state"):
        Phase2State.load(tmp_path / "state")


def test_state_of_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "state"
    small_model()(tokens(5), return_state=True)[1].save(path)
    path.write_bytes(path.read_bytes().replace(b'"format_version":"1"', b'"format_version":"2"'))
    with pytest.raises(VersionError, match="format version 2"):
        Phase2State.load(path)


def test_state_of_another_release_is_refused_by_the_names_of_its_tensors(tmp_path):
    path, state = tmp_path / "state", small_model()(tokens(5), return_state=True)[1]
    state.save(path)
    stored = read_tensors(path)
    write_tensors(path, {**stored, "layers.0.memory.writes": stored["layers.0.memory.memory"] + 0})
    with pytest.raises(CheckpointError, match=r"has no layers\.0\.memory\.writes, another one wrote it; read the text"):
        Phase2State.load(path)
