"""Runs that learn from conversations: the loss is that of the answers, whatever the batches and processes."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from resolvent.data.chat_template import ChatTemplate
from resolvent.errors import ConfigError, DataError
from resolvent.evaluation.language import sample_stretches
from resolvent.models import load_model
from resolvent.training import TrainingConfig, TrainingInterrupted, resume, train
from resolvent.training.corpus import load_corpus, split_corpus
from resolvent.training.run import new_trainer
from tests.cli.conftest import call
from tests.processes import together

from .runs import after_step, assert_same_run, metrics

MakeConfig = Callable[..., TrainingConfig]
COLOURS = {"river": "blue", "stone": "grey as ash", "cloud": "white", "tower": "red", "grass": "green", "coal": "black"}


@pytest.fixture
def chat_config(small_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """A run on questions after colours, with answers of unequal length."""
    pairs = [(f"{n}: {thing}?", colour * (1 + n)) for n in range(5) for thing, colour in COLOURS.items()]
    records = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

    def make(**changes: object) -> TrainingConfig:
        return small_config(**{"format": "chat", "data": str(path), "validation_fraction": 0.25, **changes})

    return make


def begin(config: TrainingConfig) -> None:
    train(config)


def test_resumed_run_equals_uninterrupted_run(chat_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train(chat_config(accumulation=2))
    broken = chat_config(accumulation=2, out=str(tmp_path / "broken"))
    after_step(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(TrainingInterrupted):
        train(broken)
    resume(tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "run", 10)


def test_accumulated_batches_equal_one_batch(chat_config: MakeConfig):
    gradients = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        config = chat_config(batch_size=batch_size, accumulation=accumulation, seq_len=64)
        config.model.dropout = 0.0
        with new_trainer(config) as trainer:
            trainer.train_step.model.train()
            loss = trainer.train_step.gradient(0, trainer.batches_per_step)
            gradients.append([loss, *(x.grad for x in trainer.raw_model.parameters() if x.grad is not None)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_two_processes_equal_one(chat_config: MakeConfig, tmp_path: Path):
    config = chat_config(accumulation=2, steps=3, eval_interval=0)
    config.model.dropout = 0.0
    train(config)
    theirs = chat_config(steps=3, eval_interval=0, out=str(tmp_path / "two"))
    theirs.model.dropout = 0.0
    together(2, begin, theirs)
    for ours, two in zip(metrics(tmp_path / "run"), metrics(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(two, rel=1e-4)


def test_validation_is_that_of_the_answers(chat_config: MakeConfig, tmp_path: Path):
    config = chat_config(validation_data=chat_config().data, validation_fraction=TrainingConfig.validation_fraction)
    result = train(config)
    template, model = ChatTemplate.default(result.tokenizer), load_model(tmp_path / "run", "cpu")
    nats, count, num_bytes = 0.0, 0, 0
    for line in Path(str(config.data)).read_text().splitlines():
        messages = json.loads(line)["messages"]
        ids, written = map(torch.from_numpy, template.encode_answers(messages))
        with torch.no_grad():
            logits = model(ids[None])[0, :-1]
        nats += F.cross_entropy(logits[written[1:]], ids[1:][written[1:]], reduction="sum").item()
        count, num_bytes = count + int(written.sum()), num_bytes + len(messages[1]["content"])
    assert result.validation.tokens == count == num_bytes + 30
    assert result.validation.loss == pytest.approx(nats / count, rel=1e-4)
    assert result.validation.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)


def test_sample_of_conversations_has_whole_ones(chat_config: MakeConfig):
    stream = load_corpus(chat_config()).train
    for budget in (1, 200, 600):
        sample = sample_stretches(stream, budget)
        assert sum(map(len, sample.sequences)) == pytest.approx(budget, rel=0.5) or budget == 1
        assert sample.num_predictions > len(sample.sequences)  # an answer of several tokens of each
        assert sample.num_bytes == sample.num_predictions - len(sample.sequences)


def test_run_keeps_the_template_for_chat_and_for_runs_from_it(chat_config: MakeConfig, tmp_path: Path):
    template = (
        "{% for message in messages %}{{ '<' ~ message.role ~ '>' ~ message.content ~ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    train(chat_config(steps=1))
    settings = json.loads((tmp_path / "run" / "tokenizer_config.json").read_text())
    assert "Assistant" in settings["chat_template"]
    (tmp_path / "run" / "chat_template.jinja").write_text(template)
    later = dict(start_from=str(tmp_path / "run"), preset="tiny", model=None, steps=2)
    result = train(chat_config(**later, out=str(tmp_path / "later")))
    corpus = load_corpus(chat_config(**later), result.tokenizer, template_folder=tmp_path / "later")
    assert bytes((~corpus.train.tokens[:6]).tolist()) == b"<user>"
    (tmp_path / "run").rename(tmp_path / "gone")
    assert resume(tmp_path / "later", steps=3).history.steps[-1].step == 3


def test_command_line_teaches_answers(chat_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, out, data = tmp_path / "base", tmp_path / "out", chat_config().data
    train(chat_config(out=str(base), steps=1))
    options = ("--steps", 60, "--batch-size", 8, "--lr", 0.004, "--device", "cpu", "--validation-data", data)
    assert call("train", "--from", base, "--data", data, "--format", "chat", *options, "--out", out) == 0
    losses = [record["loss"] for record in metrics(out) if "loss" in record]
    assert losses[-1] < losses[0] / 3
    assert "resolvent chat" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (dict(data=None), "format chat needs data"),
        (dict(text_field="talk"), "text_field has no effect"),
        (dict(tokenizer="bpe"), "tokenizer bpe learns from text"),
        (dict(format="talk"), "format must be one of text, chat"),
    ],
)
def test_settings_that_do_not_fit_are_refused(chat_config: MakeConfig, changes: dict[str, object], fault: str):
    with pytest.raises(ConfigError, match=fault):
        chat_config(**changes).validate()


def test_tokens_and_data_sets_are_refused(chat_config: MakeConfig):
    with pytest.raises(DataError, match="hf:name holds no records of messages"):
        load_corpus(chat_config(data="hf:name"))


def test_conversations_are_no_text_to_evaluate(chat_config: MakeConfig):
    with pytest.raises(DataError, match="name a text with --data"):
        split_corpus(chat_config())
