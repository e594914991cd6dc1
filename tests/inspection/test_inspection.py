"""The values of the inspection page: complete, plain, and those of the model."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from resolvent.data import build_tokenizer, encode_documents
from resolvent.errors import CheckpointError, DataError, ResolventError
from resolvent.evaluation.language import document_tokens, sum_of_nats
from resolvent.inspection import Inspection, inspect_model
from resolvent.inspection.inspection import read_curves, token_texts
from resolvent.models import IntegratedModel
from resolvent.models.phase2 import Phase2IntegratedModel
from tests.data.test_detokenization import metaspace
from tests.models.small import PHASE1, PHASE2

TEXT = "The old cat, père №7, sat on the mat.\n" * 4
TOKENIZER = build_tokenizer("bytes", [])


@pytest.fixture(scope="module", params=[PHASE1, PHASE2], ids=["phase 1", "phase 2"])
def model(request: pytest.FixtureRequest) -> IntegratedModel:
    torch.manual_seed(0)
    return request.param.model(vocab_size=257)


@pytest.fixture(scope="module")
def inspection(model: IntegratedModel) -> Inspection:
    return inspect_model(model, TOKENIZER, TEXT, name="a cat's")


def ids() -> torch.Tensor:
    return torch.from_numpy(encode_documents([TEXT], TOKENIZER).tokens[:-1].astype(np.int64))


def test_tokens_join_to_the_text(inspection: Inspection):
    assert inspection.tokens[0] == "<|endoftext|>"
    assert "".join(inspection.tokens[1:]) == TEXT
    assert len(inspection.tokens) == len(TEXT.encode()) + 1
    assert inspection.tokens[15:17] == ["", "è"]


def test_a_text_that_ends_inside_a_character():
    assert token_texts(TOKENIZER, [97, *"è".encode()[:1]]) == ["a", ""]


def test_expected_words_keep_their_spaces():
    """With a decoder that drops the space before a first token: in the text, and in what is expected."""
    tokenizer = metaspace()
    model = PHASE2.model(vocab_size=tokenizer.get_vocab_size())
    seen = inspect_model(model, tokenizer, "the nation a law of the people")
    assert "".join(seen.tokens[1:]) == " the nation a law of the people"
    words = {text for row in seen.expected for text, _ in row}
    assert any(word.startswith(" ") and len(word) > 1 for word in words)
    assert not words & {"nation", "people"}  # which stand behind a space only


def test_losses_and_expectations_equal_those_of_the_model(inspection: Inspection, model: IntegratedModel):
    stream = encode_documents([TEXT], TOKENIZER)
    whole = [document[:-1] for document in document_tokens(stream)]
    assert sum(inspection.nats) == pytest.approx(sum_of_nats(model, whole, batch_tokens=512, piece_tokens=64), rel=1e-3)
    chances = model(ids()[None])[0].softmax(-1).detach()
    for place in (0, 50, 140):
        expected, best = inspection.expected[place], chances[place].topk(5)
        assert [chance for _, chance in expected] == pytest.approx(best.values.tolist(), rel=1e-3)
        assert expected[0][0] == TOKENIZER.decode([int(best.indices[0])], skip_special_tokens=False)


def test_influence_is_the_gradient_in_the_embedding(inspection: Inspection, model: IntegratedModel):
    leaves = []
    handle = model.token_embedding.register_forward_hook(
        lambda module, inputs, output: leaves.append(output.detach().requires_grad_()) or leaves[-1]
    )
    tokens = ids()
    F.cross_entropy(model(tokens[None, :-1])[0, -1:], tokens[-1:]).backward()
    handle.remove()
    assert inspection.influence == pytest.approx(leaves[0].grad[0].norm(dim=-1).tolist(), rel=2e-3, abs=1e-7)


def test_every_layer_has_numbers_for_every_token(inspection: Inspection, model: IntegratedModel):
    count, heads = len(inspection.tokens), model.config.num_heads
    assert len(inspection.layers) == model.n_layers
    assert len(inspection.nats) == len(inspection.expected) == len(inspection.influence) == count - 1
    for layer in inspection.layers:
        assert np.shape(layer.real) == np.shape(layer.imaginary) == np.shape(layer.resolvent_bound) == (heads, count)
        if inspection.facts["Phase"] == "1":
            assert layer.gamma is None and layer.memory is None
            continue
        memory = layer.memory
        assert np.shape(layer.gamma) == (heads, count)
        assert memory is not None and memory.modes is not None and memory.signal is not None
        assert np.shape(memory.energy) == np.shape(memory.bound) == (heads, len(inspection.places))
        assert np.shape(memory.modes.energy) == np.shape(memory.modes.gate) == (heads, 16)
        assert np.mean(memory.modes.energy, axis=1) == pytest.approx([1.0] * heads, rel=1e-3)
        assert np.shape(memory.snr) == (heads, len(inspection.snr_edges) - 1)
        assert np.sum(memory.snr, axis=1) == pytest.approx([1.0] * heads, rel=1e-2)
        above = np.asarray(inspection.snr_edges)[:-1] >= inspection.snr_threshold
        certain = np.asarray(memory.snr)[:, above].sum(axis=1)
        assert (np.asarray(memory.signal) >= certain - 1e-3).all()


@pytest.mark.parametrize(("trained", "expected"), [(True, [0.25, 0.5, 0.75]), (False, [1.0, 1.0, 1.0])])
def test_the_strength_of_the_snr_filter_is_shown(trained: bool, expected: list[float]):
    model = PHASE2.model(vocab_size=257, snr_trained=trained)
    assert isinstance(model, Phase2IntegratedModel)
    last = next(reversed(list(model.blocks)))
    if trained:
        last.snr_filter.strength_logit.data = torch.tensor(expected).logit()
    found = inspect_model(model, TOKENIZER, TEXT).layers[-1].memory
    assert found is not None and found.strength == pytest.approx(expected, rel=1e-3)
    *_, stats = model(ids()[None], return_diagnostics=True)[1]["snr_stats"]
    assert stats["strength"].tolist() == [pytest.approx(expected)]


def test_inspection_round_trip_through_json(inspection: Inspection):
    values = json.loads(json.dumps(inspection.to_dict(), allow_nan=False))
    assert list(values) == [field.name for field in fields(Inspection)]
    assert values["name"] == "a cat's" and values["nats"] == inspection.nats
    assert values["layers"][0]["real"] == inspection.layers[0].real


def test_disabled_mechanisms_are_omitted():
    model = PHASE2.model(vocab_size=257, snr_enabled=False, resonance_enabled=False)
    found = inspect_model(model, TOKENIZER, TEXT)
    assert found.snr_threshold is None and found.resonance_threshold is None and found.consolidation_interval is None
    memory = found.layers[0].memory
    assert memory is not None and memory.signal is memory.strength is memory.modes is None and memory.snr


def test_length_limits_the_tokens(model: IntegratedModel):
    assert len(inspect_model(model, TOKENIZER, TEXT, length=10).tokens) == 10
    assert len(inspect_model(model, TOKENIZER, "a").tokens) == 2


@pytest.mark.parametrize(("text", "length"), [("", 500), (TEXT, 1)])
def test_no_text_is_an_error(model: IntegratedModel, text: str, length: int):
    with pytest.raises(DataError, match="there is no text"):
        inspect_model(model, TOKENIZER, text, length=length)


def test_a_broken_model_is_an_error():
    model = PHASE2.model(vocab_size=257)
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(ResolventError, match="not finite"):
        inspect_model(model, TOKENIZER, TEXT)


def record(step: int, **values: Any) -> str:
    known = dict(loss=1.0, bits_per_byte=1.0 / step, grad_norm=2.0, lr=0.1)
    return json.dumps({"step": step, **(values or known)}) + "\n"


def test_curves_are_thinned_by_averaging(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = [record(step) for step in range(1, 5001)]
    lines.insert(100, record(100, validation_loss=3.0, validation_bits_per_byte=1.5, final=False))
    path.write_text("".join(lines))
    curves = read_curves(path)
    assert len(curves.step) == len(curves.bits_per_byte) == 1000
    assert curves.step[:2] == [3.0, 8.0] and curves.step[-1] == 4998
    assert curves.bits_per_byte[0] == pytest.approx(np.mean(1 / np.arange(1, 6)), rel=1e-3)
    assert (curves.validation_step, curves.validation_bits_per_byte) == ([100], [1.5])


def test_curves_of_a_run_that_has_not_begun(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_curves(tmp_path / "metrics.jsonl").step == []


def test_incomplete_last_line_is_ignored(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(record(1) + record(2)[:20])
    assert read_curves(tmp_path / "metrics.jsonl").step == [1]


DAMAGED = [
    b"{\n",
    b"[1]\n",
    b'{"loss": 1}\n',
    b"\xff\xfe\n",
    record(1, loss=1.0, bits_per_byte="x", grad_norm=1.0, lr=1.0).encode(),
    record(1, loss=1.0, bits_per_byte=float("nan"), grad_norm=1.0, lr=1.0).encode(),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_metrics_are_named(tmp_path: Path, content: bytes):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        read_curves(path)
