import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from experiments.ablation.measures import (
    Mechanisms,
    evaluate_mechanisms,
    half_lives,
    head_decays,
    kept_components,
    mode_occupancy,
    occupancy,
    random_components,
    selection,
    shuffled,
    token_decay,
    without_modes,
)
from experiments.ablation.state_editing import Reading, mean_gamma_at, read_texts, with_memories
from experiments.ablation.token_classes import TOKEN_CLASSES, token_classes
from resolvent.data import build_tokenizer, encode_documents
from resolvent.errors import ConfigError, DataError, ResolventError
from resolvent.evaluation import switched_off
from resolvent.layers import hebbian
from resolvent.models.phase2 import Phase2IntegratedModel
from resolvent.ops.consolidation import modes
from resolvent.ops.hebbian import dissipative_memory_reference
from tests.models.small import PHASE1, PHASE2

BYTES = build_tokenizer("bytes", [])
STREAM = encode_documents(["The 3 quick brown foxes, they say, jump over 12 lazy dogs.\n" * 5] * 3, BYTES)
LENGTH, HORIZON = 128, 64


def random_texts(rows: int = 3, vocabulary: int = 97, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(0).integers(vocabulary, size=(rows, length + HORIZON + 1))


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def reading_of(
    distances: tuple[int, ...] = (), batch_tokens: int = 4096, spread: float | None = None, **options: Any
) -> Reading:
    model = PHASE2.model(spread, **options)
    assert isinstance(model, Phase2IntegratedModel)
    return read_texts(model, random_texts(), LENGTH, distances, batch_tokens=batch_tokens)


def plain_nats(model: Phase2IntegratedModel, inputs: Tensor, labels: Tensor, state: Any = None) -> Tensor:
    return F.cross_entropy(model(inputs, state=state).mT, labels, reduction="none")


@pytest.mark.parametrize("batch_tokens", [4096, 100])
def test_unedited_state_costs_nothing(batch_tokens: int):
    reading = reading_of((4, 64), batch_tokens)
    assert reading.cost_of_memories(reading.memories).by_text.tolist() == [0, 0, 0]
    assert reading.cost_of_rereading().by_text.tolist() == [0, 0, 0]


@pytest.mark.parametrize("batch_tokens", [4096, 100])
def test_reading_equals_one_pass(batch_tokens: int):
    reading = reading_of((4, 64), batch_tokens)
    expected = plain_nats(reading.model, reading.inputs, reading.labels).double()
    torch.testing.assert_close(reading.nats, expected, rtol=1e-4, atol=1e-4)
    _, diagnostics = reading.model(reading.inputs, return_diagnostics=True)
    torch.testing.assert_close(reading.gamma, diagnostics["gamma_values"], rtol=1e-4, atol=1e-5)
    for distance, state in reading.states.items():
        assert state.position.tolist() == [LENGTH - distance] * 3


def test_an_empty_memory_is_that_of_a_fresh_state_at_its_position():
    reading = reading_of()
    state = with_memories(reading.state, reading.recent_memories(0))
    assert state.position.tolist() == [LENGTH] * 3
    for layer in state.layers:
        assert not any(part.any() for part in layer.memory)
    cost = reading.cost_of_memories(reading.recent_memories(0)).by_text
    after = slice(LENGTH, None)
    nats = plain_nats(reading.model, reading.inputs[:, after], reading.labels[:, after], state)
    np.testing.assert_allclose(cost, (nats - reading.nats[:, after]).mean(dim=1).numpy(), atol=1e-5)
    assert np.abs(cost).max() > 1e-3


@contextmanager
def memory_inputs() -> Iterator[list[tuple[Tensor, ...]]]:
    """Record the inputs of every call of the memory operator: q, k, v, decay, eta and the consolidation."""
    heard: list[tuple[Tensor, ...]] = []
    operator = hebbian.dissipative_memory

    def spy(*tensors: Tensor, **options: Any) -> Any:
        heard.append((*tensors, options["consolidation"]))
        return operator(*tensors, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hebbian, "dissipative_memory", spy)
        yield heard


@pytest.mark.parametrize("distance", [4, 64, 100])
@pytest.mark.parametrize("options", [{}, {"snr_trained": False}, {"snr_enabled": False, "resonance_enabled": False}])
def test_recent_memories_are_what_the_last_tokens_wrote(distance: int, options: dict[str, bool]):
    """The reference reads everything token by token, but nothing is written before the last tokens."""
    reading = reading_of((4, 64, 100), **options)
    with memory_inputs() as heard:
        reading.model(reading.inputs[:, :LENGTH])
    for got, (q, k, v, decay, eta, consolidation) in zip(reading.recent_memories(distance), heard, strict=True):
        v = v.clone()
        v[:, : LENGTH - distance] = 0
        _, state = dissipative_memory_reference(q, k, v, decay, eta, consolidation=consolidation)
        torch.testing.assert_close(got.double(), state.memory, rtol=1e-3, atol=1e-5)
        assert state.memory.abs().max() > 1e-3


def test_in_a_single_layer_recent_memories_are_those_of_a_model_that_forgot():
    reading = reading_of((16,), n_layers=1)
    before = reading.states[16]
    (layer,) = before.layers
    empty = layer._replace(memory=layer.memory._replace(memory=0 * layer.memory.memory))
    _, state = reading.model(
        reading.inputs[:, LENGTH - 16 : LENGTH], state=type(before)(before.position, (empty,)), return_state=True
    )
    torch.testing.assert_close(reading.recent_memories(16), [state.layers[0].memory.memory])


def test_only_heads_that_are_read_have_a_cost():
    model = PHASE2.model()
    for number, block in enumerate(model.blocks):
        columns = block.hebbian.out_proj.weight.view(48, 3, 16)
        columns[:, [0, 1, 2] if number != 1 else [0, 1]] = 0
        columns *= 4  # the one head that is read is heard
        if block.dissipative_bk.potential.memory_to_potential is not None:
            block.dissipative_bk.potential.memory_to_potential.weight.zero_()
    reading = read_texts(model, random_texts(), LENGTH, ())
    costs = {(head.layer, head.head): abs(head.cost.mean) for head in head_decays(reading)}
    assert costs.pop((2, 3)) > 1e-3
    assert set(costs.values()) == {0}


def test_half_lives_are_distances():
    """Two heads of one layer, whose memories last for thousands of tokens and for less than one."""
    model = PHASE2.model(n_layers=1, num_heads=2, adaptive_decay=False, hebbian_dt=0.5, base_decay=1e-4)
    model.blocks[0].dissipative_bk.potential.gamma_bias.copy_(torch.tensor([4.0, -9.0]))
    reading = read_texts(model, random_texts(), LENGTH, (4, 64))
    fast, slow = head_decays(reading)
    assert fast.half_life == pytest.approx(2 * math.log(2) / math.log1p(math.exp(4)), rel=1e-3)
    assert slow.half_life > 1000
    found = half_lives(reading)
    assert (found.slow_from, found.fast_to) == pytest.approx((slow.half_life, fast.half_life))
    assert [row.kept for row in found.rows] == [0, 4, 64]
    assert found.rows[0].slow == slow.cost and found.rows[0].fast == fast.cost
    assert all(abs(row.fast.mean) < 1e-4 < 1e-3 < abs(row.slow.mean) for row in found.rows[1:])
    assert all(row.difference.mean == pytest.approx(row.slow.mean - row.fast.mean) for row in found.rows)


def test_mean_gamma_everywhere_equals_constant_gamma():
    reading = reading_of((64,), batch_tokens=100)
    with mean_gamma_at(reading, torch.ones_like(reading.inputs, dtype=torch.bool)):
        cost = reading.cost_of_rereading().by_text
    for block, mean in zip(reading.blocks, reading.gamma_means, strict=True):
        potential = block.dissipative_bk.potential
        potential.gamma_proj = None
        potential.gamma_bias.copy_((mean - potential.least_decay).expm1().log())
    expected = plain_nats(reading.model, reading.inputs, reading.labels) - reading.nats
    np.testing.assert_allclose(cost, expected.mean(dim=1).numpy(), atol=1e-5)
    assert np.abs(cost).min() > 1e-3


def test_gamma_is_replaced_at_selected_tokens():
    """Nothing moves before the first place that is replaced, in whatever pieces the text is read."""
    reading = reading_of(batch_tokens=60)
    places = torch.zeros_like(reading.inputs, dtype=torch.bool)
    places[0, 75], places[1, 150] = True, True
    heard: list[Tensor] = []
    handle = reading.blocks[0].dissipative_bk.register_forward_hook(lambda _m, _a, output: heard.append(output[1]))
    with mean_gamma_at(reading, places):
        cost = reading.cost_of_rereading().by_text
    handle.remove()
    moved = torch.cat(heard, dim=1) != reading.gamma[0]
    assert torch.equal(moved.any(dim=-1), places)
    assert cost[0] != 0 and cost[1] != 0 and cost[2] == 0


def test_a_class_is_compared_with_as_many_random_tokens(monkeypatch: pytest.MonkeyPatch):
    reading, replaced = reading_of(), []

    def spy(reading: Reading, places: Tensor) -> Any:
        replaced.append(places)
        return mean_gamma_at(reading, places)

    monkeypatch.setattr("experiments.ablation.measures.mean_gamma_at", spy)
    classes = np.random.default_rng(1).choice(2, size=reading.inputs.shape, p=(0.1, 0.9))
    found = token_decay(reading, classes, np.random.default_rng(0))
    assert [row.name for row in found.rows] == list(TOKEN_CLASSES[:2])
    for number, row in enumerate(found.rows):
        places, others = replaced[2 * number : 2 * number + 2]
        assert torch.equal(places, torch.from_numpy(classes == number)) and row.tokens == places.sum()
        assert torch.equal(places.sum(dim=1), others.sum(dim=1)) and not torch.equal(places, others)
        for mask, cost in ((places, row.cost), (others, row.random)):
            with mean_gamma_at(reading, mask):
                assert reading.cost_of_rereading().estimate == cost
        assert row.difference.mean == pytest.approx(row.cost.mean - row.random.mean)
        ratio = reading.gamma[2][places][:, 1].mean() / reading.gamma[2][..., 1].mean()
        assert row.relative[2][1] == pytest.approx(ratio.item(), rel=1e-5)
    assert replaced[-1].all() and len(replaced) == 5


def test_the_filter_keeps_what_its_own_p_says():
    reading = reading_of()
    _, diagnostics = reading.model(reading.inputs[:, :LENGTH], return_diagnostics=True)
    for block, memory, kept, seen in zip(
        reading.blocks, reading.memories, kept_components(reading), diagnostics["snr_stats"], strict=True
    ):
        snr = block.snr_filter
        assert snr is not None
        rms = memory.double().square().mean(dim=(-2, -1), keepdim=True).sqrt()
        p = torch.sigmoid((memory.double().abs() / rms - snr.threshold) / snr.temperature)
        assert torch.equal(kept, p > 0.5)
        torch.testing.assert_close(1 - kept.float().mean(dim=(-2, -1)), seen["low_snr_ratio"])
        assert 0 < kept.float().mean() < 0.5


def test_kept_and_dropped_components_partition_the_memory():
    reading = reading_of()
    found = selection(reading, np.random.default_rng(0))
    kept, dropped, like_kept, like_dropped, as_many = found.rows
    assert kept.share + dropped.share == pytest.approx(1)
    assert kept.energy + dropped.energy == pytest.approx(1)
    assert kept.energy > 4 * kept.share  # nothing below twice the rms is among them
    for row, like in ((kept, like_kept), (dropped, like_dropped)):
        assert like.energy == pytest.approx(row.energy, abs=0.05)
        assert like.share == pytest.approx(like.energy, abs=0.05)  # chosen whatever their size
    assert as_many.share == kept.share
    assert as_many.energy == pytest.approx(as_many.share, abs=0.02)
    assert found.kept_over_random.mean == pytest.approx(kept.cost.mean - like_kept.cost.mean)
    assert found.dropped_over_random.mean == pytest.approx(dropped.cost.mean - like_dropped.cost.mean)
    expected = [block.snr_filter.strength_logit.sigmoid().tolist() for block in reading.blocks if block.snr_filter]
    assert found.strength == expected


def test_as_many_components_of_every_head_lie_elsewhere():
    masks = [torch.rand(2, 3, 8, 8) < share for share in (0.1, 0.6)]
    for mask, other in zip(masks, shuffled(masks, np.random.default_rng(0)), strict=True):
        assert torch.equal(mask.sum(dim=(-2, -1)), other.sum(dim=(-2, -1))) and not torch.equal(mask, other)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_random_components_come_as_close_to_an_energy_as_one_of_them_is_large(share: float):
    memories = [torch.randn(2, 3, 8, 8, dtype=torch.float64) for _ in range(2)]
    wanted = share * torch.stack([memory.square().sum(dim=(-2, -1)) for memory in memories])
    masks = random_components(memories, wanted, np.random.default_rng(0))
    for memory, mask, energy in zip(memories, masks, wanted, strict=True):
        got = (memory.square() * mask).sum(dim=(-2, -1))
        assert ((got - energy).abs() <= memory.square().amax(dim=(-2, -1)) / 2).all()
        assert mask.any() == (share > 0) and (~mask).any() == (share < 1)
    assert share != 0.3 or not torch.equal(*masks)


def test_removed_modes_have_no_energy_and_the_others_theirs():
    reading = reading_of()
    energies, gates = mode_occupancy(reading)
    _, diagnostics = reading.model(reading.inputs[:, :LENGTH], return_diagnostics=True)
    for name, seen in (("diag_energy", energies), ("gate", gates)):
        expected = torch.stack([layer[name] for layer in diagnostics["resonance_info"]])
        torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-4)
    mask = energies > energies.median()
    for block, memory, left, removed in zip(
        reading.blocks, reading.memories, without_modes(reading, mask), mask, strict=True
    ):
        assert block.resonance is not None
        before, after = (modes(x, block.resonance.basis.value).mT for x in (memory, left))
        torch.testing.assert_close(after, before * ~removed[..., None], rtol=1e-4, atol=1e-5)
        assert before.abs().max() > 0.1


