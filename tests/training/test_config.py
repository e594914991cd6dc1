import dataclasses
import json
from pathlib import Path

import pytest

from resolvent.errors import ConfigError, DataError
from resolvent.models.phase1 import get_phase1_preset
from resolvent.models.phase2 import Phase2Config, get_phase2_preset
from resolvent.training import TrainingConfig
from resolvent.training.config import check_paths


def test_the_defaults_are_valid():
    TrainingConfig().validate()


def test_all_faults_are_reported_at_once_with_field_and_value():
    faulty = {
        "steps": 0,
        "learning_rate": -0.5,
        "schedule": "linear",
        "beta2": 1.0,
        "min_lr_ratio": 1.5,
        "vocab_size": 256,
        "seed": -1,
        "out": 7,
        "batch_size": 2.5,
        "grad_clip": float("nan"),
        "warmup_steps": True,
    }
    with pytest.raises(ConfigError) as raised:
        TrainingConfig(**faulty).validate()
    lines = str(raised.value).splitlines()
    assert lines[0] == f"TrainingConfig has {len(faulty)} faults:"
    for name, value in faulty.items():
        assert any(line.startswith(f"  - {name} must be") and line.endswith(f"got {value!r}") for line in lines), name


def test_a_single_fault_is_one_line():
    with pytest.raises(ConfigError, match=r"^steps must be >= 1, got -3$"):
        TrainingConfig(steps=-3).validate()


def test_start_from_excludes_other_model_fields():
    TrainingConfig(start_from="runs/old").validate()
    given = dict(phase=1, preset=None, model=get_phase1_preset("tiny"), tokenizer="bpe", vocab_size=300)
    with pytest.raises(ConfigError, match=r"leave out phase, preset, model, tokenizer, vocab_size$"):
        TrainingConfig(start_from="runs/old", **given).validate()
    assert TrainingConfig(start_from="runs/old").run_dir.as_posix() == "runs/from-old"


@pytest.mark.parametrize("preset_and_model", [(None, None), ("tiny", get_phase2_preset("tiny"))])
def test_one_of_preset_and_model_is_needed(preset_and_model: tuple[str | None, Phase2Config | None]):
    preset, model = preset_and_model
    with pytest.raises(ConfigError, match="one of preset and model"):
        TrainingConfig(preset=preset, model=model).validate()


def test_faults_of_the_model_are_reported_too():
    model = dataclasses.replace(get_phase2_preset("tiny"), n_layers=0)
    with pytest.raises(ConfigError) as raised:
        TrainingConfig(preset=None, model=model, steps=0).validate()
    assert "n_layers must be > 0, got 0" in str(raised.value)
    assert "steps must be >= 1, got 0" in str(raised.value)


@pytest.mark.parametrize(
    "config",
    [
        TrainingConfig(),
        TrainingConfig(warmup_steps=3, data="text.txt", schedule="wsd"),
        TrainingConfig(data=["one.txt", "two"], text_field="body", validation_data=["held.txt"]),
        TrainingConfig(preset=None, model=get_phase2_preset("tiny")),
        TrainingConfig(start_from="runs/old"),
    ],
)
def test_the_round_trip_through_json_is_equal(config: TrainingConfig):
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("field", ["data", "validation_data"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", r"must name a file or a folder, got \[''\]"),
        (["a", ""], r"must name a file or a folder, got \['a', ''\]"),
        ([], r"must name a file or a folder, got \[''\]"),
        (["a", 1], r"must be a string or a list of strings or None, got \['a', 1\]"),
        (1, r"must be a string or a list of strings or None, got 1"),
    ],
)
def test_texts_are_paths(field: str, value: object, message: str):
    with pytest.raises(ConfigError, match=f"^{field} {message}$"):
        TrainingConfig(**{field: value}).validate()


def test_configuration_of_one_text_is_that_of_older_releases():
    """Older releases had no `text_field`, and kept the path as a string."""
    values = TrainingConfig(data="text.txt").to_dict()
    assert values["data"] == "text.txt"
    del values["text_field"]
    assert TrainingConfig.from_dict(values) == TrainingConfig(data="text.txt")


def test_unknown_fields_are_named():
    with pytest.raises(ConfigError, match="'stepps', 'lr'"):
        TrainingConfig.from_dict({"stepps": 3, "lr": 1.0, "steps": 5})


def test_every_field_but_the_model_has_help_and_a_group():
    for field in dataclasses.fields(TrainingConfig):
        if field.name != "model":
            assert field.metadata["help"].endswith(".") and field.metadata["group"], field.name


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0), (100, 5), (4000, 200), (10**6, 200)])
def test_the_default_warm_up(steps: int, warmup: int):
    assert TrainingConfig(steps=steps).warmup == warmup
    assert TrainingConfig(steps=steps, warmup_steps=7).warmup == 7


