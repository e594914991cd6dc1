import math
import random
from collections import Counter

import numpy as np
import pytest

from examples.ngram import END, NUM_SYMBOLS, InterpolatedTrigram
from resolvent.errors import DataError

SUBJECTS = ["the committee", "our people", "a good neighbour", "the old harbour", "this new law"]
VERBS = ["has seen", "will defend", "cannot forget", "shall answer", "was given"]
OBJECTS = ["the question", "many fair wages", "an honest peace", "the café of München", "what we owe"]


def english(sentences: int, seed: int) -> list[str]:
    """Documents of ten sentences from a small grammar."""
    choose = random.Random(seed).choice
    lines = [f"{choose(SUBJECTS)} {choose(VERBS)} {choose(OBJECTS)}." for _ in range(sentences)]
    return ["\n".join(lines[start : start + 10]) for start in range(0, sentences, 10)]


TRAINING = english(1500, seed=1)
UNSEEN = english(200, seed=2)


@pytest.fixture(scope="module")
def model() -> InterpolatedTrigram:
    return InterpolatedTrigram.fit(TRAINING)


def symbols(document: str) -> list[int]:
    return [END, END, *document.encode(), END]


class DictionaryTrigram:
    """The same model from its definition, a symbol at a time, given the weights."""

    def __init__(self, documents: list[str], weights: np.ndarray) -> None:
        self.weights = weights
        self.seen: list[Counter] = [Counter(), Counter(), Counter()]
        self.contexts: list[Counter] = [Counter(), Counter(), Counter()]
        for document in documents:
            text = symbols(document)
            for end in range(3, len(text) + 1):
                for order in range(3):
                    gram = tuple(text[end - order - 1 : end])
                    self.seen[order][gram] += 1
                    self.contexts[order][gram[:-1]] += 1

    def probability(self, first: int, second: int, symbol: int) -> float:
        estimates = [1 / NUM_SYMBOLS]
        for order, context in enumerate([(), (second,), (first, second)]):
            if count := self.contexts[order][context]:
                estimates.append(self.seen[order][(*context, symbol)] / count)
            else:
                estimates.append(estimates[-1])
        bucket = min(math.floor(math.log2(self.contexts[2][(first, second)] + 1)), len(self.weights) - 1)
        return sum(weight * estimate for weight, estimate in zip(self.weights[bucket], estimates, strict=True))

    def bits_per_byte(self, documents: list[str]) -> float:
        bits = 0.0
        for document in documents:
            text = symbols(document)
            bits -= sum(math.log2(self.probability(*text[i - 2 : i + 1])) for i in range(2, len(text)))
        return bits / sum(len(document.encode()) for document in documents)


def with_weights(model: InterpolatedTrigram, weights: np.ndarray) -> InterpolatedTrigram:
    return InterpolatedTrigram(model.counts, weights)


@pytest.mark.parametrize("context", [b"", b"t", b"th", b"a long context", b"\x00\xff", "é".encode()])
def test_probabilities_are_positive_and_sum_to_one(model: InterpolatedTrigram, context: bytes):
    probabilities = model.probabilities(context)
    assert probabilities.shape == (NUM_SYMBOLS,)
    assert (probabilities > 0).all()
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_context_is_the_last_two_symbols(model: InterpolatedTrigram):
    assert np.array_equal(model.probabilities(b"xyzth"), model.probabilities(b"th"))
    assert not np.array_equal(model.probabilities(b"h"), model.probabilities(b"th"))
    assert model.probabilities(b"th").argmax() == ord("e")


def test_counts_by_hand():
    """Of "aab" and "ab": after no context a a b E a b E, after "a" a b b, after the start and "a" a b."""
    model = InterpolatedTrigram.fit(["aab", "ab"])
    model = with_weights(model, np.tile([0.1, 0.2, 0.3, 0.4], (16, 1)))
    after_a = model.probabilities(b"a")
    assert after_a[ord("b")] == pytest.approx(0.1 / 257 + 0.2 * 2 / 7 + 0.3 * 2 / 3 + 0.4 * 1 / 2)
    assert after_a[ord("a")] == pytest.approx(0.1 / 257 + 0.2 * 3 / 7 + 0.3 * 1 / 3 + 0.4 * 1 / 2)
    assert after_a[END] == pytest.approx(0.1 / 257 + 0.2 * 2 / 7)
    # The pair "ba" was never seen, so its share goes to the context "a"; neither was "x", nor "yx".
    assert model.probabilities(b"ba")[ord("b")] == pytest.approx(0.1 / 257 + 0.2 * 2 / 7 + 0.7 * 2 / 3)
    assert model.probabilities(b"yx")[ord("b")] == pytest.approx(0.1 / 257 + 0.9 * 2 / 7)


