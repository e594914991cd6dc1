import pytest

from resolvent import Phase1Config, get_phase1_preset
from resolvent.models.phase1.config import ALIASES, PRESETS


def test_defaults_are_valid_and_those_of_the_original():
    original = dict(
        ar_ssm_enabled=True, ar_ssm_max_rank=32, ar_ssm_min_rank=4, ar_ssm_gate_hidden_dim=None,
        ar_ssm_l1_regularization=0.001, ar_ssm_use_fused_scan=True, htt_enabled=True, htt_rank=16, htt_num_cores=2,
        htt_phase_encoding=True, htt_compression_target=0.1, stability_monitoring_enabled=True,
        stability_threshold=1e-6, schatten_s1_bound=100.0, schatten_s2_bound=50.0, gradient_norm_threshold=10.0,
        use_gradient_checkpointing=True, checkpoint_ar_ssm=True, checkpoint_htt=False, ffn_rank=None,
        ffn_compression_enabled=True, target_vram_gb=8.0, target_ppl_degradation=0.05, target_speedup=3.0,
    )  # fmt: skip
    config = Phase1Config()
    config.validate()
    assert {name: getattr(config, name) for name in original} == original
    assert Phase1Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(ar_ssm_max_rank=2), r"ar_ssm_max_rank must be >= ar_ssm_min_rank \(4\), got 2"),
        (dict(ar_ssm_min_rank=0), "ar_ssm_min_rank must be >= 1, got 0"),
        (dict(ar_ssm_l1_regularization=-1.0), "ar_ssm_l1_regularization must be >= 0, got -1"),
        (dict(htt_compression_target=1.0), r"htt_compression_target must be in range \(0, 1\), got 1"),
        (dict(htt_compression_target=0.0), "must be in range"),
        (dict(htt_rank=0), "htt_rank must be >= 1, got 0"),
        (dict(htt_num_cores=1), "htt_num_cores must be >= 2, got 1"),
        (dict(stability_threshold=0.0), "stability_threshold must be > 0, got 0"),
        (dict(schatten_s1_bound=-1.0), "schatten_s1_bound must be > 0"),
        (dict(schatten_s2_bound=0), "schatten_s2_bound must be > 0"),
        (dict(gradient_norm_threshold=0), "gradient_norm_threshold must be > 0"),
        (dict(target_vram_gb=0), "target_vram_gb must be > 0"),
        (dict(target_ppl_degradation=0), "target_ppl_degradation must be > 0"),
        (dict(target_speedup=-3), "target_speedup must be > 0"),
        (dict(ffn_rank=0), "ffn_rank must be > 0, got 0"),
        (dict(ar_ssm_gate_hidden_dim=0), "ar_ssm_gate_hidden_dim must be > 0"),
        (dict(num_heads=0), "num_heads must be > 0"),
        (dict(rank_warmup_steps=-1), "rank_warmup_steps must be >= 0"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1"),
        (dict(backend="cuda"), "backend must be one of"),
        (dict(htt_rank=1.5), "htt_rank must be an integer"),
    ],
)
def test_error_names_field_and_value(values, message):
    with pytest.raises(ValueError, match=message):
        Phase1Config(**values).validate()


def test_all_faults_are_reported_at_once():
    with pytest.raises(ValueError, match="3 faults") as error:
        Phase1Config(htt_rank=0, target_speedup=0, htt_compression_target=2.0).validate()
    assert all(text in str(error.value) for text in ("must be >= 1", "must be > 0", "must be in range"))


def test_a_wrong_type_hides_no_other_fault():
    with pytest.raises(ValueError, match="4 faults") as error:
        Phase1Config(d_model="wide", n_layers=10**7, target_speedup=0, htt_compression_target=2.0).validate()
    found = str(error.value)
    assert all(text in found for text in ("got 'wide'", "n_layers must be <= ", "must be > 0", "must be in range"))


