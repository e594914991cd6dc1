import resource
from pathlib import Path

import psutil
import pytest

from resolvent.memory import Memory, _group_limits, machine_memory


def test_free_memory_is_an_upper_bound():
    memory = machine_memory()
    assert 2**28 < memory.available <= memory.total <= psutil.virtual_memory().total


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA], ids=["address space", "data"])
def test_limit_of_the_process_counts(kind):
    used = psutil.Process().memory_info()
    taken = used.vms if kind == resource.RLIMIT_AS else used.data
    limits = resource.getrlimit(kind)
    resource.setrlimit(kind, (taken + (200 << 20), limits[1]))
    try:
        memory = machine_memory()
        assert memory.available == pytest.approx(200 << 20, abs=20 << 20)
        assert memory.total <= taken + (200 << 20)
    finally:
        resource.setrlimit(kind, limits)


def group(path, limit, usage, freeable, version):
    path.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, usage), strict=True):
        (path / name).write_text(f"{value}\n")
    statistic = "inactive_file" if version == 2 else "total_inactive_file"
    (path / "memory.stat").write_text(f"anon 5\n{statistic} {freeable}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_all_groups_around_the_process_count(tmp_path, version):
    top = tmp_path / "groups" if version == 2 else tmp_path / "groups" / "memory"
    group(top, 1000, 300, 50, version)
    group(top / "job", "max" if version == 2 else 10**18, 100, 0, version)
    group(top / "job" / "step", 500, 200, 20, version)
    membership = tmp_path / "cgroup"
    line = "0::/job/step" if version == 2 else "3:cpu,memory:/job/step\n2:cpuset:/other\n0::/"
    membership.write_text(line)
    limits = sorted(_group_limits(tmp_path / "groups", membership))
    assert limits[:2] == [(500, 180), (1000, 250)]


def test_groups_that_cannot_be_seen_do_not_count(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/../../elsewhere")
    assert list(_group_limits(tmp_path, membership)) == []
    assert list(_group_limits(tmp_path, tmp_path / "gone")) == []


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ([], Memory(100, 60)),
        ([(80, 30)], Memory(80, 50)),
        ([(20, 30)], Memory(20, 0)),
        ([(10**18, 30)], Memory(100, 60)),
        ([(90, 50), (70, 5)], Memory(70, 40)),
    ],
)
def test_lowest_limit_counts(monkeypatch, limits, expected):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(100, 60))
    monkeypatch.setattr("resolvent.memory._process_limits", lambda: [])
    monkeypatch.setattr("resolvent.memory._group_limits", lambda: limits)
    assert machine_memory() == expected


@pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="no Linux")
def test_groups_of_this_process_can_be_read():
    assert all(0 <= used < limit for limit, used in _group_limits())
