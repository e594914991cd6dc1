"""Long documents in pieces that tokenize as the whole does."""

import re
from collections.abc import Iterator

PIECE_CHARACTERS = 1 << 16
_LINE_END = re.compile(r"(?<=\S)\n")


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text before line ends, so that long documents take little memory and all cores.

    A byte-level pre-tokenizer never joins a line end to the visible character before it, so that the pieces'
    tokens, one after the other, are those of the text.

    Args:
        text: any text.
        size: characters of a piece, more where no line ends.
    """
    start = 0
    while len(text) - start > size and (end := _LINE_END.search(text, start + size)):
        yield text[start : end.start()]
        start = end.start()
    yield text[start:]
