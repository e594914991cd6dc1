import dataclasses
import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments.quality.language import (
    PLANS,
    Experiment,
    Plan,
    Text,
    book_stretches,
    by_part,
    by_position,
    difference,
    evaluation_steps,
    token_nats,
    window_starts,
)
from experiments.quality.models import build
from experiments.quality.training import Clock, Mode, OutOfTimeError
from experiments.quality.variants import ABLATION, mechanisms_of
from resolvent import load_model
from resolvent.data import build_tokenizer, load_tokenizer
from resolvent.data.cache import tokenize
from resolvent.ops import IGNORED

PLAN = Plan(width=128, layers=1, parameters=250_000, length=32, batch=4, steps=12, warmup=2, evaluations=3)
PLAIN = Mode(compiled=False, captured=False, autocast=False)
FOREVER = Clock(math.inf)


@pytest.fixture(scope="module")
def text() -> Text:
    documents = [f"Line {i}: {'so it goes, ' * (5 + i % 7)}\n" for i in range(60)]
    return Text.of_documents(documents[:50], documents[50:], build_tokenizer("bytes", []))


@pytest.fixture(scope="module")
def experiment(text: Text) -> Experiment:
    return Experiment(build("gla", PLAN.size(text.vocabulary)), text, PLAN, PLAIN)


def test_text_is_split_by_document_in_every_file(tmp_path: Path):
    for name in "ab":
        documents = ("".join(f"{name}{i}, line {j}\n" for j in range(i + 1)) for i in range(40))
        (tmp_path / f"{name}.txt").write_text("<|endoftext|>\n".join(documents))
    text = Text.of_corpus([tmp_path / "a.txt", tmp_path / "b.txt"], "bytes", 0)
    held_out = [bytes(ids[1:-1].tolist()).decode() for ids in text.validation]
    assert {x[0] for x in held_out} == {"a", "b"}
    assert all(ids[0] == ids[-1] == 256 for ids in text.validation)
    learned = bytes(text.train[text.train < 256].tolist()).decode()
    assert not any(document in learned for document in held_out)
    whole = sum((tmp_path / f"{name}.txt").stat().st_size - 39 * len("<|endoftext|>\n") for name in "ab")
    assert len(learned) + sum(map(len, held_out)) == whole
    assert text.validation_bytes == sum(len(x.encode()) for x in held_out)
    assert 0.04 < text.validation_bytes / whole < 0.06


def test_losses_are_told_by_part_of_the_corpus(tmp_path: Path):
    path = tmp_path / "text.jsonl.xz"
    rows = [{"text": f"{i}: {'so it goes, ' * 9}", "part": ("prose", "code")[i % 2]} for i in range(80)]
    path.write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    text = Text.of_corpus([path], "bytes", 0, part_field="part")
    held_out = [bytes(ids[1:-1].tolist()).decode() for ids in text.validation]
    assert text.parts == [("prose", "code")[int(document.partition(":")[0]) % 2] for document in held_out]
    text.save(tmp_path / "text.npz")
    assert Text.load(tmp_path / "text.npz").parts == text.parts
    assert Text.load(tmp_path / "text.npz").digest == text.digest
    assert dataclasses.replace(text, train=text.train[1:]).digest != text.digest
    nats = torch.where(text.windows(32)[1] == IGNORED, math.nan, 1.0)
    rows = torch.tensor([part == "code" for part in text.window_parts(32)])
    nats[rows] *= 3
    assert by_part(nats, text.window_parts(32)) == {"code": 3.0, "prose": 1.0}
    assert by_part(nats, []) == {}


def test_stretches_of_books_stay_within_a_book(text: Text, tmp_path: Path):
    (tmp_path / "books.txt").write_text("<|endoftext|>\n".join(["a" * 50 + "\n", "b" * 90 + "\n", "c" * 20 + "\n"]))
    ids, labels = book_stretches(tmp_path / "books.txt", text.tokenizer, 30, most=2)
    assert ["".join(map(chr, row)) for row in ids.tolist()] == ["a" * 30, "b" * 30, "b" * 30]
    assert torch.equal(ids[:, 1:], labels[:, :-1]) and labels[:, -1].tolist() == [97, 98, 98]
    plan = dataclasses.replace(PLAN, extrapolate=64, steps=1)
    stretches = book_stretches(tmp_path / "books.txt", text.tokenizer, 64, most=1)
    experiment = Experiment(build("phase2", plan.size(text.vocabulary)), text, plan, PLAIN, stretches, switching=False)
    record = experiment.run(1e-3, 0, FOREVER)
    assert record["long"]["stretches"] == 1 and record["switched_off"] == {}


