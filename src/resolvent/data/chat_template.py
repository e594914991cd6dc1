"""Chat templates: from the messages of a conversation to the tokens that a model reads.

A template is Jinja, as Transformers writes it into a model's folder, and runs in a sandbox with the functions that
Transformers gives it. Only the template makes special tokens: the same words in a message are text.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from resolvent.data.corpus import EOT
from resolvent.data.tokenization import TOKENIZER_FILES
from resolvent.errors import CheckpointError, DataError
from resolvent.files import read_bytes, read_json, write_json
from resolvent.native import panics_are_errors

TEMPLATE_FILE = "chat_template.jinja"
_, SETTINGS_FILE, GENERATION_FILE = TOKENIZER_FILES
"""Files of Transformers in a model's folder."""

DEFAULT = (
    "{% set names = {'system': 'System', 'user': 'User', 'assistant': 'Assistant'} %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set role = message['role'] %}"
    "{{ (names[role] if role in names else raise_exception('unknown role: ' ~ role))"
    " ~ ':\n' ~ message['content'] ~ (eos_token if role == 'assistant' else '') ~ '\n\n' }}"
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
        is_default: it is the template of runs that have none.
    """

    def __init__(
        self, source: str | None, tokenizer: Tokenizer, variables: dict[str, str], ends: frozenset[int]
    ) -> None:
        self._tokenizer, self._variables, self.ends = tokenizer, variables, ends
        self._source, self.is_default = DEFAULT if source is None else source, source is None
        self.stop = DEFAULT_STOP if source is None else ()
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        functions: dict[str, Any] = {"raise_exception": _raise, "strftime_now": _now}
        environment.globals.update(functions)
        try:
            self._template = environment.from_string(self._source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template is not valid Jinja: {error}") from error

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> Self:
        """Read the template of a model's folder: `chat_template.jinja`, or else from `tokenizer_config.json`.

        A folder with neither has the default template.

        Raises:
            CheckpointError: a file cannot be read, or holds no template.
        """
        settings = _optional_json(directory / SETTINGS_FILE)
        return cls._of(_source(directory, settings), settings, _optional_json(directory / GENERATION_FILE), tokenizer)

    @classmethod
    def default(cls, tokenizer: Tokenizer) -> Self:
        """Return the default template."""
        return cls._of(None, {}, {}, tokenizer)

    @classmethod
    def _of(
        cls, source: str | None, settings: dict[str, Any], generation: dict[str, Any], tokenizer: Tokenizer
    ) -> Self:
        """Return a template with the special tokens that Transformers' files name."""
        special = {name: _token_text(settings.get(name)) or EOT for name in ("bos_token", "eos_token")}
        return cls(source, tokenizer, special, _ends(special["eos_token"], generation, tokenizer))

    def save(self, directory: Path) -> None:
        """Write the template into the files that `save_tokenizer` has written, where Transformers finds it, too."""
        settings, generation = directory / SETTINGS_FILE, directory / GENERATION_FILE
        write_json(settings, read_json(settings) | self._variables | {"chat_template": self._source})
        write_json(generation, read_json(generation) | {"eos_token_id": sorted(self.ends)})

    @property
    def digest(self) -> str:
        """SHA-256 of everything but the tokenizer that decides the tokens of a conversation."""
        return hashlib.sha256(json.dumps([self._source, self._variables, sorted(self.ends)]).encode()).hexdigest()

    def render(self, messages: Sequence[Message], *, answer: bool = True) -> Rendering:
        """Return the text of a conversation.

        Args:
            messages: the messages.
            answer: end with what precedes an answer of the assistant.

        Raises:
            DataError: the template does not take these messages.
        """
        words = "".join(str(value) for message in messages for value in message.values())
        mark, marked = next(mark for mark in _MARKS if mark not in words), messages
        if self._special.search(words):  # nearly never, and a search of all words at once is quick
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

    def encode_answers(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of a conversation up to its last answer, and the mask of those that a model has to write.

        Prompts and answers are encoded one after the other, as a model reads and writes them. An answer ends with the
        first token that ends answers; what the template writes after that is read only.

        Returns:
            (T,) int64 and (T,) bool: the tokens, and True for those of the assistant's answers.

        Raises:
            DataError: the template does not take these messages, or writes earlier turns differently once more follow.
        """
        ids: list[int] = []
        written: list[bool] = []
        before = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, whole = self.render(messages[:number]), self.render(messages[: number + 1], answer=False)
            try:
                read, answer = self.encode(prompt, after=before), self.encode(whole, after=prompt.text)
            except ValueError as error:
                raise DataError(
                    f"the chat template writes the turns before message {number + 1} differently once it follows, so "
                    "that its tokens cannot be told from theirs: split the conversation there, or change the template"
                ) from error
            end = next((i for i, token in enumerate(answer) if token in self.ends), len(answer))
            ids += read + answer
            written += [False] * len(read) + [i <= end for i in range(len(answer))]
            before = whole.text
        return np.array(ids, np.int64), np.array(written, bool)

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


def end_tokens(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a text of the model in a folder: its own, and `<|endoftext|>`.

    Raises:
        CheckpointError: a file cannot be read.
    """
    settings, generation = (_optional_json(directory / name) for name in (SETTINGS_FILE, GENERATION_FILE))
    return _ends(_token_text(settings.get("eos_token")) or EOT, generation, tokenizer)


def _ends(eos_token: str, generation: dict[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    end = generation.get("eos_token_id")
    ids = [*(end if isinstance(end, list) else [end]), *map(tokenizer.token_to_id, (EOT, eos_token))]
    return frozenset(token for token in ids if isinstance(token, int))


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
