"""A YAML file, the command line and training.json describe the same run."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from resolvent.errors import ConfigError
from resolvent.models.phase1 import get_phase1_preset
from resolvent.models.phase2 import get_phase2_preset
from resolvent.training import TrainingConfig
from resolvent.training.config import option_names
from resolvent.training.config_file import dump_config, load_config

CONFIGS = [
    TrainingConfig(),
    TrainingConfig(
        out="runs/a: b # c", seed=7, data="text.txt", schedule="wsd", decay_fraction=0.5, learning_rate=1e-5
    ),
    TrainingConfig(data=["one.txt", "two"], text_field="本文", validation_data=["held.txt"], deterministic=True),
    TrainingConfig(phase=1, tokenizer="bpe", vocab_size=300, ema=0.99),
    TrainingConfig(preset=None, model=dataclasses.replace(get_phase2_preset("small"), n_layers=2, dropout=0.0)),
    TrainingConfig(phase=1, preset=None, model=dataclasses.replace(get_phase1_preset("tiny"), ffn_dim=64)),
    TrainingConfig(preset=None, model=dataclasses.replace(get_phase2_preset("tiny-hybrid"), attention_layers=(1,))),
    TrainingConfig(start_from="runs/old"),
]


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("config", CONFIGS)
def test_dumped_file_restores_the_run(tmp_path: Path, config: TrainingConfig):
    config.validate()
    loaded = load_config(written(tmp_path, dump_config(config)))
    if config.model in (None, get_phase2_preset("tiny"), get_phase1_preset("tiny")):
        assert loaded == config
    else:
        assert loaded.to_dict() == config.to_dict()


def test_dumped_file_has_every_option_with_its_help():
    text = dump_config(TrainingConfig())
    keys = yaml.safe_load(text).keys()
    for field in dataclasses.fields(TrainingConfig):
        if "help" in field.metadata:
            assert option_names(field)[0] in keys
            assert f"# {field.metadata['help']}" in text


def test_a_model_is_dumped_as_a_preset_and_its_changes():
    model = dataclasses.replace(get_phase2_preset("small"), n_layers=2, dropout=0.0)
    values = yaml.safe_load(dump_config(TrainingConfig(preset=None, model=model)))
    assert (values["preset"], values["set"]) == ("small", {"n_layers": 2, "dropout": 0.0})


def test_keys_have_dashes_or_underscores_and_the_aliases_of_options(tmp_path: Path):
    config = load_config(written(tmp_path, "lr: 1e-3\nbatch-size: 4\nseq_len: 128\nfrom: runs/old\n"))
    assert (config.learning_rate, config.batch_size, config.seq_len, config.start_from) == (0.001, 4, 128, "runs/old")


def test_an_empty_file_is_the_default_run(tmp_path: Path):
    assert load_config(written(tmp_path, "# nothing\n")) == TrainingConfig()


FAULTS = {
    "learning_rte: 0.1": "unknown key 'learning_rte': did you mean learning_rate?",
    "xyzzy: 1": "unknown key 'xyzzy': `resolvent train --help` lists all",
    "steps: many": "steps must be an integer, got many",
    "steps: 0": "steps must be >= 1, got 0",
    "schedule: linear": "schedule must be one of cosine, wsd, constant, got linear",
    "compile: 1": "compile must be true or false or null, got 1",
    "data: [a, 1]": "data must be a string or a list of strings or null, got [a, 1]",
    "steps: null": "steps must be an integer, got null",
    "steps: 'null'": "steps must be an integer, got 'null'",
    "deterministic: 1": "deterministic must be true or false, got 1",
    "log_interval: true": "log_interval must be an integer, got true",
    "lr: .inf": "learning_rate must be a finite number or null, got .inf",
    "out: 2026-11-30": "out must be a string or null, got 2026-11-30",
    "set: {d_model: null}": "d_model must be an integer, got null",
    "set: {bk_core: null}": "bk_core must be true or false, got null",
    "set: {htt_rank: false}": "htt_rank must be an integer or null, got false",
    "set: {attention_layers: [a]}": "attention_layers must be a list of integers, got [a]",
    "seed: !!python/object/apply:os.getpid []": "seed has a value that cannot be read: could not determine a",
    "seed: !!int x": "seed has a value that cannot be read",
    "set: [a]": "set must hold `field: value` lines of the model, got [a]",
    "overwrite: true": "unknown key 'overwrite'",
}


@pytest.mark.parametrize("line", FAULTS)
def test_faults_are_named_with_file_and_line(tmp_path: Path, line: str):
    path = written(tmp_path, f"# a run\nbeta1: 0.8\n{line}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert str(raised.value).startswith(f"{path}, line 3: {FAULTS[line]}")


def test_all_faults_are_reported_at_once(tmp_path: Path):
    with pytest.raises(ConfigError) as raised:
        load_config(written(tmp_path, "stepz: 5\nseed: -1\nlr: 1\nlearning-rate: 2\n"))
    assert [line.split(", line ")[1] for line in str(raised.value).splitlines()] == [
        "1: unknown key 'stepz': did you mean steps?",
        "2: seed must be >= 0, got -1",
        "4: learning-rate is given twice",
    ]


def test_faults_of_the_model_are_reported_with_the_others_and_their_lines(tmp_path: Path):
    text = "stepz: 5\nset:\n  n_layer: 2\n  dropout: 2\n  d_model: 64\n  vocab_size: 7\n"
    with pytest.raises(ConfigError) as raised:
        load_config(written(tmp_path, text))
    told = [line.split(", line ")[1] for line in str(raised.value).splitlines()]
    assert [line[:30] for line in told] == [
        "1: unknown key 'stepz': did yo",
        "3: unknown field of Phase2Conf",
        "4: dropout must be in [0, 1), ",
        "6: the tokenizer decides vocab",
    ]
    assert "'n_layers'" in told[1] and told[1].endswith("; `resolvent presets --fields` lists all")


def test_fields_of_the_model_are_judged_together(tmp_path: Path):
    """With one layer alone, the layer of tiny-hybrid that attends is missing."""
    config = load_config(written(tmp_path, "preset: tiny-hybrid\nset: {n_layers: 1, attention_layers: [0]}\n"))
    assert config.model is not None and config.model.n_layers == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1", "is not YAML: .* line 1"),
        ("- steps", "must hold `option: value` lines"),
        ("steps: 1\n---\nsteps: 2", "is not YAML: .*another document"),
        ("data: &a [x]\nvalidation_data: *a", r"is not YAML: aliases \(\*name\) are not read .* line 2"),
        ("steps: 0100", "line 1: steps has a value that cannot be read: 0100 is no decimal integer"),
        ("steps: 1:30", "line 1: steps has a value that cannot be read: 1:30 is no decimal integer"),
        ("? [steps]\n: 3", "line 1: unknown key 'a list or mapping': "),
        ("set: {vocab_size: 5}", "the tokenizer decides vocab_size"),
        ("set: {n_layer: 5}", "unknown field of Phase2Config: 'n_layer' .*did you mean 'n_layers'"),
        ("seed: " + "[" * 3000, "is not YAML"),
    ],
)
def test_a_file_that_describes_no_run_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, text))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=r"cannot read .*run\.yaml: .*No such file"):
        load_config(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read .*run\.yaml: .*decode"):
        load_config(path)
