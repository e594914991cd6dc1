"""The split of documents by bytes."""

from collections import deque
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from resolvent.data import split_documents
from resolvent.errors import ConfigError, DataError

FRACTIONS = st.floats(0.01, 0.99)


def num_bytes(documents: list[str]) -> int:
    return sum(len(text.encode()) for text in documents)


def mix(seed: int) -> list[str]:
    """1 to 1,000 documents with Pareto lengths, of short, long or no lines, some of them in several copies."""
    random = Random(seed)
    count = round(10 ** random.uniform(0, 3))
    alpha, scale = random.choice([0.6, 1.0, 1.5, 3.0]), random.choice([1, 20, 200])
    documents = []
    for number in range(count):
        words = " ".join(random.choices(["river", "père", "№ 9", "stone", "日本"], k=random.choice([3, 10, 100])))
        length = int(min(20_000, 1 + scale * random.paretovariate(alpha)))
        line = words + random.choice(["\n", "\r\n", " "])
        documents.append(f"{number}{line * (length // len(line) + 1)}"[:length])
    return documents + random.choices(documents, k=random.choice([0, 0, count // 10, count]))


def check_share(documents: list[str], caplog: pytest.LogCaptureFixture, fraction: float = 0.1) -> None:
    caplog.clear()
    train, held_out = split_documents(documents, fraction)
    assert num_bytes(train) + num_bytes(held_out) == num_bytes(documents)
    share = num_bytes(held_out) / num_bytes(documents)
    within = abs(share - fraction) <= 0.2 * min(fraction, 1 - fraction)
    assert within != (f"{share:.1%} of the bytes are held out instead of {fraction:.0%}" in caplog.text)
    # A part of a few characters alone may be the reason.
    assert within or min(fraction, 1 - fraction) * num_bytes(documents) < 100 * max(map(documents.count, documents))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32))
def test_a_tenth_of_the_bytes_is_held_out_whatever_the_documents(caplog: pytest.LogCaptureFixture, seed: int):
    """8 to 12 %, or a warning that says why not."""
    documents = mix(seed)
    assume(num_bytes(documents) > 20)
    check_share(documents, caplog)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.floats(0.02, 0.98))
def test_any_share_of_the_bytes_can_be_held_out(caplog: pytest.LogCaptureFixture, seed: int, fraction: float):
    documents = mix(seed)
    assume(min(fraction, 1 - fraction) * num_bytes(documents) > 2)
    check_share(documents, caplog, fraction)


@pytest.mark.parametrize("kilobytes", [[240, 3], [3, 240, 3], [1, 2, 60, 4, 2, 30, 2, 1], [10] * 8, [1] * 300 + [400]])
def test_documents_of_unequal_size_hold_out_a_tenth_of_the_bytes(caplog, kilobytes: list[int]):
    documents = [f"Document {number} says so.\n" * (50 * size) for number, size in enumerate(kilobytes)]
    train, held_out = split_documents(documents)
    assert num_bytes(held_out) / num_bytes(documents) == pytest.approx(0.1, abs=0.02)
    assert num_bytes(train) + num_bytes(held_out) == num_bytes(documents)
    assert all(text.startswith("Document") for text in train + held_out), "documents are cut at the start of a line"
    assert not caplog.messages


def test_short_documents_are_never_cut():
    documents = [f"Document {number}.\n" * (1 + number % 7) for number in range(200)]
    train, held_out = split_documents(documents)
    assert sorted(train + held_out) == sorted(documents)


def test_every_document_larger_than_the_held_out_part_gives_its_end():
    documents = [f"Document {number} says so.\n" * 100 for number in range(8)]
    train, held_out = split_documents(documents)
    assert [first + last for first, last in zip(train, held_out, strict=True)] == documents
    assert [num_bytes([text]) for text in held_out] == [pytest.approx(num_bytes(documents[:1]) / 10, rel=0.1)] * 8


def test_bytes_count_not_characters():
    """The second half of the text takes three times as many bytes as the first."""
    text = "a" * 3000 + "日" * 3000
    _, (held_out,) = split_documents([text])
    assert num_bytes([held_out]) == pytest.approx(0.1 * num_bytes([text]), abs=3)


