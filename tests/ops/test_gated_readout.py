import pytest
import torch

from resolvent.ops.gated_readout import gated_readout
from resolvent.ops.normalize import RMS_EPS


def inputs(length, heads=2, width=5, features=4, batch=2):
    """Read-out, opening, bias and features."""
    draw = {"dtype": torch.float64}
    readout, bias = torch.randn(batch, length, heads, width, **draw), torch.randn(heads * width, **draw)
    opening, beside = (torch.randn(batch, length, columns, **draw) for columns in (heads * width, features))
    return readout, opening, bias, beside


@pytest.mark.parametrize("features", [0, 4])
def test_is_the_normalised_readout_its_gate_and_the_features(features):
    readout, opening, bias, beside = inputs(9, features=features)
    normalized, gated = gated_readout(readout, opening, bias, beside if features else None)
    expected = readout / (readout.square().mean(-1, keepdim=True) + RMS_EPS).sqrt()
    torch.testing.assert_close(normalized, expected.flatten(-2), rtol=1e-10, atol=0)
    torch.testing.assert_close(gated[..., :10], normalized * torch.sigmoid(opening + bias), rtol=1e-10, atol=0)
    assert torch.equal(gated[..., 10:], beside)
