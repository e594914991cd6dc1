import dataclasses

import pytest
import torch

from resolvent.data import build_tokenizer
from resolvent.inspection import Inspection, inspect_model
from resolvent.inspection.findings import find, reach
from resolvent.inspection.values import Curves
from tests.models.small import HYBRID, PHASE1, PHASE2

TEXT = "The old cat sat on the mat. " * 4


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    torch.manual_seed(0)
    return inspect_model(HYBRID.model(vocab_size=257), build_tokenizer("bytes", []), TEXT)


def texts(inspection: Inspection) -> dict[str, str]:
    return {finding.section: finding.text for finding in find(inspection)}


def test_reach_counts_the_tokens_that_hold_nine_tenths():
    assert reach([100.0, 0.0, 1.0, 8.0]) == 4
    assert reach([1.0, 3.0, 6.0]) == 2
    assert reach([0.0, 1.0]) == 1
    assert reach([0.0, 0.0]) == 0


def test_every_mechanism_of_a_model_has_a_finding(inspection: Inspection):
    assert list(texts(inspection)) == ["surprise", "influence", "decay", "looks", "snr", "resonance"]
    assert inspection.findings == find(inspection)
    phase1 = inspect_model(PHASE1.model(vocab_size=257), build_tokenizer("bytes", []), TEXT)
    assert list(texts(phase1)) == ["surprise", "influence"]


def test_the_slowest_head_is_named(inspection: Inspection):
    layers = list(inspection.layers)
    gamma = [[1.0] * len(row) for row in layers[0].gamma]
    layers[0] = dataclasses.replace(layers[0], gamma=gamma)
    gamma = [list(row) for row in gamma]
    gamma[1] = [0.006931] * len(gamma[1])
    layers[2] = dataclasses.replace(layers[2], gamma=gamma)
    found = texts(dataclasses.replace(inspection, layers=layers, dt=1.0))["decay"]
    assert found.startswith("Head 2 of layer 3 keeps longest: it forgets half in 100 tokens, the median head in 0.7")


@pytest.mark.parametrize(
    ("strength", "expected"), [(0.003, "is inactive: its largest strength is 0.003"), (0.5, "is active in 6 of 6")]
)
def test_an_inactive_snr_filter_is_called_so(inspection: Inspection, strength: float, expected: str):
    layers = [
        layer
        if layer.memory is None
        else dataclasses.replace(layer, memory=dataclasses.replace(layer.memory, strength=[strength] * 3))
        for layer in inspection.layers
    ]
    assert expected in texts(dataclasses.replace(inspection, layers=layers))["snr"]


def test_switched_off_mechanisms_have_no_finding():
    model = PHASE2.model(vocab_size=257, snr_enabled=False, resonance_enabled=False)
    found = texts(inspect_model(model, build_tokenizer("bytes", []), TEXT))
    assert not {"snr", "resonance", "looks"} & found.keys()


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [
        ([], "Training ended at 1.50 bits per byte."),
        ([2.0, 1.75], "Training ended at 1.50 bits per byte, held-out text at 1.75."),
        ([1.5, 2.0], "Overfits: held-out text was best at step 0 (1.50 bits per byte) and ended at 2.00."),
    ],
)
def test_the_end_of_training_is_told(inspection: Inspection, held_out: list[float], expected: str):
    curves = Curves([1.0], [1.5], [1.0], [0.1], [float(i) for i in range(len(held_out))], held_out)
    assert texts(dataclasses.replace(inspection, curves=curves))["learning"] == expected
