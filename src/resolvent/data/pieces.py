"""Long documents in pieces that tokenize as the whole does."""

import re
from collections.abc import Iterator

PIECE_CHARACTERS = 1 << 16

_BOUNDARY = re.compile(
    r"(?<=\S)[ \n]"  # white space after what is none
    r"|(?<=[A-Za-z])(?=[!-@\[-`{-~])"  # after a letter what is none
    r"|(?<=[0-9])(?=[!-/:-~])"  # after a digit what is none
)


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text at boundaries of words, so that long documents take little memory and all cores.

    A byte-level pre-tokenizer joins white space to what follows only, and neither a letter nor a digit to another kind
    of character after it. So the tokens of the pieces, one after the other, are those of the text.

    Args:
        text: any text.
        size: characters of a piece, more where no such boundary is near.
    """
    start = 0
    while len(text) - start > size and (boundary := _BOUNDARY.search(text, start + size)):
        yield text[start : boundary.start()]
        start = boundary.start()
    yield text[start:]
