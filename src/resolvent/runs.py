"""Folders of trained models: a model with its tokenizer, and the files that make a folder a run.

The module imports nothing of `resolvent.training`. Heavy imports wait inside the functions,
so that `resolvent --help` is quick.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from resolvent.manifest import RUN_FILE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from resolvent.models import IntegratedModel

_MOST_PADDING = 1024
"""Rows by which a model's table may be longer than its tokenizer, where it was padded to a round number."""


def fixed_files() -> tuple[str, ...]:
    """Names of the files that the manifest of a run lists: those that never change.

    Weights carry checksums, and checkpoints have manifests of their own.
    """
    from resolvent.data.tokenization import TOKENIZER_FILES
    from resolvent.models.storage import CONFIG

    return (RUN_FILE, CONFIG, *TOKENIZER_FILES)


def run_of(directory: Path) -> Path:
    """Return the run folder that a directory is, or that its checkpoint belongs to."""
    return directory.parent.parent if directory.parent.name == "checkpoints" else directory


def load_trained(directory: Path, device: str) -> "tuple[IntegratedModel, Tokenizer]":
    """Load a model and its tokenizer.

    A table that was padded (`resize_token_embeddings`) is cut to the tokenizer's length: the model gives no probability
    to ids that are no tokens.

    Args:
        directory: a run folder, one of its checkpoints, or what `resolvent convert` wrote.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        CheckpointError: there is no model, or it does not fit the tokenizer.
        DataError: there is no tokenizer.
    """
    from resolvent.data import load_tokenizer
    from resolvent.device import pick_device
    from resolvent.errors import CheckpointError, ConfigError
    from resolvent.manifest import check_files
    from resolvent.models import load_model
    from resolvent.models.storage import INDEX, WEIGHTS
    from resolvent.terminal import shell_word

    if not any((directory / name).exists() for name in (WEIGHTS, INDEX)):
        if (directory / RUN_FILE).exists():
            raise CheckpointError(
                f"{directory} holds no model: its run was stopped before its first checkpoint. Begin it again with: "
                f"resolvent train --resume {shell_word(directory)}"
            )
        raise CheckpointError(
            f"{directory} holds no model: there is no {WEIGHTS} in it. `resolvent train` saves one with every "
            "checkpoint and at the end"
        )
    try:
        model = load_model(directory, device=pick_device(device))
    except CheckpointError as error:
        if directory.exists():
            raise
        raise CheckpointError(
            f"{directory} was removed while it was read: a run keeps its newest checkpoints only. Read a newer one, or "
            f"{run_of(directory)} itself"
        ) from error
    tokenizer = load_tokenizer(run_of(directory))
    if (run_of(directory) / RUN_FILE).exists():  # a run has a manifest; a folder put together by hand has none
        check_files(run_of(directory), fixed_files())
    count, rows = tokenizer.get_vocab_size(), model.vocab_size
    misfit = f"the tokenizer in {run_of(directory)} has {count} tokens, the model {rows}"
    if not 0 <= rows - count <= _MOST_PADDING:
        raise CheckpointError(f"{misfit}: they are not of the same run, or tokens were added to one of them alone")
    try:
        if rows > count:
            model.shrink_vocabulary(count)
    except ConfigError as error:
        raise CheckpointError(f"{misfit}: {error}") from error
    return model, tokenizer
