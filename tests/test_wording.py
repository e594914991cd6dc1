import pytest

from resolvent.wording import counted, readings


@pytest.mark.parametrize(
    ("number", "nouns", "text"),
    [
        (0, ["step"], "0 steps"),
        (1, ["step"], "1 step"),
        (2000, ["step"], "2,000 steps"),
        (1, ["process", "processes"], "1 process"),
        (2, ["process", "processes"], "2 processes"),
    ],
)
def test_noun_agrees_with_its_number(number: int, nouns: list[str], text: str):
    assert counted(number, *nouns) == text


@pytest.mark.parametrize(
    ("passes", "text"),
    [
        (0.00004, "4e-05 of the text"),
        (0.667, "67% of the text"),
        (0.99, "99% of the text"),
        (1.0, "the text once"),
        (1.06, "the text 1.1 times"),
        (3.24, "the text 3.2 times"),
        (324, "the text 324 times"),
    ],
)
def test_part_of_a_text_is_no_number_of_times(passes: float, text: str):
    assert readings(passes) == text
