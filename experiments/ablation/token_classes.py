"""Classes of tokens by their text: start of a word, inside of a word, punctuation, ..."""

import numpy as np
from tokenizers import Tokenizer

from resolvent.data.corpus import EOT

TOKEN_CLASSES = (
    "start of a word",
    "inside a word",
    "digits",
    "punctuation",
    "space",
    "line break",
    "part of a character",
    "end of text",
)
"""Names of the classes. The first character of a token that is no space decides its class. A letter without a letter
before it, in the token or at the end of the token before, starts a word. Bytes that form no character are parts of one.
"""

_NUMBERS = {name: number for number, name in enumerate(TOKEN_CLASSES)}
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def token_texts(tokenizer: Tokenizer, ids: np.ndarray) -> dict[int, str]:
    """Return the text of each id within a text, including its spaces."""
    separator = tokenizer.token_to_id(EOT)
    assert separator is not None, f"the tokenizer has no {EOT}"
    numbers = np.unique(ids).tolist()
    # After another token: some decoders drop the space at the beginning of a text.
    texts = tokenizer.decode_batch([[separator, number] for number in numbers], skip_special_tokens=False)
    return {number: text.removeprefix(EOT) for number, text in zip(numbers, texts, strict=True)}


def token_classes(tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    """Return the index into ``TOKEN_CLASSES`` of every token of texts (B, N), int64 (B, N).

    Args:
        tokenizer: a tokenizer of `build_tokenizer` or `load_tokenizer`.
        tokens: ids (B, N); the token before the first one counts as no letter.
    """
    separator, texts = tokenizer.token_to_id(EOT), token_texts(tokenizer, tokens)
    classes = np.empty(tokens.shape, np.int64)
    for row, ids in enumerate(tokens.tolist()):
        before = ""
        for column, number in enumerate(ids):
            text = "" if number == separator else texts[number]
            classes[row, column] = _NUMBERS["end of text" if number == separator else _class_of(text, before)]
            before = text
    return classes


def _class_of(text: str, before: str) -> str:
    """Return the class of a token, given the text of the token before it."""
    first = text.strip()[:1]
    if not first:
        return "line break" if "\n" in text or "\r" in text else "space"
    if first == _BROKEN:
        return "part of a character"
    if first.isalpha():
        return "inside a word" if text[0] == first and before[-1:].isalpha() else "start of a word"
    return "digits" if first.isdigit() else "punctuation"
