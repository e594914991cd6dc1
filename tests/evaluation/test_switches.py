import pytest
import torch

from resolvent.errors import ConfigError
from resolvent.evaluation import switched_off
from tests.models.small import PHASE2, tokens


@pytest.mark.parametrize("mechanism", ["snr_filter", "resonance"])
def test_block_runs_without_mechanism_and_gets_it_back(mechanism: str):
    model, ids = PHASE2.model(snr_trained=False, base_decay=0.01), tokens()
    before = model(ids)
    with switched_off(model, mechanism):
        assert all(getattr(block, mechanism) is None for block in model.blocks)
        assert not torch.equal(model(ids), before)
    assert torch.equal(model(ids), before)


def test_mechanism_comes_back_after_an_error():
    model = PHASE2.model()
    with pytest.raises(KeyError), switched_off(model, "resonance"):
        raise KeyError
    assert all(block.resonance is not None for block in model.blocks)


def test_unknown_mechanism_is_named():
    with pytest.raises(ConfigError, match="snr_filter or resonance, got 'hebbian'"):
        switched_off(PHASE2.model(), "hebbian").__enter__()
