"""Generation of text: sampling from a model that streams with a state."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic

import torch
from torch import Tensor, nn

from ..errors import ResolventError
from ..ops.precision import at_least_float32
from ..ops.prefix_sum import prefix_sum
from .decoding import CAPTURING, CapturedStep, StreamingModel, read_token
from .inference import inference_view
from .state import State
from .token_batch import check_attention_mask, check_tokens

_log = logging.getLogger(__name__)

PREFILL = 2048
"""Tokens of a prompt that one forward pass reads: without padding, longer prompts need no more memory."""

WORTH_CAPTURING = 64
"""Number of new tokens from which on capturing the step as a CUDA graph saves time."""


class Generation(nn.Module, Generic[State]):
    """Base of models that generate: ``generate`` and ``stream`` from ``hidden_states`` and ``logits``."""

    vocab_size: int

    def hidden_states(
        self, input_ids: Tensor, *, state: State | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return final hidden states (B, N, D) of tokens (B, N), and the state after them."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D)."""
        raise NotImplementedError

    @property
    def state_grows(self) -> bool:
        """True if the state grows with the number of tokens read: no step of this model can be captured."""
        return False

    def fused_step(self, state: State) -> Callable[[Tensor], Tensor] | None:
        """Return kernels that read one token after another (see ``models.decoding``); None where the model has none.

        The kernels update ``state``, whose position is on its device.
        """
        return None

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Continue prompts: (B, N) int64 -> (B, N + new) int64. The options are those of ``stream``."""
        new = list(self.stream(input_ids, max_new_tokens, **options))
        return torch.cat([input_ids, *(token.unsqueeze(1) for token in new)], dim=1)

    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        eos_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        state: State | None = None,
    ) -> Iterator[Tensor]:
        """Continue prompts and yield each new token, int64 (B,), as soon as it is drawn.

        The state has a constant size, unless the model attends to all tokens: the cost per token does not depend on the
        number of tokens read. Dropout is off,
        and the model keeps its mode: streams may alternate, in one thread or in several (see ``inference_view``).

        Args:
            input_ids: prompts, int64 (B, N).
            max_new_tokens: largest number of new tokens.
            temperature: 0 takes the likeliest token, 1 samples from the model's distribution.
            top_k: sample from the k likeliest tokens only, and from those that are as likely as the k-th.
            top_p: sample from the smallest set of tokens that has this probability, at least one.
            generator: source of randomness, of this stream alone; the same seed gives the same text. None for the
                global generator of the model's device.
            eos_token_id: token that ends a sequence, which yields this token from then on; the stream ends when all
                sequences have ended.
            attention_mask: 1 for tokens, 0 for padding on either side, (B, N).
            state: state after the tokens before the prompt.

        Raises:
            ConfigError: the model is in training mode and has no view.
            ResolventError: logits are not finite. On CUDA at temperature 0 they are checked at the end of the stream:
                a check per token would stall the queue.
            ValueError: an option is out of range, or a prompt has an id outside the vocabulary.
        """
        check_tokens(input_ids, self.vocab_size)
        _check_options(max_new_tokens, temperature, top_k, top_p)
        if attention_mask is not None:
            check_attention_mask(attention_mask, input_ids)
        draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        return _stream(inference_view(self), input_ids, max_new_tokens, draw, eos_token_id, attention_mask, state)


@torch.inference_mode()
def _stream(
    model: StreamingModel[State],
    input_ids: Tensor,
    max_new_tokens: int,
    draw: Callable[[Tensor], Tensor],
    eos_token_id: int | None,
    attention_mask: Tensor | None,
    state: State | None,
) -> Iterator[Tensor]:
    """Yield the tokens of ``stream`` from a model in evaluation mode, with options in range.

    ``draw`` maps logits (B, V) to a token of every row (B,).
    """
    hidden, state = _prefill(model, input_ids, attention_mask, state)
    step, logits = _stepper(model, state, max_new_tokens), at_least_float32(model.logits(hidden))
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    largest = logits.amax(-1)
    for remaining in range(max_new_tokens, 0, -1):
        token = draw(logits)
        if logits.is_cuda:  # once not finite, always not finite
            largest = largest + logits.amax(-1)
        if eos_token_id is not None:
            token = torch.where(done, eos_token_id, token)
            done = done | (token == eos_token_id)
        yield token
        if remaining == 1 or (eos_token_id is not None and done.all()):
            _check_finite(largest)
            return
        logits = step(token)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token of every row: logits float (B, V), -inf for tokens that are excluded -> int64 (B,).

    Raises:
        ResolventError: the largest logit of a row is not finite. On CUDA, this is not checked at temperature 0.
    """
    logits = at_least_float32(logits)
    largest = logits.amax(-1, keepdim=True)
    if not (logits.is_cuda and temperature == 0):
        _check_finite(largest)
    if temperature == 0:
        return logits.argmax(-1)
    # The temperature stays within the normal numbers of the dtype: 0 / 0 and -inf / inf are no logits.
    limits = torch.finfo(logits.dtype)
    logits = (logits - largest) / min(max(temperature, limits.tiny), limits.max)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        beyond = prefix_sum(probability) - probability >= top_p
        beyond[:, 0] = False  # top_p may round to 0 in the dtype of the logits
        logits = logits.masked_fill(beyond.scatter(-1, index, beyond), -torch.inf)
    if generator is None and logits.is_cuda:
        with CAPTURING:  # a capture in another thread uses the generator of the device
            return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
    device = generator.device if generator is not None else logits.device
    return torch.multinomial(logits.softmax(-1).to(device), 1, generator=generator).squeeze(-1).to(logits.device)


def _check_finite(largest: Tensor) -> None:
    """Raise a ResolventError unless the largest logit of every row, (B,) or (B, 1), is finite."""
    if not (finite := largest.flatten().isfinite()).all():
        row = int((~finite).nonzero()[0])
        raise ResolventError(
            f"the largest logit of row {row} is {largest.flatten()[row]}: the weights or the state are not finite, or "
            "every token is excluded; load weights from before a divergence"
        )


def _prefill(
    model: StreamingModel[State], input_ids: Tensor, mask: Tensor | None, state: State | None
) -> tuple[Tensor, State]:
    """Read the prompts; return the hidden state of each sequence's last token (B, D), and the state after it."""
    if mask is not None and not mask.all():
        hidden, state = model.hidden_states(input_ids, state=state, attention_mask=mask)
        index = torch.arange(input_ids.shape[1], device=mask.device)
        last = torch.where(mask.bool(), index, -1).amax(dim=1)
        if (last < 0).any():
            raise ValueError("attention_mask leaves a prompt without any token; a prompt needs at least one")
        return hidden[torch.arange(len(last)), last], state
    hidden = None
    for piece in input_ids.split(PREFILL, dim=1):
        hidden, state = model.hidden_states(piece, state=state)
    assert hidden is not None and state is not None
    return hidden[:, -1], state


def _stepper(model: StreamingModel[State], state: State, tokens: int) -> Callable[[Tensor], Tensor]:
    """Return a function that reads one token of every sequence, (B,), per call and returns the logits of the next."""
    if state.device.type == "cuda" and tokens >= WORTH_CAPTURING:
        if not model.state_grows:
            return CapturedStep(model, state)
        _log.info("no captured steps: the model attends to all tokens, and its state grows")
    state = state.reusable()  # what the prompt left behind is nobody else's

    def step(token: Tensor) -> Tensor:
        nonlocal state
        logits, state = read_token(model, token, state)
        return logits

    return step


def _check_options(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be >= 0 and finite, got {temperature}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be an integer >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
