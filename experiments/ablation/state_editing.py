"""Readings of texts that continue from a boundary with the original or with an edited state.

The cost of an edit is the increase of the loss, in nats per token, text by text: only the edit differs between the two
readings.

Shapes: B texts, N tokens of each, L layers, D model width, H heads, K = V head width.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from resolvent.errors import ConfigError
from resolvent.evaluation.scoring import Advance, score_tokens
from resolvent.evaluation.statistics import Estimate
from resolvent.models import Trace, observe
from resolvent.models.phase2 import LayerState, Phase2Block, Phase2IntegratedModel, Phase2Record, Phase2State
from resolvent.models.phase2.block import blocks_of
from resolvent.ops import MemoryState

Phase2Trace = Trace[Phase2Record, Phase2State]


class MemoryInput(NamedTuple):
    """Input of a memory layer: x (B, N, D) and Γ (B, N, H)."""

    x: Tensor
    gamma: Tensor


class Cost(NamedTuple):
    """Increase of the loss by an edit, nats per token of every text, float64 (B,)."""

    by_text: np.ndarray

    @property
    def estimate(self) -> Estimate:
        return Estimate.of(self.by_text.tolist())

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.by_text - other.by_text)


@dataclass(frozen=True)
class Reading:
    """Reading of texts by a model.

    Attributes:
        model: the model.
        inputs: the tokens, int64 (B, N), on the model's device.
        labels: next tokens, int64 (B, N).
        length: tokens before the boundary; those after it are the horizon.
        states: the state some tokens before the boundary, by their number; that at the boundary is ``states[0]``.
        gamma: Γ of every token, a tensor (B, N, H) per layer.
        recent: inputs of the memory layers between the first of these states and the boundary.
        nats: of every label, float64 (B, N).
        batch_tokens: most tokens in one call of the model.
        advance: called with the number of tokens read.
    """

    model: Phase2IntegratedModel
    inputs: Tensor
    labels: Tensor
    length: int
    states: dict[int, Phase2State]
    gamma: list[Tensor]
    recent: list[MemoryInput]
    nats: Tensor
    batch_tokens: int
    advance: Advance

    @property
    def state(self) -> Phase2State:
        """The state at the boundary."""
        return self.states[0]

    @property
    def memories(self) -> list[Tensor]:
        """Memories S at the boundary, (B, H, K, V) per layer."""
        return [memory_of(layer).memory for layer in self.state.layers]

    @property
    def blocks(self) -> list[Phase2Block]:
        return blocks_of(self.model)

    @property
    def gamma_means(self) -> Tensor:
        """Mean Γ of every head over all tokens, (L, H)."""
        return torch.stack([gamma.double().mean(dim=(0, 1)) for gamma in self.gamma])

    def cost_of_memories(self, memories: Sequence[Tensor]) -> Cost:
        """Return the cost over the horizon of continuing with other memories, (B, H, K, V) per layer.

        The rest of the state is unchanged. ``forgetting`` needs no edit: at a boundary it is zero, and without
        consolidation nothing reads it.
        """
        state = with_memories(self.state, memories)
        stretch = slice(self.length, None)
        nats, _ = read_nats(
            self.model, self.inputs[:, stretch], self.labels[:, stretch], state, self.batch_tokens, self.advance
        )
        return Cost((nats - self.nats[:, stretch]).mean(dim=1).cpu().numpy())

    def cost_of_rereading(self) -> Cost:
        """Return the cost over all tokens of reading the texts again with a changed model, for example with hooks."""
        parts, state = [], None
        for start, end in itertools.pairwise(_cuts(self.length, self.states, self.inputs.shape[1])):
            piece = slice(start, end)
            nats, state = read_nats(
                self.model, self.inputs[:, piece], self.labels[:, piece], state, self.batch_tokens, self.advance
            )
            parts.append(nats)
        return Cost((torch.cat(parts, dim=1) - self.nats).mean(dim=1).cpu().numpy())

    def recent_memories(self, distance: int) -> list[Tensor]:
        """Return the memories at the boundary that begin empty ``distance`` tokens before it.

        Every memory layer gets the same inputs again, so that the result is the writes of those tokens, and the rest of
        the model is unchanged. Consolidations stay at their positions and act on these memories.

        Args:
            distance: one of those of ``states``.

        Returns:
            (B, H, K, V) per layer.
        """
        if not distance:
            return [torch.zeros_like(memory) for memory in self.memories]
        before, memories = self.states[distance], []
        for block, layer, given in zip(self.blocks, before.layers, self.recent, strict=True):
            assert block.hebbian is not None  # ``memory_of`` has refused the model
            memory = memory_of(layer)
            empty = torch.zeros_like(memory.memory)
            output = block.hebbian(
                given.x[:, -distance:],
                given.gamma[:, -distance:],
                # Γ̄ stays: it is no content, but the sum of Γ dt in the interval so far.
                memory._replace(memory=empty),
                layer.conv_tail,
                before.position,
                None,
                block.consolidation(),
            )
            memories.append(output.state.memory)
        return memories


def read_texts(
    model: Phase2IntegratedModel,
    texts: np.ndarray,
    length: int,
    distances: Sequence[int] = (),
    *,
    batch_tokens: int = 4096,
    advance: Advance = lambda _: None,
) -> Reading:
    """Read texts as they are, and keep what edits begin with.

    Call it, and what it returns, in inference mode and with the model in evaluation mode.

    Args:
        model: the model.
        texts: tokens, the last of which is predicted only, (B, N + 1).
        length: tokens before the boundary, less than N.
        distances: before the boundary, where states are kept, too; less than ``length``.
        batch_tokens: most tokens in one call of the model.
        advance: called with the number of tokens read.

    Raises:
        ConfigError: the memories rotate, and what is edited would have to turn with them.
    """
    if model.config.memory_rotation:
        raise ConfigError("memory_rotation must be False to edit memories, got True")
    tokens = torch.from_numpy(texts.astype(np.int64)).to(next(model.parameters()).device)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    blocks, state, nats = blocks_of(model), None, []
    states: dict[int, Phase2State] = {}
    gamma: list[list[Tensor]] = [[] for _ in blocks]
    recent: list[list[MemoryInput]] = [[] for _ in blocks]
    for start, end in itertools.pairwise(_cuts(length, distances, inputs.shape[1])):
        piece, is_recent = slice(start, end), length - max(distances, default=0) <= start < length
        traces: list[Phase2Trace] = []
        scores, state = read_nats(
            model, inputs[:, piece], labels[:, piece], state, batch_tokens, advance, traces.append
        )
        nats.append(scores)
        states[length - end] = state
        for layer, records in enumerate(zip(*(trace.layers for trace in traces), strict=True)):
            gamma[layer] += [record.gamma for record in records]
            if is_recent:
                recent[layer] += [MemoryInput(record.memory_input, record.gamma) for record in records]
    return Reading(
        model=model,
        inputs=inputs,
        labels=labels,
        length=length,
        states={distance: states[distance] for distance in (*distances, 0)},
        gamma=[torch.cat(parts, dim=1) for parts in gamma],
        recent=[MemoryInput(*(torch.cat(parts, dim=1) for parts in zip(*given, strict=True))) for given in recent]
        if distances
        else [],
        nats=torch.cat(nats, dim=1),
        batch_tokens=batch_tokens,
        advance=advance,
    )


def read_nats(
    model: Phase2IntegratedModel,
    inputs: Tensor,
    labels: Tensor,
    state: Phase2State | None,
    batch_tokens: int,
    advance: Advance,
    look: Callable[[Phase2Trace], None] | None = None,
) -> tuple[Tensor, Phase2State]:
    """Return the nats of labels (B, N) after inputs (B, N) and a state, float64 (B, N), and the state after them.

    ``look`` is given the trace of every piece.
    """
    width, nats = max(1, batch_tokens // len(inputs)), []
    for piece, wanted in zip(inputs.split(width, dim=1), labels.split(width, dim=1), strict=True):
        if look is None:
            hidden, state = model.hidden_states(piece, state=state)
        else:
            trace = observe(model, piece, state=state)
            hidden, state = trace.hidden, trace.after
            look(trace)
        nats.append(score_tokens(model, hidden, wanted).nats.double())
        advance(piece.numel())
    assert state is not None
    return torch.cat(nats, dim=1), state


def with_memories(state: Phase2State, memories: Sequence[Tensor]) -> Phase2State:
    """Return a copy of a state with other memories S, (B, H, K, V) per layer."""
    layers = zip(state.layers, memories, strict=True)
    edited = (layer._replace(memory=memory_of(layer)._replace(memory=memory)) for layer, memory in layers)
    return Phase2State(state.position, tuple(edited))


def memory_of(layer: LayerState) -> MemoryState:
    """Return the memory of a layer.

    Raises:
        ConfigError: the layer attends instead.
    """
    if layer.memory is None:
        raise ConfigError("a block of attention_layers has no memory to edit: take a model without attention")
    return layer.memory


@contextmanager
def mean_gamma_at(reading: Reading, chosen: Tensor) -> Iterator[None]:
    """Replace Γ at some tokens (B, N) by the mean of every head, while texts are read from their beginning.

    This is the Γ of both the Hamiltonian and the memory.
    """

    def hook(mean: Tensor) -> Callable[..., Any]:
        read_before = 0

        def replace(_module: nn.Module, _arguments: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            nonlocal read_before
            potential, gamma = output
            here = chosen[:, read_before : read_before + gamma.shape[1], None]
            read_before += gamma.shape[1]
            return potential, torch.where(here, mean.to(gamma), gamma)

        return replace

    pairs = zip(reading.blocks, reading.gamma_means, strict=True)
    potential = "dissipative_bk.potential"
    handles = [block.get_submodule(potential).register_forward_hook(hook(mean)) for block, mean in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cuts(length: int, distances: Iterable[int], end: int) -> list[int]:
    """Return the positions of the cuts of a text: its ends, the boundary, and distances before it."""
    return sorted({0, length, end, *(length - distance for distance in distances)})
