import pytest
import torch

from resolvent.errors import ConfigError
from resolvent.ops import backend, dissipative_memory, resolvent_diagonal


def call(**options):
    alpha = torch.complex(torch.randn(1, 4, 2), -torch.ones(1, 4, 2))
    return resolvent_diagonal(alpha, torch.ones(2), **options)


def test_what_ran_is_counted():
    before = backend.calls["resolvent_diagonal", "torch"]
    call()
    call(backend="torch")
    assert backend.calls["resolvent_diagonal", "torch"] == before + 2


def test_a_request_that_cannot_be_met_raises(monkeypatch):
    monkeypatch.setitem(backend._implementations, "kernelless", {"torch": max})
    with pytest.raises(ConfigError, match="backend='triton' cannot run kernelless: there is no such kernel"):
        backend.implementation("kernelless", "triton", torch.device("cuda"), torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="backend='triton' cannot run resolvent_diagonal"):
        call(backend="triton")
    with pytest.raises(ConfigError, match="must be one of auto, torch, triton, got 'jax'"):
        call(backend="jax")


def test_a_registered_kernel_slots_in(monkeypatch):
    """A kernel takes over on CUDA by registering; nothing else changes."""
    kernels = {"torch": max, "triton": min}
    monkeypatch.setitem(backend._implementations, "some_operator", kernels)
    assert backend.implementation("some_operator", "auto", torch.device("cuda"), torch.float32) is min
    assert backend.implementation("some_operator", "auto", torch.device("cpu"), torch.float32) is max
    assert backend.implementation("some_operator", "torch", torch.device("cuda"), torch.float32) is max


def test_a_fallback_is_said_once(monkeypatch, caplog):
    monkeypatch.setitem(backend._implementations, "kernelless", {"torch": max})
    monkeypatch.setattr(backend, "_announced", set())
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert backend.implementation("kernelless", "auto", torch.device("cuda"), torch.float32) is max
    assert caplog.text.count("there is no such kernel") == 1


def test_a_kernel_may_refuse_tensors(monkeypatch):
    monkeypatch.setitem(backend._implementations, "choosy", {"torch": max, "triton": min})
    monkeypatch.setitem(backend._refusals, ("choosy", "triton"), lambda dtype, width: f"{width} is wide" * (width > 8))
    cuda = torch.device("cuda")
    assert backend.implementation("choosy", "auto", cuda, torch.float32, 8) is min
    assert backend.implementation("choosy", "auto", cuda, torch.float32, 9) is max
    with pytest.raises(ConfigError, match="backend='triton' cannot run choosy: 9 is wide"):
        backend.implementation("choosy", "triton", cuda, torch.float32, 9)


def test_operators_accept_the_switch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(1, 3, 2, 4)
    with pytest.raises(ConfigError, match="dissipative_memory"):
        dissipative_memory(x, x, x, torch.rand(1, 3, 2), torch.ones(2), backend="triton")
