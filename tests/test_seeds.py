"""Seeds have the same range in every command and function."""

import pytest

from experiments.ablation.measures import evaluate_mechanisms
from resolvent.data import encode_documents
from resolvent.data.tokenization import bytes_tokenizer
from resolvent.errors import ConfigError
from resolvent.evaluation import evaluate_needle, measure_influence
from resolvent.seeds import MOST_SEED, check_seed
from resolvent.training import TrainingConfig
from tests.cli.conftest import call
from tests.models.small import PHASE2


@pytest.mark.parametrize("seed", [0, 1, MOST_SEED])
def test_seeds_in_range_are_accepted(seed):
    check_seed(seed)
    TrainingConfig(seed=seed).validate()


@pytest.mark.parametrize("seed", [-1, MOST_SEED + 1, 2**64, 1.5, "1", None, True])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ConfigError, match=f"seed must be an integer from 0 to {2**63 - 1}, got {seed!r}"):
        check_seed(seed)
    with pytest.raises(ConfigError, match="seed must be"):
        TrainingConfig(seed=seed).validate()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_measures_refuse_seeds_out_of_range(seed):
    tokenizer = bytes_tokenizer()
    model, stream = PHASE2.model(vocab_size=257), encode_documents(["a text " * 100], tokenizer)
    for measure in (
        lambda: evaluate_needle(model, stream, tokenizer, seed=seed),
        lambda: measure_influence(model, stream, seed=seed),
        lambda: evaluate_mechanisms(model, stream, tokenizer, seed=seed),
    ):
        with pytest.raises(ConfigError, match=f"seed must be an integer from 0 to {MOST_SEED}, got {seed}"):
            measure()


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "."],
        ["convert", ".", "out"],
        ["train"],
        ["evaluate", "needle", "."],
        ["evaluate", "influence", "."],
    ],
    ids=" ".join,
)
def test_commands_refuse_seeds_out_of_range(command, seed, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert call(*command, "--seed", seed) == 2
    shown = capfd.readouterr().err
    assert "seed" in shown and str(MOST_SEED if seed > 0 else 0) in shown, shown
