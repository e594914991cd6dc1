import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resolvent import Phase1Config, Phase1IntegratedModel, create_phase1_model, get_phase1_preset
from resolvent.errors import ConfigError
from resolvent.ops import dispatch

from ...learning import moved_by_training, train
from ..small import tokens
from .conftest import SMALL, small_model


def test_model_has_the_named_parts():
    model = create_phase1_model(**SMALL)
    for name in ("token_embedding", "position_embedding", "blocks", "ln_f", "lm_head"):
        assert isinstance(getattr(model, name), nn.Module)
    assert (model.vocab_size, model.d_model, model.n_layers, model.n_seq) == (97, 48, 3, 64)
    logits = model(tokens())
    assert logits.shape == (2, 100, 97)
    assert logits.dtype == torch.float32


def test_factory_takes_config_preset_and_single_values():
    config = Phase1Config(vocab_size=97, d_model=48, n_layers=1)
    before = config.to_dict()
    assert create_phase1_model(config=config, n_layers=2, device="cpu").n_layers == 2
    assert config.to_dict() == before
    model = create_phase1_model(preset="tiny", htt_rank=3, device="cpu")
    assert (model.config.htt_rank, model.vocab_size) == (3, 257)
    with pytest.raises(ValueError, match="either config or preset"):
        create_phase1_model(config=config, preset="8gb")
    with pytest.raises(ValueError, match=r"unknown field of Phase1Config: 'htt_rnk' \(did you mean 'htt_rank'"):
        create_phase1_model(preset="tiny", htt_rnk=3)
    with pytest.raises(ValueError, match="htt_num_cores must be 2"):
        create_phase1_model(preset="tiny", htt_num_cores=3)
    assert isinstance(Phase1IntegratedModel(get_phase1_preset("tiny")), Phase1IntegratedModel)


def test_same_seed_gives_same_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in create_phase1_model(**SMALL).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    "options", [{}, dict(ar_ssm_enabled=False), dict(htt_enabled=False), dict(ffn_rank=4), dict(dropout=0.1)]
)
def test_every_trainable_parameter_moves_within_four_steps(options):
    model = create_phase1_model(**{**SMALL, **options})
    assert moved_by_training(model, (tokens(80) for _ in range(4))) == {name for name, _ in model.named_parameters()}


def test_training_learns_to_predict_sorted_tokens():
    model = create_phase1_model(**{**SMALL, "vocab_size": 30})

    def batches():
        for step in range(60):
            model.update_rank_schedule(20 * step)
            yield torch.randint(0, 30, (8, 33)).sort(dim=1).values

    losses = train(model, batches(), lr=3e-3)
    assert losses[-1] < 0.7 * losses[0]


def test_penalty_equals_the_mean_gate_and_lowers_gates():
    model = small_model(ar_ssm_l1_regularization=0.5)
    ids = tokens()
    _, diagnostics, penalty = model(ids, return_diagnostics=True, return_penalty=True)
    gates = torch.stack(diagnostics["gate_values"])
    torch.testing.assert_close(penalty, 0.5 * gates.mean())
    penalty.backward()
    for block in model.blocks:
        block.ar_ssm.gate_proj.bias.data -= block.ar_ssm.gate_proj.bias.grad
    assert model(ids, return_penalty=True)[1] < penalty
    assert small_model(ar_ssm_enabled=False)(tokens(), return_penalty=True)[1] == 0


def test_rank_schedule_changes_the_flops():
    model, ids = create_phase1_model(**{**SMALL, "ar_ssm_max_rank": 32, "rank_warmup_steps": 100}), tokens(50, 1)

    def flops():
        with FlopCounterMode(display=False) as counter:
            model(ids)
        return counter.get_total_flops()

    found = []
    for step, rank in ((0, 4), (25, 11), (50, 18), (100, 32), (10_000, 32)):
        assert model.update_rank_schedule(step) == model.rank == rank
        found.append(flops())
    assert found == sorted(found) and found[0] < found[1] < found[2] < found[3] == found[4]
    per_channel = 3 * 50 * 2 * (12 + 3 * 48)  # layers, tokens; gate, U, V, W_o
    assert found[3] - found[0] == 28 * per_channel
    assert small_model(ar_ssm_enabled=False).update_rank_schedule(5) is None


