"""Main results of an inspection, as sentences that stand first on the page."""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from resolvent.inspection.values import Curves, Finding, Inspection
from resolvent.wording import counted

_REACH = 0.9
"""Share of the influence that lies within the reach."""
_ACTIVE = 0.05
"""Strength from which on an SNR filter counts as active; it starts at 0.0025."""
_DAMPED = 0.5
"""Gate below which a mode counts as damped."""
_PASSED = 0.95
"""Gate above which a resonance counts as inactive."""
_WORSE = 1.01
"""Factor by which the last validation is above the best one where a run is said to overfit."""


def find(inspection: Inspection) -> list[Finding]:
    """Return the main results of an inspection."""
    rules = (_loss, _reach, _learning, _slowest_head, _attention, _snr_filter, _resonance)
    return list(itertools.chain.from_iterable(rule(inspection) for rule in rules))


def reach(influence: list[float]) -> int:
    """Return the number of last tokens that hold 90 % of the influence on the last prediction; 0 without any."""
    backwards = np.cumsum(influence[::-1])
    return int(np.searchsorted(backwards, _REACH * backwards[-1]) + 1) if backwards[-1] > 0 else 0


def _loss(found: Inspection) -> Iterator[Finding]:
    size = len("".join(found.tokens[1:]).encode())
    if size:
        bits = sum(found.nats) / math.log(2) / size
        yield Finding(f"Predicts this text at {bits:.2f} bits per byte.", "surprise")


def _reach(found: Inspection) -> Iterator[Finding]:
    if count := reach(found.influence):
        share = "90\N{NO-BREAK SPACE}% of the influence on the last prediction"
        yield Finding(f"Looks back about {_tokens(count)}: they hold {share}.", "influence")


def _learning(found: Inspection) -> Iterator[Finding]:
    curves = found.curves
    if curves is not None and curves.step:
        yield Finding(_learned(curves), "learning")


def _learned(curves: Curves) -> str:
    if not (held_out := curves.validation_bits_per_byte):
        return f"Training ended at {curves.bits_per_byte[-1]:.2f} bits per byte."
    best = min(range(len(held_out)), key=held_out.__getitem__)
    if held_out[-1] > _WORSE * held_out[best]:
        return (
            f"Overfits: held-out text was best at step {curves.validation_step[best]:,.0f} "
            f"({held_out[best]:.2f} bits per byte) and ended at {held_out[-1]:.2f}."
        )
    return f"Training ended at {curves.bits_per_byte[-1]:.2f} bits per byte, held-out text at {held_out[-1]:.2f}."


def _slowest_head(found: Inspection) -> Iterator[Finding]:
    heads = [
        (math.log(2) / (float(np.median(gamma)) * found.dt), head, number)
        for number, layer in enumerate(found.layers, 1)
        if layer.gamma is not None and layer.memory is not None
        for head, gamma in enumerate(layer.gamma, 1)
    ]
    if heads:
        half_life, head, layer = max(heads)
        middle = float(np.median([half for half, *_ in heads]))
        text = (
            f"Head {head} of layer {layer} keeps longest: it forgets half in {_tokens(half_life)}, "
            f"the median head in {_tokens(middle)}."
        )
        yield Finding(text, "decay")


def _attention(found: Inspection) -> Iterator[Finding]:
    heads = [
        (float(np.mean(row)), head, number)
        for number, layer in enumerate(found.layers, 1)
        if layer.attention is not None
        for head, row in enumerate(layer.attention.distance, 1)
    ]
    if heads:
        far, head, layer = max(heads)
        text = f"Head {head} of layer {layer} attends farthest: {_tokens(far)} back on average."
        yield Finding(text, "looks")


def _snr_filter(found: Inspection) -> Iterator[Finding]:
    memories = [(number, layer.memory) for number, layer in enumerate(found.layers, 1)]
    heads = [
        (strength, head, number)
        for number, memory in memories
        if memory is not None and memory.strength is not None
        for head, strength in enumerate(memory.strength, 1)
    ]
    if not heads:
        return
    most, head, layer = max(heads)
    active = sum(strength >= _ACTIVE for strength, *_ in heads)
    if active:
        text = f"The SNR filter is active in {active} of {len(heads)} heads, most in head {head} of layer {layer}."
    else:
        text = f"The SNR filter is inactive: its largest strength is {most:.2g} of 1."
    yield Finding(text, "snr")


def _resonance(found: Inspection) -> Iterator[Finding]:
    memories = [layer.memory for layer in found.layers if layer.memory is not None]
    gates = [gate for memory in memories if memory.modes is not None for row in memory.modes.gate for gate in row]
    if not gates:
        return
    damped = sum(gate < _DAMPED for gate in gates)
    if min(gates) > _PASSED:
        text = (
            f"The resonance is inactive: every mode keeps at least {math.floor(100 * min(gates))}\N{NO-BREAK SPACE}%."
        )
    else:
        text = f"The resonance damps {damped} of {len(gates)} modes by more than half."
    yield Finding(text, "resonance")


def _tokens(count: float) -> str:
    return f"{count:.1f} tokens" if count < 9.95 and count != round(count) else counted(round(count), "token")
