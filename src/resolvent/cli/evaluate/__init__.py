"""`resolvent evaluate [MEASURE] DIR`: a group of commands, of which `language` is the default."""

from typing import Any

import typer

from resolvent.cli.evaluate import influence, language, needle, positions
from resolvent.cli.help import Group, add_command, flowing

DEFAULT = "language"


class Measures(Group):
    """Group in which `resolvent evaluate DIR ...` is `resolvent evaluate language DIR ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            two_folders = len(args) > 1 and not any(word.startswith("-") for word in args[:2])  # no measure takes two
            if two_folders and not ctx.resilient_parsing:
                known = ", ".join(self.commands)
                raise typer.BadParameter(f"{args[0]!r} is none of {known}", ctx, param_hint="measure")
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


def evaluate() -> None:
    """Measure a trained model.

    The default measure is [bold]language[/bold], the loss on text. The other three go far beyond the training length,
    by default to 65,536 tokens. All print a table and write its figures with --json FILE; the other three draw them
    with --plot FILE. Each explains its figures and options with --help: resolvent evaluate language --help lists those
    of the default measure.

    Example: [bold]resolvent evaluate runs/tiny --data novel.txt[/bold]

    Example: [bold]resolvent evaluate positions runs/tiny --data novel.txt --plot positions.png[/bold]
    """


measures = typer.Typer(cls=Measures, no_args_is_help=True, rich_markup_mode="rich", subcommand_metavar="[MEASURE] DIR")
measures.callback(help=flowing(evaluate))(evaluate)
for measure in (language.language, positions.positions, needle.needle, influence.influence):
    add_command(measures, measure)
