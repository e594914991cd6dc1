"""States in other precisions, and what a model refuses to read on from."""

import copy
from dataclasses import replace

import pytest
import torch

from resolvent import convert_phase1_to_phase2
from resolvent.inspection.trace import trace_text
from resolvent.models import observe
from resolvent.tensors import read_tensors

from .small import HYBRID, PHASE1, PHASE2, tokens

STATES = [(PHASE1, {}), (PHASE2, {}), (PHASE2, dict(ar_ssm_rank=5)), (HYBRID, {})]


@pytest.fixture(params=STATES, ids=["phase1", "phase2", "phase2 with a semiseparable branch", "hybrid"])
def model(request):
    phase, options = request.param
    torch.manual_seed(0)
    return phase.model(**options)


@pytest.fixture
def state(model):
    with torch.no_grad():
        return model(tokens(30), return_state=True)[1]


def test_clone_is_equal_in_memory_of_its_own(state):
    view = state.repeat(3)[1:2]  # whose tensors hold the memory of three sequences
    copied = view.clone()
    for mine, other in zip(copied.tensors(), view.tensors(), strict=True):
        assert torch.equal(mine, other) and mine.data_ptr() != other.data_ptr()
        assert mine.untyped_storage().nbytes() == mine.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64])
def test_state_refuses_half_and_integer_dtypes(state, dtype):
    for attempt in (lambda: state.to(dtype), lambda: state.to("cpu", dtype), lambda: state.to(dtype=dtype)):
        with pytest.raises(ValueError, match=f"a state is float32 or float64, got {dtype}"):
            attempt()


@torch.no_grad()
def test_state_moves_between_float32_and_float64_models(model, state):
    twin, ids = copy.deepcopy(model).double(), tokens(20)
    with pytest.raises(
        ValueError, match=r"of the state is torch.complex64, of the model torch.complex128; use state.to"
    ):
        twin(ids, state=state)
    wide = state.to(torch.float64)
    for (name, narrow), (_, x) in zip(state._layer_tensors(), wide._layer_tensors(), strict=True):
        assert x.dtype == (torch.complex128 if narrow.is_complex() else torch.float64), name
        assert torch.equal(x, narrow.to(x.dtype)), name  # imaginary parts, too
    expected, end = model(ids, state=state, return_state=True)
    found, wide_end = twin(ids, state=wide, return_state=True)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"of the model torch.complex64; use state.to\(torch.float32\)"):
        model(ids, state=wide_end)
    back = wide_end.to("cpu", torch.float32)
    assert [x.dtype for x in back.tensors()] == [x.dtype for x in end.tensors()]
    model(ids, state=back)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_float32_states(model, state, dtype):
    small, ids = copy.deepcopy(model).to(dtype), tokens(20)
    _, own = small(ids, return_state=True)
    for (name, x), (_, single) in zip(own._layer_tensors(), state._layer_tensors(), strict=True):
        is_window = name.rpartition(".")[2] in ("keys", "values")
        assert x.dtype == (dtype if is_window else single.dtype), name
    small(ids, state=state)
    model(ids, state=own)


def damaged(state, kind):
    """A state that no model makes, and what is said of it."""
    first, *others = state.layers
    match kind:
        case "half":
            return state.map(lambda x: x.half() if x.is_floating_point() else x), "of the state is torch.float16"
        case "a tensor of fewer sequences":
            layers = (first._replace(resolvent=first.resolvent[:1]), *others)
            return replace(state, layers=layers), r"layers.0.resolvent of the state holds 1 sequences"
        case "a tensor elsewhere":
            layers = (first._replace(resolvent=first.resolvent.to("meta")), *others)
            return replace(state, layers=layers), "the state is on meta, the input on cpu"
        case "positions that are no integers":
            return replace(state, position=state.position.double()), "position must be int64, got torch.float64"
        case "other sequences":
            return state.repeat(2), "the state holds 4 sequences, the input has 2"
        case "fewer layers":
            return replace(state, layers=(first,)), "another model"
        case "no layers":
            return replace(state, layers=()), "another model"
    return tuple(state.layers), "state must be a ModelState, as the model returns it, got tuple"


KINDS = [
    "half",
    "a tensor of fewer sequences",
    "a tensor elsewhere",
    "positions that are no integers",
    "other sequences",
    "fewer layers",
    "no layers",
    "no state",
]


@pytest.mark.parametrize("kind", KINDS)
def test_mismatched_state_is_refused(model, state, kind):
    wrong, message = damaged(state, kind)
    with pytest.raises(ValueError, match=message):
        model(tokens(5), state=wrong)


def test_repr_of_traces_and_reports_is_one_line(model):
    shown = [repr(observe(model, tokens(9))), repr(trace_text(model, tokens(9)[0]))]
    assert shown[0].startswith("Trace(2 x 9 tokens, records of 3 layers, ") and "9 tokens read" in shown[0]
    assert shown[1] == "TextTrace(9 tokens, 3 layers)"
    report = convert_phase1_to_phase2(PHASE1.model()).conversion_report
    assert repr(report) == f"ConversionReport({report.summary()})" and "\n" not in report.summary()


def test_repr_of_state_is_one_line(model, state):
    for shown in (repr(state), str(state)):
        assert "\n" not in shown and len(shown) < 120
        assert type(state).__name__ in shown and "2 sequences, 30 tokens read, 3 layers" in shown
        assert f"{state.nbytes:,} bytes on cpu" in shown
    _, ragged = model(tokens(9), attention_mask=torch.ones(2, 9).tril(7), return_state=True)
    assert "8 to 9 tokens read" in repr(ragged)
    assert "0 sequences" in repr(state[[]])


def test_file_of_a_state_may_hold_more(state, tmp_path):
    state.save(tmp_path / "state", {"extra.words": torch.arange(3)})
    read = type(state).load(tmp_path / "state")
    assert all(torch.equal(a, b) for a, b in zip(read.tensors(), state.tensors(), strict=True))
    assert read_tensors(tmp_path / "state")["extra.words"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"must begin with 'extra\.', got 'position'"):
        state.save(tmp_path / "state", {"position": torch.arange(3)})
