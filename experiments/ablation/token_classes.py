"""What kind of text every token is: the start of a word, the inside of one, punctuation, ..."""

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
"""What a token's first character that is no space says of it. A letter that no letter comes before, in the token or at
the end of the one before it, starts a word. Bytes that are no character by themselves are parts of one."""

_NUMBERS = {name: number for number, name in enumerate(TOKEN_CLASSES)}
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def token_texts(tokenizer: Tokenizer, ids: np.ndarray) -> dict[int, str]:
    """The text that each id stands for amid a text, its spaces included."""
    separator = tokenizer.token_to_id(EOT)
    assert separator is not None, f"the tokenizer has no {EOT}"
    numbers = np.unique(ids).tolist()
    # Behind another token: some decoders drop the space that a text begins with.
    texts = tokenizer.decode_batch([[separator, number] for number in numbers], skip_special_tokens=False)
    return {number: text.removeprefix(EOT) for number, text in zip(numbers, texts, strict=True)}


def token_classes(tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    """Index into ``TOKEN_CLASSES`` of every token of texts (B, N), int64 (B, N).

    Args:
        tokenizer: any whose decoder knows the text of a token, as `build_tokenizer` and `load_tokenizer` make it.
        tokens: ids (B, N); the token before the first one counts as no letter.
    """
    separator, texts = tokenizer.token_to_id(EOT), token_texts(tokenizer, tokens)
    classes = np.empty(tokens.shape, np.int64)
    for row, ids in enumerate(tokens.tolist()):
        before = ""
        for place, number in enumerate(ids):
            text = "" if number == separator else texts[number]
            classes[row, place] = _NUMBERS["end of text" if number == separator else _class_of(text, before)]
            before = text
    return classes


def _class_of(text: str, before: str) -> str:
    """Class of a token, given the text of the token before it."""
    first = text.strip()[:1]
    if not first:
        return "line break" if "\n" in text or "\r" in text else "space"
    if first == _BROKEN:
        return "part of a character"
    if first.isalpha():
        return "inside a word" if text[0] == first and before[-1:].isalpha() else "start of a word"
    return "digits" if first.isdigit() else "punctuation"