def test_bits_count_the_closing_end_and_divide_by_bytes():
    """Six symbols, four of them bytes, each with probability 1/257 when the weight is all on the uniform part."""
    uniform = with_weights(InterpolatedTrigram.fit(["ab"]), np.tile([1.0, 0.0, 0.0, 0.0], (16, 1)))
    assert uniform.bits_per_byte(["aé", "b"]) == pytest.approx(6 * math.log2(257) / 4)


def test_documents_are_independent(model: InterpolatedTrigram):
    first, second = UNSEEN[0], UNSEEN[1]
    sizes = [len(first.encode()), len(second.encode())]
    separate = [model.bits_per_byte([document]) * size for document, size in zip([first, second], sizes, strict=True)]
    assert model.bits_per_byte([first, second]) == pytest.approx(sum(separate) / sum(sizes))
    assert model.bits_per_byte([second, first]) == pytest.approx(model.bits_per_byte([first, second]))


def test_matches_the_definition(model: InterpolatedTrigram):
    reference = DictionaryTrigram(TRAINING, model.weights)
    probe = [*UNSEEN[:5], "", "Zebra\x00 ünseen! \N{GRINNING FACE}"]
    assert model.bits_per_byte(probe) == pytest.approx(reference.bits_per_byte(probe), rel=1e-12)


def test_each_order_beats_the_one_below(model: InterpolatedTrigram):
    scores = []
    for order in range(4):
        # A little uniform weight, because an unseen trigram would cost infinitely many bits.
        weights = np.zeros(4)
        weights[order], weights[0] = 1 - 1e-3, weights[0] + 1e-3
        scores.append(with_weights(model, np.tile(weights / weights.sum(), (16, 1))).bits_per_byte(UNSEEN))
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < 0.8 * scores[-2]
    assert model.bits_per_byte(UNSEEN) < scores[-1]


def test_weights_suit_unseen_text(model: InterpolatedTrigram):
    """Weights fitted on held-out text are near the best there are for other text of the kind, bucket by bucket."""
    fitted = model.bits_per_byte(UNSEEN)
    for share in (0.5, 0.9):
        for order in range(4):
            weights = share * model.weights + (1 - share) * np.eye(4)[order]
            assert with_weights(model, weights).bits_per_byte(UNSEEN) > fitted - 0.002


def test_weights_favour_frequent_contexts():
    """Noise makes many rare pairs, whose few successors say nothing; in "xyzwyv" a pair always tells the next."""
    letters = random.Random(0).choices("abcdefghijklmnopqrstu", k=6000)
    documents = ["".join(letters[start : start + 300]) + "xyzwyv" * 100 for start in range(0, 6000, 300)]
    weights = InterpolatedTrigram.fit(documents).weights
    assert weights[2:5, 3].max() < 0.2
    assert weights[10, 3] > 0.9


def test_scores_do_not_jump_where_a_context_outgrows_the_held_out_text():
    """The counts of all the text may put a context in a bucket that the weights were never fitted on."""
    per_repetition = len("ab ")
    scores = [
        InterpolatedTrigram.fit(["ab " * (size // per_repetition)]).bits_per_byte(["ab " * 100])
        for size in range(2900, 3500, 60)
    ]
    assert max(scores) < 0.2


@pytest.mark.parametrize("documents", [["a"], ["", "a"], ["ab"] * 3, ["x" * 11]])
def test_tiny_texts_work(documents: list[str]):
    model = InterpolatedTrigram.fit(documents)
    assert model.weights.sum(axis=1) == pytest.approx(np.ones(16))
    assert 0 < model.bits_per_byte(documents) < 2 * math.log2(NUM_SYMBOLS)


@pytest.mark.parametrize("documents", [[], [""], ["", ""]])
def test_no_text_is_an_error(model: InterpolatedTrigram, documents: list[str]):
    with pytest.raises(DataError, match=f"{len(documents)} documents without any text"):
        InterpolatedTrigram.fit(documents)
    with pytest.raises(DataError, match="without any text"):
        model.bits_per_byte(documents)


def test_wrong_arrays_are_errors(model: InterpolatedTrigram):
    with pytest.raises(ValueError, match=r"counts must be"):
        InterpolatedTrigram(np.zeros((257, 257, 257), np.int64), model.weights)
    with pytest.raises(ValueError, match=r"weights must be"):
        with_weights(model, np.tile([0.0, 0.0, 0.0, 1.0], (16, 1)))


def test_fitting_is_deterministic_and_ignores_later_documents(model: InterpolatedTrigram):
    again = InterpolatedTrigram.fit(TRAINING)
    model.bits_per_byte(UNSEEN)
    assert np.array_equal(again.weights, model.weights)
    assert again.bits_per_byte(UNSEEN) == model.bits_per_byte(UNSEEN)
