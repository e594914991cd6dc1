"""Files from anywhere: nothing in them runs, reads other files, or takes time and memory without bound."""

import ast
import copy
import io
import json
import os
import pickle
import shutil
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from resolvent.data import encode_documents, load_documents, load_tokenizer
from resolvent.errors import CheckpointError, DataError, ResolventError
from resolvent.files import read_json, write_json
from resolvent.inspection.inspection import read_curves
from resolvent.manifest import MANIFEST, read_checked, write_manifest
from resolvent.models import load_model
from resolvent.models.phase2 import Phase2State
from resolvent.runs import RUN_FILE, fixed_files, load_trained
from resolvent.training import resume
from resolvent.training.checkpoint import load_optimizer, load_trainer_state
from resolvent.training.optimizer import build_optimizer
from resolvent.training.run_folder import read_run
from tests.cli.conftest import call

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "format-5"
SOURCES = Path(__file__).parents[2] / "src"
CHECKPOINT = Path("checkpoints") / "step-00000006"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "run", tmp_path / "run"))


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def traps(target: Path) -> list[bytes]:
    saved = BytesIO()
    torch.save({"model": Trap(target)}, saved)
    return [pickle.dumps(Trap(target)), saved.getvalue()]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("reader", ["model", "optimizer", "state", "tokenizer", "text", "parquet"])
def test_a_pickle_is_not_opened(run: Path, tmp_path: Path, number: int, reader: str):
    target = tmp_path / "sprung"
    trap = traps(target)[number]
    (run / MANIFEST).unlink()
    if reader == "model":
        (run / "model.safetensors").write_bytes(trap)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load_model(run, device="cpu")
    elif reader == "optimizer":
        model = load_model(run, device="cpu")
        optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.1, betas=(0.9, 0.95))
        (run / CHECKPOINT / "optimizer.safetensors").write_bytes(trap)
        with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
            load_optimizer(run / CHECKPOINT, model, optimizer)
    elif reader == "state":
        (tmp_path / "state").write_bytes(trap)
        with pytest.raises(CheckpointError, match="holds no saved state"):
            Phase2State.load(tmp_path / "state")
    elif reader == "tokenizer":
        (run / "tokenizer.json").write_bytes(trap)
        with pytest.raises(DataError, match=r"tokenizer\.json"):
            load_tokenizer(run)
    elif reader == "text":
        (tmp_path / "text.txt").write_bytes(trap)
        with pytest.raises(DataError, match=r"text\.txt is a (Python pickle|ZIP archive), not text"):
            load_documents(tmp_path / "text.txt")
    else:
        (tmp_path / "text.parquet").write_bytes(trap)
        with pytest.raises(DataError, match=r"text\.parquet"):
            load_documents(tmp_path / "text.parquet")
    assert not target.exists()
    pickle.loads(trap) if number == 0 else torch.load(BytesIO(trap), weights_only=False)
    assert target.exists()  # the trap is one


def test_pickles_beside_a_model_are_ignored(run: Path, tmp_path: Path):
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
        (run / name).write_bytes(traps(tmp_path / "sprung")[1])
    load_trained(run, "cpu")
    resume(run, data=str(GOLDEN / "verses.txt"))
    (run / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no model"):
        load_trained(run, "cpu")
    assert not (tmp_path / "sprung").exists()


def test_no_source_can_run_what_it_reads():
    """No pickle, no evaluation of text, no code from the network; `torch.load` and its like are not named at all."""
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "runpy", "torch.hub"}
    calls = {"eval", "exec", "compile", "__import__"}
    attributes = {"torch.load", "np.load", "numpy.load", "yaml.load", "os.system", "os.popen"}
    seen = 0
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & set(names), path
            if isinstance(node, ast.Call):
                seen += 1
                assert ast.unparse(node.func) not in calls | attributes, path
    assert seen > 1000


