"""Folders of trained models: loading of model and tokenizer, and the files of a run.

The module does not import `resolvent.training`. Heavy imports are inside the functions, so that `resolvent --help` is
quick.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from resolvent.errors import CheckpointError
from resolvent.files import shown
from resolvent.manifest import ADAPTER_WEIGHTS, CONFIG, INDEX, RUN_FILE, WEIGHTS, check_files, lists
from resolvent.terminal import shell_word

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from resolvent.models import IntegratedModel
    from resolvent.models.storage import Dtype

EMA_FOLDER = "ema"
"""Folder in a run folder with the moving average of the weights, as a model."""

_MOST_PADDING = 1024
"""Largest number of padding rows of a model's table beyond the size of its tokenizer."""


def fixed_files() -> tuple[str, ...]:
    """Return the names of the files in the manifest of every run: those that never change.

    Weights carry checksums, and checkpoints have manifests of their own.
    """
    from resolvent.data.tokenization import TOKENIZER_FILES

    return (RUN_FILE, CONFIG, *TOKENIZER_FILES)


def check_run(run_dir: Path) -> None:
    """Compare the files of a run that never change with its manifest; of a LoRA run also the weights that it adapts.

    Raises:
        CheckpointError: names the first file that is missing or changed; or the manifest is unsound.
    """
    check_files(run_dir, [*fixed_files(), *([WEIGHTS] if lists(run_dir, WEIGHTS) else [])])


def run_of(directory: Path) -> Path:
    """Return the run folder of a directory, which is a run folder, a checkpoint or an averaged model in one."""
    if directory.parent.name == "checkpoints":
        return directory.parent.parent
    averaged = directory.name == EMA_FOLDER and (directory.parent / RUN_FILE).exists()
    return directory.parent if averaged else directory


def check_model(directory: Path) -> None:
    """Check, before heavy imports, that a folder holds a model.

    Raises:
        CheckpointError: it holds none.
    """
    if any((directory / name).exists() for name in (WEIGHTS, INDEX, ADAPTER_WEIGHTS)):
        return
    inner = sorted(path.parent for depth in ("*", "checkpoints/*") for path in directory.glob(f"{depth}/{WEIGHTS}"))
    if inner:
        raise CheckpointError(f"{directory} holds no model, but folders in it do: name one, such as {inner[-1]}")
    if (directory / RUN_FILE).exists():
        raise CheckpointError(
            f"{directory} holds no model: its run was stopped before its first checkpoint. Begin it again with: "
            f"resolvent train --resume {shell_word(directory)}"
        )
    if directory.is_file():
        raise CheckpointError(f"{directory} holds no model, it is a file: name the folder of a run")
    missing = f"there is no {WEIGHTS} in it" if directory.exists() else "there is no such folder"
    if directory.is_symlink() and not directory.exists():
        missing = f"it is a link to {shown(os.readlink(directory))}, which does not exist"
    raise CheckpointError(
        f"{directory} holds no model: {missing}. `resolvent train` saves one with every checkpoint and at the end"
    )


def load_trained(
    directory: Path | str, device: str = "auto", *, dtype: "Dtype" = "float32"
) -> "tuple[IntegratedModel, Tokenizer]":
    """Load a model and its tokenizer.

    A padded table (`resize_token_embeddings`) is cut to the size of the tokenizer, so that ids without a token have no
    probability.

    Args:
        directory: a run folder, one of its checkpoints, or an output folder of `resolvent convert`.
        device: `auto`, `cpu` or `cuda`.
        dtype: `float32`, or `stored` for that of the file.

    Raises:
        CheckpointError: there is no model, or it does not fit the tokenizer.
        DataError: there is no tokenizer.
    """
    directory = Path(directory)
    check_model(directory)
    from resolvent.data import load_tokenizer
    from resolvent.device import pick_device
    from resolvent.errors import ConfigError
    from resolvent.models import load_model

    try:
        model = load_model(directory, device=pick_device(device), dtype=dtype)
    except CheckpointError as error:
        if directory.exists():
            raise
        raise CheckpointError(
            f"{directory} was removed while it was read: a run keeps its newest checkpoints only. Read a newer one, or "
            f"{run_of(directory)} itself"
        ) from error
    tokenizer = load_tokenizer(run_of(directory))
    if (run_of(directory) / RUN_FILE).exists():  # a run has a manifest; a folder of another origin has none
        check_run(run_of(directory))
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
