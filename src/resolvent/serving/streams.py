"""Replies of the server as a whole and as streams of events."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .answers import Answers
from .errors import logged
from .replies import CompletionReply


async def whole(answers: Answers, reply: CompletionReply) -> dict[str, Any]:
    """Return the reply with all answers, once they are complete."""
    texts = [""] * len(answers.answers)
    async for number, _, text in answers.pieces():
        texts[number] += text
    return reply.whole(answers.answers, texts, answers.usage())


async def events(answers: Answers, reply: CompletionReply, usage: bool) -> AsyncIterator[bytes]:
    """Yield the events of a stream; an error ends it, as an event of its own."""
    try:
        for number in range(len(answers.answers)):
            if opening := reply.opening(number):
                yield _event(opening)
        async for number, answer, text in answers.pieces():
            if text or answer.finish is not None:
                yield _event(reply.chunk(number, answer, text))
        if usage:
            yield _event(reply.usage(answers.usage()))
        yield b"data: [DONE]\n\n"
    except Exception as error:  # the status has been sent
        yield _event(logged(error).body())


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


class Stream(StreamingResponse):
    """Stream of answers, whose places are free when it ends, however that happens."""

    def __init__(self, chunks: AsyncIterator[bytes], answers: Answers) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._answers:
            await super().__call__(scope, receive, send)


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any] | None:
    """Return the result of ``work``; None as soon as the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await tasks[0] if tasks[0] in done else None
    finally:
        for task in tasks:
            task.cancel()
