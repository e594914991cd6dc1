"""A group of commands of which one is meant where none is named."""

from typing import Any

from typer.core import TyperGroup

DEFAULT = "language"


class Measures(TyperGroup):
    """`resolvent evaluate DIR ...` is `resolvent evaluate language DIR ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)
