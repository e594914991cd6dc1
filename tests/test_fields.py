import math
from typing import Any, Literal

import pytest

from resolvent.fields import fits, kind_name
from resolvent.wording import JSON, PYTHON

LARGEST = 3.4e38


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (int, [0, -3, 10**400], [True, 1.0, "1", None]),
        (float, [0, 1.5, -LARGEST], [True, math.nan, math.inf, 1e39, 10**400, "1"]),
        (bool, [True, False], [0, 1, None]),
        (str, ["", "x"], [True, None, 1]),
        (Literal["a", "b"], ["a", "c"], [1, True]),
        (int | None, [1, None], [True, 1.5]),
        (tuple[int, ...], [(), (1, 2)], [[1], (1.5,), (True,)]),
        (str | list[str] | None, ["x", ["x", "y"], None], [[1], ("x",), True]),
    ],
)
def test_values_of_a_type_fit(kind: Any, right: list[Any], wrong: list[Any]):
    assert all(fits(value, kind, LARGEST) for value in right)
    assert not any(fits(value, kind, LARGEST) for value in wrong)


def test_a_type_is_named_in_the_words_of_its_language():
    assert kind_name(int | None, PYTHON) == "an integer or None"
    assert kind_name(bool | None, JSON) == "true or false or null"
    assert kind_name(tuple[int, ...] | None, JSON) == "a list of integers or null"
    assert kind_name(str | list[str], PYTHON) == "a string or a list of strings"
