import pytest
import torch

from resolvent.ops import likeliest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_likeliest_equals_argmax(device):
    logits = torch.randn(5, 20_011).to(device)
    logits[1, [7, 19_000]] = 9.0  # the first of equal ones
    logits[2] = -torch.inf
    logits[3, 5] = torch.inf
    token, largest = likeliest(logits)
    assert torch.equal(token, logits.argmax(-1))
    assert torch.equal(largest, logits.amax(-1))


@pytest.mark.parametrize("device", DEVICES)
def test_a_logit_that_is_not_a_number_shows_in_the_largest(device):
    logits = torch.randn(2, 300).to(device)
    logits[1, 299] = torch.nan
    token, largest = likeliest(logits)
    assert largest.isnan().tolist() == [False, True]
    assert 0 <= int(token[1]) < 300


def test_kernel_equals_argmax_where_it_is_interpreted():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU")
    from resolvent.ops.triton.likeliest import likeliest as run

    logits = torch.randn(3, 9000)
    logits[1, [7, 8900]] = 9.0
    logits[2, 4] = torch.nan
    token, total = torch.empty(3, dtype=torch.int64), torch.ones(3)
    run(logits, token, total)
    assert torch.equal(token[:2], logits[:2].argmax(-1))
    assert torch.equal(total[:2], 1 + logits[:2].amax(-1))
    assert total[2].isnan()
