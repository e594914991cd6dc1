"""The tests that the factory report names, under its names."""

import pytest
import torch
from torch import nn

from resolvent.models.phase1 import Phase1Config, create_phase1_model
from resolvent.models.phase2 import (
    Phase2Config,
    Phase2IntegratedModel,
    convert_phase1_to_phase2,
    create_phase2_model,
    get_phase2_preset,
)

from .learning import moved_by_training

REPORT = {
    "small": (256, 4, 512, 4.0, 29.05e6),
    "base": (512, 6, 1024, 8.0, 70.95e6),
    "large": (1024, 12, 2048, 16.0, 256.33e6),
}


class TestPhase2Config:
    def test_default_config(self):
        config = Phase2Config()
        report = dict(
            phase1_config=None, use_triton_bk=True, triton_block_size=256, base_decay=0.01, adaptive_decay=True,
            hebbian_eta=0.1, hebbian_dt=1.0, num_heads=8, head_dim=64, snr_threshold=2.0, snr_gamma_boost=2.0,
            snr_eta_boost=1.5, resonance_enabled=True, resonance_energy_threshold=0.1, use_zeta_init=True,
            zeta_embedding_trainable=False, vocab_size=50257, d_model=512, n_layers=6, n_seq=1024, ffn_dim=None,
            dropout=0.1, target_vram_gb=8.0, target_speedup_triton=3.0,
        )  # fmt: skip
        assert {name: getattr(config, name) for name in report} == report

    def test_config_validation_valid(self):
        Phase2Config().validate()
        Phase2Config(vocab_size=30000, d_model=768, n_layers=8, base_decay=0.015, hebbian_eta=0.12).validate()

    def test_config_validation_invalid_base_decay(self):
        with pytest.raises(ValueError, match=r"^base_decay must be > 0, got -0.01$"):
            Phase2Config(base_decay=-0.01).validate()

    @pytest.mark.parametrize("least", [0, 0.01, 0.2])
    def test_config_validation_invalid_least_decay(self, least):
        Phase2Config(least_decay=0.009).validate()
        with pytest.raises(ValueError, match=rf"^least_decay must be > 0 and < base_decay \(0.01\), got {least}$"):
            Phase2Config(least_decay=least).validate()

    def test_config_validation_odd_head_dim_with_rotation(self):
        Phase2Config(head_dim=7).validate()
        with pytest.raises(
            ValueError, match=r"^memory_rotation turns pairs of channels: head_dim must be even, got 7$"
        ):
            Phase2Config(head_dim=7, memory_rotation=True).validate()

    @pytest.mark.parametrize(
        ("fields", "fault"),
        [
            (dict(memory_rotation_orders=(2, 1)), r"memory_rotation_orders must be numbers >= 2, got \[2, 1\]"),
            (dict(memory_rotation_orders=()), r"memory_rotation_orders must be numbers >= 2, got \[\]"),
            (
                dict(memory_rotation_orders=(2, 3, 5)),
                r"memory_rotation_orders must be a number that divides head_dim / 2 \(32\), got 3 orders",
            ),
            (
                dict(memory_rotation=False, memory_rotation_orders=(2, 3)),
                r"memory_rotation_orders other than \(2,\) need memory_rotation, got False",
            ),
            (
                dict(memory_rotation_bias=True, memory_rotation_orders=(2, 3)),
                r"memory_rotation_bias starts at angles of every size, .* must be \(2,\), got \[2, 3\]",
            ),
        ],
    )
    def test_config_validation_invalid_rotation_orders(self, fields, fault):
        Phase2Config(memory_rotation=True, memory_rotation_orders=(2, 3, 5, 2)).validate()
        with pytest.raises(ValueError, match=fault):
            Phase2Config(**({"memory_rotation": True} | fields)).validate()

    def test_config_validation_invalid_hebbian_eta(self):
        with pytest.raises(ValueError, match=r"^hebbian_eta must be > 0, got 0.0$"):
            Phase2Config(hebbian_eta=0.0).validate()

    def test_config_validation_invalid_snr_threshold(self):
        with pytest.raises(ValueError, match=r"^snr_threshold must be > 0, got -2.0$"):
            Phase2Config(snr_threshold=-2.0).validate()

    def test_config_validation_reports_all_faults_at_once(self):
        wrong = Phase2Config(base_decay=0, d_model=-1, dropout=1.5, consolidation_interval=100, backend="cuda")
        with pytest.raises(ValueError, match="5 faults") as error:
            wrong.validate()
        faults = ("base_decay must be > 0, got 0", "d_model must be > 0, got -1", "dropout must be in [0, 1), got 1.5")
        for fault in (*faults, "consolidation_interval must be a multiple of 64, got 100", "got 'cuda'"):
            assert fault in str(error.value)

    @pytest.mark.parametrize(
        ("field", "value"),
        [("d_model", 512.0), ("d_model", "512"), ("n_layers", True), ("base_decay", float("nan")), ("dropout", "0"),
         ("resonance_enabled", 1), ("phase1_config", {}), ("ffn_dim", 0.5)],
    )  # fmt: skip
    def test_config_validation_names_wrong_types(self, field, value):
        with pytest.raises(ValueError, match=f"{field} must be .* got"):
            Phase2Config(**{field: value}).validate()

    def test_config_to_dict(self):
        values = Phase2Config(d_model=768, phase1_config=Phase1Config(htt_rank=8)).to_dict()
        assert values["d_model"] == 768
        assert values["phase1_config"]["htt_rank"] == 8

    def test_config_from_dict(self):
        for config in (Phase2Config(d_model=768), Phase2Config(phase1_config=Phase1Config(htt_rank=8, ffn_rank=4))):
            again = Phase2Config.from_dict(config.to_dict())
            assert again == config
            assert type(again.phase1_config) is type(config.phase1_config)
        with pytest.raises(ValueError, match=r"'d_modell' \(did you mean 'd_model'\?\)"):
            Phase2Config.from_dict({"d_modell": 3})

    def test_config_from_phase1(self):
        phase1 = Phase1Config(vocab_size=1000, d_model=128, n_layers=3, n_seq=256, target_vram_gb=10.0)
        config = Phase2Config.from_phase1(phase1, n_layers=5)
        assert config.phase1_config is phase1
        assert (config.vocab_size, config.d_model, config.n_layers, config.n_seq) == (1000, 128, 5, 256)
        assert config.target_vram_gb == 10.0
        with pytest.raises(ValueError, match="unknown field"):
            Phase2Config.from_phase1(phase1, layers=5)
        with pytest.raises(ValueError, match="n_seq must be an integer, got '512'"):
            Phase2Config.from_phase1(phase1, n_seq="512").validate()

    @pytest.mark.parametrize(("n_seq", "interval"), [(1, 64), (256, 64), (700, 128), (1024, 256), (65536, 256)])
    def test_a_window_of_phase1_holds_consolidations(self, n_seq, interval):
        assert Phase2Config.from_phase1(Phase1Config(n_seq=n_seq)).consolidation_interval == interval
        assert Phase2Config.from_phase1(Phase1Config(), consolidation_interval=320).consolidation_interval == 320