def test_groups_of_modes_rise_in_energy_and_partition_the_modes():
    found = occupancy(reading_of())
    shares, energies = ([getattr(row, name) for row in found.groups] for name in ("share", "energy"))
    assert shares == pytest.approx([1 / 8] * 8)
    assert energies == sorted(energies) and sum(energies) == pytest.approx(1)
    assert sum(row.share for row in found.gated) == pytest.approx(1)
    assert -1 <= found.correlation_by_text.mean <= 1
    ranks = np.argsort(np.argsort([row.cost.mean for row in found.groups]))  # energies rise
    assert found.correlation == pytest.approx(np.corrcoef(ranks, range(8))[0, 1])


@pytest.mark.parametrize("bias", [50.0, -50.0])
def test_gates_that_are_all_open_or_all_shut(bias: float):
    model = PHASE2.model()
    for block in model.blocks:
        block.resonance.bias.fill_(bias)
        block.resonance.sharpness.zero_()
    reading = read_texts(model, random_texts(), LENGTH, ())
    above, below = occupancy(reading).gated
    everything, nothing = (above, below) if bias > 0 else (below, above)
    assert (nothing.share, nothing.energy, nothing.cost.mean, nothing.gate) == (0, 0, 0, None)
    assert nothing.cost_per_energy is None
    assert (everything.share, everything.gate) == (1, pytest.approx(float(bias > 0)))
    if bias > 0:
        erased = reading.cost_of_memories(reading.recent_memories(0)).estimate
        assert everything.cost.mean == pytest.approx(erased.mean, abs=1e-4)


