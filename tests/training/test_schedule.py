import pytest
from hypothesis import given
from hypothesis import strategies as st

from resolvent.training.config import TrainingConfig
from resolvent.training.schedule import learning_rate_factor


def factors(schedule: str, steps: int = 100, warmup: int = 10, min_ratio: float = 0.1) -> list[float]:
    return [
        learning_rate_factor(step, steps=steps, warmup=warmup, schedule=schedule, min_ratio=min_ratio)
        for step in range(steps)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_warm_up_is_a_line_to_the_peak(schedule: str):
    assert factors(schedule)[:10] == pytest.approx([step / 10 for step in range(1, 11)])


def test_cosine_falls_from_the_peak_to_the_least():
    height = factors("cosine", warmup=0)
    assert height[0] == pytest.approx(1, abs=1e-3)
    assert height[49] == pytest.approx(0.55)
    assert height[-1] == pytest.approx(0.1)


def test_wsd_stays_until_the_last_fifth():
    height = factors("wsd")
    assert height[10:80] == [1.0] * 70
    assert height[80] < 1
    assert height[-1] == pytest.approx(0.1)


def test_constant_stays():
    assert factors("constant")[10:] == [1.0] * 90


@given(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 400),
    min_ratio=st.floats(0, 1),
)
def test_schedule_rises_then_falls_within_its_bounds(schedule: str, steps: int, warmup: int, min_ratio: float):
    height = factors(schedule, steps, warmup, min_ratio)
    assert all(0 <= h <= 1 for h in height)
    assert height[:warmup] == sorted(height[:warmup])
    assert height[warmup:] == sorted(height[warmup:], reverse=True)
    if schedule != "constant" and warmup < steps:
        assert height[-1] == pytest.approx(min_ratio)


def test_the_default_configuration_reaches_its_peak():
    config = TrainingConfig()
    assert max(factors("cosine", config.steps, config.warmup)) == pytest.approx(1)
