import math

import numpy as np
import pytest

from resolvent.errors import ConfigError, ResolventError
from resolvent.evaluation.statistics import Bucket, Estimate, doubling, doubling_buckets, rank_correlation


def test_error_of_single_values_equals_standard_error_of_the_mean():
    values = [1.0, 4.0, 2.5, 7.0]
    assert Estimate.of(values) == Estimate(
        pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)))
    )


def test_interval_of_a_ratio_covers_the_true_value():
    """Errors cover the true mean of samples of different sizes, whose parts go together.

    2,000 times, the true mean lies within two errors in about 95 % of them.
    """
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        counts = random.integers(1, 20, size=40)
        sums = counts * (3.0 + random.normal(size=40))  # all parts of a sample share its deviation
        estimate = Estimate.of(sums, counts)
        assert estimate.standard_error is not None
        hits += abs(estimate.mean - 3.0) < 2 * estimate.standard_error
    assert 0.92 < hits / 2000 < 0.97


def test_a_single_sample_has_no_error():
    assert Estimate.of([6.0], [3]) == Estimate(2.0, None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_value_is_an_error(value: float):
    with pytest.raises(ResolventError, match="not finite"):
        Estimate.of([1.0, value])


@pytest.mark.parametrize("last", [1, 2, 3, 4, 5, 100, 65536])
def test_buckets_double_and_cover_all_numbers(last: int):
    buckets = doubling_buckets(last)
    assert [number for bucket in buckets for number in (bucket.first, bucket.last)][-1] == last
    assert [bucket.first for bucket in buckets[1:]] == [bucket.last + 1 for bucket in buckets[:-1]]
    assert [bucket.last for bucket in buckets[:-1]] == [2**i for i in range(len(buckets) - 1)]
    assert sum(bucket.size for bucket in buckets) == last


def test_buckets_are_formatted_as_ranges():
    assert [str(bucket) for bucket in (Bucket(1, 1), Bucket(1025, 2048))] == ["1", "1,025 - 2,048"]


def test_distances_double_up_to_the_last():
    assert doubling(16, 100) == [16, 32, 64, 100]
    assert doubling(16, 64) == [16, 32, 64]
    with pytest.raises(ConfigError, match="length must be >= 16, got 15"):
        doubling(16, 15)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 20, 3, 400], [-1, 5, 0, 6], 1),  # by order, whatever the distances
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2, 3, 4], [2, 1, 4, 3], 0.6),  # 1 - 6 * 4 / (4 * 15)
        ([1, 2, 3, 4], [1, 2, 2, 3], math.sqrt(0.9)),  # equal values share their places
        ([1, 2, 3], [5, 5, 5], 0),
        ([7], [1], 0),
    ],
)
def test_rank_correlation(x: list[float], y: list[float], expected: float):
    assert rank_correlation(x, y) == pytest.approx(expected)
    assert rank_correlation(y, x) == pytest.approx(expected)
