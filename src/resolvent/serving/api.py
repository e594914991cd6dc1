"""HTTP server with the OpenAI API: completions and chat, streamed or not; health and metrics."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from tokenizers import Tokenizer

from ..data.chat_template import ChatTemplate
from ..data.encoding import Encoder
from ..data.stream import encode_prompt
from ..errors import ResolventError
from .answers import Answers, Mailbox
from .engine import Engine
from .errors import ApiError, logged
from .metrics import CONTENT_TYPE, Metrics
from .middleware import Counted, Guard
from .replies import ChatReply, CompletionReply
from .requests import Request
from .schemas import ChatBody, CompletionBody
from .streams import Stream, events, unless_gone, whole

_MOST_DISCARDED = 1 << 28
"""Bytes of a body that is too long which are read before the answer: many clients read only after they wrote."""
_BODY_SECONDS = 60
_GONE = 499
"""Status in the metrics of requests whose client has gone."""

Body = TypeVar("Body", CompletionBody, ChatBody)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a request.

    Attributes:
        prompt_tokens: largest number of tokens of a prompt.
        new_tokens: largest number of tokens of an answer.
        seconds: time for the answers.
    """

    prompt_tokens: int = 131_072
    new_tokens: int = 4096
    seconds: float = 600.0

    @property
    def body_bytes(self) -> int:
        """Largest size of a body: a token of text has few bytes."""
        return 16 * self.prompt_tokens + (1 << 16)


