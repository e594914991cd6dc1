"""Bodies of requests, as the OpenAI API has them, with a few sampling options more.

Unknown fields are refused, so that no option is ignored silently. Fields that are null are left out.
"""

import itertools
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, field_validator, model_validator

from ..models.sampling import SamplingOptions
from ..seeds import MOST_SEED

_MOST_STOPS = 16
_MOST_LOGPROBS = 20
_MOST_ANSWERS = 128
_MOST_PARTS = 2048
_MOST_PROMPTS = 2048
"""Largest number of prompts of a request, as the OpenAI API has it; the engine may take fewer."""


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


_StopText = Annotated[str, Field(min_length=1)]
Stop = Annotated[list[_StopText], FailFast(), Field(max_length=_MOST_STOPS), BeforeValidator(_as_list)]


class _Strict(BaseModel):
    """Body without unknown fields, whose values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, value: Any) -> Any:
        return {key: x for key, x in value.items() if x is not None} if isinstance(value, dict) else value


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = False


class _Body(_Strict):
    """Fields that both kinds of requests have."""

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: Stop = []
    n: Annotated[int, Field(ge=1, le=_MOST_ANSWERS)] = 1
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = Field(default_factory=lambda: secrets.randbelow(MOST_SEED + 1))
    user: str = ""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def sampling(self) -> SamplingOptions:
        """Return the options of sampling.

        Raises:
            ValueError: an option is out of range; the message begins with its name.
        """
        return SamplingOptions(**{name: getattr(self, name) for name in SamplingOptions.__dataclass_fields__})

    def seeds(self, prompts: int) -> list[list[int]]:
        """Return the seeds of all answers to each prompt: the request's own seed for the first, and those after it."""
        return [[(self.seed + p * self.n + i) % (MOST_SEED + 1) for i in range(self.n)] for p in range(prompts)]


def _of_one_kind(prompt: object) -> object:
    """Refuse a list of items of several kinds, or of too many: each type of the union would report every item."""
    if isinstance(prompt, list):
        kinds = {type(item) for item in prompt}
        if kinds != {int} and len(prompt) > _MOST_PROMPTS:
            raise ValueError(f"{len(prompt)} prompts are more than {_MOST_PROMPTS}: send them in several requests")
        tokens = itertools.chain.from_iterable(prompt) if kinds == {list} else ()
        if len(kinds) > 1 or not kinds <= {str, int, list} or any(type(token) is not int for token in tokens):
            raise ValueError("Input should be a text, a list of texts, a list of tokens, or a list of lists of tokens")
    return prompt


Prompt = Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_of_one_kind)]


class CompletionBody(_Body):
    """Body of `/v1/completions`."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a text or tokens."""
        prompt: Any = self.prompt
        return prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]


class TextPart(_Strict):
    """Part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """Message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=_MOST_PARTS)]
    name: str | None = None

    @field_validator("role")
    @classmethod
    def _system(cls, role: str) -> str:
        """Take the name that templates know."""
        return "system" if role == "developer" else role

    def message(self) -> dict[str, str]:
        """Return role and text, for a chat template."""
        parts = self.content if isinstance(self.content, list) else [TextPart(type="text", text=self.content)]
        return {"role": self.role, "content": "\n".join(part.text for part in parts)}


class ChatBody(_Body):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self
