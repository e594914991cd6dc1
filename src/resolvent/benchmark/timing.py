"""Timing: medians after a warm-up, over inputs that exceed the cache."""

import ctypes
import itertools
import platform
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Job = Callable[[], Any]

_SECONDS = 0.3
"""Approximate duration of a measurement."""
_GRAPH_BELOW_MS = 10.0
"""Jobs below this time are launched from a CUDA graph: otherwise, gaps between kernels would count."""
_GRAPH_MS = 2.0
"""Duration of a graph, so that its launch is negligible."""
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
_KEEP_FREED_MEMORY = {_M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 2**28, _M_MMAP_MAX: 0}


@dataclass(frozen=True)
class Ceilings:
    """Limits of a machine: the speed of a large copy and a large matrix product.

    Attributes:
        bytes_per_second: bytes read plus bytes written.
        flops_per_second: in the dtype of the measurement.
    """

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class Work:
    """Least work of a call: each input read once, each output written once."""

    num_bytes: float = 0.0
    flops: float = 0.0

    def fraction(self, seconds: float, ceilings: Ceilings) -> float:
        """Return the least time under the ceilings, divided by the time taken."""
        least = max(self.num_bytes / ceilings.bytes_per_second, self.flops / ceilings.flops_per_second)
        return least / seconds


def measure_ceilings(device: torch.device, dtype: torch.dtype, size: int) -> Ceilings:
    """Copy ``4 size²`` values and multiply two ``size x size`` matrices of random values."""

    def copy() -> Job:
        source = torch.randn(4, size, size, device=device, dtype=dtype)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def product() -> Job:
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        return lambda: a @ b

    copied, multiplied = 2 * 4 * size**2 * dtype.itemsize, 3 * size**2 * dtype.itemsize
    return Ceilings(
        1000 * copied / milliseconds(copy, copied, device),
        1000 * 2 * size**3 / milliseconds(product, multiplied, device),
    )


def keep_freed_memory() -> None:
    """Make glibc keep freed memory in this process.

    By default glibc returns every large tensor to the kernel, so that a step on the CPU would measure the allocation of
    pages. Other C libraries are not changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in _KEEP_FREED_MEMORY.items():
        if not mallopt(parameter, value):
            raise RuntimeError(f"mallopt({parameter}, {value}) was refused")


def milliseconds(make_job: Callable[[], Job], num_bytes: float, device: torch.device) -> float:
    """Return the median time of a job.

    Args:
        make_job: makes a job with new inputs. It is called until inputs and outputs of all jobs fill the cache twice,
            and the jobs are run in turn.
        num_bytes: bytes that a job reads and writes.
        device: the device.
    """
    jobs = [make_job() for _ in range(_sets(num_bytes, device))]
    for job in jobs:  # compiles, tunes and fills caches
        job()
    once = _median_ms(jobs, 3, device)
    if device.type == "cuda" and once < _GRAPH_BELOW_MS:
        return _graph_ms(jobs, max(1, round(_GRAPH_MS / (once * len(jobs)))))
    rounds = min(1000, round(1000 * _SECONDS / once))
    return _median_ms(jobs, rounds, device) if rounds > 3 else once


def _sets(num_bytes: float, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, int(2 * cache / num_bytes) + 1))


def _median_ms(jobs: list[Job], rounds: int, device: torch.device) -> float:
    turns = itertools.cycle(jobs)
    if device.type != "cuda":
        return statistics.median(_seconds(next(turns)) for _ in range(rounds)) * 1000
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in marks:
        start.record()
        next(turns)()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def _seconds(job: Job) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def _graph_ms(jobs: list[Job], turns: int) -> float:
    """Return the median time of a job in a CUDA graph of all jobs."""
    graph = capture(jobs, turns)
    replay = _median_ms([graph.replay], max(10, round(1000 * _SECONDS / _GRAPH_MS)), torch.device("cuda"))
    return replay / (turns * len(jobs))


def capture(jobs: list[Job], turns: int = 1) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of ``turns`` passes over all jobs, after a warm-up on the captured stream."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for job in jobs * 2:
            job()
    torch.cuda.current_stream().wait_stream(stream)
    # Keep the results of a pass: freed memory of one job would be in the cache for the next.
    kept: deque[Any] = deque(maxlen=len(jobs))
    with torch.cuda.graph(graph, stream=stream):
        for job in jobs * turns:
            kept.append(job())
    return graph


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return ``|found - exact| / |exact|`` over several tensors, in float64; NaN if any value is NaN."""
    pairs = [(a.detach().to(b.device, b.dtype), b.detach()) for a, b in zip(found, exact, strict=True)]
    difference = sum((a - b).abs().square().sum().item() for a, b in pairs)
    return (difference / sum(b.abs().square().sum().item() for _, b in pairs)) ** 0.5


def greatest(errors: list[float]) -> float:
    """Return the largest of some errors; NaN if one is NaN."""
    return torch.tensor(errors, dtype=torch.float64).max().item()
