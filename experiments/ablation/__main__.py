"""Command `python -m experiments.ablation DIR`: effect of the mechanisms of Phase 2 on the loss of a model."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from resolvent.cli.console import report_console
from resolvent.cli.evaluate.tables import Joined, load, plus_minus, show, write
from resolvent.cli.help import add_command
from resolvent.cli.loading import BatchTokens, Device, Directory, JsonFile
from resolvent.cli.texts import HeldOut, Text, TextField, TextOptions
from resolvent.errors import ResolventError
from resolvent.seeds import MOST_SEED
from resolvent.terminal import degrade_streams, for_terminal, say

if TYPE_CHECKING:
    from experiments.ablation.measures import (
        ClassDecay,
        HalfLives,
        Mechanisms,
        Modes,
        Occupancy,
        Removed,
        Selection,
        TokenDecay,
    )
    from resolvent.evaluation.statistics import Estimate


class _Part(NamedTuple):
    """Table and a summary of its figures."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    says: str


def ablation(
    directory: Directory,
    data: Text = None,
    text_field: TextField = None,
    held_out: HeldOut = False,
    length: Annotated[int, typer.Option(min=1, help="Tokens to read before the memory is edited.")] = 1024,
    horizon: Annotated[
        int | None, typer.Option(min=1, help="Tokens to predict after that.", show_default="one consolidation interval")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Most texts to read; more texts give smaller errors.")] = 16,
    joined: Joined = False,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the random components and tokens.")] = 0,
    json_path: JsonFile = None,
    batch_tokens: BatchTokens = 4096,
    device: Device = "auto",
) -> None:
    """Measure the effect of decay rates, SNR filter and resonance on the loss.

    Texts are read up to a boundary between two consolidations. There a part of the memory is erased: that of a head,
    old writes of slow or fast heads, components that the SNR filter keeps or drops, modes that resonate or do not.
    [bold]cost[/bold] is the increase of the loss of the next tokens, in nats per token. In the table on classes of
    tokens, Γ is replaced by its mean instead, and the whole text is read again. ± is one standard error over the texts.

    Example: [bold]python -m experiments.ablation runs/tiny --sequences 64 --joined[/bold]
    """
    text = TextOptions(data, text_field, held_out)
    model, tokenizer, stream = load(directory, text, device, json_path)
    from experiments.ablation.measures import evaluate_mechanisms

    options = dict(length=length, horizon=horizon, sequences=sequences, joined=joined, seed=seed)
    found = evaluate_mechanisms(model, stream, tokenizer, batch_tokens=batch_tokens, progress=True, **options)
    try:
        write(found, options | {"horizon": found.horizon}, directory, text, json_path)
    finally:
        _show(found, directory, json_path)


def _show(found: "Mechanisms", directory: Path, json_path: Path | None) -> None:
    console = report_console(json_path)
    say(
        console,
        f"{directory}, {found.sequences:,} texts: {found.length:,} tokens read, the next {found.horizon:,} predicted "
        f"at {plus_minus(found.loss)} nats per token",
    )
    for part in _parts(found):
        say(console, "")
        if isinstance(part, str):
            say(console, part)
        else:
            show(json_path, part.title, part.columns, part.rows)
            say(console, part.says)


def _parts(found: "Mechanisms") -> "Iterator[_Part | str]":
    """Yield the tables, and lines instead of tables for which the model lacks the mechanism."""
    yield _heads(found)
    yield _half_lives(found.half_lives) if found.half_lives else "The model has a single head: none is slow or fast."
    decays = found.token_decay
    yield _classes(decays) if decays else "Γ is the same for all tokens (adaptive_decay=False)."
    yield _selection(found.selection) if found.selection else "The model has no SNR filter (snr_enabled=False)."
    yield _occupancy(found.occupancy) if found.occupancy else "The model has no resonance (resonance_enabled=False)."


def _heads(found: "Mechanisms") -> _Part:
    rows = [
        (f"{head.layer}", f"{head.head}", f"{head.decay:.4f}", f"{head.half_life:,.1f}", _signed(head.cost))
        for head in found.heads
    ]
    most = max(found.heads, key=lambda head: head.cost.mean)
    return _Part(
        "Erasing the memory of a head",
        ("layer", "head", "Γ dt", "half-life (tokens)", "cost"),
        rows,
        f"Erasing all memories costs {_signed(found.erased)} nats per token. Of single heads, head {most.head} of "
        f"layer {most.layer} costs most, {_signed(most.cost)}. Half-life and cost have a rank correlation of "
        f"{found.correlation:+.2f}.",
    )


def _half_lives(found: "HalfLives") -> _Part:
    columns = (
        [row.slow for row in found.rows],
        [row.fast for row in found.rows],
        [row.difference for row in found.rows],
    )
    kept = [row.kept for row in found.rows]
    slow, fast, difference = (_reach(kept, costs) for costs in columns)
    return _Part(
        f"Erasing all but the last tokens of the slow heads (half-life {found.slow_from:,.1f} tokens and more) and of "
        f"the fast ones ({found.fast_to:,.1f} and less)",
        ("tokens kept", "cost of slow", "cost of fast", "slow - fast"),
        [(f"{n:,}", *map(_signed, costs)) for n, *costs in zip(kept, *columns, strict=True)],
        f"Above zero by two standard errors: the slow heads' cost {slow}, the fast heads' {fast}, slow - fast "
        f"{difference}.",
    )


def _reach(kept: Sequence[int], costs: "Sequence[Estimate]") -> str:
    """Describe the numbers of kept tokens at which a cost differs from zero, also after rounding in the table."""
    felt = [n for n, cost in zip(kept, costs, strict=True) if cost.mean >= 5e-5 and _is_clear(cost)]
    return f"with {', '.join(f'{n:,}' for n in felt)} tokens kept" if felt else "never"


def _classes(found: "TokenDecay") -> _Part:
    from statistics import fmean  # whose own imports take milliseconds

    means = {row.name: fmean(_flat(row.relative)) for row in found.rows}
    highest, lowest = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    clear = [row for row in found.rows if _is_clear(row.difference)]
    more, less = (
        [f"{row.name} ({_signed(row.difference)})" for row in clear if sign * row.difference.mean > 0]
        for sign in (1, -1)
    )
    return _Part(
        "Replacing Γ by its mean over all tokens, head by head, in Hamiltonian and memory",
        ("tokens", "count", "Γ / mean", "of heads", "cost", "at random tokens", "difference"),
        [_class_row(row, means[row.name]) for row in found.rows],
        f"Γ is highest at {highest} ({means[highest]:.2f} of the mean) and lowest at {lowest} ({means[lowest]:.2f}). "
        f"Replacing it everywhere costs {_signed(found.everywhere)} nats per token. By two standard errors, that costs "
        f"more than at as many random tokens: {', '.join(more) or 'nowhere'}; less: {', '.join(less) or 'nowhere'}.",
    )


def _class_row(row: "ClassDecay", mean: float) -> tuple[str, ...]:
    ratios = _flat(row.relative)
    spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
    return (row.name, f"{row.tokens:,}", f"{mean:.2f}", spread, *map(_signed, (row.cost, row.random, row.difference)))


def _selection(found: "Selection") -> _Part:
    kept, dropped, *_, as_many = found.rows
    strengths = _flat(found.strength)
    return _Part(
        "Erasing the components that the SNR filter keeps (p > 1/2) and those that it drops",
        ("components", "share", "energy", "cost", "cost / energy"),
        [_removed_row(row) for row in found.rows],
        f"Erasing what the filter keeps costs {_signed(kept.cost)} nats per token, what it drops "
        f"{_signed(dropped.cost)}; that is {_signed(found.kept_over_random)} and {_signed(found.dropped_over_random)} "
        "more than random components with as much energy. As many random ones as it keeps cost "
        f"{_signed(as_many.cost)}. The filter acts with a strength of {min(strengths):.3f} to {max(strengths):.3f}; to "
        f"read without it costs {_signed(found.off)}.",
    )


def _occupancy(found: "Occupancy") -> _Part:
    above, below = found.gated
    return _Part(
        "Erasing modes by their energy",
        ("modes", "share", "energy", "gate", "cost", "cost / energy"),
        [_modes_row(row) for row in (*found.gated, *found.groups)],
        f"Erasing the modes whose gate is above 1/2, {above.share:.1%} of all, costs {_signed(above.cost)} nats per "
        f"token, the others {_signed(below.cost)}. Energy and cost of the groups have a rank correlation of "
        f"{found.correlation:+.2f}, within single texts of {_signed(found.correlation_by_text)}. To read without the "
        f"resonance costs {_signed(found.off)}.",
    )


def _removed_row(row: "Removed") -> tuple[str, ...]:
    per_energy = row.cost_per_energy
    worth = "" if per_energy is None else f"{per_energy:+.4f}"
    return row.name, f"{row.share:.1%}", f"{row.energy:.1%}", _signed(row.cost), worth


def _modes_row(row: "Modes") -> tuple[str, ...]:
    name, share, energy, cost, worth = _removed_row(row)
    return name, share, energy, "" if row.gate is None else f"{row.gate:.3f}", cost, worth


def _flat(by_head: list[list[float]]) -> list[float]:
    return [value for heads in by_head for value in heads]


def _signed(estimate: "Estimate") -> str:
    return plus_minus(estimate, signed=True)


def _is_clear(estimate: "Estimate") -> bool:
    """Return True if an estimate is two standard errors away from zero."""
    return estimate.standard_error is not None and abs(estimate.mean) > 2 * estimate.standard_error


app = typer.Typer(add_completion=False, rich_markup_mode="rich")
add_command(app, ablation)


def main() -> None:
    """Run the command. An error that the library names is one line on stderr, with exit code 1."""
    degrade_streams(sys.stdout, sys.stderr)
    try:
        app(prog_name="python -m experiments.ablation")
    except (ResolventError, OSError) as error:
        sys.exit(for_terminal(f"Error: {error}", sys.stderr))


if __name__ == "__main__":
    main()