@pytest.mark.parametrize("mechanism", ["snr_filter", "resonance"])
def test_a_mechanism_is_switched_off_and_on_again(mechanism: str):
    reading = reading_of(snr_trained=False, base_decay=0.01)
    with switched_off(reading.model, mechanism):
        cost = reading.cost_of_rereading().by_text
        expected = plain_nats(reading.model, reading.inputs, reading.labels) - reading.nats
    np.testing.assert_allclose(cost, expected.mean(dim=1).numpy(), atol=1e-5)
    assert np.abs(cost).min() > 1e-5
    assert all(getattr(block, mechanism) is not None for block in reading.blocks)
    assert reading.cost_of_rereading().by_text.tolist() == [0, 0, 0]


START, INSIDE, DIGITS, PUNCTUATION, SPACE, LINE, PART, END = TOKEN_CLASSES


def test_classes_of_bytes():
    ids = [256, *"Hi, é 42\n".encode()]
    expected = [END, START, INSIDE, PUNCTUATION, SPACE, PART, PART, SPACE, DIGITS, DIGITS, LINE]
    assert [TOKEN_CLASSES[n] for n in token_classes(BYTES, np.array([ids]))[0]] == expected


def test_classes_of_a_byte_level_vocabulary():
    tokenizer = build_tokenizer("gpt2", [])
    encoding = tokenizer.encode("Unbelievably, 1912 naïve\n\ncats' \N{SNOWMAN}", add_special_tokens=False)
    got = dict(zip(encoding.tokens, token_classes(tokenizer, np.array([encoding.ids]))[0].tolist(), strict=True))
    names = {token: TOKEN_CLASSES[number] for token, number in got.items()}
    assert names == {
        "Un": START, "bel": INSIDE, "iev": INSIDE, "ably": INSIDE, ",": PUNCTUATION, "Ġ1912": DIGITS, "ĠnaÃ¯ve": START,
        "Ċ": LINE, "cats": START, "'": PUNCTUATION, "Ġâĺ": PART, "ĥ": PART,
    }  # fmt: skip


