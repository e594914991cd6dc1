"""Run folders: the configuration in training.json, the lock and the manifest."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from resolvent._version import __version__
from resolvent.errors import CheckpointError, ConfigError
from resolvent.files import check_version, locked, partial_name, read_json, remove, write_json
from resolvent.manifest import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    WEIGHTS,
    check_files,
    description,
    is_as_described,
    is_sealed,
    sealed,
    write_manifest,
)
from resolvent.runs import EMA_FOLDER, RUN_FILE, fixed_files
from resolvent.terminal import shell_word
from resolvent.training.config import TrainingConfig
from resolvent.wording import JSON

if TYPE_CHECKING:
    from resolvent.evaluation import LanguageScore

FORMAT_VERSION = 3
STEPS_FILE = "steps.json"
"""File of the number of steps, if it was changed after the start of the run."""
RESULT_FILE = "result.json"
"""File of the scores of a finished run."""


class Scores(NamedTuple):
    """Scores of a validation: of the weights, and of their moving average where there is one."""

    validation: "LanguageScore"
    ema_validation: "LanguageScore | None" = None


def has_begun(run_dir: Path) -> bool:
    """Return True if the folder holds a run that can be resumed: the manifest is written last."""
    return (run_dir / RUN_FILE).exists() and (run_dir / MANIFEST).exists()


def is_run(run_dir: Path) -> bool:
    """Return True if the contents of a folder's files show that a run began in it; their names alone do not."""
    try:
        listed, record = (read_json(run_dir / name) for name in (MANIFEST, RUN_FILE))
    except CheckpointError:
        return False
    files = listed.get("files")
    return isinstance(files, dict) and RUN_FILE in files and record.keys() >= {"data_fingerprint", "training"}


def check_new(run_dir: Path, *, overwrite: bool = False) -> None:
    """Check that a run can begin in a folder.

    Args:
        run_dir: the folder.
        overwrite: allow the folder of a run, which the new one replaces.

    Raises:
        ConfigError: the folder is in use, or cannot be made.
    """
    remedy = "choose another one with --out"
    if not run_dir.exists():
        if run_dir.is_symlink():
            raise ConfigError(f"the run folder {run_dir} is a link to nothing ({os.readlink(run_dir)}): {remedy}")
        above = next(path for path in run_dir.parents if path.exists())
        if not above.is_dir():
            raise ConfigError(f"the run folder {run_dir} cannot be made, {above} is a file: {remedy}")
        return
    unfinished = partial_name(run_dir / MANIFEST).exists() and not (run_dir / MANIFEST).exists()
    if run_dir.is_dir() and (unfinished or not any(run_dir.iterdir())):
        return
    if not is_run(run_dir):
        raise ConfigError(f"the run folder {run_dir} is not empty, and what it holds is no run: {remedy}")
    if overwrite and run_dir.is_symlink():
        raise ConfigError(f"the run folder {run_dir} is a link, which --overwrite does not follow: {remedy}")
    if not overwrite:
        run = "run" if (run_dir / WEIGHTS).exists() else "run, which was stopped before its first checkpoint,"
        raise ConfigError(
            f"the run folder {run_dir} is not empty: continue its {run} with --resume {shell_word(run_dir)}, "
            f"replace it with --overwrite, or {remedy}"
        )