def test_paths_in_a_manifest_are_not_read(run: Path, tmp_path: Path):
    """A manifest's names are looked up, never opened: a file is only compared with the entry of its own name."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # opening it would wait for ever
    manifest = json.loads((run / MANIFEST).read_text())
    entry = manifest["files"]["config.json"]
    manifest["files"] |= {"../fifo": entry, str(fifo): entry, "../../etc/passwd": entry, "": entry, ".": entry}
    (run / MANIFEST).write_text(json.dumps(manifest))
    resume(run, data=str(GOLDEN / "verses.txt"))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "..", "", 3, None, ["a"]])
def test_an_index_of_shards_stays_in_its_folder(run: Path, tmp_path: Path, name: object):
    (run / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (run / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"ln_f.weight": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json must name files beside it in weight_map"):
        load_model(run, device="cpu")


def test_paths_in_records_are_text(tmp_path: Path):
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "texts"
    folder.mkdir()
    record = {"text": "../secret.txt", "path": "../secret.txt", "file": str(tmp_path / "secret.txt")}
    (folder / "a.jsonl").write_text(json.dumps(record))
    (folder / "inner").symlink_to(tmp_path)
    assert load_documents(folder) == ["../secret.txt"]


def record(run: Path, **changes: Any) -> None:
    """Have a run folder say something else of its run, with a manifest in order."""
    values = read_json(run / RUN_FILE)
    values["training"] |= changes
    write_json(run / RUN_FILE, values)
    write_manifest(run, fixed_files())


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of the user's, which is not opened."""
    path, opened = tmp_path / "secret.txt", list[str]()
    path.write_text("A secret of the user's.\n" * 100)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]) == str(path):
            opened.append(event)

    sys.addaudithook(watch)  # which stays, and knows this test's path only
    yield path
    assert not opened
    path.read_text()
    assert opened  # it would have been seen


@pytest.mark.parametrize("field", ["data", "validation_data"])
@pytest.mark.parametrize("command", [["inspect"], ["evaluate"], ["evaluate", "positions"]])
def test_text_that_a_folder_names_is_used_only_with_the_fingerprint_of_its_run(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], field: str, command: list[str]
):
    secret = tmp_path / "secret.txt"
    secret.write_text("A secret of the user's.\n" * 100)
    record(run, data=None, validation_data=None)
    record(run, **{field: str(secret)})
    assert call(*command, run, "--device", "cpu") == 1
    told = capfd.readouterr()
    name = {"data": f"the held-out part of {secret}", "validation_data": str(secret)}[field]
    assert told.out == f"Reading   {name}\n"
    options = {"data": "--data PATH --held-out", "validation_data": "--data PATH"}[field]
    assert "has changed since the run" in told.err and told.err.endswith(f"as it is now: {options}\n")
    assert not (run / "inspection.html").exists()


def test_path_that_a_folder_names_is_shown_without_control_characters(run: Path, capfd: pytest.CaptureFixture[str]):
    record(run, data="a\x1b]52;c;eA==\a\n")
    assert call("evaluate", run, "--device", "cpu") == 1
    assert capfd.readouterr().out == "Reading   the held-out part of a\\x1b]52;c;eA==\\x07\n\n"


def test_a_resumed_run_reads_neither_tokenizer_nor_model_that_it_began_from(run: Path, watched: Path):
    shutil.copy(GOLDEN / "verses.txt", run.parent)
    record(run, tokenizer=str(watched))
    resume(run, data=str(GOLDEN / "verses.txt"))
    record(run, tokenizer="bytes", preset="tiny", model=None, start_from=str(watched))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="has lost its checkpoints"):
        resume(run, data=str(GOLDEN / "verses.txt"))


