"""Writing: one token of every sequence after another, on CUDA by replaying a graph of step and sampler.

Shapes: B sequences, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ops import likeliest
from ..ops.precision import at_least_float32
from .decoding import WARM_UP, StreamingModel, captured, step_in_place
from .sampling import Draw, Sampler, check_finite
from .state import State, map_tensors


class Writer:
    """Draws of B sequences, each from the logits that follow the draw before.

    Args:
        step: reads a token of every sequence, int64 (B,), and returns logits (B, V).
        sampler: sampler of the sequences.
        top: number of likeliest tokens whose log probabilities are in every draw; None for none.
        ends: tokens each of which ends a sequence, which then yields that token for good.
        logits: logits of the first draw, (B, V).

    Attributes:
        ended: sequences that have ended, bool (B,).
    """

    def __init__(
        self,
        step: Callable[[Tensor], Tensor],
        sampler: Sampler,
        top: int | None,
        ends: Sequence[int],
        logits: Tensor,
    ) -> None:
        self._step, self._sampler, self._top = step, sampler, top
        rows, device = len(logits), logits.device
        self._ends = torch.tensor(ends, device=device) if ends else None
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self._token = torch.zeros(rows, dtype=torch.int64, device=device)
        self._largest = torch.zeros(rows, dtype=torch.promote_types(logits.dtype, torch.float32), device=device)
        self._numbers = torch.zeros(rows, dtype=torch.float64, device=device) if sampler.random else None
        self._advance: Callable[[], Draw] = lambda: self._draw(self._step(self._token))
        self._set_numbers()
        self.first = map_tensors(self._draw(logits), torch.clone)

    def __call__(self) -> Draw:
        """Read the last draw and return the next."""
        self._set_numbers()
        return map_tensors(self._advance(), torch.clone)  # the next draw overwrites it

    def check(self) -> None:
        """Raise a ResolventError if a logit so far was not finite: what is not finite once stays so in the sum."""
        check_finite(self._largest)

    def capture(self, model: StreamingModel[State], state: State, tokens: int) -> State:
        """Replay a CUDA graph of step and draw from now on.

        Args:
            model: a model on CUDA, in evaluation mode.
            state: state before the last draw is read; it is copied.
            tokens: most draws until the next capture: for those, a state that grows gets slots now.

        Returns:
            the state that every draw updates, where it is.
        """
        device = self._token.device
        of_trial, own = (state.clone().with_position_on(device).with_room(max(tokens, WARM_UP)) for _ in range(2))
        trial = step_in_place(model, of_trial, has_room=True)
        self._step = step_in_place(model, own, has_room=True)
        changing = [self.ended, self._token, self._largest, *self._sampler.tensors()]
        before = [x.clone() for x in changing]
        graph, draw = captured(
            device,
            lambda: self._draw(self._step(self._token)),
            lambda: self._draw(trial(self._token)),
        )
        for x, old in zip(changing, before, strict=True):
            x.copy_(old)

        def advance() -> Draw:
            graph.replay()
            return draw

        self._advance = advance
        return own

    def _set_numbers(self) -> None:
        """Draw the random numbers of the next draw."""
        if self._numbers is not None:
            self._numbers.copy_(self._sampler.numbers(), non_blocking=True)

    def _draw(self, logits: Tensor) -> Draw:
        """Draw from logits (B, V), and keep the tokens; on CUDA, Python reads nothing."""
        if self._sampler.greedy and self._top is None and self._ends is None:
            likeliest(at_least_float32(logits), self._token, self._largest)
            draw = Draw(self._token)
        else:
            draw, largest = self._sampler.draw(logits, self._numbers, self._top)
            self._largest += largest
            if self._ends is not None:
                draw = draw._replace(token=torch.where(self.ended, self._token, draw.token))
                self.ended |= (draw.token.unsqueeze(1) == self._ends).any(1)  # isin may sort, and wait for the device
            self._token.copy_(draw.token)
        if logits.device.type == "cpu":
            self.check()
        return draw