class TestPresets:
    def check(self, name):
        d_model, n_layers, n_seq, vram, _ = REPORT[name]
        config = get_phase2_preset(name)
        config.validate()
        assert (config.d_model, config.n_layers, config.n_seq) == (d_model, n_layers, n_seq)
        assert config.target_vram_gb == vram
        config.d_model = 1
        assert get_phase2_preset(name).d_model == d_model

    def test_get_small_preset(self):
        self.check("small")

    def test_get_base_preset(self):
        self.check("base")

    def test_get_large_preset(self):
        self.check("large")

    def test_get_invalid_preset(self):
        with pytest.raises(ValueError, match=r"Unknown preset: huge\. Available presets: tiny, small, base, large"):
            get_phase2_preset("huge")


class TestCreatePhase2Model:
    def test_create_with_default_config(self):
        model = create_phase2_model(device="cpu")
        assert isinstance(model, Phase2IntegratedModel)
        assert (model.vocab_size, model.d_model, model.n_layers, model.n_seq) == (50257, 512, 6, 1024)

    def test_create_with_preset(self):
        model = create_phase2_model(preset="small", device="cpu")
        assert (model.d_model, model.n_layers, model.n_seq) == (256, 4, 512)

    def test_create_with_custom_config(self):
        config = Phase2Config(vocab_size=1000, d_model=128, n_layers=2, n_seq=64)
        before = config.to_dict()
        model = create_phase2_model(config=config, n_layers=3, device="cpu")
        assert (model.vocab_size, model.d_model, model.n_layers) == (1000, 128, 3)
        assert config.to_dict() == before

    def test_create_with_direct_params(self):
        model = create_phase2_model(vocab_size=1000, d_model=128, n_layers=2, n_seq=64, device="cpu", hebbian_eta=0.3)
        assert (model.vocab_size, model.d_model, model.n_layers, model.n_seq) == (1000, 128, 2, 64)
        assert model.config.hebbian_eta == 0.3

    def test_create_refuses_what_it_cannot_honour(self):
        with pytest.raises(ValueError, match="either config or preset"):
            create_phase2_model(config=Phase2Config(), preset="small")
        with pytest.raises(
            ValueError, match=r"unknown field of Phase2Config: 'hebian_eta' \(did you mean 'hebbian_eta'"
        ):
            create_phase2_model(preset="tiny", hebian_eta=0.3)
        with pytest.raises(ValueError, match="d_model must be > 0"):
            create_phase2_model(preset="tiny", d_model=-4)

    def test_the_same_seed_gives_the_same_weights(self):
        def weights(seed):
            torch.manual_seed(seed)
            return torch.cat(
                [p.detach().flatten() for p in create_phase2_model(preset="tiny", device="cpu").parameters()]
            )

        assert torch.equal(weights(1), weights(1))
        assert not torch.equal(weights(1), weights(2))

    def test_model_has_all_components(self):
        model = create_phase2_model(preset="tiny", device="cpu")
        for name in ("token_embedding", "position_embedding", "blocks", "ln_f", "lm_head"):
            assert isinstance(getattr(model, name), nn.Module)
        for block in model.blocks:
            for name in ("dissipative_bk", "bk_proj", "hebbian", "snr_filter", "resonance", "ffn", "ln1", "ln2"):
                assert isinstance(getattr(block, name), nn.Module)

    def test_model_forward_pass(self):
        model = create_phase2_model(vocab_size=1000, d_model=128, n_layers=2, n_seq=64, device="cpu")
        logits = model(torch.randint(0, 1000, (2, 64)))
        assert logits.shape == (2, 64, 1000)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()

    def test_model_forward_with_diagnostics(self):
        model = create_phase2_model(vocab_size=1000, d_model=128, n_layers=2, n_seq=64, device="cpu")
        logits, diagnostics = model(torch.randint(0, 1000, (2, 64)), return_diagnostics=True)
        assert logits.shape == (2, 64, 1000)
        assert {
            "layer_outputs",
            "gamma_values",
            "snr_stats",
            "resonance_info",
            "stability_metrics",
        } <= diagnostics.keys()
        assert {"input_embeddings", "final_hidden_states"} <= diagnostics.keys()
        assert len(diagnostics["gamma_values"]) == 2