@pytest.mark.parametrize(
    ("vram", "ranks", "htt_rank", "target", "checkpoints", "bucket"),
    [
        (4, (16, 4), 8, 0.05, True, 8),
        (8, (16, 4), 8, 0.05, True, 8),
        (8.5, (32, 4), 16, 0.1, True, 10),
        (10, (32, 4), 16, 0.1, True, 10),
        (24, (64, 8), 32, 0.2, False, 24),
        (80, (64, 8), 32, 0.2, False, 24),
    ],
)
def test_for_hardware(vram, ranks, htt_rank, target, checkpoints, bucket):
    config = Phase1Config.for_hardware(vram)
    config.validate()
    assert (config.ar_ssm_max_rank, config.ar_ssm_min_rank) == ranks
    assert (config.htt_rank, config.htt_compression_target, config.target_vram_gb) == (htt_rank, target, bucket)
    assert config.use_gradient_checkpointing is config.checkpoint_ar_ssm is checkpoints
    assert config.ar_ssm_l1_regularization == 0.001


@pytest.mark.parametrize("vram", [0, -1, float("nan")])
def test_for_hardware_refuses_no_memory(vram):
    with pytest.raises(ValueError, match="vram_gb must be > 0"):
        Phase1Config.for_hardware(vram)


def test_configurations_for_inference_quality_and_efficiency():
    quality, efficiency = Phase1Config.for_maximum_quality(), Phase1Config.for_maximum_efficiency()
    assert (quality.ar_ssm_max_rank, quality.htt_rank, quality.target_ppl_degradation) == (128, 64, 0.01)
    assert (efficiency.ar_ssm_max_rank, efficiency.ar_ssm_min_rank, efficiency.target_vram_gb) == (16, 2, 6.0)
    assert not Phase1Config.for_inference().use_gradient_checkpointing


@pytest.mark.parametrize(
    ("name", "ranks", "l1", "htt_rank", "compression", "checkpoints", "vram", "ppl", "speed"),
    [
        ("8gb", (16, 4), 0.01, 8, 0.05, True, 8, 0.05, 3),
        ("10gb", (32, 4), 0.001, 16, 0.1, True, 10, 0.05, 3),
        ("24gb", (64, 8), 0.0001, 32, 0.2, False, 24, 0.01, 3),
        ("inference", (32, 4), 0.001, 16, 0.1, False, 8, 0.05, 5),
        ("max_quality", (128, 16), 0.0001, 64, 0.3, False, 40, 0.01, 3),
        ("max_efficiency", (16, 2), 0.01, 8, 0.05, True, 6, 0.10, 3),
    ],
)
def test_presets(name, ranks, l1, htt_rank, compression, checkpoints, vram, ppl, speed):
    config = get_phase1_preset(name)
    assert (config.ar_ssm_max_rank, config.ar_ssm_min_rank) == ranks
    assert (config.ar_ssm_l1_regularization, config.htt_rank) == (l1, htt_rank)
    assert config.htt_compression_target == compression
    assert config.use_gradient_checkpointing is config.checkpoint_ar_ssm is checkpoints
    assert (config.target_vram_gb, config.target_ppl_degradation, config.target_speedup) == (vram, ppl, speed)


def test_presets_are_fresh_valid_and_have_aliases():
    for name in (*PRESETS, *ALIASES):
        config = get_phase1_preset(name)
        config.validate()
        config.htt_rank = 999
        assert get_phase1_preset(name).htt_rank != 999
    assert get_phase1_preset("balanced") == get_phase1_preset("10gb")
    with pytest.raises(ValueError, match=r"Unknown preset: 9gb\. Available presets: tiny, 8gb, .*efficiency"):
        get_phase1_preset("9gb")


def test_rank_schedule():
    config = Phase1Config(ar_ssm_min_rank=4, ar_ssm_max_rank=32, rank_warmup_steps=1000)
    assert [config.rank_at(step) for step in (0, 1, 36, 500, 999, 1000, 5000)] == [4, 4, 5, 18, 31, 32, 32]
    assert Phase1Config(rank_warmup_steps=0).rank_at(0) == 32
