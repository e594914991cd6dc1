import math

import pytest
import torch

from experiments.quality import mqar
from experiments.quality.mqar import MIXERS, Experiment, Plan, Slice, build, generate
from experiments.quality.training import Clock, Mode

PLAIN = Mode(compiled=False, captured=False, autocast=False)
FOREVER = Clock(math.inf)
SMALL = Plan(epochs=2, batch=16, vocabulary=64, train=(Slice(32, 4, 50), Slice(64, 8, 40)), test=(Slice(32, 4, 20),))


def recall(length: int, pairs: int, examples: int, vocabulary: int = 64) -> mqar.Recall:
    return generate(Slice(length, pairs, examples), vocabulary, torch.Generator().manual_seed(0))


def test_every_answer_follows_from_its_key():
    task = recall(64, 8, 200)
    assert task.inputs.shape == (200, 64) and task.positions.shape == task.answers.shape == (200, 8)
    columns = (task.inputs.tolist(), task.positions.tolist(), task.answers.tolist())
    for tokens, positions, answers in zip(*columns, strict=True):
        keys, values = tokens[0:16:2], tokens[1:16:2]
        assert len(set(keys)) == len(set(values)) == 8
        assert all(1 <= key < 32 for key in keys) and all(32 <= value < 64 for value in values)
        assert len(set(positions)) == 8 and all(16 <= p < 64 and p % 2 == 0 for p in positions)
        meaning = dict(zip(keys, values, strict=True))
        assert [meaning[tokens[p]] for p in positions] == answers


def test_distributions():
    task = recall(32, 2, 40_000)
    counts = torch.bincount(task.inputs[:, 0], minlength=64)[1:32] / 40_000
    assert (counts - 1 / 31).abs().max() < 0.005
    counts = torch.bincount(task.inputs[:, 3], minlength=64)[32:] / 40_000
    assert (counts - 1 / 32).abs().max() < 0.005
    ranks = torch.arange(1, 15, dtype=torch.float64)
    p = ranks ** (0.01 - 1)
    p /= p.sum()
    first = torch.bincount((task.positions[:, 0] - 4) // 2, minlength=14) / 40_000
    assert (first - p).abs().max() < 0.01
    second = p * (p / (1 - p)).sum() - p * p / (1 - p)  # drawn after another one, without replacement
    found = torch.bincount((task.positions[:, 1] - 4) // 2, minlength=14) / 40_000
    assert (found - second).abs().max() < 0.01
    between = task.inputs[:, 5::2].flatten()
    assert (torch.bincount(between, minlength=64) / len(between) - 1 / 64).abs().max() < 0.002


def test_impossible_slices_are_errors():
    for length, pairs, vocabulary in [(31, 4, 64), (32, 9, 64), (64, 16, 32)]:
        with pytest.raises(ValueError, match="pairs need an even length"):
            recall(length, pairs, 1, vocabulary)


def test_the_protocol_is_zoology_s():
    plan = Plan()
    assert [str(part) for part in plan.train] == ["64x4", "128x8", "256x16", "256x32", "256x64"]
    assert plan.batches == [390, 78, 78, 78, 78] and plan.steps == 32 * 702
    assert [f"{rate:.2e}" for rate in mqar.LEARNING_RATES] == ["1.00e-03", "3.16e-03", "1.00e-02", "3.16e-02"]
    rates = plan.rates(1.0)
    assert rates[0] == 1 and rates[701] == 1 and rates[702] == pytest.approx((1 + math.cos(math.pi / 32)) / 2)
    kinds, numbers = plan.order(0)
    first = sorted(zip(kinds[:702], numbers[:702].tolist(), strict=True))
    assert first == [(kind, i) for kind, count in enumerate(plan.batches) for i in range(count)]
    assert kinds[:702] != kinds[702:1404]


def test_sequences_to_learn_and_to_test_differ_and_are_always_the_same():
    first, second = (mqar.draw(SMALL, torch.device("cpu")) for _ in range(2))
    assert torch.equal(first[0][0].inputs, second[0][0].inputs)
    assert not torch.equal(first[0][0].inputs[:20], first[1][0].inputs)


@pytest.mark.parametrize(
    "name", [*MIXERS, "phase2", "phase2/bare", "phase2/original", "phase2/no-snr/wide", "phase2/hybrid"]
)
def test_every_model_learns_from_the_places_asked_for(name: str):
    entry = build(name, 64, 2, 64)
    experiment = Experiment(entry, SMALL, PLAIN, mqar.draw(SMALL, torch.device("cpu")))
    entry.model.eval()
    loss = experiment._loss(torch.tensor([0]), experiment.train[0])
    assert loss.item() == pytest.approx(math.log(64), abs=1.5)
    task = experiment.train[0]
    hidden = entry.model.hidden_states(task.inputs[:16].long())[0]
    logits = entry.model.lm_head(hidden)
    nats = [
        logits[i, p].log_softmax(-1)[a]
        for i in range(16)
        for p, a in zip(task.positions[i], task.answers[i], strict=True)
    ]
    assert loss.item() == pytest.approx(-torch.stack(nats).mean().item(), rel=1e-4)
    record = experiment.run(3e-3, 0, FOREVER)
    assert record["finite"] and set(record["accuracies"]) == {"32x4"} and 0 <= record["accuracy"] <= 1
    assert record == experiment.run(3e-3, 0, FOREVER) | {key: record[key] for key in ("seconds",)}


def test_snr_filter_keeps_no_second_memory_and_wide_doubles_the_heads():
    whole, without, wide = (build(name, 64, 2, 64).state_bytes for name in ("phase2", "phase2/no-snr", "phase2/wide"))
    memory = 4 * 2 * 32 * 32
    assert whole // memory == without // memory == 1
    assert wide // memory == 2
    assert build("phase2/wide", 64, 2, 64).model.config.num_heads == 4


@pytest.mark.parametrize(("width", "head_dim"), [(64, 30), (128, 62)])
def test_wide_fits_in_the_state_of_gated_deltanet(width: int, head_dim: int):
    entry = build(f"phase2/wide-{head_dim}", width, 2, 64)
    config, peer = entry.model.config, build("gated-deltanet", width, 2, 64).state_bytes
    assert (config.num_heads, config.head_dim) == (4, head_dim) and 0.95 * peer < entry.state_bytes <= peer


def test_a_hybrid_attends_in_the_last_of_three_blocks():
    entry = build("phase2/hybrid/window-128", 64, 2, 64)
    config = entry.model.config
    assert config.n_layers == 3 and config.attention_layers == (2,) and config.attention_window == 128
    assert entry.state_bytes - 2 * build("phase2", 64, 2, 64).state_bytes > 4 * 2 * 128 * 64


def test_attention_learns_to_recall():
    plan = Plan(epochs=12, batch=32, vocabulary=64, train=(Slice(32, 4, 1024),), test=(Slice(32, 4, 256),))
    experiment = Experiment(build("attention", 64, 1, 64), plan, PLAIN, mqar.draw(plan, torch.device("cpu")))
    assert experiment.run(1e-2, 0, FOREVER)["accuracy"] > 0.97


def test_diverged_model_answers_nothing():
    experiment = Experiment(build("gla", 64, 2, 64), SMALL, PLAIN, mqar.draw(SMALL, torch.device("cpu")))
    record = experiment.run(1e30, 0, FOREVER)
    assert not record["finite"] and record["accuracy"] == 0


def test_unknown_mixers_are_errors():
    with pytest.raises(ValueError, match="there is no model 'transformer'; known are attention, gla"):
        build("transformer", 64, 2, 64)