def test_resume_says_which_text_it_reads_and_uses_no_other(run: Path, tmp_path: Path):
    (tmp_path / "other.txt").write_text("Not what the run learned from.\n" * 100)
    record(run, data=str(tmp_path / "other.txt"))
    shutil.rmtree(run / CHECKPOINT)  # a run that is finished reads none
    said, before = io.StringIO(), {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="has changed since the run"):
        resume(run, console=Console(file=said))
    assert said.getvalue() == f"Reading   {tmp_path / 'other.txt'}\n"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_weights_of_other_shapes_are_not_read_however_large(run: Path):
    """Sparse files of 8 GB, which could be mapped, and of 4 TB."""
    for size in (1 << 33, 1 << 42):
        header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        (run / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(run / "model.safetensors", 8 + len(header) + size)
        began = time.perf_counter()
        with pytest.raises(CheckpointError, match=r"do not fit config\.json|cannot read .*model\.safetensors"):
            load_model(run, device="cpu")
        assert time.perf_counter() - began < 2


@pytest.mark.parametrize("length", [1 << 26, 1 << 62])
def test_a_long_header_of_weights_is_not_read(run: Path, length: int):
    (run / "model.safetensors").write_bytes(length.to_bytes(8, "little"))
    os.truncate(run / "model.safetensors", 1 << 27)
    with pytest.raises(CheckpointError, match=r"its header has [\d,]+ bytes, more than 33,554,432"):
        load_model(run, device="cpu")


def test_a_long_line_of_metrics_is_not_read(run: Path):
    (run / "metrics.jsonl").write_bytes(b'{"step": 1')
    os.truncate(run / "metrics.jsonl", 1 << 36)
    for action in (lambda: read_curves(run / "metrics.jsonl"), lambda: resume(run, data=str(GOLDEN / "verses.txt"))):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
            action()


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 2**31, 2**63, 2**64, 10**30, 10**400, 1e308, -1e-320, "", "\0", "../../x", "9" * 5000]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.integers(1, 300).map(lambda depth: json.loads("[" * depth + "]" * depth)),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, part in inner for place in places(part, (*at, key)))]


@st.composite
def changed(draw: st.DrawFn, name: str) -> bytes:
    """A JSON file of the golden run with up to three values replaced, removed or added."""
    value = {"": json.loads((GOLDEN / "run" / name).read_text())}
    for _ in range(draw(st.integers(1, 3))):
        *way, key = draw(st.sampled_from(places(value)[1:]))
        target = value
        for step in way:
            target = target[step]
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace":
                target[key] = copy.deepcopy(draw(HOSTILE))
            case "remove" if way:
                del target[key]
            case "add" if isinstance(target, dict) and way:
                target[draw(st.text(max_size=8))] = copy.deepcopy(draw(HOSTILE))
    return json.dumps(value[""]).encode()


def read_and_use(run: Path, name: str) -> None:
    """Read and use a file whose manifest is valid."""
    data = str(GOLDEN / "verses.txt")
    match Path(name).name:
        case "config.json":
            load_model(run, device="cpu")
        case "tokenizer.json":
            tokenizer = load_tokenizer(run)
            tokens = encode_documents(["A prompt, 日本."], tokenizer).tokens
            tokenizer.decode(tokens.tolist())
        case "training.json":
            write_manifest(run, json.loads((run / MANIFEST).read_text())["files"])
            read_run(run)
        case "trainer.json":
            load_trainer_state(run / CHECKPOINT)
        case "manifest.json":
            read_checked(run / "config.json", 1 << 20)
            resume(run, data=data)


NAMES = ["config.json", "tokenizer.json", "training.json", str(CHECKPOINT / "trainer.json"), "manifest.json"]


def hostile_json(data: st.DataObject, name: str, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    run = Path(shutil.copytree(GOLDEN / "run", folder))
    (run / MANIFEST).unlink() if name in ("config.json", "tokenizer.json") else None
    (run / name).write_bytes(data.draw(changed(name)))
    began = time.perf_counter()
    try:
        read_and_use(run, name)
    except ResolventError as error:
        message = str(error)
    else:
        message = ""
    assert len(message) < 10_000
    assert time.perf_counter() - began < 5


def cases(number: int) -> Callable[[Any], Any]:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=checks)


@pytest.mark.parametrize("name", NAMES)
@cases(40)
@given(data=st.data())
def test_hostile_json(data: st.DataObject, name: str, tmp_path: Path):
    hostile_json(data, name, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@cases(600)
@given(data=st.data())
def test_any_hostile_json(data: st.DataObject, name: str, tmp_path: Path):
    hostile_json(data, name, tmp_path / "run")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 200_000,
        b'{"a": "' + b"x" * 50_000_000 + b'"}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 490 + b"]" * 490 + b"}",
        b"\xff\xfe{}",
        b"",
    ],
    ids=["deep lists", "deep objects", "long", "long number", "nested", "no UTF-8", "empty"],
)
def test_hostile_sizes_of_json_take_little(run: Path, content: bytes):
    (run / MANIFEST).unlink()
    (run / "config.json").write_bytes(content)
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"config\.json") as raised:
        load_model(run, device="cpu")
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1 and peak < 20e6 and len(str(raised.value)) < 1000
    (run / "tokenizer.json").write_bytes(content)
    began = time.perf_counter()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(run)
    assert time.perf_counter() - began < 2