def test_a_space_that_a_decoder_drops_where_a_text_begins_counts():
    vocabulary = {"<|endoftext|>": 0, "▁the": 1, "s": 2, "▁cat": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="s"))
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([3]) == "cat"
    assert [TOKEN_CLASSES[n] for n in token_classes(tokenizer, np.array([[0, 1, 3, 2]]))[0]] == [
        END,
        START,
        START,
        INSIDE,
    ]


def test_a_word_begins_anew_in_every_row():
    ids = np.frombuffer(b"abab", np.uint8).reshape(2, 2)
    assert token_classes(BYTES, ids).tolist() == [[0, 1], [0, 1]]


def measured(model: Any, **options: Any) -> Mechanisms:
    return evaluate_mechanisms(model, STREAM, BYTES, **{"length": 64, "sequences": 3, **options})


def test_measurement_is_consistent():
    found = measured(PHASE2.model(vocab_size=257), horizon=100)
    assert (found.length, found.horizon, found.sequences) == (64, 100, 3)
    assert len(found.heads) == 9
    assert found.token_decay and found.half_lives and found.selection and found.occupancy
    rows = found.token_decay.rows
    assert {row.name for row in rows} == set(TOKEN_CLASSES) - {"part of a character"}
    assert sum(row.tokens for row in rows) == 3 * 164
    relative = np.average([row.relative for row in rows], axis=0, weights=[row.tokens for row in rows])
    np.testing.assert_allclose(relative, 1, rtol=1e-5)
    assert found.half_lives.rows[0].kept == 0 and found.half_lives.rows[-1].kept == 16


