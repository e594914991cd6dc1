"""What all tests share."""

import pytest
import torch

torch.set_num_threads(1)  # the tensors are small: two threads would wait for each other longer than they compute


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
