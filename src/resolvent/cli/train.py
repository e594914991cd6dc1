"""`resolvent train`, whose options are the fields of `TrainingConfig`."""

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resolvent.cli.console import progress_console, report_console, show_table, write_result
from resolvent.cli.loading import JsonFile, PlotFile, wrong_usage
from resolvent.cli.settings import Changes, ConfigFile, changes_of, is_given, refuse, with_settings
from resolvent.runs import check_model
from resolvent.terminal import discard_output, say, shell_word
from resolvent.training.config import RUN, SAVED_WITH_A_MODEL, TrainingConfig, changed_preset, check_paths

if TYPE_CHECKING:
    from rich.console import Console

    from resolvent.training import TrainingResult

_MOVABLE = ("data", "validation_data")
"""Settings of a run that may be given again when it resumes: the paths of its text."""
_RESUMABLE = ("device", "tracker", "steps", "cache", *_MOVABLE)
"""Settings that may be given beside --resume."""

LOOK_FIRST = "Look before you train"


@with_settings
def train(
    context: typer.Context,
    config_file: ConfigFile = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Resume the run in DIR.", rich_help_panel=RUN)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in the run folder.", rich_help_panel=RUN)
    ] = False,
    dump_config: Annotated[
        bool, typer.Option("--dump-config", help="Print the run as a YAML file.", rich_help_panel=LOOK_FIRST)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print sizes, memory and expected time, and stop.", rich_help_panel=LOOK_FIRST),
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option(
            "--tokens-per-second",
            min=1,
            help="Speed that --dry-run expects.",
            show_default="measured in a few steps",
            rich_help_panel=LOOK_FIRST,
        ),
    ] = None,
    lr_find: Annotated[
        bool,
        typer.Option("--lr-find", help="Try learning rates, print their losses, and stop.", rich_help_panel=LOOK_FIRST),
    ] = False,
    change: Changes = None,
    json_path: JsonFile = None,
    plot_path: PlotFile = None,
    **settings: Any,
) -> None:
    """Train a model on text.

    Ctrl-C saves a checkpoint, and --resume continues from it exactly. Beside --resume, --data names the new path of a
    text that was moved, and --steps changes the number of steps.

    Example: [bold]resolvent train --data novel.txt --tokenizer bpe --vocab-size 2048 --out runs/novel[/bold]

    Example: [bold]resolvent train --preset base --dump-config > run.yaml; resolvent train --config run.yaml[/bold]
    """
    looks = {"--dump-config": dump_config, "--dry-run": dry_run, "--lr-find": lr_find}
    _check_looks(context, [name for name, wanted in looks.items() if wanted])
    settings |= {name: paths[0] for name in _MOVABLE if (paths := settings[name]) is not None and len(paths) == 1}
    if resume is not None:
        settled = [name for name in settings if name not in _RESUMABLE]
        refuse(context, [*settled, "config_file", "change", "overwrite"], "--resume", "the run keeps its settings")
    config, changes = _described(context, settings, change)
    if not dump_config:
        _check_places(config, resume, overwrite, looks=dry_run or lr_find)
    _choose_model(config, changes)
    given = {name: settings[name] for name in _RESUMABLE if is_given(context, name)}
    if dump_config:
        _print_config(config, resume, given)
        return
    from resolvent.training import leaving_processes

    with leaving_processes():
        if dry_run:
            _plan(config, rate, json_path)
        elif lr_find:
            _find_rate(config, json_path, plot_path)
        else:
            _train(config, resume, given, overwrite, json_path, plot_path)


def _check_looks(context: typer.Context, looks: list[str]) -> None:
    """Refuse options that have no effect beside the others."""
    if len(looks) > 1:
        raise typer.BadParameter(f"give one of {', '.join(looks)}", param_hint=looks[-1])
    if looks != ["--dry-run"]:
        refuse(context, ["rate"], "--tokens-per-second", "only --dry-run expects a speed")
    if looks:
        unused = {"--dump-config": ["json_path", "plot_path"], "--dry-run": ["resume", "plot_path"]}
        refuse(context, ["overwrite", *unused.get(looks[0], ["resume"])], looks[0], "it trains nothing")


def _described(
    context: typer.Context, settings: dict[str, Any], change: list[str] | None
) -> tuple[TrainingConfig, dict[str, Any]]:
    """Return the run that file and command line describe, and the fields of the model that they change."""
    config, changes = TrainingConfig(**settings), changes_of(context, change)
    if config.start_from is not None:
        settled = [*SAVED_WITH_A_MODEL, "change"]
        refuse(context, settled, "--from", "the model brings its sizes and its tokenizer along")
    if config.tokenizer != "bpe":
        refuse(context, ["vocab_size"], "--tokenizer", f"{config.tokenizer} has tokens of its own")
    with wrong_usage():
        config.validate()
    return config, changes


