import math
import platform
import time

import psutil
import pytest
import torch

from resolvent.benchmark import timing
from resolvent.benchmark.memory import in_fresh_process
from resolvent.benchmark.timing import greatest, keep_freed_memory, measure_ceilings, milliseconds, relative_error

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "_SECONDS", 0.05)


def test_measured_time_equals_the_duration_of_a_job():
    assert 5.0 <= milliseconds(lambda: lambda: time.sleep(0.005), 1.0, CPU) < 50.0


def test_one_time_preparations_are_not_timed():
    prepared = []

    def job() -> None:
        if not prepared:
            time.sleep(0.2)
            prepared.append(True)

    assert milliseconds(lambda: job, 1.0, CPU) < 10.0


def test_a_failing_job_is_not_timed():
    def job() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        milliseconds(lambda: job, 1.0, CPU)


def test_ceilings_are_rates_per_second():
    ceilings = measure_ceilings(CPU, torch.float32, 64)
    assert 1e8 < ceilings.bytes_per_second < 1e13
    assert 1e8 < ceilings.flops_per_second < 1e14


def test_relative_error_sees_every_tensor():
    exact = [torch.ones(3, dtype=torch.complex128), torch.zeros(1, dtype=torch.float64)]
    assert relative_error([x.clone() for x in exact], exact) == 0
    assert relative_error([exact[0], torch.ones(1)], exact) == pytest.approx((1 / 3) ** 0.5)
    assert math.isnan(relative_error([exact[0], torch.tensor([math.nan])], exact))
    assert math.isnan(greatest([0.1, math.nan, 0.2])) and greatest([0.1, 0.3, 0.2]) == 0.3


@pytest.mark.gpu
def test_short_jobs_are_timed_without_their_launches():
    device = torch.device("cuda")

    def make_job() -> timing.Job:
        x = torch.randn(2**18, device=device)
        return lambda: x + 1

    ms = milliseconds(make_job, 2**21, device)
    assert 0.0003 < ms < 0.005  # 2 MB at some TB/s; a launch alone takes longer


def bytes_kept_after_freeing() -> int:
    """Return the resident bytes that 256 MB of freed tensors leave, in this process, which keeps freed memory."""
    keep_freed_memory()
    before = psutil.Process().memory_info().rss
    tensors = [torch.ones(2**24) for _ in range(4)]
    del tensors
    return psutil.Process().memory_info().rss - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_kept():
    assert in_fresh_process(bytes_kept_after_freeing) > 2**27
