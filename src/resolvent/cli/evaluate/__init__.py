"""`resolvent evaluate`: a group of commands of which one is meant where none is named."""

from typing import Any

import typer
from typer.core import TyperGroup

DEFAULT = "language"


class Measures(TyperGroup):
    """`resolvent evaluate DIR ...` is `resolvent evaluate language DIR ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            if len(args) > 1 and not any(word.startswith("-") for word in args[:2]):  # no measure takes two folders
                known = ", ".join(self.commands)
                raise typer.BadParameter(f"{args[0]!r} is none of {known}", ctx, param_hint="measure")
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)
