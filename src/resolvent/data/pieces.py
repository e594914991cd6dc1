"""Documents in pieces: plain text cut at its separators, and long texts cut so that they tokenize as the whole does."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

EOT = "<|endoftext|>"
"""The line that separates documents in a text file, and the token that separates them in a stream."""

PIECE_CHARACTERS = 1 << 16

_SEPARATOR = re.compile(rf"^{re.escape(EOT)}(?:\r?\n|\r?\Z)", re.MULTILINE)
_LONGEST_SEPARATOR = len(EOT) + 2
_BOUNDARY = re.compile(
    r"(?<=\S)[ \n]"  # white space after what is none
    r"|(?<=[A-Za-z])(?=[!-@\[-`{-~])"  # after a letter what is none
    r"|(?<=[0-9])(?=[!-/:-~])"  # after a digit what is none
)


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        text: its text, which may be empty.
        last: whether the document ends with it.
    """

    text: str
    last: bool


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text at boundaries of words, so that long documents take little memory and all cores.

    A byte-level pre-tokenizer joins white space to what follows only, and neither a letter nor a digit to another kind
    of character after it. So the tokens of the pieces, one after the other, are those of the text.

    Args:
        text: any text.
        size: characters of a piece, more where no such boundary is near.
    """
    return (piece.text for piece in evenly([Piece(text, True)], size))


def evenly(parts: Iterable[Piece], size: int = PIECE_CHARACTERS) -> Iterator[Piece]:
    """Cut documents, which come in parts of any length, into pieces as `pieces` does, whatever the parts.

    Args:
        parts: of documents.
        size: characters of a piece, more where no boundary is near.
    """
    text, start, searched = "", 0, size
    for part in parts:
        text, start, searched = text[start:] + part.text, 0, searched - start
        while boundary := _BOUNDARY.search(text, max(searched, 1)):
            yield Piece(text[start : boundary.start()], False)
            start = boundary.start()
            searched = start + size
        searched = max(searched, len(text))
        if part.last:
            yield Piece(text[start:], True)
            text, start, searched = "", 0, size


def documents_of(parts: Iterable[Piece]) -> Iterator[str]:
    """Join pieces to documents, and leave out the blank ones."""
    texts: list[str] = []
    for text, last in parts:
        texts.append(text)
        if last:
            document, texts = "".join(texts), []
            if document and not document.isspace():
                yield document


def separated(chunks: Iterable[str]) -> Iterator[Piece]:
    """Cut text that comes in chunks at the lines that are exactly the separator."""
    line, within_line = "", False
    for chunk in chunks:
        if within_line:  # of a line that is too long to be a separator
            end = chunk.find("\n") + 1 or len(chunk)
            yield Piece(chunk[:end], False)
            within_line, chunk = not chunk[:end].endswith("\n"), chunk[end:]
        whole, newline, rest = (line + chunk).rpartition("\n")
        *ended, document_rest = _SEPARATOR.split(whole + newline)
        yield from (Piece(text, True) for text in ended)
        yield Piece(document_rest, False)
        line = rest
        if len(line) > _LONGEST_SEPARATOR:
            yield Piece(line, False)
            line, within_line = "", True
    *ended, document_rest = _SEPARATOR.split(line)
    yield from (Piece(text, True) for text in ended)
    yield Piece(document_rest, True)
