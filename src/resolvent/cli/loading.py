"""Parameters that several commands have in common."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Run folder, or a checkpoint in it.", show_default=False)
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: cuda where there is one.")]
