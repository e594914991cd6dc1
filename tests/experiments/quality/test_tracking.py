import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments.quality import results
from experiments.quality.__main__ import app
from experiments.quality.tracking import TASKS, BracketedSums, Experiment, Plan, Products, build, products
from experiments.quality.training import Clock, Mode
from resolvent.ops.cross_entropy import IGNORED

PLAIN = Mode(compiled=False, captured=False, autocast=False)
GROUPS = {name: task.table for name, task in TASKS.items() if isinstance(task, Products)}
BRACKETED = {name: task for name, task in TASKS.items() if isinstance(task, BracketedSums)}
SMALL = Plan("parity", width=16, steps=4, batch=8, longest=8, warmup=1, test=(8, 24), last=6, examples=16)


def test_labels_of_sums():
    tokens = torch.randint(5, (7, 30), generator=torch.Generator().manual_seed(0))
    for task, order in {"parity": 2, "mod3": 3, "mod5": 5}.items():
        read = tokens % order
        assert torch.equal(products(read, GROUPS[task]), read.cumsum(-1) % order)


def test_labels_of_permutations():
    tokens = torch.randint(6, (40,), generator=torch.Generator().manual_seed(0))
    arranged = "abc"
    names, states = list(itertools.permutations(range(3))), []
    for token in tokens.tolist():  # the permutation moves the letter at i to the place names[token][i]
        moved = [""] * 3
        for letter, place in zip(arranged, names[token], strict=True):
            moved[place] = letter
        arranged = "".join(moved)
        states.append([arranged.index(letter) for letter in "abc"])
    assert [list(names[state]) for state in products(tokens, GROUPS["s3"]).tolist()] == states


@pytest.mark.parametrize("task", GROUPS)
def test_tasks_are_groups(task: str):
    table = GROUPS[task]
    elements = torch.arange(len(table))
    assert torch.equal(table[0], elements) and torch.equal(table[:, 0], elements)
    assert torch.equal(table.sort(0).values, elements[:, None].expand_as(table))
    a, b, c = torch.meshgrid(elements, elements, elements, indexing="ij")
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    assert torch.equal(table, table.T) == (task != "s3")


def spelled(tokens: torch.Tensor, order: int) -> str:
    return "".join([*map(str, range(order)), *"+-()"][token] for token in tokens.tolist())


def closed(text: str) -> bool:
    return text.count("(") == text.count(")") and text[-1] not in "+-"


@pytest.mark.parametrize("name", BRACKETED)
def test_labels_are_values_of_closed_expressions(name: str):
    task, seen = BRACKETED[name], 0
    tokens, labels = task.sequences(40, 31, torch.Generator().manual_seed(0))
    for row, wanted in zip(tokens, labels.tolist(), strict=True):
        text = spelled(row, task.order)
        for i, label in enumerate(wanted):
            start = text[: i + 1]
            assert label == (eval(start) % task.order if closed(start) else IGNORED)
            seen += label != IGNORED
    assert seen > 300


@pytest.mark.parametrize("length", [1, 2, 3, 8, 40, 41])
def test_every_bracket_closes_at_the_last_odd_position(length: int):
    task = BRACKETED["mod5-brackets"]
    tokens, labels = task.sequences(200, length, torch.Generator().manual_seed(0))
    last = length - 1 + length % 2
    assert bool((labels[:, last - 1] != IGNORED).all())
    for row in tokens:
        text = spelled(row, task.order)
        assert closed(text[:last]) and (last == length or text[-1] in "+-")


@pytest.mark.parametrize("name", BRACKETED)
def test_a_guess_of_a_bracketed_sum_is_right_once_in_n_times(name: str):
    task = BRACKETED[name]
    tokens, labels = task.sequences(4000, 40, torch.Generator().manual_seed(0))
    known = labels[labels != IGNORED]
    parts = known.bincount(minlength=task.order) / len(known)
    torch.testing.assert_close(parts, torch.full((task.order,), 1 / task.order), rtol=0, atol=0.01)
    depths = ((tokens == task.order + 2).long() - (tokens == task.order + 3).long()).cumsum(-1)
    assert depths.min() == 0 and depths.max() >= 6 and 0.25 < len(known) / labels.numel() < 0.35


def test_accuracy_counts_the_known_values_alone():
    plan = dataclasses.replace(SMALL, task="mod3-brackets")
    experiment = Experiment(build("phase2", plan), plan, PLAIN, "abc")
    with torch.no_grad():
        experiment.entry.model.lm_head.weight.zero_()  # the first digit is then the likeliest everywhere
    _, labels = plan.drawn.sequences(16, 24, torch.Generator().manual_seed(1_000_000 + 24))
    known = labels[:, -6:][labels[:, -6:] != IGNORED]
    assert 0 < len(known) < 96 and experiment._accuracy(24) == (known == 0).double().mean().item()


def test_training_learns_from_the_known_values_alone():
    plan = dataclasses.replace(SMALL, task="mod3-brackets")
    experiment = Experiment(build("phase2/rotation", plan), plan, PLAIN, "abc")
    experiment.draw(0)
    hidden, _ = experiment.entry.model.hidden_states(experiment.tokens[1, :, : int(experiment.lengths[1])])
    labels = experiment.labels[1, :, : hidden.shape[1]]
    logits = experiment.entry.model.lm_head(hidden)[labels != IGNORED]
    exact = torch.nn.functional.cross_entropy(logits, labels[labels != IGNORED])
    torch.testing.assert_close(experiment._loss(torch.tensor([1]), 8), exact)


