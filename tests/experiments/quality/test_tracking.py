import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments.quality import results
from experiments.quality.__main__ import app
from experiments.quality.tracking import TASKS, Experiment, Plan, build, products
from experiments.quality.training import Clock, Mode

PLAIN = Mode(compiled=False, captured=False, autocast=False)
SMALL = Plan("parity", width=16, steps=4, batch=8, longest=8, warmup=1, test=(8, 24), last=6, examples=16)


def test_labels_of_sums():
    tokens = torch.randint(5, (7, 30), generator=torch.Generator().manual_seed(0))
    for task, order in {"parity": 2, "mod3": 3, "mod5": 5}.items():
        read = tokens % order
        assert torch.equal(products(read, TASKS[task]), read.cumsum(-1) % order)


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
    assert [list(names[state]) for state in products(tokens, TASKS["s3"]).tolist()] == states


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_groups(task: str):
    table = TASKS[task]
    elements = torch.arange(len(table))
    assert torch.equal(table[0], elements) and torch.equal(table[:, 0], elements)
    assert torch.equal(table.sort(0).values, elements[:, None].expand_as(table))
    a, b, c = torch.meshgrid(elements, elements, elements, indexing="ij")
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    assert torch.equal(table, table.T) == (task != "s3")


def test_lengths_grow():
    plan = Plan("parity", steps=4000)
    lengths = torch.tensor(plan.lengths(torch.Generator().manual_seed(0)))
    assert lengths[0] == 3 and lengths.min() == 3 and lengths.max() == 40
    assert lengths[:200].max() <= 3 + 37 * 200 // 2000
    late = lengths[2000:].double()
    assert late.min() == 3 and abs(late.mean() - 21.5) < 1


def test_an_unknown_task_is_an_error():
    with pytest.raises(ValueError, match="no task 's4'"):
        _ = Plan("s4").table


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


@pytest.mark.parametrize(("name", "spread"), [("rotation", 0.5), ("rotation-0.1", 0.1), ("rotation-1", 1.0)])
def test_rotation_start_and_shared_weights(name: str, spread: float):
    plain, turned = build("phase2", Plan("parity")), build(f"phase2/{name}", Plan("parity"))
    plain.reset(0)
    turned.reset(0)
    weights = dict(turned.model.named_parameters())
    start = weights.pop("blocks.0.hebbian.rotation_proj.weight")
    assert abs(start.std().item() * 64**0.5 / spread - 1) < 0.1
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
