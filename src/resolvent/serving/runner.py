"""Forward passes of the engine: reading of prompts and steps of the batch, on CUDA replayed from graphs.

Shapes: B sequences in the batch, S prompts, N tokens of a piece, D model width, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..models import IntegratedModel
from ..models.decoding import CapturedStep, TokenReader
from ..models.reading import CapturedPiece
from ..models.state import ModelState


class Runner:
    """Forward passes that Python launches.

    Args:
        model: a model in evaluation mode.
        device: device of the model.

    Attributes:
        most_prompts: most prompts that one pass reads.
    """

    most_prompts = 1

    def __init__(self, model: IntegratedModel, device: torch.device) -> None:
        self._model, self._device = model, device
        self._reader: TokenReader[ModelState] | None = None

    def read(
        self, pieces: Sequence[np.ndarray], states: Sequence[ModelState | None]
    ) -> tuple[Tensor, list[ModelState]]:
        """Read the next tokens of prompts.

        Args:
            pieces: tokens of each prompt, int64 (N,), N >= 1.
            states: state of each after the tokens before; None for a fresh start.

        Returns:
            The hidden states of the last tokens (S, D), and the states after them, in memory of their own.
        """
        hidden, after = [], []
        for piece, state in zip(pieces, states, strict=True):
            ids = torch.from_numpy(piece)[None].to(self._device)
            found, state = self._model.hidden_states(ids, state=state)
            hidden.append(found[:, -1])
            after.append(state.clone())  # which does not hold the activations of the piece
        return torch.cat(hidden), after

    def join(self, state: ModelState) -> None:
        """Add sequences to the end of the batch."""
        self._begin(state if self._reader is None else ModelState.cat([self._reader.state, state]))

    def keep(self, rows: Sequence[int]) -> None:
        """Keep some sequences of the batch, in rising order."""
        assert self._reader is not None
        if rows:
            self._begin(self._reader.state[rows])
        else:
            self._reader = None

    def step(self, token: Tensor) -> Tensor:
        """Read a token of every sequence of the batch, int64 (B,), and return the logits of the next, (B, V).

        The next step may overwrite them.
        """
        assert self._reader is not None
        return self._reader(token)

    def _begin(self, state: ModelState) -> None:
        """Let the steps go on from a state to which there is no other reference."""
        self._reader = TokenReader(self._model, state.reusable())


class CapturedRunner(Runner):
    """Forward passes that CUDA graphs replay.

    The states of the batch lie in slots that never move; steps are captured for the first 1, 2, 4, ... slots when they
    are first needed, and the slots behind the batch are read for nothing. So nothing is captured again when sequences
    join and leave.

    Args:
        model: a model on CUDA, in evaluation mode, whose steps and pieces can be captured.
        device: device of the model.
        most: most sequences of the batch.
        block: most tokens that a pass reads.
    """

    most_prompts = 16

    def __init__(self, model: IntegratedModel, device: torch.device, most: int, block: int) -> None:
        super().__init__(model, device)
        self._sizes = [1 << i for i in range((most - 1).bit_length())] + [most]
        _, state = model.hidden_states(torch.zeros(1, 1, dtype=torch.int64, device=device))
        assert isinstance(state, ModelState)
        fresh = state.map(torch.zeros_like)
        self._slots = fresh.repeat(most).clone().with_position_on(device)
        self._token, self._count = torch.zeros(most, dtype=torch.int64, device=device), 0
        self._steps: dict[int, CapturedStep] = {}
        self._piece = CapturedPiece(model, fresh, self.most_prompts, block)

    def read(
        self, pieces: Sequence[np.ndarray], states: Sequence[ModelState | None]
    ) -> tuple[Tensor, list[ModelState]]:
        self._piece.put(states)
        hidden = self._piece(torch.from_numpy(np.concatenate(pieces)), [len(piece) for piece in pieces])
        after = self._piece.take(slice(0, len(pieces)))
        return hidden[: len(pieces)].clone(), [after[i : i + 1].clone() for i in range(len(pieces))]

    def join(self, state: ModelState) -> None:
        first, self._count = self._count, self._count + len(state)
        targets = self._slots[first : self._count].tensors()
        torch._foreach_copy_(targets, state.tensors())

    def keep(self, rows: Sequence[int]) -> None:
        moved = [i for i, row in enumerate(rows) if i != row]
        if moved:
            source = self._slots[[rows[i] for i in moved]]
            torch._foreach_copy_(self._slots[moved[0] : len(rows)].tensors(), source.tensors())
        self._count = len(rows)

    def step(self, token: Tensor) -> Tensor:
        size = next(size for size in self._sizes if size >= self._count)
        if size not in self._steps:
            self._steps[size] = CapturedStep(self._model, self._slots[:size], self._token[:size])
        self._token[: self._count].copy_(token)
        return self._steps[size]()[: self._count]


def make_runner(model: IntegratedModel, most: int, block: int) -> Runner:
    """Return what runs a model: captured passes where CUDA and the model allow it.

    Args:
        model: a model in evaluation mode.
        most: most sequences of the batch.
        block: most tokens that a pass reads.
    """
    device = model.lm_head.weight.device
    if device.type != "cuda" or model.state_grows or model.reads_offsets:
        return Runner(model, device)
    return CapturedRunner(model, device, most, block)