def test_windows_are_short_in_half_of_the_steps_and_whole_at_the_end(text: Text):
    plan = dataclasses.replace(PLAN, steps=40)
    entry = build("phase2/attention/window-16/short-4", plan.size(text.vocabulary))
    experiment, seen = Experiment(entry, text, plan, PLAIN, switching=False), []
    layer = next(block.attention for block in entry.model.blocks)
    layer.register_forward_hook(lambda *_: seen.append(layer.window) if torch.is_grad_enabled() else None)
    record = experiment.run(1e-3, 0, FOREVER)
    windows = seen[-plan.steps :]
    assert record["finite"] and layer.window == 16
    assert set(windows[:34]) == {4, 16} and 10 < windows.count(4) < 24
    assert windows[34:] == [16] * 6


def test_text_is_the_same_after_saving(text: Text, tmp_path: Path):
    text.save(tmp_path / "text.npz")
    loaded = Text.load(tmp_path / "text.npz")
    assert np.array_equal(loaded.train, text.train) and loaded.train.dtype == np.uint16
    assert all(np.array_equal(a, b) for a, b in zip(loaded.validation, text.validation, strict=True))
    names = ("validation_bytes", "vocabulary", "tokenizer", "predicted")
    assert all(getattr(loaded, name) == getattr(text, name) for name in names)


def test_shards_are_a_text(tmp_path: Path):
    documents = [f"Line {i}: {'so it goes, ' * (5 + i % 7)}" for i in range(60)]
    (tmp_path / "text.txt").write_text("<|endoftext|>\n".join(documents))
    source = dict(tokenizer="bytes", validation_fraction=0.05)
    tokenize([str(tmp_path / "text.txt")], tmp_path / "tokens", **source)
    found, expected = Text.load(tmp_path / "tokens"), Text.of_corpus([tmp_path / "text.txt"], "bytes", 0)
    assert np.array_equal(found.train, expected.train)
    for ours, theirs in zip(found.validation, expected.validation, strict=True):
        assert np.array_equal(ours, theirs)
    assert found.digest == expected.digest and found.validation_bytes == expected.validation_bytes
    tokenize([str(tmp_path / "text.txt")], tmp_path / "all", **source | {"validation_fraction": None})
    with pytest.raises(ValueError, match="holds nothing out: tokenize it with --validation-fraction"):
        Text.load(tmp_path / "all")


@pytest.mark.parametrize("name", [name for name in PLANS if name.startswith("scale")])
def test_models_of_a_scaling_line_are_within_reach(name: str):
    with torch.device("meta"):
        for model in ("phase2", "phase2/hybrid", "phase2/attention", "transformer"):
            size = PLANS[name].size(16384)
            assert build(model, size, "meta").parameters == pytest.approx(size.parameters, rel=0.02)


def test_characters_are_split_in_order(tmp_path: Path):
    (tmp_path / "text.txt").write_text("abcdé" * 20)
    text = Text.of_characters([tmp_path / "text.txt"])
    assert text.train.tolist() == [0, 1, 2, 3, 4] * 18
    assert text.validation[0].tolist() == [0, 1, 2, 3, 4] * 2
    assert (text.vocabulary, text.validation_bytes, text.predicted) == (5, 12, 9)


def test_windows_predict_every_token_once(text: Text):
    ids, labels = text.windows(32)
    assert ids.shape == labels.shape and ids.shape[1] == 32
    kept = labels != -100
    assert kept.sum() == text.predicted
    assert torch.equal(labels[kept], torch.cat([torch.from_numpy(x[1:].astype(np.int64)) for x in text.validation]))
    inside = kept[:, :-1] & kept[:, 1:]
    assert torch.equal(labels[:, :-1][inside], ids[:, 1:][inside])
    ids, labels = text.stretches(100)
    assert torch.equal(ids.flatten()[1:], labels.flatten()[:-1]) and len(ids) == (text.predicted + 9) // 100


def test_windows_of_a_pass_tile_the_tokens_in_random_order():
    starts = window_starts(1000, 32, batch=4, steps=20, seed=3)
    assert starts.shape == (20, 4)
    flat = starts.flatten()
    count = next(i for i in range(1, 80) if len(set(flat[: i + 1] % 32)) > 1)  # the first pass
    assert sorted(flat[:count]) == list(range(flat[:count].min(), 1000 - 32, 32)) != list(flat[:count])
    assert flat.min() >= 0 and flat.max() + 32 < 1000
    assert np.array_equal(starts, window_starts(1000, 32, batch=4, steps=20, seed=3))
    assert not np.array_equal(starts, window_starts(1000, 32, batch=4, steps=20, seed=4))


