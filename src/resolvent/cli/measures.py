"""A group of commands of which one is meant where none is named."""

from typing import TYPE_CHECKING

from typer.core import TyperGroup

if TYPE_CHECKING:
    from typer import Context

DEFAULT = "language"


class Measures(TyperGroup):
    """`resolvent evaluate DIR ...` is `resolvent evaluate language DIR ...`."""

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)
