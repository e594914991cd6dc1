"""Operators are tested with poisoned memory."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _poison_unwritten_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised floats come as NaN, so that an output which nobody wrote cannot pass for a number."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poisoned(make):
        def make_poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if (tensor.is_floating_point() or tensor.is_complex()) and tensor.device.type == "cpu":
                tensor.detach().fill_(torch.nan)
            return tensor

        return make_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
