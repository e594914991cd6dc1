"""Sequence parallelism: each process reads a stretch of a sequence and sends only states to the next process.

A block needs of the earlier stretches only the final state of the same block in the process before. So every block
receives a state, computes, and sends its final state, as a pipeline in which each process is one block behind the
process before it. P processes take ``(L + P - 1) / L`` of the ideal time for L blocks, forward and backward, for any
length, with and without consolidation. The gradients of the states are sent in the opposite direction, so that the
gradient is that of the whole sequence.

Shapes: B sequences, N tokens of a stretch, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import ConfigError
from .models.base import Block, IntegratedModel
from .models.state import ModelState, map_tensors, named_tensors
from .ops import IGNORED


class SequenceParallel(nn.Module):
    """Model that reads one stretch of every sequence in each process of a group.

    All processes call the model and ``backward`` equally often. Each has all weights; after ``backward``,
    ``sum_gradients`` sums the gradients of all processes.

    Args:
        model: the model, the same in all processes.
        group: the processes, in the order of their stretches; None for all.

    Raises:
        ConfigError: the state of the model grows with the tokens that it has read.
    """

    def __init__(self, model: IntegratedModel, group: dist.ProcessGroup | None = None):
        super().__init__()
        if model.state_grows:
            raise ConfigError(
                "attention_window=None cannot be trained with stretches of a sequence: only states of a fixed size "
                "travel; set attention_window"
            )
        self.model = model
        self._chain = _Chain(group)

    def stretch(self, x: Tensor) -> Tensor:
        """Return the stretch of this process of whole sequences (B, ...); stretches are as equal as possible."""
        return x.tensor_split(self._chain.size, dim=1)[self._chain.rank]

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """Return logits or loss of the stretch of this process.

        Args:
            input_ids: tokens, integer (B, N); N may differ from process to process.
            labels: next tokens, int64 (B, N), or -100 at ignored positions.
            state: state of the sequences before the first stretch; only that of the first process is used.
            return_state: also return the state after the stretch; in the last process, that of the whole sequences.

        Returns:
            logits (B, N, V), or, given labels, the mean nats of all stretches, the same number in every process.

        Raises:
            ValueError: tokens, labels or state do not fit each other or the model.
        """
        if labels is not None and labels.shape != input_ids.shape:
            expected, got = tuple(input_ids.shape), tuple(labels.shape)
            raise ValueError(f"labels must have the shape of input_ids, {expected}, got {got}")
        chain, model = self._chain, self.model
        before = self._state_before(input_ids, state)
        with self._linked_blocks(before):
            hidden, after = model.hidden_states(input_ids, state=before)
        output = model.logits(hidden) if labels is None else self._mean_loss(hidden, labels)
        chain.settle()
        return (output, after) if return_state else output

    def sum_gradients(self) -> None:
        """Sum the gradients of the parameters over the processes."""
        self._chain.settle()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        works = [dist.all_reduce(p.grad, group=self._chain.group, async_op=True) for p in trained]
        for work in works:
            cast(dist.Work, work).wait()

    def _state_before(self, input_ids: Tensor, state: ModelState | None) -> ModelState | None:
        """Return the state before the stretch: its position, and tensors to receive the state of the process before."""
        chain, device = self._chain, input_ids.device
        position = torch.zeros(len(input_ids), dtype=torch.long) if state is None else state.position
        position = chain.from_first(position.to(device)).cpu()
        lengths = chain.gather(torch.tensor(input_ids.shape[1], device=device))
        if chain.first:
            return state
        with torch.no_grad():
            _, empty = self.model.hidden_states(input_ids[:, :1])
        return replace(empty, position=position + sum(lengths[: chain.rank]))

    @contextmanager
    def _linked_blocks(self, before: ModelState | None) -> Iterator[None]:
        """Make every block receive its state and send its final state."""
        chain = self._chain
        anchor = torch.zeros((), requires_grad=True)
        layer_type = before.layer_type if before is not None else ()

        def receive(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = inputs
            index = next(i for i, value in enumerate(others) if isinstance(value, layer_type))
            x, *tensors = _Receive.apply(chain, _tensors(others[index]), anchor, x)
            others[index] = _with_tensors(others[index], tensors)
            return (x, *others)

        def send(block: nn.Module, inputs: tuple[Any, ...], record: Any) -> Any:
            return record._replace(output=_Send.apply(chain, anchor, record.output, *_tensors(record.state)))

        with ExitStack() as hooks:
            for block in cast(Sequence[Block], self.model.blocks):
                if not chain.first:
                    hooks.callback(block.register_forward_pre_hook(receive).remove)
                if not chain.last:
                    hooks.callback(block.register_forward_hook(send).remove)
            yield

    def _mean_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        mine = self.model.loss(hidden, labels, "sum") / self._chain.sum((labels != IGNORED).sum()).clamp(min=1)
        # The value is that of all processes, the gradient that of this process.
        return mine + (self._chain.sum(mine.detach()) - mine.detach())


class _Chain:
    """Chain of processes, each of which receives from the one before and sends to the one after."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.first, self.last = self.rank == 0, self.rank == self.size - 1
        self._on_the_way: list[tuple[Any, Tensor]] = []

    def send(self, tensors: Sequence[Tensor], step: int) -> None:
        """Send tensors asynchronously to the process ``step`` ranks later."""
        packed = torch.cat([_bytes(x) for x in tensors])
        work = dist.isend(packed, group=self.group, group_dst=self.rank + step)
        self._on_the_way.append((work, packed))

    def receive(self, like: Sequence[Tensor], device: torch.device, step: int) -> list[Tensor]:
        """Receive tensors with the shapes and dtypes of others from the process ``step`` ranks later."""
        sizes = [x.numel() * x.element_size() for x in like]
        packed = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        dist.recv(packed, group=self.group, group_src=self.rank + step)
        return [_from_bytes(part, x) for part, x in zip(packed.split(sizes), like, strict=True)]

    def settle(self) -> None:
        """Wait until all sent tensors have arrived."""
        for work, _ in self._on_the_way:
            work.wait()
        self._on_the_way.clear()

    def from_first(self, x: Tensor) -> Tensor:
        """Return the tensor of the first process."""
        x = x.clone()
        dist.broadcast(x, group=self.group, group_src=0)
        return x

    def gather(self, x: Tensor) -> list[int]:
        """Return the numbers of all processes."""
        numbers = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(numbers, x, group=self.group)
        return [int(number) for number in numbers]

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over all processes."""
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x


class _Receive(torch.autograd.Function):
    """Receive the state of a block from the process before, and send its gradient back.

    The input of the block passes through, so that gradients are sent in the order of the blocks. So does an ``anchor``
    that requires a gradient: every process must record the operation, even without trainable inputs.
    """

    @staticmethod
    def forward(ctx: Any, chain: _Chain, like: list[Tensor], anchor: Tensor, x: Tensor) -> Any:
        ctx.chain = chain
        return x, *chain.receive(like, x.device, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *grad_state: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        ctx.chain.send(grad_state, -1)
        return None, None, None, grad


class _Send(torch.autograd.Function):
    """Send the state of a block to the process after, and receive its gradient; x passes through."""

    @staticmethod
    def forward(ctx: Any, chain: _Chain, anchor: Tensor, x: Tensor, *state: Tensor) -> Tensor:
        ctx.chain, ctx.like = chain, [torch.empty_like(t, device="meta") for t in state]
        chain.send(state, 1)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        return None, None, grad, *ctx.chain.receive(ctx.like, grad.device, 1)


def _tensors(layer: Any) -> list[Tensor]:
    return [x for _, x in named_tensors(layer)]


def _with_tensors(layer: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the same structure with other tensors."""
    new = iter(tensors)
    return map_tensors(layer, lambda _: next(new))


def _bytes(x: Tensor) -> Tensor:
    x = x.detach().resolve_conj()
    return (torch.view_as_real(x) if x.is_complex() else x).contiguous().flatten().view(torch.uint8)


def _from_bytes(part: Tensor, like: Tensor) -> Tensor:
    """Return the inverse of ``_bytes``, as an aligned copy."""
    x = part.clone().view(like.dtype.to_real())
    return torch.view_as_complex(x.view(*like.shape, 2)) if like.is_complex() else x.view(like.shape)
