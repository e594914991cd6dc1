"""Chat templates: from the messages of a conversation to the tokens that a model reads.

A template is Jinja, as Transformers writes it into a model's folder, and runs in a sandbox with the functions that
Transformers gives it. Only the template makes special tokens: the same words in a message are text.
"""

import datetime
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ..data import EOT
from ..errors import CheckpointError, DataError
from ..files import read_bytes, read_json
from ..native import panics_are_errors

TEMPLATE_FILE, SETTINGS_FILE, GENERATION_FILE = "chat_template.jinja", "tokenizer_config.json", "generation_config.json"
"""Files of Transformers in a model's folder."""

DEFAULT = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[message.role] }}:\n{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""Template of runs that have none: a line that names the speaker, then the words; `<|endoftext|>` ends an answer."""
DEFAULT_STOP = ("\nUser:",)
"""Stop strings of the default template: a model that was not trained on it writes the user's next words, too."""

_MOST_BYTES = 1 << 20
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Code points that are no characters: one that no message holds marks words that are not special tokens."""

Message = dict[str, Any]
"""A message: at least `role` and `content`."""


class Rendering(NamedTuple):
    """Text of a conversation.

    Attributes:
        text: the text.
        marked: the text, in which ``mark`` splits words of special tokens that are not of the template.
        mark: the mark.
    """

    text: str
    marked: str
    mark: str


class ChatTemplate:
    """Template with the special tokens of a tokenizer.

    Args:
        source: the template; None for the default.
        tokenizer: the tokenizer.
        variables: variables of the template, such as `bos_token` and `eos_token`.
        ends: tokens that end an answer.

    Attributes:
        stop: strings before which an answer ends.
    """

    def __init__(
        self, source: str | None, tokenizer: Tokenizer, variables: dict[str, str], ends: frozenset[int]
    ) -> None:
        self._tokenizer, self._variables, self.ends = tokenizer, variables, ends
        self.stop = DEFAULT_STOP if source is None else ()
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        functions: dict[str, Any] = {"raise_exception": _raise, "strftime_now": _now}
        environment.globals.update(functions)
        try:
            self._template = environment.from_string(DEFAULT if source is None else source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template is not valid Jinja: {error}") from error

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> Self:
        """Read the template of a model's folder: `chat_template.jinja`, or else from `tokenizer_config.json`.

        Raises:
            CheckpointError: a file cannot be read, or holds no template.
        """
        settings = _optional_json(directory / SETTINGS_FILE)
        special = {name: _token_text(settings.get(name)) or EOT for name in ("bos_token", "eos_token")}
        end = _optional_json(directory / GENERATION_FILE).get("eos_token_id")
        ids = [*(end if isinstance(end, list) else [end]), *map(tokenizer.token_to_id, (EOT, special["eos_token"]))]
        ends = frozenset(token for token in ids if isinstance(token, int))
        return cls(_source(directory, settings), tokenizer, special, ends)

    def render(self, messages: Sequence[Message], *, answer: bool = True) -> Rendering:
        """Return the text of a conversation.

        Args:
            messages: the messages.
            answer: end with what precedes an answer of the assistant.

        Raises:
            DataError: the template does not take these messages.
        """
        mark = self._mark(messages)
        marked = [self._marked(message, mark) for message in messages]
        try:
            text = self._template.render(messages=marked, add_generation_prompt=answer, **self._variables)
        except Exception as error:  # a template may fail in as many ways as a program
            raise DataError(f"the chat template does not take these messages: {error}") from error
        return Rendering(text.replace(mark, ""), text, mark)

    def encode(self, rendering: Rendering, *, after: str = "") -> list[int]:
        """Return the tokens of a conversation.

        Args:
            rendering: the conversation.
            after: beginning of its text that is left out.
        """
        return self._tokens(_without_beginning(rendering.marked, after, rendering.mark), rendering.mark)

    def _mark(self, messages: Sequence[Message]) -> str:
        """Return a code point that the messages do not hold."""
        text = "".join(str(value) for message in messages for value in message.values())
        return next(mark for mark in _MARKS if mark not in text)

    def _marked(self, message: Message, mark: str) -> Message:
        """Return a message in which the mark splits the words of special tokens."""

        def split(match: re.Match[str]) -> str:
            return match[0][0] + mark + match[0][1:]

        return {key: self._special.sub(split, x) if isinstance(x, str) else x for key, x in message.items()}

    @panics_are_errors()
    def _tokens(self, marked: str, mark: str) -> list[int]:
        """Encode a rendered text: special tokens are tokens unless the mark splits them."""
        ids: list[int] = []
        for i, part in enumerate(self._special.split(marked)):
            if i % 2 and (token := self._tokenizer.token_to_id(part)) is not None:
                ids.append(token)
            else:
                ids += self._tokenizer.encode(part.replace(mark, ""), add_special_tokens=False).ids
        return ids

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Pattern of one special token of the tokenizer, as a group."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        words = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, words))})")


def _without_beginning(marked: str, beginning: str, mark: str) -> str:
    """Leave out the beginning of a text, which is given without marks.

    Raises:
        ValueError: the text has another beginning.
    """
    if marked.startswith(beginning):
        return marked[len(beginning) :]
    index = 0
    for character in beginning:
        while marked[index : index + 1] == mark:
            index += 1
        if marked[index : index + 1] != character:
            raise ValueError("the rendered conversation does not begin with the text that was read")
        index += 1
    return marked[index:]


def _source(directory: Path, settings: dict[str, Any]) -> str | None:
    """Return the template of a folder; None if it has none."""
    path = directory / TEMPLATE_FILE
    if path.exists():
        try:
            return read_bytes(path, _MOST_BYTES).decode()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read the chat template {path}: {error}") from error
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}.get("default")
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{directory / SETTINGS_FILE}: chat_template must be a text or a list with a default")
    return found


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _token_text(value: object) -> str | None:
    """Return a token of Transformers' settings: its text, or a dictionary that has the text."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _to_json(value: object, indent: int | None = None) -> str:
    """Return JSON as Transformers' filter does, which escapes no HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
