"""Conversation whose state is kept between turns: a turn reads its own tokens only, however long the talk."""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..data.chat_template import ChatTemplate, Message, Rendering
from ..errors import CheckpointError, ConfigError
from ..models import IntegratedModel
from ..models.decoding import TokenReader
from ..models.inference import inference_view
from ..models.reading import read_prompts
from ..models.sampling import Penalties, RowGenerators, RowSampler, SamplingOptions
from ..models.state import EXTRA, ModelState
from ..models.storage import weights_digest
from ..native import panics_are_errors
from ..ops.precision import at_least_float32, wide_dtype
from ..tensors import read_tensors
from .answer import Answer
from .requests import TokenEvent

_TOKENS, _RECORD = f"{EXTRA}conversation.tokens", f"{EXTRA}conversation.record"
"""Names in a conversation file: the tokens that the state has read, and JSON as bytes."""
_SNAPSHOTS = 16
"""Turns that ``undo`` takes back without reading the turns before them again."""


@dataclass(frozen=True)
class _Read:
    """Text that a model has read, with the state after it.

    Attributes:
        text: rendered conversation.
        tokens: its tokens.
        state: state after them; None if there are none.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    state: ModelState | None = None


class Conversation:
    """Conversation with a model.

    Args:
        model: the model; its mode does not change.
        tokenizer: the tokenizer.
        template: the chat template.
        seed: seed of the answers.
        options: options of sampling.
        max_tokens: largest number of tokens of an answer.

    Attributes:
        messages: the messages so far.
        options: options of sampling, for the next answer.
        max_tokens: largest number of tokens, of the next answer.
        cost: tokens that the last turn has read before its answer.
    """

    def __init__(
        self,
        model: IntegratedModel,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        seed: int,
        options: SamplingOptions,
        max_tokens: int,
    ) -> None:
        self._model: Any = inference_view(model)
        self._tokenizer, self._template = tokenizer, template
        self._random = RowGenerators.of_seeds([seed])
        self.messages: list[Message] = []
        self.options, self.max_tokens, self.cost = options, max_tokens, 0
        self._read = _Read()
        self._snapshots: deque[_Read] = deque(maxlen=_SNAPSHOTS)

    @property
    def tokens(self) -> int:
        """Number of tokens that the state has read."""
        return len(self._read.tokens)

    def say(self, text: str) -> Iterator[str]:
        """Say something, and yield the answer piece by piece.

        An answer that is not taken to its end counts as said up to there.

        Raises:
            DataError: the template does not take the messages; the conversation stays as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = self._template.render(messages)
        return self._answer(messages, rendered)

    def undo(self) -> bool:
        """Take the last turn back; return False if there is none."""
        last = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not last:
            return False
        self.messages = self.messages[: last[-1]]
        self._read = self._snapshots.pop() if self._snapshots else _Read()
        return True

    def set_system(self, text: str) -> None:
        """Set the system message, or remove it where the text is empty. The next turn reads everything again."""
        others = [message for message in self.messages if message["role"] != "system"]
        self.messages = ([{"role": "system", "content": text}] if text else []) + others
        self._read = _Read()
        self._snapshots.clear()

    @torch.inference_mode()
    def save(self, path: Path) -> None:
        """Write messages, tokens and state to a safetensors file, which ``ModelState.load`` reads as a state, too.

        Raises:
            ConfigError: nothing was said yet.
            OSError: the file cannot be written.
        """
        if not self.messages:
            raise ConfigError("there is nothing to save: say something first")
        if self._read.state is None:
            self._read_text(self._template.render(self.messages, answer=False))
        assert self._read.state is not None
        record = {"messages": self.messages, "text": self._read.text, "weights": weights_digest(self._model)}
        extra = {
            _TOKENS: torch.tensor(self._read.tokens),
            _RECORD: torch.from_numpy(np.frombuffer(json.dumps(record).encode(), np.uint8).copy()),
        }
        self._read.state.save(path, extra)

    def load(self, path: Path) -> None:
        """Go on with a saved conversation in the place of this one.

        Raises:
            CheckpointError: the file cannot be read, or holds no conversation with this model.
        """
        tensors = read_tensors(path)
        if missing := {_TOKENS, _RECORD} - tensors.keys():
            raise CheckpointError(f"{path} holds no conversation: it has no {min(missing)}")
        record = json.loads(tensors[_RECORD].numpy().tobytes())
        if record["weights"] != weights_digest(self._model):
            raise CheckpointError(
                f"{path} is a conversation with another model, or with other --weights: load it with those"
            )
        weight = self._model.lm_head.weight
        state = self._model.state_type.load(path, weight.device)
        try:
            state.check(self._model.state_shapes(), 1, weight.device, wide_dtype(weight))
        except ValueError as error:
            raise CheckpointError(f"{path} holds no conversation with this model: {error}") from error
        self.messages = record["messages"]
        self._read = _Read(record["text"], tuple(tensors[_TOKENS].tolist()), state)
        self._snapshots.clear()

    @torch.inference_mode()
    def _answer(self, messages: list[Message], rendered: Rendering) -> Iterator[str]:
        """Read the messages that are new, and write the answer to them."""
        self._snapshots.append(self._read)
        logits = self._read_text(rendered)
        before, answer = self._read, Answer(self._tokenizer, self._read.tokens, self._template.stop)
        written: list[int] = []
        text, sampler = "", self._sampler()
        assert before.state is not None
        reader = TokenReader(self._model, before.state)
        try:
            while answer.finish is None:
                token = sampler(logits).token
                event = self._event(int(token), answer.count + 1)
                piece = answer.push(event)
                text += piece
                if piece:
                    yield piece
                if answer.finish != "stop":
                    logits = reader(token)
                    written.append(event.token)
        finally:
            whole = answer.finish is not None and text == answer.whole
            self.messages = [*messages, {"role": "assistant", "content": text}]
            self._read = _Read(before.text + text, (*before.tokens, *written), reader.state) if whole else before
            if not whole:  # the state has read tokens of which the text is not part of the conversation
                self._append(text)

    def _event(self, token: int, count: int) -> TokenEvent:
        """Return the event of a token of the answer."""
        if token in self._template.ends:
            return TokenEvent(0, token, "stop")
        return TokenEvent(0, token, "length" if count >= self.max_tokens else None)

    def _sampler(self) -> RowSampler:
        """Return a sampler for the next answer, whose random numbers follow those of the last one."""
        weight, penalties = self._model.lm_head.weight, None
        if self.options.penalises:
            prompt = torch.tensor(self._read.tokens)
            penalties = Penalties([self.options], [prompt], self._model.vocab_size, weight.device)
        return RowSampler([self.options], self._random, penalties)

    def _read_text(self, rendered: Rendering) -> Tensor:
        """Read a rendered conversation behind what was read; return the logits of the next token, (1, V).

        A template may write earlier turns differently once more follows; then everything is read again.
        """
        if not rendered.text.startswith(self._read.text) or rendered.text == self._read.text:
            self._read = _Read()
        ids = self._template.encode(rendered, after=self._read.text)
        self.cost = len(ids)
        hidden = self._read_ids(ids, rendered.text)
        return at_least_float32(self._model.logits(hidden))

    @panics_are_errors()
    def _append(self, text: str) -> None:
        """Read a text of the assistant behind what was read."""
        if ids := self._tokenizer.encode(text, add_special_tokens=False).ids:
            self._read_ids(ids, self._read.text + text)

    def _read_ids(self, ids: list[int], text: str) -> Tensor:
        """Read tokens, after which the whole text is ``text``; return the last hidden state, (1, D)."""
        tokens = torch.tensor([ids], device=self._model.lm_head.weight.device)
        hidden, state = read_prompts(self._model, tokens, state=self._read.state)
        state = state.clone()  # which does not hold the activations of a piece
        self._read = _Read(text, (*self._read.tokens, *ids), state)
        return hidden