@contextmanager
def new_run(run_dir: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Lock a run folder, made if missing, against other processes, before and during its run.

    Args:
        run_dir: the folder.
        overwrite: remove the run in the folder.

    Yields:
        The locked file, for `write_run`.

    Raises:
        ConfigError: the folder is in use.
        CheckpointError: another process holds it, or it cannot be written.
    """
    check_new(run_dir, overwrite=overwrite)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the run folder: {error}; choose another one with --out") from error
    replaced = overwrite and has_begun(run_dir)
    with (
        locked(run_dir / MANIFEST) if replaced else nullcontext(),
        locked(partial_name(run_dir / MANIFEST)) as held,  # becomes the manifest, and stays locked
    ):
        if replaced:
            _clear(run_dir)
        yield held


@contextmanager
def beginning(run_dir: Path) -> Iterator[None]:
    """Begin a run in a locked folder: the block fills the folder and ends with `write_run`.

    If the block fails, its files are removed; if the process is killed, the next run clears the folder.

    Raises:
        ConfigError: the folder is in use.
        CheckpointError: it cannot be written.
    """
    mark = partial_name(run_dir / MANIFEST)
    try:
        check_new(run_dir)
    except ConfigError:
        mark.unlink(missing_ok=True)
        raise
    try:
        _clear(run_dir)
        yield
    except BaseException as error:
        with suppress(OSError, CheckpointError):  # a folder that is not empty keeps its mark for the next run
            _clear(run_dir)
            mark.unlink(missing_ok=True)
            run_dir.rmdir()
        if isinstance(error, OSError):
            remedy = "free space on its disk, or choose another one with --out"
            raise CheckpointError(f"cannot begin a run in {run_dir}: {error}; {remedy}") from error
        raise


def _clear(run_dir: Path) -> None:
    """Remove the files of a run, and no others; links are removed, not followed.

    The manifest is removed first: if the process is killed, the rest is no run.

    Raises:
        CheckpointError: something cannot be removed.
    """
    from resolvent.models.card import CARD, is_own_card
    from resolvent.training.checkpoint import FOLDER
    from resolvent.training.metrics import FILE_NAME
    from resolvent.training.tracking import ID_FILE, TENSORBOARD_DIR

    adapters = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    try:
        for name in (MANIFEST, STEPS_FILE, RESULT_FILE, FILE_NAME, ID_FILE, WEIGHTS, *adapters, *fixed_files()):
            (run_dir / name).unlink(missing_ok=True)
        if is_own_card(run_dir / CARD):
            (run_dir / CARD).unlink()
        for folder in (run_dir / FOLDER, run_dir / EMA_FOLDER, run_dir / TENSORBOARD_DIR):
            remove(folder)
    except OSError as error:
        raise CheckpointError(f"cannot empty the run folder {run_dir}: {error}; remove what is in it") from error


def write_run(run_dir: Path, config: TrainingConfig, fingerprint: str, held: BinaryIO | None) -> None:
    """Write the configuration of a run and the fingerprint of its data; the run can then be resumed.

    Model configuration and tokenizer must be in the folder, and the weights that a LoRA run adapts; `held` is the file
    that `new_run` yields.
    """
    record = {"format_version": FORMAT_VERSION, "version": __version__}
    write_json(run_dir / RUN_FILE, {**record, "data_fingerprint": fingerprint, "training": config.to_dict()})
    write_manifest(run_dir, [*fixed_files(), *([WEIGHTS] if config.lora else [])], held)


def write_steps(run_dir: Path, steps: int) -> None:
    """Write a new number of steps of a run.

    Raises:
        OSError: the folder cannot be written.
    """
    write_json(run_dir / STEPS_FILE, sealed({"format_version": 1, "steps": steps}))


def check_run_folder(run_dir: Path) -> None:
    """Check, before heavy imports, that a folder holds a run.

    Raises:
        CheckpointError: it holds none.
    """
    if not (run_dir / RUN_FILE).exists():
        missing = f"there is no {RUN_FILE} in it" if run_dir.exists() else "there is no such folder"
        raise CheckpointError(f"{run_dir} holds no training run: {missing}. `resolvent train --out DIR` begins one")


def read_run(run_dir: Path) -> tuple[TrainingConfig, str]:
    """Return the configuration of a run and the fingerprint of its data.

    Raises:
        CheckpointError: the folder holds no run, a damaged one, or one of an older format.
    """
    check_run_folder(run_dir)
    path = run_dir / RUN_FILE
    record = read_json(path)
    check_version(path, record.get("format_version"), FORMAT_VERSION)
    check_files(run_dir, [RUN_FILE])
    if record["format_version"] < FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {record['format_version']}: the run held out other documents, or trained "
            "another model, than this release does. Train anew; a model that this release reads can be trained on with "
            f"--from {shell_word(run_dir)}"
        )
    try:
        config = TrainingConfig.from_dict({"optimizer": "adamw"} | record["training"])  # what there was before Muon
        config = dataclasses.replace(config, steps=_read_steps(run_dir, config.steps))
        config.validate(JSON)
        return config, record["data_fingerprint"]
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} does not describe a training run: {error}") from error


def _read_steps(run_dir: Path, started_with: int) -> int:
    path = run_dir / STEPS_FILE
    if not path.exists():
        return started_with
    record = read_json(path)
    check_version(path, record.get("format_version"), 1)
    if not is_sealed(record):
        raise CheckpointError(f"{path} is not what was saved: restore it from a copy, or remove it and give --steps")
    return record["steps"]


def write_result(run_dir: Path, step: int, scores: "Scores") -> None:
    """Write the scores of the last validation of a finished run.

    Raises:
        OSError: the folder cannot be written.
    """
    from resolvent.training.metrics import FILE_NAME

    record = {"format_version": 1, "step": step, "metrics": description(run_dir / FILE_NAME)}
    measured = {name: dataclasses.asdict(score) for name, score in scores._asdict().items() if score is not None}
    write_json(run_dir / RESULT_FILE, sealed({**record, **measured}))


def read_result(run_dir: Path, last_step: int) -> "Scores | None":
    """Return the scores of a finished run; None if they have to be measured (again).

    Args:
        run_dir: the run folder.
        last_step: the last step of the run.

    Raises:
        VersionError: a newer release wrote the file.
    """
    from resolvent.evaluation import LanguageScore
    from resolvent.training.metrics import FILE_NAME

    path = run_dir / RESULT_FILE
    try:
        record = read_json(path)
    except CheckpointError:  # missing or damaged: the validation is repeated
        return None
    check_version(path, record.get("format_version"), 1)
    whole = is_sealed(record) and record.get("step") == last_step
    if not whole or not is_as_described(run_dir / FILE_NAME, record.get("metrics")):
        return None
    return Scores(**{name: LanguageScore(**record[name]) for name in Scores._fields if name in record})
