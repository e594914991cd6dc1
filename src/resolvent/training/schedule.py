"""Learning rate of every step, as a fraction of the peak."""

import math

WSD_DECAY_PART = 0.2  # in the last fifth of a warm-up-stable-decay run, the learning rate falls


def learning_rate_factor(step: int, *, steps: int, warmup: int, schedule: str, min_ratio: float) -> float:
    """Return the learning rate of a step divided by the peak.

    Args:
        step: number of the step, from 0 to `steps - 1`.
        steps: number of steps of the whole run.
        warmup: steps of linear warm-up; step `warmup - 1` is the first at the peak.
        schedule: `cosine`, `wsd` or `constant`.
        min_ratio: ratio of the last step (`cosine`, `wsd`).
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    decay_start = warmup if schedule == "cosine" else max(warmup, steps - math.ceil(WSD_DECAY_PART * steps))
    # 1 at the last step, so that a run ends at min_ratio whatever its length.
    progress = min(1.0, max(0, step - decay_start + 1) / max(1, steps - decay_start))
    if schedule == "cosine":
        height = (1 + math.cos(math.pi * progress)) / 2
    else:
        # 1 - sqrt first falls faster than a line, which gives a lower loss (Hägele et al., 2024).
        height = 1 - math.sqrt(progress)
    return min_ratio + (1 - min_ratio) * height