def test_raising_the_rank_in_training_keeps_the_logits():
    model, ids = create_phase1_model(**SMALL), tokens(60)
    model.update_rank_schedule(0)
    train(model, [ids] * 3, lr=1e-2)
    model.eval()
    assert model.rank == 4 and model.blocks[0].ar_ssm.out_proj.weight[:, :4].all()
    low = model(ids)
    model.update_rank_schedule(1000)
    assert model.rank == 8
    torch.testing.assert_close(model(ids), low, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("field", ["use_gradient_checkpointing", "checkpoint_ar_ssm", "checkpoint_htt"])
def test_checkpointing_saves_memory_at_equal_gradients(field):
    def run(value):
        torch.manual_seed(0)
        others = {"use_gradient_checkpointing": True, "checkpoint_ar_ssm": False, "checkpoint_htt": False}
        model = create_phase1_model(**{**SMALL, "dropout": 0.2, **others, field: value}).train()
        ids, kept = tokens(200), 0

        def count(x):
            nonlocal kept
            kept += x.numel() * x.element_size()
            return x

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            loss = model(ids).square().mean()
        loss.backward()
        return kept, loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    (kept, loss, gradient), (kept_without, loss_without, gradient_without) = run(True), run(False)
    assert kept < (0.5 if field == "use_gradient_checkpointing" else 0.99) * kept_without
    assert torch.equal(loss, loss_without)
    torch.testing.assert_close(gradient, gradient_without)


def test_diagnostics_change_no_logit_and_report_gates_and_stability(model):
    ids = tokens(130)
    logits, state, diagnostics = model(ids, return_state=True, return_diagnostics=True)
    assert torch.equal(logits, model(ids))
    for name in ("layer_outputs", "gate_values", "effective_rank", "gate_sparsity", "stability_metrics"):
        assert len(diagnostics[name]) == 3
    assert diagnostics["input_embeddings"].shape == diagnostics["final_hidden_states"].shape == (2, 130, 48)
    assert 0 < diagnostics["effective_rank"][0] < 8
    assert diagnostics["htt_compression_ratio"] == model.token_embedding.compression_ratio
    assert diagnostics["stability_warnings"] == []
    g = state.layers[0].resolvent
    assert diagnostics["stability_metrics"][0]["least_pivot"] <= 1 / g.abs().max()
    tight = small_model(schatten_s1_bound=1e-3, stability_threshold=1e3)
    told = tight(ids, return_diagnostics=True)[1]["stability_warnings"]
    assert len(told) == 6 and "layer 0: least pivot" in told[0] and "s1" in told[1]
    off = small_model(stability_monitoring_enabled=False)(ids, return_diagnostics=True)[1]
    assert off["stability_metrics"] == off["stability_warnings"] == []


def test_padded_diagnostics_equal_single(model):
    ids, mask = tokens(50), torch.ones(2, 50)
    mask[0, :20] = 0
    _, padded = model(ids, attention_mask=mask, return_diagnostics=True)
    _, alone = model(ids[:1, 20:], return_diagnostics=True)
    torch.testing.assert_close(padded["gate_values"][1][0, 20:], alone["gate_values"][1][0], rtol=1e-4, atol=1e-4)


def test_bfloat16_autocast_is_close_to_float32():
    model, ids = small_model(spread=0.02), tokens(200)
    exact = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        found, state = model(ids, return_state=True)
    assert (found.float() - exact).norm() / exact.norm() < 0.05
    assert state.layers[0].ar_ssm.total.dtype == torch.float64


@pytest.mark.skipif(not dispatch.interpreting(), reason="Triton compiles for the GPU here")
def test_the_default_model_runs_on_the_kernels():
    """Every operator of Phase 1 has a kernel, the sum that ``ar_ssm_use_fused_scan`` asks for included."""
    plain, kernels = small_model(backend="torch"), small_model(backend="triton")
    kernels.load_state_dict(plain.state_dict())
    ids, found = tokens(70), []
    before = dispatch.calls.copy()
    for model in (plain, kernels):
        loss = model(ids[:, :-1], labels=ids[:, 1:])
        found.append((loss, torch.autograd.grad(loss, list(model.parameters()))))
    counted = dispatch.calls - before
    layers = plain.n_layers * (2 if plain.config.use_gradient_checkpointing else 1)  # they run again in backward
    for path in ("torch", "triton"):
        assert counted["gated_prefix_sum", path] == counted["resolvent_diagonal", path] == layers
    (expected, expected_gradients), (ours, gradients) = found
    assert (ours - expected).abs() <= 1e-6 * expected
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


def test_kernels_that_cannot_run_are_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="backend='triton' cannot run resolvent_diagonal: the tensors are on cpu"):
        small_model(backend="triton")(tokens(5))


