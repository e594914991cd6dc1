"""Trace of a forward pass: a typed record of what every layer computed.

Shapes: B batch, N sequence, D model width. Of a padded batch the records have the tokens without padding, one sequence
after another in one row, (1, T); ``Trace.restore`` gives them the shape of the input.
"""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from .state import State
from .token_batch import TokenBatch


class BlockRecord(Protocol):
    """Record of one block: a named tuple of a phase, in which these two fields are the first and the last.

    Attributes:
        output: residual stream behind the block, (B, N, D).
        state: state of the block after the last token.
    """

    @property
    def output(self) -> Tensor: ...

    @property
    def state(self) -> tuple: ...


Record = TypeVar("Record", bound=BlockRecord)


@dataclass(frozen=True, repr=False)
class Trace(Generic[Record, State]):
    """One forward pass, from the token vectors to the final norm.

    Attributes:
        batch: the tokens as the blocks read them.
        before: the state that the model was given.
        vectors: vectors of the token embedding, (B, N, D).
        embedded: input embeddings, scaled and with positions, (B, N, D).
        entered: input of the first block: ``embedded`` after dropout, (B, N, D).
        layers: what every block computed; empty unless asked for.
        normed: final hidden states, (B, N, D).
        next_state: the state after the last token; None where it was not asked for.
    """

    batch: TokenBatch
    before: State | None
    vectors: Tensor
    embedded: Tensor
    entered: Tensor
    layers: tuple[Record, ...]
    normed: Tensor
    next_state: State | None

    def __repr__(self) -> str:
        batch, length = self.batch.shape
        return f"Trace({batch} x {length} tokens, records of {len(self.layers)} layers, {self.next_state})"

    @property
    def after(self) -> State:
        """The state after the last token, of a trace that has it."""
        assert self.next_state is not None
        return self.next_state

    @property
    def hidden(self) -> Tensor:
        """Final hidden states in the shape of the input, (B, N, D); zero where there was padding."""
        return self.restore(self.normed)

    def restore(self, x: Tensor) -> Tensor:
        """Give a tensor of a record, (1, T, ...), the shape of the input, (B, N, ...); zero where there was padding."""
        return self.batch.restore(x)