class Service:
    """Endpoints of one model.

    Args:
        engine: the engine; it starts and closes with the application.
        tokenizer: the tokenizer.
        template: the chat template.
        name: name of the model.
        limits: limits of a request.
        keys: API keys; None lets everybody in who names the server by an address of ``hosts``.
        hosts: names of the server without a key: web pages that reach it under another name are refused.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        name: str,
        *,
        limits: Limits,
        keys: Sequence[str] | None,
        hosts: Sequence[str] = ("localhost", "127.0.0.1", "::1"),
    ) -> None:
        self._engine, self._tokenizer, self._template, self.name = engine, tokenizer, template, name
        self._limits, self._metrics, self._created = limits, Metrics(engine), int(time.time())
        self._keys, self._hosts, self._encoder = keys, hosts, Encoder(tokenizer)

    def application(self) -> ASGIApp:
        """Return the ASGI application."""
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        app = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={
                HTTPException: _http_error,
                **dict.fromkeys((ApiError, ValidationError, ResolventError, Exception), _error),
            },
        )
        paths = {route.path for route in routes}
        return Counted(Guard(app, self._keys, self._hosts), self._metrics, paths)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Run the engine as long as the application."""
        self._mailbox = Mailbox(asyncio.get_running_loop())
        self._engine.start()
        try:
            yield
        finally:
            await run_in_threadpool(self._engine.close)

    async def models(self, request: HttpRequest) -> Response:
        """List the one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Response:
        """Describe a model by name."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def health(self, request: HttpRequest) -> Response:
        """Say whether the engine runs."""
        alive = self._engine.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def metrics(self, request: HttpRequest) -> Response:
        """Return the metrics."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def completions(self, request: HttpRequest) -> Response:
        """Continue texts."""
        body = await self._body(request, CompletionBody)
        self._engine.check_size(len(body.prompts), body.n)  # before anything is made of them
        prompts = await run_in_threadpool(self._prompts, body.prompts)
        return await self._reply(request, body, prompts, body.max_tokens, body.logprobs, body.stop)

    async def chat(self, request: HttpRequest) -> Response:
        """Answer in a conversation."""
        body = await self._body(request, ChatBody)
        self._engine.check_size(1, body.n)
        messages = [message.message() for message in body.messages]
        prompt = await run_in_threadpool(lambda: self._template.encode(self._template.render(messages)))
        most = body.max_completion_tokens or body.max_tokens or self._limits.new_tokens
        logprobs = body.top_logprobs or 0 if body.logprobs else None
        stop = [*body.stop, *self._template.stop]
        return await self._reply(request, body, [self._checked(prompt)], most, logprobs, stop)

    async def _reply(
        self,
        request: HttpRequest,
        body: CompletionBody | ChatBody,
        prompts: list[np.ndarray],
        max_tokens: int,
        logprobs: int | None,
        stop: list[str],
    ) -> Response:
        """Submit the prompts, and return the answers or a stream of them."""
        if max_tokens > (most := self._limits.new_tokens):
            raise ApiError(400, f"max_tokens must be at most {most}, got {max_tokens}", param="max_tokens")
        try:
            options, seeds = body.sampling(), body.seeds(len(prompts))
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).partition(" ")[0], code="invalid_value") from error
        requests = [
            Request(
                tokens=prompt,
                max_tokens=max_tokens,
                options=options,
                seeds=own,
                ends=self._template.ends,
                logprobs=logprobs,
                seconds=self._limits.seconds,
            )
            for prompt, own in zip(prompts, seeds, strict=True)
        ]
        answers = Answers(self._engine, self._mailbox, self._metrics, self._tokenizer, requests, stop)
        reply = (ChatReply if isinstance(body, ChatBody) else CompletionReply)(self.name)
        if body.stream:
            return Stream(events(answers, reply, body.stream_options.include_usage), answers)
        with answers:
            content = await unless_gone(request, whole(answers, reply))
        return Response(status_code=_GONE) if content is None else JSONResponse(content)

    async def _body(self, request: HttpRequest, schema: type[Body]) -> Body:
        """Read and check the body of a request.

        Raises:
            ApiError: it is too long, of another type or for another model.
            ValidationError: it is not valid.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"the Content-Type must be application/json, got {kind!r}", code="unsupported_type")
        body = schema.model_validate_json(await self._content(request))
        self._check_model(body.model)
        return body

    async def _content(self, request: HttpRequest) -> bytes:
        content, length, most = bytearray(), 0, self._limits.body_bytes
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    length += len(part)
                    if length <= most:
                        content += part
                    if length > _MOST_DISCARDED:
                        break
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS} s", code="timeout") from error
        if length > most:
            raise ApiError(413, f"the body is longer than {most:,} bytes; shorten the prompt", code="body_too_large")
        return bytes(content)

    def _prompts(self, prompts: list[str] | list[list[int]]) -> list[np.ndarray]:
        """Return the tokens of prompts; a text begins as a document does."""
        encoded = [encode_prompt(prompt, self._encoder) if isinstance(prompt, str) else prompt for prompt in prompts]
        return [self._checked(prompt) for prompt in encoded]

    def _checked(self, prompt: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the tokens of a prompt as an array.

        Raises:
            ApiError: there are none, too many, or some that the vocabulary lacks.
        """
        if not len(prompt):
            raise ApiError(400, "the prompt has no token; give at least one", param="prompt")
        if len(prompt) > (most := self._limits.prompt_tokens):
            raise ApiError(
                400,
                f"the prompt has {len(prompt):,} tokens, more than {most:,}; shorten it",
                param="prompt",
                code="context_length_exceeded",
            )
        size = self._tokenizer.get_vocab_size()
        if wrong := [token for token in (min(prompt), max(prompt)) if not 0 <= token < size]:
            raise ApiError(400, f"token {wrong[0]} is outside the vocabulary (0..{size - 1})", param="prompt")
        return np.asarray(prompt, np.int64)

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404,
                f"there is no model {name!r}; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "resolvent"}


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """Return an error of the routes."""
    assert isinstance(error, HTTPException)
    told = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, told).body(), error.status_code, headers=error.headers)


async def _error(request: HttpRequest, error: Exception) -> Response:
    told = logged(error)
    headers = {"Retry-After": "1"} if told.status == 503 else None
    return JSONResponse(told.body(), told.status, headers=headers)