@pytest.mark.parametrize(("name", "heads"), [("phase2", 2), ("phase2/heads-4", 4)])
def test_memories_have_the_heads_of_the_plan_unless_the_name_says_others(name: str, heads: int):
    config = build(name, Plan("parity")).model.config
    assert (config.num_heads, config.head_dim) == (heads, 64 // heads)


def test_lengths_grow():
    plan = Plan("parity", steps=4000)
    lengths = torch.tensor(plan.lengths(torch.Generator().manual_seed(0)))
    assert lengths[0] == 3 and lengths.min() == 3 and lengths.max() == 40
    assert lengths[:200].max() <= 3 + 37 * 200 // 2000
    late = lengths[2000:].double()
    assert late.min() == 3 and abs(late.mean() - 21.5) < 1


def test_an_unknown_task_is_an_error():
    with pytest.raises(ValueError, match="no task 's4'"):
        _ = Plan("s4").drawn


def test_training_reads_the_sequences_of_its_step():
    experiment = Experiment(build("phase2/rotation", SMALL), SMALL, PLAIN, "abc")
    kinds = experiment.draw(3)
    assert kinds == [0, 0, 0, 0] and experiment.lengths.min() >= 3 and experiment.lengths.max() <= 8
    assert torch.equal(experiment.labels, experiment.tokens.cumsum(-1) % 2)
    model = experiment.entry.model
    experiment.lengths[2] = 5
    hidden, _ = model.hidden_states(experiment.tokens[2, :, :5])
    exact = torch.nn.functional.cross_entropy(
        model.lm_head(hidden).flatten(0, 1), experiment.labels[2, :, :5].flatten()
    )
    torch.testing.assert_close(experiment._loss(torch.tensor([2]), 8), exact)


def test_a_step_reads_a_multiple_of_16_tokens():
    plan = dataclasses.replace(SMALL, longest=40, steps=64, growth=0.0)
    experiment = Experiment(build("phase2", plan), plan, PLAIN, "abc")
    kinds, lengths = torch.tensor(experiment.draw(0)), experiment.lengths
    assert len(experiment.trainer._advances) == 3 and set(kinds.tolist()) == {0, 1, 2}
    assert bool((lengths <= 16 * (kinds + 1)).all()) and bool((lengths > 16 * kinds).all())


def test_accuracy_counts_the_last_positions():
    experiment = Experiment(build("phase2", SMALL), SMALL, PLAIN, "abc")
    head = experiment.entry.model.lm_head
    with torch.no_grad():
        head.weight.zero_()  # the first label is then the likeliest everywhere
    generator = torch.Generator().manual_seed(1_000_000 + 24)
    labels = torch.randint(2, (16, 24), generator=generator).cumsum(-1) % 2
    assert experiment._accuracy(24) == (labels[:, -6:] == 0).double().mean().item()
    with torch.no_grad():
        head.weight.fill_(math.nan)
    assert experiment._accuracy(24) == 0


@pytest.mark.parametrize(
    ("name", "spread"), [("rotation", 0.5), ("rotation/orders-2-3", 0.5), ("rotation-0.1", 0.1), ("rotation-1", 1.0)]
)
def test_rotation_start_and_shared_weights(name: str, spread: float):
    plain, turned = build("phase2", Plan("parity")), build(f"phase2/{name}", Plan("parity"))
    plain.reset(0)
    turned.reset(0)
    weights = dict(turned.model.named_parameters())
    start = weights.pop("blocks.0.hebbian.rotation_proj.weight")
    assert abs(start.std().item() * 64**0.5 / spread - 1) < 0.1
    assert turned.model.config.memory_rotation_orders == ((2, 3) if name.endswith("orders-2-3") else (2,))
    others = dict(plain.model.named_parameters())
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in others)


def test_a_run_is_recorded_and_not_made_again(tmp_path: Path):
    out = tmp_path / "runs.jsonl"
    command = ["tracking", "--out", str(out), "--commit", "abc", "--tasks", "mod3", "--steps", "3", "--longest", "5"]
    command += ["--models", "phase2/rotation-0.1", "--no-capture"]
    for _ in range(2):
        found = CliRunner().invoke(app, command, catch_exceptions=False)
        assert found.exit_code == 0
    (record,) = results.read([out])
    assert record["settings"] == Plan("mod3", steps=3, longest=5).settings()
    assert record["commit"] == "abc" and record["seed"] == 0 and record["model"] == "phase2/rotation-0.1"
    assert set(record["accuracies"]) == {"40", "128", "256"} and record["finite"]
    shown = CliRunner().invoke(app, ["report", str(out)], catch_exceptions=False).stdout
    assert "group mod3" in shown and "phase2/rotation-0.1" in shown


def test_parity_of_short_sequences_is_learnt():
    plan = Plan("parity", steps=200, batch=32, longest=6, test=(6,), warmup=20, last=4, growth=0.3)
    experiment = Experiment(build("phase2/rotation-1", plan), plan, PLAIN, "abc")
    assert experiment.run(5e-3, 0, Clock(math.inf))["accuracy"] > 0.9
