import logging
import shutil
from pathlib import Path

import pytest

from resolvent.data import load_documents
from resolvent.data.content import NotText
from resolvent.data.folders import files_below
from resolvent.errors import DataError
from resolvent.manifest import MANIFEST
from resolvent.training.run_folder import beginning, new_run

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def project(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    return tmp_path


def test_run_folders_are_never_data(project, caplog):
    for number in (1, 2, 3):
        shutil.copytree(GOLDEN / "format-5" / "run", project / "runs" / f"r{number}")
    shutil.copytree(project / "runs" / "r1", project / "deep" / "down" / "r1")
    with caplog.at_level(logging.WARNING):
        assert load_documents(project) == ["text"]
    (record,) = caplog.records
    assert f"4 x the folder of a run, as {project / 'deep' / 'down' / 'r1'}" in record.message


def test_run_that_begins_is_no_data(project):
    run = project / "run"
    with new_run(run):
        assert load_documents(project) == ["text"]
        with beginning(run):
            (run / "tokenizer.json").write_text('{"text": "x"}')
            (run / ".metrics.jsonl.partial").write_text('{"step": 1}')
            assert load_documents(project) == ["text"]


def test_run_that_was_killed_while_it_began_is_no_data(project):
    (project / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    (project / "run" / f".{MANIFEST}.partial").touch()
    (project / "run" / "checkpoints" / "step-1" / "readme.txt").write_text("no text of the user")
    assert load_documents(project) == ["text"]


def test_saved_models_and_lone_checkpoints_are_no_data(project, caplog):
    checkpoint = next((GOLDEN / "format-5" / "run" / "checkpoints").iterdir())
    shutil.copytree(checkpoint, project / "copy")
    (project / "copy" / "merges.txt").write_text("a b")
    assert load_documents(project) == ["text"]
    assert "1 x the folder of a model" in caplog.text


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_run_folder_named_as_data_is_refused(inside):
    path = GOLDEN / "format-5" / "run"
    if not inside:
        with pytest.raises(NotText, match="run is the folder of a run, not text: name the text that it was trained on"):
            load_documents(path)
    else:
        with pytest.raises(DataError, match="checkpoints holds no text"):
            load_documents(path / inside)


def test_manifest_of_another_program_makes_no_run(project):
    (project / MANIFEST).write_text('{"name": "an extension"}')
    assert load_documents(project) == ["text"]


def test_caches_and_hidden_files_are_skipped(project, caplog):
    for folder in ("__pycache__", ".venv", "cache", ".pytest_cache"):
        (project / folder).mkdir()
        (project / folder / "b.txt").write_text("cached")
    (project / "cache" / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55")
    (project / ".hidden.txt").write_text("hidden")
    assert files_below(project) == ([project / "a.txt"], [])
    assert load_documents(project) == ["text"]
    assert not caplog.records


def test_links_to_folders_and_loops_are_left_out(project, caplog):
    (project / "sub").mkdir()
    (project / "sub" / "up").symlink_to(project)
    (project / "sub" / "b.txt").symlink_to(project / "a.txt")
    assert load_documents(project) == ["text", "text"]
    assert f"1 x a link to a folder, as {project / 'sub' / 'up'}" in caplog.text


def test_folder_may_be_named_by_a_link(project, tmp_path_factory):
    link = tmp_path_factory.mktemp("links") / "link"
    link.symlink_to(project)
    assert load_documents(link) == ["text"]


def test_few_kinds_are_listed_the_others_counted(project, caplog):
    contents = [b"%PDF-1", b"{\\rtf1", b"\x89PNG\r\n\x1a\n\0", b"GGUF\0", b"ORC\0", b"Obj\x01\0", b"\x93NUMPY\0"]
    for number, content in enumerate(contents):
        (project / f"b{number}").write_bytes(content)
    assert load_documents(project) == ["text"]
    assert caplog.text.count(" x ") == 5
    assert "; 2 others" in caplog.text


def test_folder_of_nothing_but_other_files_says_what_they_are(tmp_path, caplog):
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1")
    with pytest.raises(DataError, match="holds no text; give a file or a folder with text, JSON Lines or Parquet"):
        load_documents(tmp_path)
    assert "1 x a PDF document" in caplog.text
