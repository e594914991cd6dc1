"""Text of an answer while its tokens arrive: decoded in place, ended by stop strings, with log probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from ..data.detokenization import StopText, TextStream, added_texts
from .requests import TokenEvent

_CONTEXT = 32
"""Tokens of a prompt that decide how the next token is written, with many to spare."""


@dataclass(frozen=True)
class TokenLogprob:
    """Log probabilities at one token.

    Attributes:
        text: text of the token.
        logprob: its log probability.
        top: the likeliest tokens as text, with their log probabilities.
        offset: characters of the answer before it.
    """

    text: str
    logprob: float
    top: list[tuple[str, float]]
    offset: int


@dataclass
class Answer:
    """Answer to a prompt, token by token.

    Args:
        tokenizer: the tokenizer.
        prompt: tokens of the prompt.
        stop: strings before which the answer ends.

    Attributes:
        finish: reason why the answer is complete, "stop" or "length"; None as long as it is not.
        count: number of tokens, the last one included.
        whole: text of all tokens, stop strings included.
        logprobs: of the tokens since ``push`` last returned a text, where they were asked for.
    """

    tokenizer: Tokenizer
    prompt: Sequence[int]
    stop: Sequence[str] = ()
    finish: str | None = None
    count: int = 0
    whole: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Prepare the decoder."""
        context = [int(token) for token in self.prompt[-_CONTEXT:]]
        self._stream, self._stop = TextStream(self.tokenizer, context), StopText(self.stop)
        self._before, self._length = context[-1], 0

    def push(self, event: TokenEvent) -> str:
        """Take a token; return the text that is certain now. A token that ends the answer has no text."""
        self.count += 1
        ended = event.finish == "stop"
        piece = "" if ended else self._stream.push(event.token)
        if event.logprob is not None:
            self._add_logprob(event)
        self._length += len(piece)
        if event.finish is not None:
            piece += self._stream.rest()
        self.whole += piece
        text = self._stop.push(piece)
        self.finish = event.finish if self._stop.stopped is None else "stop"
        self._before = event.token
        return text + self._stop.rest() if self.finish is not None else text

    def take_logprobs(self) -> list[TokenLogprob]:
        """Return the log probabilities that were not taken yet."""
        taken, self.logprobs = self.logprobs, []
        return taken

    def _add_logprob(self, event: TokenEvent) -> None:
        texts = added_texts(self.tokenizer, self._before, [event.token, *(token for token, _ in event.top)])
        top = [(text, logprob) for text, (_, logprob) in zip(texts[1:], event.top, strict=True)]
        self.logprobs.append(TokenLogprob(texts[0], event.logprob or 0.0, top, self._length))