def test_a_step_reads_its_windows(experiment: Experiment, text: Text):
    experiment.starts.copy_(torch.from_numpy(window_starts(len(text.train), 32, 4, 12, seed=0)))
    model = experiment.entry.model
    loss = experiment._loss(torch.tensor([5]))
    rows = [torch.from_numpy(text.train[i : i + 33].astype(np.int64)) for i in experiment.starts[5].tolist()]
    ids = torch.stack(rows)
    logits = F.linear(model.hidden_states(ids[:, :-1])[0], model.lm_head.weight)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_run_is_recorded_and_repeatable(experiment: Experiment, text: Text):
    record = experiment.run(1e-2, 1, FOREVER)
    assert record["finite"] and record["loss"] < math.log(257)
    assert [step for step, _ in record["curve"]] == [4, 8, 12]
    assert record["curve"][-1][1] == record["loss"] and record["best_loss"] == min(x for _, x in record["curve"])
    assert record["tokens"] == 12 * 4 * 32 and record["seconds"] > 0
    assert record["bits_per_byte"] == pytest.approx(
        record["loss"] * text.predicted / text.validation_bytes / math.log(2)
    )
    assert list(record["loss_by_position"]) == ["0-32"]
    on = mechanisms_of(experiment.entry.name) if experiment.entry.name in ABLATION else {}
    assert list(record["switched_off"]) == list(on)
    assert all(math.isfinite(mean) and error >= 0 for mean, error in record["switched_off"].values())
    ids, labels = text.windows(32)
    model = experiment.entry.model
    with torch.no_grad():
        logits = F.linear(model.hidden_states(ids)[0], model.lm_head.weight)
    assert record["loss"] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), rel=1e-5)
    again = experiment.run(1e-2, 1, FOREVER)
    assert again["curve"] == record["curve"] != experiment.run(1e-2, 2, FOREVER)["curve"]


def test_diverged_run_is_recorded(experiment: Experiment):
    record = experiment.run(1e30, 0, FOREVER)
    assert not record["finite"] and record["loss"] is None and record["bits_per_byte"] is None


def test_no_run_begins_beyond_the_budget(experiment: Experiment):
    with pytest.raises(OutOfTimeError):
        experiment.run(1e-2, 0, Clock.of(experiment.seconds / 2))


def test_long_stretches_are_compared_with_windows_over_the_same_tokens(text: Text):
    plan = dataclasses.replace(PLAN, extrapolate=128, steps=2)
    experiment = Experiment(build("phase2/bare", plan.size(text.vocabulary)), text, plan, PLAIN)
    long = experiment.run(1e-3, 0, FOREVER)["long"]
    assert list(long["by_position"]) == list(long["in_windows"]) == ["0-64", "64-128"]
    ids, labels = text.stretches(128)
    model = experiment.entry.model.eval()
    with torch.no_grad():
        whole = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="none").view_as(ids)
        parts = F.cross_entropy(model(ids.view(-1, 32)).flatten(0, 1), labels.flatten(), reduction="none").view_as(ids)
    assert long["by_position"]["64-128"] == pytest.approx(whole[:, 64:].mean().item(), rel=1e-5)
    assert long["in_windows"]["64-128"] == pytest.approx(parts[:, 64:].mean().item(), rel=1e-5)
    assert long["stretches"] == len(ids)


def test_a_saved_model_brings_its_tokenizer(text: Text, tmp_path: Path):
    plan = dataclasses.replace(PLAN, steps=1)
    experiment = Experiment(build("phase2", plan.size(text.vocabulary)), text, plan, PLAIN)
    experiment.save(tmp_path)
    ids = torch.tensor([load_tokenizer(tmp_path).encode("so it goes").ids])
    experiment.entry.model.eval()
    assert torch.equal(load_model(tmp_path, "cpu")(ids), experiment.entry.model(ids))


def test_buckets_and_evaluations():
    nats = torch.arange(300.0).repeat(2, 1)
    nats[1, 200:] = torch.nan
    assert by_position(nats) == {"0-64": 31.5, "64-128": 95.5, "128-256": pytest.approx(
        (2 * sum(range(128, 200)) + sum(range(200, 256))) / 200
    ), "256-300": 277.5}  # fmt: skip
    assert evaluation_steps(10, 4) == [2, 5, 8, 10] and evaluation_steps(2, 4)[-1] == 2


def test_nats_of_a_diverged_model_are_not_taken_for_missing_ones(experiment: Experiment, text: Text):
    ids, labels = text.windows(32)
    experiment.entry.reset(0)
    with torch.no_grad():
        experiment.entry.model.ln_f.weight.fill_(torch.nan)
    nats = token_nats(experiment.entry.model, ids, labels, 8, experiment.trainer.evaluating())
    assert nats[experiment.counted].mean().isnan()
    experiment.entry.reset(0)


def test_a_difference_counts_tokens_and_its_error_windows():
    nan = math.nan
    nats = torch.tensor([[2.0, 4.0, nan], [1.0, nan, nan], [3.0, 3.0, 3.0]], dtype=torch.float64)
    assert difference(nats, nats) == (0.0, 0.0)
    mean, error = difference(nats, nats - torch.tensor([[1.0], [1.0], [0.0]]))
    assert mean == pytest.approx(3 / 6)
    gaps = [2 - 2 * 0.5, 1 - 1 * 0.5, 0 - 3 * 0.5]  # of the windows' sums to what the mean lets expect
    assert error == pytest.approx(math.sqrt(sum(gap**2 for gap in gaps) * 3 / 2) / 6)
