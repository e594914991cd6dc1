"""Memory of this machine, within the limits of this process."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Memory of a device, or of the machine.

    Attributes:
        total: bytes.
        available: bytes of it that are free.
    """

    total: int
    available: int


def machine_memory() -> Memory:
    """Return the memory of the machine, or a lower limit of this process.

    The limits are those of `ulimit` and of control groups, which containers and batch systems set.
    """
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit, used in (*_process_limits(), *_group_limits()):
        total, available = min(total, limit), min(available, limit - used)
    return Memory(total, max(0, available))


def _process_limits() -> Iterator[tuple[int, int]]:
    """Yield each limit of `ulimit`, with the bytes that count towards it."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    used = psutil.Process().memory_info()
    for limit, taken in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, getattr(used, "data", 0))):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield soft, taken


def _group_limits(root: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> Iterator[tuple[int, int]]:
    """Yield the limit of each control group of this process, version 1 or 2, with the bytes that count towards it.

    Inactive page cache counts as free.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, usage, freeable = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            freeable = "total_inactive_file"
        else:
            continue
        inner = top / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group.is_relative_to(top):
                yield from _limit_of(group, limit, usage, freeable)


def _limit_of(group: Path, limit: str, usage: str, freeable: str) -> Iterator[tuple[int, int]]:
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # no limit here, or a group of the host's that a container cannot see
        return
    if most != "max":
        yield int(most), max(0, used - int(statistics.get(freeable, 0)))
