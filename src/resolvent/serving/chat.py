"""Chat: lines that a user types, said or obeyed as commands."""

import dataclasses
import shlex
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ResolventError
from ..models.sampling import SamplingOptions
from ..wording import counted
from .conversation import Conversation

HELP = """\
/system [TEXT]     set the system message, which the model reads first; without TEXT, remove it
/set NAME VALUE    temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, max_tokens
/undo              take the last turn back
/save FILE         write the conversation to a file, with the state
/load FILE         go on with a saved conversation
/help              show this
/quit              end; so does Ctrl-D. Ctrl-C ends an answer
"""


class Chat:
    """Chat over a conversation.

    Args:
        conversation: the conversation.

    Attributes:
        over: True once the user has ended the chat.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation, self.over = conversation, False
        self._commands: dict[str, Callable[[str], str]] = {
            "system": self._system,
            "set": self._set,
            "undo": self._undo,
            "save": self._save,
            "load": self._load,
            "help": lambda _: HELP,
            "quit": self._quit,
        }

    def respond(self, line: str) -> Generator[str, None, None]:
        """Yield the response to a line, piece by piece; an error is a response, too."""
        line = line.strip()
        if not line:
            return
        try:
            if line.startswith("/"):
                yield self._obey(line)
                return
            yield from self._conversation.say(line)
            yield "\n"
        except (ResolventError, OSError) as error:
            yield f"Error: {error}\n"

    def _obey(self, line: str) -> str:
        name, _, rest = line[1:].partition(" ")
        if name not in self._commands:
            raise ConfigError(f"there is no command /{name}; /help lists them")
        return self._commands[name](rest.strip())

    def _system(self, text: str) -> str:
        self._conversation.set_system(text)
        return "The conversation is read again with the next turn.\n"

    def _set(self, text: str) -> str:
        name, _, value = text.partition(" ")
        names = [field.name for field in dataclasses.fields(SamplingOptions)]
        if name == "max_tokens":
            self._conversation.max_tokens = _at_least_one(value)
        elif name in names:
            changed: dict[str, Any] = {name: _number(name, value)}
            try:
                self._conversation.options = dataclasses.replace(self._conversation.options, **changed)
            except ValueError as error:
                raise ConfigError(str(error)) from error
        else:
            raise ConfigError(f"there is no option {name!r}; there are {', '.join([*names, 'max_tokens'])}")
        return f"{name} is {value}\n"

    def _undo(self, _: str) -> str:
        return "The last turn is taken back.\n" if self._conversation.undo() else "There is no turn to take back.\n"

    def _save(self, text: str) -> str:
        path = _path(text)
        self._conversation.save(path)
        return f"Saved in {path}, after {counted(self._conversation.tokens, 'token')}\n"

    def _load(self, text: str) -> str:
        path = _path(text)
        self._conversation.load(path)
        turns = sum(message["role"] == "user" for message in self._conversation.messages)
        return f"Loaded {path}: {counted(turns, 'turn')}, {counted(self._conversation.tokens, 'token')}\n"

    def _quit(self, _: str) -> str:
        self.over = True
        return ""


def _path(text: str) -> Path:
    """Return the one path that a line names, with quotes where it has blanks."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{text}: {error}") from error
    if len(words) != 1:
        raise ConfigError(f"name one FILE, with quotes where it has blanks; got {len(words)} words")
    return Path(words[0]).expanduser()


def _number(name: str, value: str) -> float | int | None:
    """Return the value of an option of sampling; "none" is None for those that may be left out."""
    if value == "none" and name in ("top_k", "top_p", "min_p"):
        return None
    try:
        return int(value) if name == "top_k" else float(value)
    except ValueError as error:
        kind = "a whole number" if name == "top_k" else "a number"
        raise ConfigError(f"{name} must be {kind}, got {value!r}") from error


def _at_least_one(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"max_tokens must be a whole number >= 1, got {value!r}")
    return int(value)
