"""`resolvent presets`."""

from typing import Annotated

import typer


def presets(
    phase: Annotated[int, typer.Option(min=1, max=2, help="Phase whose presets to list.")] = 2,
) -> None:
    """List the models that --preset knows.

    Parameters are counted with the vocabulary shown; `resolvent train` gives a model its tokenizer's.

    Example: [bold]resolvent presets[/bold]
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from resolvent.models.phases import PHASES

    table = Table(box=None, pad_edge=False)
    table.add_column("preset", no_wrap=True)
    for heading in ("parameters", "vocabulary", "d_model", "layers", "heads", "n_seq", "target VRAM"):
        table.add_column(heading, justify="right", no_wrap=True)
    _, model, _, preset, names = PHASES[phase]
    for name in names:
        config = preset(name)
        with torch.device("meta"):  # sizes without the memory
            parameters = model(config, init=False).num_parameters()
        sizes = (parameters, config.vocab_size, config.d_model, config.n_layers, config.num_heads, config.n_seq)
        table.add_row(name, *(f"{size:,}" for size in sizes), f"{config.target_vram_gb:g} GB")
    Console().print(table)