def test_many_unknown_fields_are_counted_not_listed(run: Path):
    (run / MANIFEST).unlink()
    (run / "config.json").write_text(json.dumps(read_json(run / "config.json") | dict.fromkeys(map(str, range(10**4)))))
    began = time.perf_counter()
    with pytest.raises(CheckpointError, match="9,980 more") as raised:
        load_model(run, device="cpu")
    assert time.perf_counter() - began < 5 and len(str(raised.value)) < 3000


@pytest.mark.parametrize(
    "field", ["d_model", "n_layers", "num_heads", "head_dim", "vocab_size", "ffn_dim", "conv_size"]
)
@pytest.mark.parametrize("size", [512, 100_000, 2**31 - 1, 10**15])
def test_a_configuration_gets_no_more_memory_than_its_weights_have(run: Path, field: str, size: int):
    (run / MANIFEST).unlink()
    (run / "config.json").write_text(json.dumps(read_json(run / "config.json") | {field: size}))
    began = time.perf_counter()
    with pytest.raises(CheckpointError, match=f"do not fit|{field} must be <="):
        load_model(run, device="cpu")
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("version", ["9" * 5000, "9" * 9, "²", "-1", ""])
def test_weights_of_an_unknown_format_version_are_refused(run: Path, version: str):
    path = run / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"]["format_version"] = version
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[end:])
    with pytest.raises(CheckpointError, match="has format version") as raised:
        load_model(run, device="cpu")
    assert len(str(raised.value)) < 1000


def test_an_optimiser_of_another_shape_is_refused(run: Path):
    model = load_model(run, device="cpu")
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.1, betas=(0.9, 0.95))
    shutil.copy(run / "model.safetensors", run / CHECKPOINT / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match="optimiser's state"):
        load_optimizer(run / CHECKPOINT, model, optimizer)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode())))
def test_prompts_of_any_bytes(prompt: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """As an argument, where the shell could pass them, and as a file: invalid UTF-8 becomes U+FFFD."""
    expected, (path, options) = prompt.decode("utf-8", "replace"), (tmp_path / "prompt", ["--max-new-tokens", 0])
    capfd.readouterr()
    if b"\0" not in prompt:
        assert call("generate", GOLDEN / "run", f"--prompt={os.fsdecode(prompt)}", *options, "--device", "cpu") == 0
        assert capfd.readouterr() == (expected + "\n", "")
    path.write_bytes(prompt)
    code = call("generate", GOLDEN / "run", "--prompt-file", path, *options, "--device", "cpu")
    out, err = capfd.readouterr()
    if code == 0:
        assert (out, err) == (expected.removeprefix("\ufeff") + "\n", "")
    else:
        assert b"\0" in prompt or expected.count("\ufffd") > 32
        assert (out, len(err.splitlines())) == ("", 1) and f"{path} is " in err and "not text" in err


def test_options_for_prompts_exclude_each_other(capfd: pytest.CaptureFixture[str]):
    assert call("generate", GOLDEN / "run", "--prompt", "a", "--prompt-file", __file__) == 2
    assert "the file holds the prompt" in capfd.readouterr().err


@pytest.mark.slow
def test_a_prompt_of_ten_megabytes(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    prompt = (b"A line of a long text.\n" * 500_000)[: 10 << 20]
    (tmp_path / "prompt").write_bytes(prompt)
    assert (
        call("generate", GOLDEN / "run", "--prompt-file", tmp_path / "prompt", "--max-new-tokens", 3, "--seed", 1) == 0
    )
    assert capfd.readouterr().out.encode().startswith(prompt)


def test_text_that_is_no_utf8_is_repaired_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "text.txt").write_bytes(b"caf\xe9 \xf0\x9f\x98 \xed\xa0\x80.")
    assert load_documents(tmp_path / "text.txt") == ["caf\ufffd \ufffd \ufffd\ufffd\ufffd."]
    assert "Replaced 5 invalid sequences by U+FFFD in 1 file" in caplog.text
