"""Reading of prompts: pieces of bounded size, state in and state out, on CUDA replayed from a graph.

Shapes: B prompts, N tokens of a prompt, S sequences of a piece, T tokens of a piece, D model width.
"""

import itertools
from collections.abc import Sequence
from typing import Generic

import torch
from torch import Tensor

from .decoding import StreamingModel, captured
from .state import State
from .token_batch import unpad

PIECE = 2048
"""Tokens of a prompt that one forward pass reads on the CPU: longer prompts need no more memory."""
LEAST_ON_CUDA = 256
"""Least tokens of a prompt that one forward pass reads on CUDA."""
PIECE_ON_CUDA = 1 << 25
"""Numbers of the residual stream of a forward pass on CUDA, 65,536 tokens of a width of 512.

A piece this large takes longer than Python needs to launch it, and about 2 GiB in half precision.
"""


def piece_length(sequences: int, width: int, device: torch.device) -> int:
    """Return how many tokens of each of some prompts a forward pass of a model of this width reads at once."""
    return max(LEAST_ON_CUDA, PIECE_ON_CUDA // (width * sequences)) if device.type == "cuda" else PIECE


def read_prompts(
    model: StreamingModel[State], input_ids: Tensor, mask: Tensor | None = None, state: State | None = None
) -> tuple[Tensor, State]:
    """Read prompts in pieces.

    Args:
        model: a model in evaluation mode.
        input_ids: prompts, int64 (B, N), N >= 1.
        mask: 1 for tokens, 0 for padding on either side, (B, N); None for no padding.
        state: state after the tokens before the prompts; None for a fresh start.

    Returns:
        The hidden state of the last token of every prompt, (B, D), and the state after it.

    Raises:
        ValueError: a prompt has no token.
    """
    length = piece_length(len(input_ids), model.d_model, input_ids.device)
    if mask is not None and not mask.all():
        return _read_ragged(model, input_ids, mask, state, length)
    hidden = None
    for piece in input_ids.split(length, dim=1):
        hidden, state = model.hidden_states(piece, state=state)
    assert hidden is not None and state is not None
    return hidden[:, -1], state


def _read_ragged(
    model: StreamingModel[State], input_ids: Tensor, mask: Tensor, state: State | None, length: int
) -> tuple[Tensor, State]:
    """Read prompts of different lengths, packed end to end; those that have ended have no tokens in later pieces."""
    unpadded = unpad(input_ids, mask)
    prompts = unpadded.tokens[0].split(unpadded.cu_seqlens.diff().tolist())
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    if not lengths.all():
        raise ValueError("attention_mask leaves a prompt without any token; a prompt needs at least one")
    last: Tensor | None = None
    for start in range(0, int(lengths.max()), length):
        offsets = torch.cat([lengths.new_zeros(1), (lengths - start).clamp(0, length).cumsum(0)])
        piece = torch.cat([prompt[start : start + length] for prompt in prompts]).unsqueeze(0)
        hidden, state = model.hidden_states(piece, state=state, cu_seqlens=offsets)
        rows = hidden[0, (offsets[1:] - 1).clamp(min=0).to(hidden.device)]
        last = rows if last is None else torch.where((offsets.diff() > 0).to(rows.device).unsqueeze(1), rows, last)
    assert last is not None and state is not None
    return last, state


class CapturedPiece(Generic[State]):
    """Forward pass over the next tokens of several sequences as a CUDA graph, which one launch replays.

    The sequences lie end to end in a row of T tokens. Their offsets and states are in memory of the graph, so that it
    serves sequences of any lengths. A last sequence of no meaning reads what they leave free.

    Args:
        model: a model on CUDA, in evaluation mode, whose offsets Python does not read.
        fresh: state of one sequence before its first token: zeros.
        sequences: most sequences S of a piece.
        tokens: most tokens T of a piece.
    """

    def __init__(self, model: StreamingModel[State], fresh: State, sequences: int, tokens: int) -> None:
        self.model, self.sequences, self.tokens, device = model, sequences, tokens, fresh.device
        self.state = fresh.repeat(sequences + 1).clone().with_position_on(device)
        self._ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
        self._offsets = torch.tensor([0] * (sequences + 1) + [tokens], device=device)

        def read() -> Tensor:
            hidden, new = model.hidden_states(self._ids, state=self.state, cu_seqlens=self._offsets)
            torch._foreach_copy_(self.state.tensors(), new.tensors())
            return hidden[0, (self._offsets[1:-1] - 1).clamp(min=0)]

        self._graph, self._hidden = captured(device, read)
        torch._foreach_zero_(self.state.tensors())

    def put(self, states: Sequence[State | None]) -> None:
        """Set the states of the first sequences, of one sequence each; None for a fresh start."""
        for row, state in enumerate(states):
            mine = [x[row] for x in self.state.tensors()]
            if state is None:
                torch._foreach_zero_(mine)
            else:
                torch._foreach_copy_(mine, [x[0] for x in state.tensors()])

    def take(self, rows: slice) -> State:
        """Return a copy of the states of some sequences, with the position on the CPU."""
        copy = self.state.map(lambda x: x[rows].clone(memory_format=torch.contiguous_format))
        return copy.with_position_on(torch.device("cpu"))

    def __call__(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Read the next tokens of the first sequences, which update their states.

        Args:
            ids: tokens of the sequences end to end, int64 (n,), n <= T, on any device.
            lengths: tokens of each sequence, which may be 0.

        Returns:
            The hidden state of the last token of every sequence, (S, D), which the next call overwrites. It has no
            meaning for a sequence without a token.
        """
        offsets, end = [0, *itertools.accumulate(lengths)], sum(lengths)
        offsets += [end] * (self.sequences - len(lengths))
        self._offsets.copy_(torch.tensor([*offsets, self.tokens]), non_blocking=True)
        self._ids[0, :end].copy_(ids, non_blocking=True)
        self._graph.replay()
        return self._hidden
