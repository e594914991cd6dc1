"""`resolvent presets`."""


def presets() -> None:
    """List the models that --preset knows.

    Parameters are counted with the vocabulary shown; `resolvent train` gives a model its tokenizer's.

    Example: [bold]resolvent presets[/bold]
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from resolvent.models.phase2 import Phase2IntegratedModel, get_phase2_preset
    from resolvent.models.phase2.config import PRESETS

    table = Table(box=None, pad_edge=False)
    table.add_column("preset", no_wrap=True)
    for heading in ("parameters", "vocabulary", "d_model", "layers", "heads", "n_seq", "target VRAM"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in PRESETS:
        config = get_phase2_preset(name)
        with torch.device("meta"):  # sizes without the memory
            parameters = Phase2IntegratedModel(config, init=False).num_parameters()
        sizes = (parameters, config.vocab_size, config.d_model, config.n_layers, config.num_heads, config.n_seq)
        table.add_row(name, *(f"{size:,}" for size in sizes), f"{config.target_vram_gb:g} GB")
    Console().print(table)
