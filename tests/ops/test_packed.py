"""Sequences packed end to end."""

import pytest
import torch

from resolvent.ops.packed import check_shape, count_sequences, sequence_numbers


@pytest.mark.parametrize("offsets", [[0, 5], [0, 1, 2, 5], [0, 0, 3, 3, 3, 5, 5], [0, 5, 5]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sequence_numbers(offsets: list[int], dtype: torch.dtype):
    numbers = sequence_numbers(torch.tensor(offsets, dtype=dtype), 5)
    lengths = torch.tensor(offsets).diff()
    assert torch.equal(numbers, torch.repeat_interleave(torch.arange(len(lengths)), lengths))


def test_count_sequences():
    offsets = torch.tensor([0, 2, 2, 5])
    assert (count_sequences(4, None), count_sequences(1, offsets)) == (4, 3)
    with pytest.raises(ValueError, match="packed sequences need a batch of one, got 2"):
        count_sequences(2, offsets)


def test_a_wrong_shape_is_named():
    check_shape("state", torch.zeros(2, 3), (2, 3))
    for wrong in (torch.zeros(1, 3), torch.zeros(6), torch.zeros(2, 3, 1)):
        with pytest.raises(ValueError, match=r"state must have shape \(2, 3\), got \("):
            check_shape("state", wrong, (2, 3))
