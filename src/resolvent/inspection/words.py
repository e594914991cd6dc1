"""Words of a text, to which its tokens belong."""

import math
import re

from resolvent.errors import DataError
from resolvent.inspection.values import Comparison, Inspection

_WORD = re.compile(r"\s*\S+|\s+$")


def word_numbers(tokens: list[str]) -> list[int]:
    """Return the number of the word that the last character of each token belongs to.

    Args:
        tokens: text of the tokens, (N,). The first one opens the text and is word 0. A token without text belongs to
            the word of the next token with text.
    """
    text = "".join(tokens[1:])
    word_of = [number for number, word in enumerate(_WORD.finditer(text), 1) for _ in word[0]]
    numbers, end = [0], 0
    for token in tokens[1:]:
        end += len(token)
        numbers.append(word_of[max(0, min(end - bool(token), len(word_of) - 1))] if word_of else 1)
    return numbers


def compare(first: Inspection, second: Inspection) -> Comparison:
    """Compare the losses of two models word by word; their tokenizers may differ.

    Raises:
        DataError: the models did not read a common word.
    """
    pairs = [_words_of(first), _words_of(second)]
    count = min(len(words) for words, _ in pairs)
    if "".join(first.tokens[1:]) != "".join(second.tokens[1:]):
        count -= 1  # the shorter text may end within a word
    words = pairs[0][0][:count]
    if not words or words != pairs[1][0][:count]:
        raise DataError("the two models did not read a common word of the same text: give them the same, longer text")
    nats = [losses[:count] for _, losses in pairs]
    size = len("".join(words).encode()) * math.log(2)
    return Comparison(words, nats, [sum(row) / size for row in nats])


def _words_of(inspection: Inspection) -> tuple[list[str], list[float]]:
    """Return the words and the loss of each."""
    count = max(inspection.words)
    words, nats = [""] * count, [0.0] * count
    for number, loss in zip(inspection.words[1:], inspection.nats, strict=True):
        nats[number - 1] += loss
    for number, word in enumerate(_WORD.finditer("".join(inspection.tokens[1:]))):
        words[number] = word[0]
    return words, nats
