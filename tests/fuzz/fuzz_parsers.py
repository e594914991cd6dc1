"""Feed the parsers of untrusted files with what atheris makes of valid ones. Needs `pip install atheris`.

    python tests/fuzz/fuzz_parsers.py PARSER CORPUS [-max_total_time=60 ...libFuzzer options]

PARSER is one of those in `PARSERS`, or `list`; CORPUS a folder for inputs, which is seeded when it is empty. A parser
may refuse an input with a ResolventError of bounded length. Anything else is a finding.
"""

import logging
import lzma
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

READERS = [f"resolvent.data.{name}" for name in ("corpus", "reading", "content", "records")]
with atheris.instrument_imports(include=["resolvent.files", "resolvent.manifest", *READERS, "json"]):
    from resolvent.data import corpus, encode_documents, load_documents, load_tokenizer
    from resolvent.errors import ResolventError
    from resolvent.manifest import MANIFEST, read_checked, write_manifest
    from resolvent.models import load_model
    from resolvent.models.phase2 import Phase2State
    from resolvent.training.checkpoint import load_trainer_state
    from resolvent.training.metrics import MetricsLog
    from resolvent.training.run_folder import read_run

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "format-5"
RUN, CHECKPOINT = GOLDEN / "run", GOLDEN / "run" / "checkpoints" / "step-00000003"
LONGEST_MESSAGE = 10_000


def _read_model(folder: Path) -> None:
    load_model(folder, device="cpu")


def _read_tokenizer(folder: Path) -> None:
    encode_documents(["A prompt, 日本."], load_tokenizer(folder))


def _read_record(folder: Path) -> None:
    write_manifest(folder, ["training.json"])
    read_run(folder)


def _read_metrics(folder: Path) -> None:
    with MetricsLog(folder, last_step=3):
        pass


def _read_state(folder: Path) -> None:
    Phase2State.load(folder / "state")


def _documents(name: str) -> Callable[[Path], None]:
    return lambda folder: load_documents(folder / name) and None


PARSERS: dict[str, tuple[str, Path | None, Callable[[Path], None]]] = {
    "config": ("config.json", RUN / "config.json", _read_model),
    "weights": ("model.safetensors", RUN / "model.safetensors", _read_model),
    "tokenizer": ("tokenizer.json", RUN / "tokenizer.json", _read_tokenizer),
    "manifest": (MANIFEST, RUN / MANIFEST, lambda folder: read_checked(folder / "config.json", 1 << 20) and None),
    "record": ("training.json", RUN / "training.json", _read_record),
    "trainer-state": ("trainer.json", CHECKPOINT / "trainer.json", load_trainer_state),
    "metrics": ("metrics.jsonl", RUN / "metrics.jsonl", _read_metrics),
    "state": (
        "state",
        CHECKPOINT / "optimizer.safetensors",
        lambda folder: Phase2State.load(folder / "state") and None,
    ),
    "text": ("text.txt", GOLDEN / "verses.txt", _documents("text.txt")),
    "jsonl": ("text.jsonl", None, _documents("text.jsonl")),
    "xz": ("text.xz", None, _documents("text.xz")),
    "array": ("text.json", None, _documents("text.json")),
    "parquet": ("text.parquet", None, _documents("text.parquet")),
}
"""By name: the file that is fuzzed, a valid one, and what reads it out of a folder."""


def _valid(name: str) -> bytes:
    _, file, _ = PARSERS[name]
    if file is not None:
        return file.read_bytes()
    if name == "jsonl":
        return b'{"text": "One \\ud800 verse."}\n\n{"text": "Another.", "n": [1, 2.5e3, null]}\n'
    if name == "array":
        return b'[{"text": "One \\ud800 verse."},\n {"text": "Another.", "n": [1, 2.5e3, null]}]\n'
    if name == "xz":
        return lzma.compress(b"One verse.\n<|endoftext|>\nAnother.\n")
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": ["One verse.", "Another."], "n": [1, 2]}), sink)
    return sink.getvalue().to_pybytes()


def main() -> None:
    name, inputs = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else Path()
    if name == "list":
        print(*PARSERS)
        return
    inputs.mkdir(parents=True, exist_ok=True)
    if not any(inputs.iterdir()):
        (inputs / "valid").write_bytes(_valid(name))
    logging.getLogger(corpus.__name__).setLevel(logging.ERROR)  # U+FFFD is no finding
    file, _, read = PARSERS[name]
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
    for neighbour in ("config.json", "model.safetensors"):
        shutil.copy(RUN / neighbour, folder)

    def test_one_input(data: bytes) -> None:
        (folder / file).write_bytes(data)
        try:
            read(folder)
        except ResolventError as error:
            if len(str(error)) > LONGEST_MESSAGE:
                raise ValueError("an error of many pages") from error

    atheris.Setup([sys.argv[0], *sys.argv[2:]], test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
