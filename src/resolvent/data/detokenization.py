"""The text that tokens add behind others: many decoders write a token alone otherwise than in its place.

Metaspace and Unigram drop the space before a first token, WordPiece keeps the ## of one, and bytes are characters only
together. So no token is ever decoded alone here.
"""

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_MOST_HELD = 16
"""Tokens without a whole character after which all but the last of their text is shown: no character has as many."""


class TextStream:
    """Decodes tokens as they come, each behind those before it.

    The pieces of text together are the text of all tokens less that of the prompt. What may be a part of a character
    is held back until the character is whole.

    Args:
        tokenizer: decodes; special tokens are shown.
        prompt: tokens before the first that is pushed; their text is in no piece.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # The last tokens: those whose text was shown, which decide how the next ones are written, and those held back.
        self._tokens, self._context = list(prompt), len(prompt)
        self._shown = len(self._text())

    def push(self, token: int) -> str:
        """Return the text that a token completes: "" where it is held back or adds nothing."""
        self._tokens.append(token)
        text, held = self._text(), len(self._tokens) - self._context
        broken = text.endswith(_BROKEN)  # later bytes may make a character of its end
        if broken and held < _MOST_HELD:
            return ""
        piece = text[self._shown : len(text) - broken]
        if piece or held >= _MOST_HELD:
            self._tokens = self._tokens[self._context :]
            self._context, self._shown = len(self._tokens), len(self._text()) - broken
        return piece

    def rest(self) -> str:
        """Return the text of the tokens that are still held back, at the end."""
        return self._text()[self._shown :]

    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=False)


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int], prompt: Sequence[int] = ()) -> Iterator[str]:
    """Decode tokens as they come, behind a prompt whose text is not repeated; see ``TextStream``."""
    stream = TextStream(tokenizer, prompt)
    pieces = (stream.push(token) for token in ids)
    yield from filter(None, pieces)
    if rest := stream.rest():
        yield rest


def added_texts(tokenizer: Tokenizer, before: int, candidates: Sequence[int]) -> list[str]:
    """Return the text that each of some tokens would add behind a token; with it, where it completes a character."""
    known = tokenizer.decode([before], skip_special_tokens=False).rstrip(_BROKEN)
    texts = tokenizer.decode_batch([[before, token] for token in candidates], skip_special_tokens=False)
    return [text.removeprefix(known) for text in texts]
