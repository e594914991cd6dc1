"""Replies of the two endpoints: whole, and in the chunks of a stream."""

import secrets
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from .answer import Answer, TokenLogprob

Json = dict[str, Any]


class CompletionReply:
    """Reply of `/v1/completions`.

    Args:
        model: name of the model.
    """

    kind: ClassVar[str] = "text_completion"
    chunk_kind: ClassVar[str] = "text_completion"
    prefix: ClassVar[str] = "cmpl"

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Answer], texts: Sequence[str], usage: Json) -> Json:
        """Return the reply with all answers."""
        pairs = enumerate(zip(answers, texts, strict=True))
        choices = [self._choice(i, self._content(text), answer) for i, (answer, text) in pairs]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}

    def opening(self, number: int) -> Json | None:
        """Return the chunk before the first text of an answer, where there is one."""
        return None

    def chunk(self, number: int, answer: Answer, text: str) -> Json:
        """Return the chunk with the next text of an answer."""
        return self._chunk([self._choice(number, self._delta(text), answer)])

    def usage(self, usage: Json) -> Json:
        """Return the chunk with the number of tokens."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._head, "object": self.chunk_kind, "choices": choices}

    def _choice(self, number: int, content: Json, answer: Answer) -> Json:
        """Return a choice: an answer, or a part of it, with the log probabilities that were not taken yet."""
        logprobs = answer.take_logprobs()
        shown = self._logprobs(logprobs) if logprobs else None
        return {"index": number, **content, "logprobs": shown, "finish_reason": answer.finish}

    def _content(self, text: str) -> Json:
        return {"text": text}

    def _delta(self, text: str) -> Json:
        return {"text": text}

    def _logprobs(self, logprobs: list[TokenLogprob]) -> Json:
        return {
            "tokens": [each.text for each in logprobs],
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [dict([*reversed(each.top), (each.text, each.logprob)]) for each in logprobs],
            "text_offset": [each.offset for each in logprobs],
        }


class ChatReply(CompletionReply):
    """Reply of `/v1/chat/completions`."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, number: int) -> Json:
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": number, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _content(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, logprobs: list[TokenLogprob]) -> Json:
        return {
            "content": [
                {
                    **_token(each.text, each.logprob),
                    "top_logprobs": [_token(text, logprob) for text, logprob in each.top],
                }
                for each in logprobs
            ],
            "refusal": None,
        }


def _token(text: str, logprob: float) -> Json:
    """Return a token; its bytes are not known where it is a part of a character."""
    return {
        "token": text,
        "logprob": logprob,
        "bytes": None if "\N{REPLACEMENT CHARACTER}" in text else [*text.encode()],
    }
