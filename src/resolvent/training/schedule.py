"""Learning rate of every step, as a fraction of the peak."""

import math

WSD_DECAY_FRACTION = 0.2


def learning_rate_factor(
    step: int,
    *,
    steps: int,
    warmup: int,
    schedule: str,
    min_ratio: float,
    decay_fraction: float = WSD_DECAY_FRACTION,
) -> float:
    """Return the learning rate of a step divided by the peak.

    Args:
        step: number of the step, from 0 to `steps - 1`.
        steps: number of steps of the whole run.
        warmup: steps of linear warm-up; step `warmup - 1` is the first at the peak.
        schedule: `cosine`, `wsd` (warm-up, stable, decay) or `constant`.
        min_ratio: ratio of the last step (`cosine`, `wsd`).
        decay_fraction: share of the steps, at the end, in which `wsd` decays.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    first = warmup if schedule == "cosine" else decay_start(steps=steps, warmup=warmup, decay_fraction=decay_fraction)
    # 1 at the last step, so that a run ends at min_ratio whatever its length.
    progress = min(1.0, max(0, step - first + 1) / max(1, steps - first))
    if schedule == "cosine":
        height = (1 + math.cos(math.pi * progress)) / 2
    else:
        # 1 - sqrt first falls faster than a line, which gives a lower loss (Hägele et al., 2024).
        height = 1 - math.sqrt(progress)
    return min_ratio + (1 - min_ratio) * height


def decay_start(*, steps: int, warmup: int, decay_fraction: float) -> int:
    """Return the first step of the decay of `wsd`, counted from 0; arguments as of `learning_rate_factor`."""
    return max(warmup, steps - math.ceil(decay_fraction * steps))
