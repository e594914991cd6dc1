"""Means with standard errors, over buckets that double."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from resolvent.errors import ConfigError, ResolventError


@dataclass(frozen=True)
class Estimate:
    """A mean over independent samples.

    Attributes:
        mean: the mean.
        standard_error: of the mean; None for a single sample.
    """

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, sums: Sequence[float], counts: Sequence[int] | None = None) -> Estimate:
        """Estimate from the sum and the count of every sample; without counts, from single values.

        The error is that of a ratio of sums: samples may differ in their counts, and the values within a sample need
        not be independent.

        Raises:
            ResolventError: a value is not finite.
        """
        totals = np.asarray(sums, np.float64)
        sizes = np.ones(len(totals)) if counts is None else np.asarray(counts, np.float64)
        mean = float(totals.sum() / sizes.sum())
        if not math.isfinite(mean):
            raise ResolventError(f"the measurement came to {mean}: the model's weights or outputs are not finite")
        if len(totals) == 1:
            return cls(mean, None)
        correction = len(totals) / (len(totals) - 1)
        spread = math.sqrt(correction * float(np.square(totals - mean * sizes).sum()))
        return cls(mean, spread / float(sizes.sum()))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 0 if one of the two is constant."""
    ranks = np.stack([_ranks(np.asarray(values, np.float64)) for values in (x, y)])
    if (ranks == ranks[:, :1]).all(axis=1).any():
        return 0.0
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from one on; equal values have their mean rank."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[index]


class Bucket(NamedTuple):
    """Bucket of whole numbers from `first` to `last`."""

    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first + 1

    def __str__(self) -> str:
        return f"{self.first:,}" if self.size == 1 else f"{self.first:,} - {self.last:,}"


def doubling_buckets(last: int) -> list[Bucket]:
    """Return the buckets 1, 2, 3 to 4, 5 to 8 and so on; the last one ends with `last`."""
    ends = doubling(1, last)
    return [Bucket(1, 1), *(Bucket(before + 1, end) for before, end in itertools.pairwise(ends))]


def doubling(first: int, last: int) -> list[int]:
    """Return `first`, twice `first` and so on, up to `last`.

    Raises:
        ConfigError: the first is below one or above the last.
    """
    if not 1 <= first <= last:
        raise ConfigError(f"length must be >= {max(first, 1):,}, got {last:,}")
    steps = [first << i for i in range((last // first).bit_length())]
    return steps if steps[-1] == last else [*steps, last]
