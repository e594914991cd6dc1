"""training.json: what a run was started with."""

from pathlib import Path

from resolvent._version import __version__
from resolvent.errors import CheckpointError, ConfigError
from resolvent.files import read_json, write_json
from resolvent.training.config import TrainingConfig

RUN_FILE = "training.json"


def write_run(run_dir: Path, config: TrainingConfig, fingerprint: str) -> None:
    """Record a run's configuration and the fingerprint of its data."""
    write_json(
        run_dir / RUN_FILE, {"version": __version__, "data_fingerprint": fingerprint, "training": config.to_dict()}
    )


def read_run(run_dir: Path) -> tuple[TrainingConfig, str]:
    """The configuration of a run and the fingerprint of its data.

    Raises:
        CheckpointError: the folder holds no run, or a damaged one.
    """
    path = run_dir / RUN_FILE
    if not path.exists():
        raise CheckpointError(f"{run_dir} holds no training run: there is no {RUN_FILE} in it")
    record = read_json(path)
    try:
        config = TrainingConfig.from_dict(record["training"])
        config.validate()
        return config, record["data_fingerprint"]
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} does not describe a training run: {error}") from error
