"""`resolvent presets`."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from resolvent.cli.console import report_console, show_table, write_result
from resolvent.cli.loading import JsonFile


def presets(
    phase: Annotated[int, typer.Option(min=1, max=2, help="Phase whose presets to list.")] = 2,
    fields: Annotated[
        bool, typer.Option("--fields", help="List the fields that --set changes, with their defaults, instead.")
    ] = False,
    json_path: JsonFile = None,
) -> None:
    """List the presets.

    Parameters are counted with the vocabulary shown; `resolvent train` uses that of the tokenizer. Non-embedding
    parameters are all but token embedding and head. Hybrids attend in every third block to the last n_seq / 2 tokens;
    VRAM is that of the GPU they are meant for.

    Example: [bold]resolvent presets[/bold]

    Example: [bold]resolvent presets --fields[/bold]
    """
    if fields:
        _show_fields(phase, json_path)
        return
    import torch

    from resolvent.models.phases import PHASES

    _, model, _, preset, names = PHASES[phase]
    columns = (
        "preset",
        "parameters",
        "non-embedding",
        "vocab",
        "d_model",
        "layers",
        "heads",
        "n_seq",
        "VRAM (GB)",
    )
    configs, rows = {}, []
    for name in names:
        config = preset(name)
        with torch.device("meta"):  # sizes without the memory
            built = model(config, init=False)
        parameters = built.num_parameters()
        outer = {*built.token_embedding.parameters(), *built.lm_head.parameters()}
        inner = parameters - sum(weight.numel() for weight in outer)
        configs[name] = {"parameters": parameters, "non_embedding_parameters": inner, "config": config.to_dict()}
        sizes = (config.vocab_size, config.d_model, config.n_layers, config.num_heads, config.n_seq)
        millions = (f"{count / 1e6:,.1f}M" for count in (parameters, inner))
        rows.append((name, *millions, *(f"{size:,}" for size in sizes), f"{config.target_vram_gb:g}"))
    write_result(json_path, {"phase": phase, "presets": configs})
    show_table(report_console(json_path), columns, rows, text=columns[:1])


def _show_fields(phase: int, json_path: Path | None) -> None:
    """Print the fields of a configuration, their defaults and descriptions."""
    from resolvent.models.config import field_descriptions
    from resolvent.models.phases import PHASES

    config = PHASES[phase].config
    defaults, texts = config().to_dict(), field_descriptions(config)
    write_result(json_path, {name: {"default": defaults[name], "description": text} for name, text in texts.items()})
    columns = ("field", "default", "description")
    rows = [(name, json.dumps(defaults[name]), _in_json(text)) for name, text in texts.items()]
    show_table(report_console(json_path), columns, rows, text=("field", "description"))


def _in_json(text: str) -> str:
    """Return a description with values as --set and YAML files write them."""
    words = {"None": "null", "True": "true", "False": "false"}
    return re.sub(r"\b(None|True|False)\b", lambda found: words[found[0]], text).replace("``", "")
