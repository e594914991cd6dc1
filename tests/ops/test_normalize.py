import pytest
import torch
from torch.nn import functional as F

from resolvent.ops.normalize import unit_length, unit_rms


def test_values_are_those_of_torch():
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(unit_length(x), F.normalize(x, dim=-1), rtol=1e-10, atol=0)
    torch.testing.assert_close(unit_rms(x), F.rms_norm(x, (16,), eps=1e-5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("function", [unit_length, unit_rms])
def test_gradients(function):
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)


def test_half_precision_is_computed_in_float32():
    x = torch.randn(100, 64).bfloat16()
    found = unit_length(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, F.normalize(x.double(), dim=-1).bfloat16(), rtol=0, atol=0)


def test_a_zero_vector_stays_zero_with_a_finite_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    y = unit_length(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 4))
    assert x.grad.isfinite().all()