class DummyPhase1Model(nn.Module):
    """A model of which only embedding and output mean anything to Phase 2."""

    def __init__(self, vocab_size: int = 1000, d_model: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.linear1 = nn.Linear(d_model, d_model)
        self.linear2 = nn.Linear(d_model, d_model)
        self.output = nn.Linear(d_model, vocab_size)

    def forward(self, x):
        return self.output(self.linear2(self.linear1(self.embedding(x)).relu()))


SIZES = dict(vocab_size=1000, d_model=128, n_layers=2, n_seq=64, num_heads=2)


class TestConvertPhase1ToPhase2:
    def test_convert_simple_model(self):
        model = convert_phase1_to_phase2(DummyPhase1Model(), Phase2Config(**SIZES))
        assert isinstance(model, Phase2IntegratedModel)
        assert (model.vocab_size, model.d_model, model.n_layers, model.n_seq) == (1000, 128, 2, 64)
        logits = model(torch.randint(0, 1000, (2, 64)))
        assert logits.shape == (2, 64, 1000)
        assert logits.isfinite().all()

    def test_convert_with_weight_copying(self):
        source = DummyPhase1Model()
        model = convert_phase1_to_phase2(source, Phase2Config(**SIZES), copy_compatible_weights=True)
        assert torch.equal(model.token_embedding.weight, source.embedding.weight)
        assert torch.equal(model.lm_head.weight, source.output.weight)
        fresh = convert_phase1_to_phase2(source, Phase2Config(**SIZES), copy_compatible_weights=False)
        assert not torch.equal(fresh.token_embedding.weight, source.embedding.weight)

    def test_convert_with_weight_freezing(self):
        model = convert_phase1_to_phase2(DummyPhase1Model(), Phase2Config(**SIZES), freeze_phase1_weights=True)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {"token_embedding.weight", "lm_head.weight"}
        free = convert_phase1_to_phase2(DummyPhase1Model(), Phase2Config(**SIZES))
        assert all(p.requires_grad for p in free.parameters())

    @torch.no_grad()
    def test_convert_with_weight_preservation(self):
        source = create_phase1_model(**SIZES, device="cpu")
        for parameter in source.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model = convert_phase1_to_phase2(source.eval()).eval()
        ids = torch.randint(0, 1000, (2, 200))
        assert (model(ids) - source(ids)).abs().max() <= 1e-5
        for ours, theirs in zip(model.blocks, source.blocks, strict=True):
            assert torch.equal(ours.bk_proj.weight, theirs.bk_proj.weight)


class TestIntegration:
    @pytest.mark.parametrize(
        "preset",
        ["tiny", "small", pytest.param("base", marks=pytest.mark.slow), pytest.param("large", marks=pytest.mark.slow)],
    )
    def test_create_and_train_step(self, preset):
        """Every trainable parameter has a finite gradient after one backward pass, and moves within a few steps."""
        model = create_phase2_model(preset=preset, vocab_size=500, device="cpu")
        moved = moved_by_training(model, (torch.randint(0, 500, (1, 270)) for _ in range(4)))
        assert moved == {name for name, _ in model.named_parameters()}

    def test_gradients_exist_for_sequences_without_a_boundary(self):
        model = create_phase2_model(preset="tiny", device="cpu").train()
        model(torch.randint(0, 257, (1, 8))).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    def test_preset_models_parameter_count(self):
        for name, (*_, expected) in REPORT.items():
            with torch.device("meta"):
                count = Phase2IntegratedModel(get_phase2_preset(name)).num_parameters()
            assert count == pytest.approx(expected, rel=0.02), name

    def test_the_training_loop_of_the_report_learns(self):
        vocab_size, batches = 50, []
        for _ in range(50):
            ids = torch.randint(0, vocab_size, (4, 33)).sort(dim=1).values
            batches.append({"input_ids": ids[:, :-1], "target_ids": ids[:, 1:]})
        model = create_phase2_model(
            vocab_size=vocab_size, d_model=32, n_layers=2, num_heads=2, head_dim=16, device="cpu"
        )
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for batch in batches:
            output = model(batch["input_ids"])
            loss = nn.functional.cross_entropy(output.view(-1, vocab_size), batch["target_ids"].reshape(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]

    @pytest.mark.slow
    def test_the_previous_token_task_is_solved(self):
        """20 symbols, 32 tokens, width 32, two layers: loss below 0.05 within 600 steps (the original: chance)."""
        model = create_phase2_model(
            vocab_size=20, d_model=32, n_layers=2, n_seq=32, num_heads=2, head_dim=16, dropout=0.0, device="cpu"
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(600):
            ids = torch.randint(0, 20, (16, 32))
            loss = nn.functional.cross_entropy(model(ids)[:, 1:].reshape(-1, 20), ids[:, :-1].reshape(-1))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert loss.item() < 0.05

    @pytest.mark.slow
    def test_creating_large_takes_seconds(self):
        import time

        start = time.perf_counter()
        create_phase2_model(preset="large", device="cpu")
        assert time.perf_counter() - start <= 20

    @pytest.mark.gpu
    def test_the_same_seed_gives_the_same_weights_on_cuda(self):
        torch.manual_seed(3)
        here = create_phase2_model(preset="small", device="cpu")
        torch.manual_seed(3)
        there = create_phase2_model(preset="small", device="cuda")
        for a, b in zip(here.parameters(), there.parameters(), strict=True):
            assert torch.equal(a, b.cpu())
        ids = torch.randint(0, 50257, (2, 300))
        torch.testing.assert_close(there.eval()(ids.cuda()).cpu(), here.eval()(ids), rtol=1e-3, atol=1e-3)


def test_the_import_path_of_the_report_works_from_the_root():
    from src.models.phase1 import Phase1Config as ReportPhase1Config
    from src.models.phase2 import convert_phase1_to_phase2 as report_convert
    from src.models.phase2 import create_phase2_model as report_create

    assert report_create is create_phase2_model
    assert report_convert is convert_phase1_to_phase2
    assert ReportPhase1Config is Phase1Config


def test_the_factory_is_the_module_that_the_report_names():
    import src.models.phase2.factory as report_factory

    names = ("Phase2Config", "get_phase2_preset", "create_phase2_model", "convert_phase1_to_phase2")
    assert [getattr(report_factory, name) for name in names] == [globals()[name] for name in names]
