"""Decoding of tokens in the context of the tokens before them.

Many decoders write a token differently when it stands alone: Metaspace and Unigram drop the space before a first token,
WordPiece keeps its ##, and bytes form characters only together. So no token is decoded alone.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import takewhile

from tokenizers import Tokenizer

from resolvent.native import panics_are_errors

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_MOST_HELD = 16
"""Largest number of tokens that are held back, since a character has at most four bytes."""


class TextStream:
    """Decoder of tokens that arrive one by one, each in the context of earlier tokens.

    The pieces together are the text of all tokens without the text of the prompt. Bytes of an incomplete character are
    held back until the character is whole.

    Args:
        tokenizer: the tokenizer; special tokens are decoded, too.
        prompt: tokens before the first one that is pushed.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # The last tokens: a context whose text was returned, which decides how the next ones are written, and those
        # that are held back.
        self._tokens, self._context = list(prompt), len(prompt)
        self._shown = len(self._text())

    def push(self, token: int) -> str:
        """Return the text that a token completes: "" where it is held back or adds nothing."""
        self._tokens.append(token)
        text, held = self._text(), len(self._tokens) - self._context
        broken = text.endswith(_BROKEN)  # later bytes may complete its last character
        if broken and held < _MOST_HELD:
            return ""
        piece = text[self._shown : len(text) - broken]
        if piece or held >= _MOST_HELD:
            self._tokens = self._tokens[self._context :]
            self._context, self._shown = len(self._tokens), len(self._text()) - broken
        return piece

    def rest(self) -> str:
        """Return the text of the tokens that are held back at the end."""
        return self._text()[self._shown :]

    @panics_are_errors()
    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=False)


class StopText:
    """Filter that ends a text before the first complete stop string; the pieces of the text arrive one by one.

    The end of the text so far is held back while it may be the beginning of a stop string.

    Args:
        stops: the stop strings; none of them is empty.

    Attributes:
        stopped: the stop string that ended the text; None as long as there was none.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self._stops, self._held = tuple(stops), ""
        self.stopped: str | None = None

    def push(self, piece: str) -> str:
        """Return the text that is certain to stand before any stop string, now that a piece has arrived."""
        if self.stopped is not None:
            return ""
        text = self._held + piece
        found = [(index + len(stop), index, stop) for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:  # the first that is complete, so that the sizes of the pieces do not matter
            _, index, self.stopped = min(found)
            self._held = ""
            return text[:index]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """Return the text that is still held back, at the end."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that begins a stop string."""
    return next(length for length in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:length]))


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int], prompt: Sequence[int] = ()) -> Iterator[str]:
    """Decode tokens that arrive one by one after a prompt; see ``TextStream``."""
    stream = TextStream(tokenizer, prompt)
    pieces = (stream.push(token) for token in ids)
    yield from filter(None, pieces)
    if rest := stream.rest():
        yield rest


def decode_until(
    tokenizer: Tokenizer, ids: Iterable[int], prompt: Sequence[int], *, stop: Sequence[str], ends: Container[int]
) -> Iterator[str]:
    """Decode tokens that arrive one by one until a text is complete; no token is taken after that.

    Args:
        tokenizer: the tokenizer.
        ids: the tokens.
        prompt: tokens before the first one.
        stop: strings before which the text ends.
        ends: tokens that end the text.
    """
    text = StopText(stop)
    for piece in decode_stream(tokenizer, takewhile(lambda token: token not in ends, ids), prompt):
        if shown := text.push(piece):
            yield shown
        if text.stopped is not None:
            return
    if rest := text.rest():
        yield rest


@panics_are_errors()
def added_texts(tokenizer: Tokenizer, before: int, candidates: Sequence[int]) -> list[str]:
    """Return the text that each candidate adds after a token, with a character that the candidate completes."""
    known = tokenizer.decode([before], skip_special_tokens=False).rstrip(_BROKEN)
    texts = tokenizer.decode_batch([[before, token] for token in candidates], skip_special_tokens=False)
    return [text.removeprefix(known) for text in texts]
