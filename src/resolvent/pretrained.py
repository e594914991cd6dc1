"""Folders of pretrained Transformers made models of this library, and back: weights, tokenizer and card."""

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .errors import CheckpointError, ConfigError, DataError
from .files import atomic_directory, write_json
from .manifest import CONFIG, WEIGHTS, write_manifest
from .models import load_model, save_model
from .models.card import write_card
from .models.phase2 import (
    ConversionReport,
    Phase2Config,
    Phase2IntegratedModel,
    convert_transformer,
    save_transformer,
    transformer_config,
)
from .models.phase2.transformer import match_readouts
from .models.phase2.transformer_source import Source
from .runs import run_of
from .wording import counted

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

_SCORED_TOKENS = 2048
"""Tokens on which a conversion that is not exact is measured, or four windows; half as many before them fit it."""
_FEWEST_TOKENS = 96
"""Fewest tokens of such a text."""


@dataclass(frozen=True)
class Sample:
    """Text on which a conversion that is not exact is fitted and measured.

    Attributes:
        name: its name.
        documents: its documents.
        window: most tokens that attention reads; None for those of the Transformer.
    """

    name: str
    documents: Sequence[str]
    window: int | None

    @property
    def tokens(self) -> int:
        """Number of tokens to fit and to measure on."""
        return 3 * max(_SCORED_TOKENS // 2, 2 * (self.window or 0))


@dataclass(frozen=True)
class Losses:
    """Losses of a conversion that is not exact, in nats per token.

    Attributes:
        text: name of the text.
        tokens: number of tokens predicted.
        before: loss of the Transformer.
        after: loss of the converted model.
    """

    text: str
    tokens: int
    before: float
    after: float


@dataclass(frozen=True)
class Converted:
    """Report of the conversion of a Transformer.

    Attributes:
        report: report of the tensors.
        memories: number of layers that became memories.
        loss: losses where the conversion is not exact.
    """

    report: ConversionReport
    memories: int
    loss: Losses | None

    def to_dict(self) -> dict[str, object]:
        """Return plain values, for JSON."""
        return self.report.to_dict() | {"loss": None if self.loss is None else dataclasses.asdict(self.loss)}


def check_tokenizer(source: Path) -> None:
    """Check, before anything is computed, that a folder holds a tokenizer.

    Raises:
        DataError: it holds none.
    """
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


def convert_pretrained(
    transformer: Source, config: Phase2Config, origin: Path, out: Path, *, sample: Sample | None = None, seed: int = 0
) -> Converted:
    """Write the Phase 2 model of a Transformer and its tokenizer into a folder, which appears whole or not at all.

    Args:
        transformer: the Transformer, opened.
        config: configuration of the model, as `transformer_config` returns it.
        origin: folder or GGUF file of the Transformer.
        out: the folder.
        sample: text on which a conversion that is not exact is fitted and measured; None for an exact one.
        seed: seed of the new weights.

    Raises:
        CheckpointError, ConfigError: as of `convert_transformer`.
        DataError: the tokenizer cannot be read, or the text is too short.
    """
    torch.manual_seed(seed)
    model, loss = convert_transformer(transformer, config), None
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(out) as folder:
        names = save_pretrained_tokenizer(origin, folder, model.vocab_size)
        if sample is not None:
            ids = _first_tokens(folder, sample.documents, sample.tokens)
            loss = _fit_and_measure(model, transformer, ids, sample.name)
        save_model(model, folder)
        _write_card(folder, model, origin, out.name, loss)
        write_manifest(folder, [CONFIG, WEIGHTS, *names])
    report = model.conversion_report
    assert report is not None
    return Converted(report, config.n_layers - len(config.windows), loss)


def _write_card(folder: Path, model: Phase2IntegratedModel, source: Path, name: str, loss: Losses | None) -> None:
    """Write the model card of a converted Transformer."""
    assert model.conversion_report is not None
    made = [f"Converted from the Transformer `{source.name}`: {model.conversion_report.summary()}."]
    if model.conversion_report.exact:
        made.append("The conversion is exact: the logits are those of the Transformer.")
    if loss is not None:
        made.append(
            f"The conversion is not exact: {loss.before:.4f} nats per token before and {loss.after:.4f} after, on "
            f"{counted(loss.tokens, 'token')} of {Path(loss.text).name}."
        )
    licence = (
        f"That of the Transformer `{source.name}`: add it as `license:` to the head of this page before you publish it."
    )
    write_card(folder, model, made, name=name, licence=licence)


def _first_tokens(folder: Path, documents: Sequence[str], count: int) -> Tensor:
    """Return the first tokens of a text, (1, N), as the tokenizer in a folder encodes them.

    Raises:
        DataError: the text has too few.
    """
    tokenizer, ids = Tokenizer.from_file(str(folder / _TOKENIZER)), list[int]()
    for document in documents:
        ids += tokenizer.encode(document, add_special_tokens=False).ids
        if len(ids) >= count:
            break
    if len(ids) < _FEWEST_TOKENS:
        raise DataError(
            f"the text has {counted(len(ids), 'token')}, too few to measure a conversion: --text needs {_FEWEST_TOKENS}"
        )
    return torch.tensor([ids[:count]])


def _fit_and_measure(model: Phase2IntegratedModel, source: Source, input_ids: Tensor, text: str) -> Losses:
    """Fit the memories of a model on the first third of a text, and measure its loss on the rest."""
    exact = convert_transformer(source, transformer_config(source, bk_core=False))
    first, rest = input_ids.tensor_split([input_ids.shape[1] // 3], dim=1)
    match_readouts(model, exact, first)
    with torch.inference_mode():
        before, after = (float(x(rest[:, :-1], labels=rest[:, 1:])) for x in (exact, model))
    return Losses(text, rest.shape[1] - 1, before, after)


def write_transformer(directory: Path, out: Path) -> str:
    """Write a model as a Transformer of the Llama family, with its tokenizer, into a folder.

    Returns:
        The `model_type` of the Transformer.

    Raises:
        CheckpointError: the folder holds no Phase 2 model.
        ConfigError: the model has a part that these Transformers lack.
    """
    model, run = load_model(directory, "cpu", dtype="stored"), run_of(directory)
    if not isinstance(model, Phase2IntegratedModel):
        raise CheckpointError(f"{run} holds no Phase 2 model: convert it to one first")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(out) as folder:
        for name in _FILES:
            if (run / name).exists():
                shutil.copyfile(run / name, folder / name)
        return save_transformer(model, folder)