def test_default_window_is_n_seq_of_the_model():
    assert [TrainingConfig(seq_len=given).window(n_seq=512) for given in (None, 64)] == [512, 64]


def test_the_default_learning_rate_falls_with_the_width():
    assert TrainingConfig(optimizer="adamw").peak_learning_rate(d_model=512) == pytest.approx(1e-3, rel=0.03)
    assert TrainingConfig(optimizer="adamw").peak_learning_rate(d_model=128) == pytest.approx(4e-3, rel=0.03)
    assert TrainingConfig(optimizer="adamw", learning_rate=0.25).peak_learning_rate(d_model=128) == 0.25


def test_learning_rates_beside_muon_do_not_depend_on_the_width_and_keep_their_ratio():
    for width in (128, 1024):
        assert TrainingConfig().peak_learning_rate(width) == 4e-3
        assert TrainingConfig().peak_muon_learning_rate(width) == 5 * 4e-3
    assert TrainingConfig(learning_rate=0.25).peak_muon_learning_rate(128) == 5 * 0.25
    given = TrainingConfig(learning_rate=0.25, muon_learning_rate=0.5)
    assert (given.peak_learning_rate(128), given.peak_muon_learning_rate(128)) == (0.25, 0.5)
    assert TrainingConfig(start_from="runs/old").peak_muon_learning_rate(128) == 5 * 1e-3


def test_settings_of_muon_have_no_effect_with_adamw():
    TrainingConfig(muon_learning_rate=0.5, muon_momentum=0.9).validate()
    idle = TrainingConfig(optimizer="adamw", muon_learning_rate=0.5, muon_momentum=0.9)
    with pytest.raises(ConfigError, match="muon_learning_rate has no effect with the optimizer 'adamw'") as raised:
        idle.validate()
    assert "muon_momentum has no effect" in str(raised.value)


def test_the_default_run_folder_is_named_after_the_preset():
    assert TrainingConfig(preset="small").run_dir.as_posix() == "runs/small"
    assert TrainingConfig(preset="small", out="elsewhere").run_dir.as_posix() == "elsewhere"


def test_validations_take_a_twentieth_of_the_tokens_that_are_trained_on():
    config = TrainingConfig(steps=1000, eval_interval=100)
    assert config.validation_tokens(2048, final=False) == 100 * 2048 // 20
    assert config.validation_tokens(2048, final=True) == 1000 * 2048 // 20
    large = TrainingConfig(steps=100_000, eval_interval=250)
    assert large.validation_tokens(2**19, final=False) == 65_536
    assert large.validation_tokens(2**19, final=True) == 100_000 * 2**19 // 20
    assert TrainingConfig(steps=1).validation_tokens(10, final=True) == 1


@pytest.mark.parametrize("tokens", [0, 7, 10**9])
def test_given_tokens_of_a_validation_replace_the_default(tokens: int):
    config = TrainingConfig(eval_tokens=tokens, final_eval_tokens=tokens + 1)
    assert config.validation_tokens(2048, final=False) == tokens
    assert config.validation_tokens(2048, final=True) == tokens + 1


def test_a_saved_model_takes_a_quarter_of_the_learning_rate_of_fresh_weights():
    adamw = TrainingConfig(optimizer="adamw", start_from="runs/old")
    assert adamw.peak_learning_rate(128) == pytest.approx(0.125 / 128)
    assert TrainingConfig(start_from="runs/old").peak_learning_rate(128) == pytest.approx(1e-3)
    assert TrainingConfig(start_from="runs/old", learning_rate=0.3).peak_learning_rate(128) == 0.3


def test_validation_fraction_is_refused_beside_validation_data():
    TrainingConfig(validation_data="other.txt").validate()
    TrainingConfig(validation_fraction=0.2).validate()
    with pytest.raises(ConfigError, match="validation_fraction has no effect beside validation_data"):
        TrainingConfig(validation_data="other.txt", validation_fraction=0.2).validate()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_validation_fraction_is_between_0_and_1(fraction: float):
    with pytest.raises(ConfigError, match=r"validation_fraction must be [<>] [01], got"):
        TrainingConfig(validation_fraction=fraction).validate()


def test_paths_of_texts_are_checked_without_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b:2", "tokens.bin"):
        Path(name).touch()
    Path("folder").mkdir()
    check_paths(["a.txt", "a.txt:0.5", "b:2", "b:2:1", "folder", "hf:user/name,split=train", "tokens.idx", "."])
    for missing in ("c.txt", "c.txt:0.5", "other.idx", "folder/a.txt"):
        name = missing.removesuffix(":0.5")
        with pytest.raises(DataError, match=f"^cannot read {name}: No such file or directory; check that it exists"):
            check_paths(["a.txt", missing])
