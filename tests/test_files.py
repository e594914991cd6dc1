import errno
from pathlib import Path

import pytest

from resolvent.errors import CheckpointError
from resolvent.files import atomic_directory, atomic_file, read_json, write_file, write_json, write_output


def test_a_folder_appears_when_it_is_complete(tmp_path: Path):
    target = tmp_path / "step"
    with atomic_directory(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_does_not_appear_when_filling_it_fails(tmp_path: Path):
    target = tmp_path / "step"

    def fail() -> None:
        with atomic_directory(target) as partial:
            (partial / "old").write_text("1")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert not target.exists()
    with atomic_directory(target) as partial:  # the remains are no part of the next attempt
        (partial / "new").write_text("2")
    assert [path.name for path in target.iterdir()] == ["new"]


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a"
    write_file(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            write_file(path, b"new")
    assert path.read_bytes() == b"old"
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}


@pytest.mark.parametrize(("text", "message"), [(None, "No such file"), ("{", "cannot read"), ("[]", "JSON object")])
def test_damaged_json_is_a_checkpoint_error(tmp_path: Path, text: str | None, message: str):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_json(path)


def test_errors_of_a_full_disk_name_the_file(tmp_path: Path):
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        write_output(Path("/dev/full"), b"text")
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'a'}'"), atomic_file(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())