def test_fused_scan_switch_and_backend_reach_the_layers():
    assert small_model().blocks[0].ar_ssm.backend == "auto"
    assert small_model(ar_ssm_use_fused_scan=False).blocks[0].ar_ssm.backend == "torch"
    assert small_model(backend="torch").blocks[0].bk.backend == "torch"


FIELDS = {
    "ar_ssm_enabled": (True, False),
    "ar_ssm_max_rank": (8, 6),
    "ar_ssm_gate_hidden_dim": (None, 7),
    "ar_ssm_bounded": (True, False),
    "htt_enabled": (True, False),
    "htt_rank": (6, 4),
    "htt_phase_encoding": (True, False),
    "ffn_rank": (None, 5),
    "vocab_size": (97, 120),
    "d_model": (48, 32),
    "n_layers": (3, 2),
    "n_seq": (64, 128),
    "num_heads": (3, 2),
    "ffn_dim": (None, 40),
    "embedding_scale": (1.0, 3.0),
}
"""Fields that change the logits, with two values each."""

ELSEWHERE = {
    "ar_ssm_min_rank", "rank_warmup_steps", "ar_ssm_l1_regularization", "ar_ssm_use_fused_scan", "backend",
    "htt_num_cores", "use_gradient_checkpointing", "checkpoint_ar_ssm", "checkpoint_htt", "ffn_compression_enabled",
    "stability_monitoring_enabled", "stability_threshold", "schatten_s1_bound", "schatten_s2_bound", "dropout",
}  # fmt: skip
"""Fields that the tests above and those of the configuration cover."""

TARGETS = {
    "htt_compression_target", "gradient_norm_threshold", "target_vram_gb", "target_ppl_degradation", "target_speedup",
}  # fmt: skip
"""Fields that state targets."""


def test_every_field_has_a_test():
    assert {f.name for f in dataclasses.fields(Phase1Config)} == {*FIELDS, *ELSEWHERE, *TARGETS}


@pytest.mark.parametrize("name", FIELDS)
def test_field_changes_the_logits(name):
    def logits(value):
        torch.manual_seed(0)
        model = small_model(spread=0.1, **{name: value})
        torch.manual_seed(1)
        return model(tokens(80))

    first, second = (logits(value) for value in FIELDS[name])
    assert first.shape != second.shape or not torch.equal(first, second)


def test_disabled_compression_keeps_full_matrices():
    full, low = small_model(ffn_rank=4, ffn_compression_enabled=False), small_model(ffn_rank=4)
    assert full.num_parameters() == small_model().num_parameters()
    assert low.num_parameters() < full.num_parameters()


@pytest.mark.parametrize("name", ["8gb", "10gb", "24gb", "inference", "max_quality", "max_efficiency"])
def test_presets_meet_their_compression_target(name):
    with torch.device("meta"):
        model = Phase1IntegratedModel(get_phase1_preset(name), init=False)
    assert model.token_embedding.compression_ratio < model.config.htt_compression_target


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_equals_cpu():
    model, ids = small_model(), tokens(300)
    expected, offsets = model(ids), torch.tensor([0, 100, 100, 300])
    packed = model(ids[:1], cu_seqlens=offsets)
    model.cuda()
    torch.testing.assert_close(model(ids.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model(ids[:1].cuda(), cu_seqlens=offsets).cpu(), packed, rtol=1e-3, atol=1e-3)
    _, state = model(ids[:, :200].cuda(), return_state=True)
    rest = model(ids[:, 200:].cuda(), state=state).cpu()
    torch.testing.assert_close(rest, expected[:, 200:], rtol=1e-3, atol=1e-3)