def zip_parts(train: list[str], held_out: list[str], documents: list[str]) -> Iterator[tuple[str, str, str]]:
    """The parts of every document; each document begins with a character of its own."""
    lefts, rights = deque(train), deque(held_out)
    for document in documents:
        left = lefts.popleft() if lefts and lefts[0][0] == document[0] else ""
        yield left, rights.popleft() if left != document else "", document
    assert not lefts
    assert not rights


@given(st.lists(st.text(), min_size=2), FRACTIONS, st.integers(0, 3), st.randoms(use_true_random=False))
def test_split_is_a_partition_that_order_does_not_change(texts, fraction, seed, random):
    documents = [chr(0x1000 + number) + text for number, text in enumerate(texts)]
    train, held_out = split_documents(documents, fraction, seed)
    assert train
    assert held_out
    for left, right, document in zip_parts(train, held_out, documents):
        assert left + right == document

    shuffled = documents.copy()
    random.shuffle(shuffled)
    again = split_documents(shuffled, fraction, seed)
    assert (sorted(again[0]), sorted(again[1])) == (sorted(train), sorted(held_out))


@given(st.lists(st.text("ab\n", min_size=1, max_size=30), min_size=2, unique=True), FRACTIONS)
def test_equal_documents_are_treated_alike(documents, fraction):
    train, held_out = split_documents(documents * 2, fraction)
    half = len(train) // 2, len(held_out) // 2
    assert (train, held_out) == (train[: half[0]] * 2, held_out[: half[1]] * 2)
    assert split_documents(documents, fraction) == (train[: half[0]], held_out[: half[1]])


def test_seed_changes_the_split():
    documents = [f"document {number}" for number in range(100)]
    assert split_documents(documents, seed=0) != split_documents(documents, seed=1)
    assert split_documents(documents, seed=0) == split_documents(documents, seed=0)


def test_single_document_is_cut_at_the_nearest_line():
    lines = [f"line {number}\n" for number in range(100)]
    text = "".join(lines)
    (train,), (held_out,) = split_documents([text], 0.25)
    assert train + held_out == text
    assert train.endswith("\n")
    assert len(held_out) == pytest.approx(0.25 * len(text), abs=max(map(len, lines)))
    assert split_documents([text, text], 0.25) == ([train] * 2, [held_out] * 2)


@pytest.mark.parametrize("text", ["x" * 1000, "x\n" + "x" * 998, "x" * 998 + "\nx", "x" * 850 + "\n" + "x" * 149])
def test_single_document_without_a_near_line_is_cut(text):
    assert split_documents([text], 0.1) == ([text[:900]], [text[900:]])


@given(st.lists(st.text("ab", min_size=1), min_size=1).map("\n".join), FRACTIONS)
def test_single_document_is_cut_in_two_unless_a_side_would_be_empty(text, fraction):
    if round(len(text) * (1 - fraction)) in (0, len(text)):
        with pytest.raises(DataError, match="too short"):
            split_documents([text], fraction)
    else:
        (train,), (held_out,) = split_documents([text], fraction)
        assert train + held_out == text
        assert train.strip()
        assert held_out.strip()


@pytest.mark.parametrize("text", ["x", "x  ", "\n\n\n\nx"])
def test_single_document_too_short(text):
    with pytest.raises(DataError, match=f"one document of {len(text)} bytes is too short to hold out 10%"):
        split_documents([text])


def test_documents_too_short_to_be_cut_are_reported(caplog):
    train, held_out = split_documents(["a", "b", "c"])
    assert len(train) == 2 and len(held_out) == 1
    assert "33.3% of the bytes are held out instead of 10%: the documents are too few, or equal" in caplog.text


def test_large_group_of_equal_short_documents_stays_in_training(caplog):
    documents = ["y"] * 600 + [f"document {number}\n" for number in range(40)]
    train, held_out = split_documents(documents)
    assert train.count("y") == 600
    assert num_bytes(held_out) / num_bytes(documents) == pytest.approx(0.1, abs=0.02)
    assert not caplog.messages


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_split_fraction_out_of_range(fraction):
    with pytest.raises(ConfigError, match=f"validation_fraction must be between 0 and 1, got {fraction}"):
        split_documents(["a", "b"], fraction)


@pytest.mark.parametrize("documents", [[], [""]])
def test_split_of_nothing(documents: list[str]):
    with pytest.raises(DataError, match="no documents to split"):
        split_documents(documents)


def test_a_document_without_text_is_left_in_training():
    assert split_documents(["", "a" * 90 + "b" * 10]) == (["", "a" * 90], ["b" * 10])
