"""Requests to the engine, the events that answer them, and the errors that end them.

Shapes: N tokens of a prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import ResolventError
from ..models.sampling import SamplingOptions


class OverloadedError(ResolventError):
    """The queue of the engine has no place for a request."""


class DeadlineError(ResolventError):
    """A request took longer than it may."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Prompt to be continued in one way or several.

    Attributes:
        tokens: the prompt, int64 (N,), at least one token of the vocabulary.
        max_tokens: largest number of tokens of an answer, at least 1.
        options: options of sampling.
        seeds: seed of every answer, at least one.
        ends: tokens that end an answer.
        logprobs: number of likeliest tokens to report beside each token; None for no log probabilities.
        seconds: time limit, from ``submit`` to the last token; None for none.
    """

    tokens: np.ndarray
    max_tokens: int
    options: SamplingOptions
    seeds: Sequence[int]
    ends: frozenset[int] = frozenset()
    logprobs: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class TokenEvent:
    """Token of an answer.

    Attributes:
        answer: number of the answer, from 0 on.
        token: the token.
        finish: "stop" if the token ends the answer, "length" if there may be no more; None if more tokens follow.
        logprob: log probability of the token in the model's distribution, where asked for.
        top: the likeliest tokens with their log probabilities.
    """

    answer: int
    token: int
    finish: str | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Failure:
    """End of all answers of a request.

    Attributes:
        error: the reason.
    """

    error: Exception


@dataclass(eq=False)
class Ticket:
    """Request in the engine.

    Attributes:
        request: the request.
        deliver: takes the events, in the engine's thread; it must return at once and raise nothing.
        deadline: time of ``time.monotonic`` at which the request fails.
        cached: tokens of the prompt that came from the prefix cache.
        cancelled: True if the answers are not wanted any more.
        stopped: numbers of the answers that are complete for their reader, at a stop string.
    """

    request: Request
    deliver: Callable[[TokenEvent | Failure], None]
    deadline: float
    cached: int = 0
    cancelled: bool = False
    stopped: set[int] = field(default_factory=set)

    def cancel(self) -> None:
        """Free the places of the request before the next step. Events of the current step may still follow."""
        self.cancelled = True
