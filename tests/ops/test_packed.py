"""Sequences packed end to end."""

import pytest
import torch

from resolvent.ops.packed import sequence_numbers


@pytest.mark.parametrize("offsets", [[0, 5], [0, 1, 2, 5], [0, 0, 3, 3, 3, 5, 5], [0, 5, 5]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_token_knows_its_sequence(offsets: list[int], dtype: torch.dtype):
    numbers = sequence_numbers(torch.tensor(offsets, dtype=dtype), 5)
    lengths = torch.tensor(offsets).diff()
    assert torch.equal(numbers, torch.repeat_interleave(torch.arange(len(lengths)), lengths))
