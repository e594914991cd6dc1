"""Conversations in the place of documents: records of messages, of which a model learns the assistant's answers."""

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from resolvent.data.chat_template import ChatTemplate, Message
from resolvent.data.corpus import stream_documents
from resolvent.data.pieces import Piece, documents_of
from resolvent.data.reading import Reading
from resolvent.data.split import DocumentKey
from resolvent.data.stream import SIGNED, TokenStream, byte_length
from resolvent.data.text import Fragment, Text
from resolvent.errors import DataError

FIELD = "messages"
"""Field of a record that holds the messages, as in the OpenAI API."""
ASSISTANT = "assistant"

logger = logging.getLogger(__name__)


class Conversations(Text):
    """Files of conversations: JSON Lines or JSON arrays of objects with `messages`, compressed or not.

    A conversation goes whole to one side of the split. Its size is that of its answers.

    Args:
        paths: of files and folders.
        template: makes the tokens of a conversation.
    """

    holds_tokens = True
    signed = True

    def __init__(self, paths: list[str], template: ChatTemplate) -> None:
        super().__init__(paths, FIELD)
        self._template = template

    @property
    def read_as(self) -> list[str]:
        """The field, and a hash of the template."""
        return [self.text_field, self._template.digest]

    def pieces(self, reading: Reading | None = None) -> Iterator[Piece]:
        """Yield the messages of all conversations as JSON, in pieces."""
        reading = reading or Reading(self.text_field)
        reading.structured = True
        return stream_documents(self.paths, reading)

    def conversations(self, reading: Reading | None = None) -> Iterator[list[Message]]:
        """Yield the messages of all conversations.

        Raises:
            DataError: files that cannot be read, or something else than messages, at least one of the assistant.
        """
        for number, document in enumerate(documents_of(self.pieces(reading)), start=1):
            yield self._checked(document, number)

    def _keys_and_sizes(self, reading: Reading) -> Iterator[tuple[int, int]]:
        return ((_key(messages), _answer_bytes(messages)) for messages in self.conversations(reading))

    def _cut(self, parts: Mapping[int, float]) -> dict[int, int | None]:
        """Cut no conversation."""
        return dict.fromkeys(parts)

    def fragments(self, held: np.ndarray, *, cut: bool = True) -> Iterator[Fragment]:
        """Yield the tokens of each conversation, the complement of those that are not in an answer."""
        for number, messages in enumerate(self.conversations()):
            size = _answer_bytes(messages)
            if number >= len(held) or size != self.survey.sizes[number]:
                raise self._changed()
            yield Fragment(bool(held[number] < size), size, self._encoded(messages, number + 1))

    def stream(self, separator: int) -> TokenStream:
        """Return all conversations as one signed stream in memory, which ends with the separator.

        Raises:
            DataError: as of `conversations`, or the template does not take the messages.
        """
        reading = Reading(self.text_field)
        parts = [
            (self._encoded(messages, number), _answer_bytes(messages))
            for number, messages in enumerate(self.conversations(reading), start=1)
        ]
        for warning in reading.warnings:
            logger.warning(warning)
        lengths = [len(tokens) for tokens, _ in parts]
        return TokenStream(
            tokens=np.concatenate([*(tokens for tokens, _ in parts), [~separator]]).astype(SIGNED),
            starts=np.cumsum([0, *lengths[:-1]]),
            byte_lengths=np.array([size for _, size in parts], np.int64),
        )

    def _encoded(self, messages: list[Message], number: int) -> np.ndarray:
        """Return the tokens of a conversation, the complement of those that are read only."""
        try:
            ids, written = self._template.encode_answers(messages)
        except DataError as error:
            raise DataError(f"{self.name}: conversation {number}: {error}") from error
        return np.where(written, ids, ~ids)

    def _checked(self, document: str, number: int) -> list[Message]:
        """Return the messages of a conversation that was read as JSON.

        Raises:
            DataError: something else than messages, at least one of the assistant.
        """
        place = f"{self.name}: conversation {number}"
        try:
            messages: Any = json.loads(document)
        except ValueError as error:
            raise DataError(
                f'{place}: not JSON ({error}); the format chat reads JSON Lines of objects with a list "{FIELD}"'
            ) from error
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise DataError(
                f'{place}: "{FIELD}" must be a list of objects with a "role" and a "content" that are strings, got '
                f"{document!r:.200}"
            )
        if not _answer_bytes(messages):
            raise DataError(
                f'{place}: no message with the role "{ASSISTANT}" has words to learn: remove the conversation, or add '
                "the answer"
            )
        return messages


def _key(messages: list[Message]) -> int:
    key = DocumentKey()
    key.update(json.dumps(messages).encode())
    return key.value()


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def _answer_bytes(messages: list[Message]) -> int:
    return sum(byte_length(message["content"]) for message in messages if message["role"] == ASSISTANT)