def _choose_model(config: TrainingConfig, changes: dict[str, Any]) -> None:
    """Check the preset, and replace it by its model if fields change."""
    if config.start_from is None:
        with wrong_usage():
            chosen = changed_preset(config.phase, str(config.preset), changes)
        if changes:
            config.model, config.preset = chosen, None


def _check_places(config: TrainingConfig, resume: Path | None, overwrite: bool, *, looks: bool) -> None:
    """Check, before heavy imports, the folders and the texts that the command names."""
    from resolvent.training.run_folder import check_new, check_run_folder

    if resume is not None:
        check_run_folder(resume)
    elif not looks:
        check_new(config.run_dir, overwrite=overwrite)
    if config.start_from is not None:
        check_model(Path(config.start_from))
    for _, paths in config.named_texts():
        check_paths(paths)


def _print_config(config: TrainingConfig, resume: Path | None, given: dict[str, Any]) -> None:
    from resolvent.training.config_file import dump_config

    if resume is not None:
        from resolvent.training.run_folder import read_run

        config = dataclasses.replace(read_run(resume)[0], out=str(resume), **given)
        config.validate()
    print(dump_config(config), end="")


def _plan(config: TrainingConfig, tokens_per_second: float | None, json_path: Path | None) -> None:
    from resolvent.training.planning import plan_run

    planned = plan_run(config, tokens_per_second=tokens_per_second, console=progress_console(json_path))
    if _prints():
        write_result(json_path, planned.to_dict())
        say(report_console(json_path), str(planned))


def _find_rate(config: TrainingConfig, json_path: Path | None, plot_path: Path | None) -> None:
    from resolvent.training.lr_find import find_learning_rate

    test = find_learning_rate(config, console=progress_console(json_path))
    if not _prints():
        return
    write_result(json_path, dataclasses.asdict(test))
    if plot_path is not None:
        test.plot(plot_path)
    console = report_console(json_path)
    show_table(console, ("learning rate", "loss"), [(f"{lr:.1e}", f"{loss:.4f}") for lr, loss in test.table()])
    say(console, test.advice)


def _train(
    config: TrainingConfig,
    resume: Path | None,
    given: dict[str, Any],
    overwrite: bool,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Begin a run or go on with it, and say in the end what came of it."""
    from resolvent import training
    from resolvent.training.run_folder import has_begun

    console = _console(json_path)
    run_dir = resume or config.run_dir
    try:
        with training.terminable():
            if resume is not None:
                result = training.resume(resume, console=console, **given)
            else:
                result = training.train(config, overwrite=overwrite, console=console)
    except (training.TrainingInterrupted, KeyboardInterrupt) as stop:
        number = getattr(stop, "signal_number", signal.SIGINT)
        go_on = f" Go on with: resolvent train --resume {shell_word(run_dir)}" if has_begun(run_dir) else ""
        try:
            say(console, f"Stopped.{go_on}")
            sys.stdout.flush()
        except OSError:  # the terminal was closed
            discard_output()
        raise typer.Exit(128 + number) from None
    if _prints():
        write_result(json_path, _summary(result))
        if plot_path is not None:
            result.plot(plot_path)
        say(console, _next_command(result.run_dir))


def _next_command(run_dir: Path) -> str:
    from resolvent.training.run_folder import read_run

    if read_run(run_dir)[0].format == "chat":
        return f"Talk to it: resolvent chat {shell_word(run_dir)}"
    return f"Generate text: resolvent generate {shell_word(run_dir)} --prompt 'The' --stream"


def _prints() -> bool:
    """Return True in one of the processes that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def _console(json_path: Path | None) -> "Console":
    """Return the console for progress. If its reader closes, the run saves a checkpoint and stops, as after SIGTERM."""
    console = progress_console(json_path)

    def stop() -> None:
        console.quiet = True
        discard_output()
        signal.raise_signal(signal.SIGTERM)

    console.on_broken_pipe = stop
    return console


def _summary(result: "TrainingResult") -> dict[str, Any]:
    """Return the figures of a finished run."""
    return {
        "run_dir": str(result.run_dir),
        "parameters": result.model.num_parameters(),
        "validation": dataclasses.asdict(result.validation),
        "ema_validation": None if result.ema_validation is None else dataclasses.asdict(result.ema_validation),
    }
