import pytest
import torch
from torch.nn import functional as F

from resolvent.ops.short_conv import causal_conv, next_tail


def setup(length, batch=2, width=4, channels=3):
    x = torch.randn(batch, length, channels, dtype=torch.float64)
    return x, torch.randn(width, channels, dtype=torch.float64), torch.randn(batch, width - 1, channels).double()


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 50])
def test_is_the_depthwise_convolution(length, width):
    x, weight, tail = setup(length, width=width)
    y = causal_conv(x, weight, tail)
    extended = torch.cat([tail, x], 1).mT
    expected = F.conv1d(extended, weight.flip(0).mT.unsqueeze(1), groups=x.shape[-1]).mT
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(next_tail(x, tail), torch.cat([tail, x], 1)[:, length:])


def test_packed_is_separate_tails_included():
    lengths = [3, 0, 1, 20, 2, 0]
    x, weight, _ = setup(sum(lengths), batch=1)
    tails, offsets = torch.randn(len(lengths), 3, 3).double(), torch.tensor([0, *lengths]).cumsum(0)
    packed, packed_tails = causal_conv(x, weight, tails, offsets), next_tail(x, tails, offsets)
    for i, length in enumerate(lengths):
        part = x[:, offsets[i] : offsets[i] + length]
        alone = causal_conv(part, weight, tails[i : i + 1])
        torch.testing.assert_close(packed[:, offsets[i] : offsets[i + 1]], alone, rtol=1e-12, atol=1e-12)
        assert torch.equal(packed_tails[i : i + 1], next_tail(part, tails[i : i + 1]))


def test_gradients():
    x, weight, _ = setup(9, batch=1)
    tails = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: causal_conv(*a, torch.tensor([0, 2, 9])), (x, weight, tails))
    assert torch.autograd.gradcheck(causal_conv, (x, weight, tails[:1].detach().requires_grad_()))