def test_progress_bar_ends_at_its_total(monkeypatch: pytest.MonkeyPatch):
    """The announced number of tokens equals the number read, for any mechanisms."""
    announced, read = [], []

    @contextmanager
    def bar(_title: str, tokens: int, _show: bool) -> Iterator[Any]:
        announced.append(tokens)
        yield read.append

    monkeypatch.setattr("experiments.ablation.measures.progress_bar", bar)
    for options in ({}, dict(snr_enabled=False, adaptive_decay=False), dict(resonance_enabled=False)):
        measured(PHASE2.model(vocab_size=257, n_layers=2, **options))
        assert announced.pop() == sum(read)
        read.clear()


def test_mechanisms_that_a_model_lacks_are_left_out():
    lacking = dict(snr_enabled=False, resonance_enabled=False, adaptive_decay=False, n_layers=1, num_heads=1)
    found = measured(PHASE2.model(vocab_size=257, **lacking))
    assert (found.token_decay, found.selection, found.occupancy, found.half_lives) == (None,) * 4
    assert [abs(head.cost.mean) > 0 for head in found.heads] == [True]


def test_documents_that_are_short_are_joined():
    model = PHASE2.model(vocab_size=257, n_layers=1)
    with pytest.raises(DataError, match=r"no text has the 385 tokens .* or --joined"):
        measured(model, length=320)
    assert measured(model, length=320, joined=True).sequences == 2


def test_the_model_stays_as_it_was_and_the_seed_decides():
    model = PHASE2.model(vocab_size=257, n_layers=2).train()
    first, again, other = (measured(model, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first.heads == other.heads
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(block.snr_filter is not None and block.resonance is not None for block in model.blocks)


def test_wrong_requests_are_errors():
    with pytest.raises(ConfigError, match="Phase1IntegratedModel, which has neither"):
        measured(PHASE1.model(vocab_size=257))
    model = PHASE2.model(vocab_size=257)
    with pytest.raises(ConfigError, match="a multiple of 64, the model's interval, got 100"):
        measured(model, length=100)
    with pytest.raises(ConfigError, match="horizon must be >= 1, got 0"):
        measured(model, horizon=0)
    with pytest.raises(ConfigError, match="sequences must be >= 1, got 0"):
        measured(model, sequences=0)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(ResolventError, match="not finite"):
        measured(model)
