"""training.json: what a run was started with; and the lock and the manifest that make its folder a run."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from resolvent._version import __version__
from resolvent.errors import CheckpointError, ConfigError
from resolvent.files import check_version, locked, partial_name, read_json, write_json
from resolvent.manifest import MANIFEST, check_files, write_manifest
from resolvent.runs import RUN_FILE, fixed_files
from resolvent.terminal import shell_word
from resolvent.training.config import TrainingConfig

FORMAT_VERSION = 1


def has_begun(run_dir: Path) -> bool:
    """Whether a folder is a run's that can be resumed: its manifest is written last."""
    return (run_dir / RUN_FILE).exists() and (run_dir / MANIFEST).exists()


def check_new(run_dir: Path) -> None:
    """Refuse a folder in which no run can begin.

    Raises:
        ConfigError: the folder is in use.
    """
    if not run_dir.exists():
        return
    unfinished = partial_name(run_dir / MANIFEST).exists() and not (run_dir / MANIFEST).exists()
    if not (run_dir.is_dir() and (unfinished or not any(run_dir.iterdir()))):
        raise ConfigError(
            f"the run folder {run_dir} is not empty: continue its run with --resume {shell_word(run_dir)}, "
            "or choose another one with --out"
        )


@contextmanager
def new_run(run_dir: Path) -> Iterator[None]:
    """Hold a run folder, made where missing, against other processes, before its run begins and while it lasts.

    Raises:
        ConfigError: the folder is in use.
        CheckpointError: another process holds it, or it cannot be written.
    """
    check_new(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the run folder: {error}; choose another one with --out") from error
    with locked(partial_name(run_dir / MANIFEST)):  # which becomes the manifest, and stays locked
        yield


@contextmanager
def beginning(run_dir: Path) -> Iterator[None]:
    """Begin a run in a folder that is held: the block fills it and ends with `write_run`.

    If the block fails, nothing is left of it; if the process is killed, the next beginning clears the folder.

    Raises:
        ConfigError: the folder is in use.
        CheckpointError: it cannot be written.
    """
    mark = partial_name(run_dir / MANIFEST)
    try:
        check_new(run_dir)
        _clear(run_dir)
    except ConfigError:
        mark.unlink(missing_ok=True)
        raise
    try:
        yield
    except BaseException as error:
        _clear(run_dir)
        mark.unlink(missing_ok=True)
        with suppress(OSError):  # a mount point, or somebody put something into it
            run_dir.rmdir()
        if isinstance(error, OSError):
            remedy = "make room on its disk, or choose another one with --out"
            raise CheckpointError(f"cannot begin a run in {run_dir}: {error}; {remedy}") from error
        raise


def _clear(run_dir: Path) -> None:
    """Remove what a beginning writes before the manifest."""
    for name in fixed_files():
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def write_run(run_dir: Path, config: TrainingConfig, fingerprint: str) -> None:
    """Record a run's configuration and the fingerprint of its data; from here on the run can be resumed.

    Model configuration and tokenizer must be there already.
    """
    record = {"format_version": FORMAT_VERSION, "version": __version__}
    write_json(run_dir / RUN_FILE, {**record, "data_fingerprint": fingerprint, "training": config.to_dict()})
    write_manifest(run_dir, fixed_files())


def read_run(run_dir: Path) -> tuple[TrainingConfig, str]:
    """The configuration of a run and the fingerprint of its data.

    Raises:
        CheckpointError: the folder holds no run, or a damaged one.
    """
    path = run_dir / RUN_FILE
    if not path.exists():
        raise CheckpointError(f"{run_dir} holds no training run: there is no {RUN_FILE} in it")
    record = read_json(path)
    check_version(path, record.get("format_version"), FORMAT_VERSION)
    check_files(run_dir, [RUN_FILE])
    try:
        config = TrainingConfig.from_dict(record["training"])
        config.validate()
        return config, record["data_fingerprint"]
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} does not describe a training run: {error}") from error
