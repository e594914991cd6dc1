"""Answers to the prompts of one HTTP request: events of the engine's thread, as the event loop takes them."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from tokenizers import Tokenizer

from .answer import Answer
from .engine import Engine
from .metrics import Metrics
from .requests import Failure, Request, TokenEvent

Event = TokenEvent | Failure


class Mailbox:
    """Events for queues of an event loop: those of one step of the engine wake the loop once.

    Args:
        loop: the event loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._lock = loop, threading.Lock()
        self._posted: list[tuple[asyncio.Queue[tuple[int, Event]], int, Event]] = []

    def post(self, queue: asyncio.Queue[tuple[int, Event]], prompt: int, event: Event) -> None:
        """Put an event of a prompt into a queue, from any thread."""
        with self._lock:
            self._posted.append((queue, prompt, event))
            first = len(self._posted) == 1
        if first and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        with self._lock:
            posted, self._posted = self._posted, []
        for queue, prompt, event in posted:
            queue.put_nowait((prompt, event))


class Answers:
    """Answers to several prompts, within a `with` block, whose end frees their places in the engine.

    Args:
        engine: the engine.
        mailbox: mailbox of the running event loop.
        metrics: metrics of the server.
        tokenizer: the tokenizer.
        requests: a request per prompt; each has as many answers.
        stop: strings before which an answer ends.

    Attributes:
        answers: all answers, those to the first prompt first.

    Raises:
        OverloadedError, ConfigError: the engine does not take the requests.
    """

    def __init__(
        self,
        engine: Engine,
        mailbox: Mailbox,
        metrics: Metrics,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        stop: Sequence[str],
    ) -> None:
        self._requests, self._metrics, self._started = requests, metrics, time.monotonic()
        self.answers = [Answer(tokenizer, r.tokens.tolist(), stop) for r in requests for _ in r.seeds]
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        deliver = [partial(mailbox.post, self._queue, prompt) for prompt in range(len(requests))]
        self._tickets = engine.submit(requests, deliver)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Answer, str]]:
        """Yield the number of an answer, the answer and its next piece of text, which may be empty, token by token.

        Raises:
            Exception: the engine failed a request.
        """
        left, begun = len(self.answers), set[int]()
        while left:
            prompt, event = await self._queue.get()
            if isinstance(event, Failure):
                raise event.error
            number = prompt * len(self._requests[0].seeds) + event.answer
            answer = self.answers[number]
            if answer.finish is not None:  # a token that was written before the engine knew of the stop string
                continue
            text = answer.push(event)
            if prompt not in begun:
                begun.add(prompt)
                self._metrics.first_token.observe(time.monotonic() - self._started)
            if answer.finish is not None:
                self._tickets[prompt].stopped.add(event.answer)
                left -= 1
            yield number, answer, text
        self._metrics.duration.observe(time.monotonic() - self._started)

    def usage(self) -> dict[str, object]:
        """Return the number of tokens, as the OpenAI API has it."""
        read = sum(len(request.tokens) for request in self._requests)
        written = sum(answer.count for answer in self.answers)
        cached = sum(ticket.cached for ticket in self._tickets)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
