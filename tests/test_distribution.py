"""Distribution: the wheel, its licences, its changelog."""

import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from resolvent import __version__

ROOT = Path(__file__).parents[1]


def table(lines: list[str]) -> dict[str, tuple[str, str]]:
    """Version and licence by package."""
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: (version, licence) for name, version, licence in cells}


@pytest.fixture(name="listed")
def listed_licences() -> dict[str, tuple[str, str]]:
    shown = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8")
    return table([line for line in shown.splitlines() if line.startswith("| ")][1:])


@pytest.fixture(name="pinned")
def pinned_versions() -> dict[str, str]:
    pins = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in pins}


def test_the_licences_of_all_that_is_needed_are_listed(listed: dict[str, tuple[str, str]], pinned: dict[str, str]):
    installed = table(runpy.run_path(str(ROOT / "scripts" / "list_licenses.py"))["rows"]())
    others = [name for name, (version, _) in installed.items() if version != pinned.get(name, version)]
    if others:  # which may need other packages, and word their licences otherwise
        pytest.skip(f"listed are the versions of constraints.txt; here are others of {', '.join(others)}")
    assert {name: licence for name, (_, licence) in listed.items()} == {
        name: licence for name, (_, licence) in installed.items()
    }


def test_the_licences_listed_are_of_the_pinned_versions(listed: dict[str, tuple[str, str]], pinned: dict[str, str]):
    assert listed.keys() - pinned.keys() <= {"setuptools"}
    for name in listed.keys() & pinned.keys():
        assert listed[name][0] == pinned[name], name
    assert not [name for name, (_, licence) in listed.items() if re.search(r"\bA?GPL", licence)]


def test_changelog_has_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\S+)\]", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert __version__ == versions[1]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions[1:])


@pytest.mark.slow
def test_wheel_works_with_only_its_dependencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installed from the wheel alone, without network, in a fresh environment.

    Its dependencies are those of this environment, found through a path file: it is shown that the wheel is complete
    and its command works, not that an index would bring the dependencies along; `make wheel` shows that.
    """
    source = tmp_path / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def run(*command: object) -> str:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"resolvent-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"resolvent", f"resolvent-{__version__}.dist-info"}
    assert {"resolvent/py.typed", "resolvent/layers/zeta_zeros.txt"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)

    fresh = tmp_path / "fresh"
    run(sys.executable, "-m", "venv", "--without-pip", fresh)
    python, command = fresh / "bin" / "python", fresh / "bin" / "resolvent"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    (packages,) = fresh.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    home = run(python, "-c", "import resolvent; print(resolvent.__file__)")
    assert Path(home.strip()).is_relative_to(fresh)
    assert run(command, "--version") == f"resolvent {__version__}\n"
    runpy.run_path(str(ROOT / "scripts" / "try_command.py"))["try_command"](command, tmp_path)
