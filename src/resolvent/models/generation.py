"""Generation of text: sampling from a model that streams with a state."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Generic

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops.precision import at_least_float32
from ..seeds import check_seed
from .decoding import StreamingModel, TokenReader
from .inference import inference_view
from .reading import read_prompts
from .sampling import Draw, Penalties, RowGenerators, Sampler, SamplingOptions, device_uniform
from .state import State
from .token_batch import check_attention_mask, check_tokens
from .writing import Writer

WORTH_CAPTURING = 64
"""Number of new tokens from which on capturing the step as a CUDA graph saves time."""

SLOTS = 1024
"""Tokens for which a state that grows has slots in a captured step; then the step is captured anew."""


class Generation(nn.Module, Generic[State]):
    """Base of models that generate: ``generate`` and ``stream`` from ``hidden_states`` and ``logits``."""

    vocab_size: int
    d_model: int

    def hidden_states(
        self, input_ids: Tensor, *, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return final hidden states (B, N, D) of tokens (B, N), and the state after them.

        ``cu_seqlens`` are offsets of S sequences packed in one row, integer (S + 1,).
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D)."""
        raise NotImplementedError

    @property
    def state_grows(self) -> bool:
        """True if the state grows with the tokens read: a captured step serves as many as the state has slots for."""
        return False

    def fused_step(self, state: State) -> Callable[[Tensor], Tensor] | None:
        """Return a step of its own that reads one token after another (see ``models.decoding``); None for none.

        The step updates ``state``, whose position is on its device.
        """
        return None

    def compile_steps(self) -> None:
        """Read single tokens with compiled code from now on, on a CPU: in ``generate``, chats and the server.

        The code is compiled when a step first runs, for one sequence, and again for several; PyTorch keeps it on disk.
        A stream or batch that begins later has the weights of that time. Call this after ``prepare_weights``: the code
        is compiled anew when modules, dtypes or the layout of weights have changed.

        Raises:
            ConfigError: the model is not on a CPU or has no step of its own, or there is no C++ compiler.
        """
        raise ConfigError(f"{type(self).__name__} has no step of one token of its own: leave out --compile")

    @torch.no_grad()
    def read(
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Read prompts of any length for the logits of the token that follows each.

        The prompts are read in pieces of bounded size, and the head is applied to the last token alone: ``forward``
        keeps the logits of all tokens in memory. Dropout is off, and the model keeps its mode.

        Args:
            input_ids: prompts, int64 (B, N).
            attention_mask: 1 for tokens, 0 for padding on either side, (B, N).
            state: state after the tokens before the prompts; None for a fresh start.

        Returns:
            logits (B, V) of the next tokens, and the state after the prompts.

        Raises:
            ValueError: tokens, mask or state do not fit each other or the model, or a prompt has no token.
        """
        check_tokens(input_ids, self.vocab_size)
        if attention_mask is not None:
            check_attention_mask(attention_mask, input_ids)
        model = inference_view(self)
        hidden, state = read_prompts(model, input_ids, attention_mask, state)
        return at_least_float32(model.logits(hidden)), state

    def generate(self, input_ids: Tensor, max_new_tokens: int, *, samples: int = 1, **options: Any) -> Tensor:
        """Continue prompts: (B, N) int64 -> (B * samples, N + new) int64. The options are those of ``draws``."""
        new = list(self.stream(input_ids, max_new_tokens, samples=samples, **options))
        return torch.cat([input_ids.repeat_interleave(samples, dim=0), *(token.unsqueeze(1) for token in new)], dim=1)

    def stream(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Iterator[Tensor]:
        """Continue prompts and yield each new token, int64 (B,), as soon as it is drawn.

        The options are those of ``draws``, but for ``logprobs``.
        """
        return (draw.token for draw in self.draws(input_ids, max_new_tokens, **options))

    def draws(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        samples: int = 1,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        logprobs: int | None = None,
        eos_token_id: int | Collection[int] | None = None,
        attention_mask: Tensor | None = None,
        state: State | None = None,
        **sampling: Any,
    ) -> Iterator[Draw]:
        """Continue prompts and yield a draw for each new token: the token of every sequence, with log probabilities.

        The state has a constant size, unless the model attends to all tokens: the cost per token does not depend on the
        number of tokens read. Dropout is off, and the model keeps its mode: streams may alternate, in one thread or in
        several (see ``inference_view``).

        Args:
            input_ids: prompts, int64 (B, N).
            max_new_tokens: largest number of new tokens.
            samples: number of sequences that go on from each prompt, which is read once: the first ``samples`` rows
                are those of the first prompt.
            seeds: a seed for each of the B * ``samples`` sequences. A sequence draws the same tokens alone and in a
                batch.
            generator: source of randomness of all sequences together, of this stream alone; the same seed gives the
                same text. Where there are neither seeds nor a generator, the global generator of the model's device is
                used.
            logprobs: number of likeliest tokens whose log probabilities are in every draw, beside that of the drawn
                token; None for no log probabilities.
            eos_token_id: token that ends a sequence, or several of them. The sequence yields it from then on; the
                stream ends when all sequences have ended.
            attention_mask: 1 for tokens, 0 for padding on either side, (B, N).
            state: state after the tokens before the prompt. The repetition penalty does not see those tokens.
            **sampling: fields of ``SamplingOptions``: temperature, top_k, top_p, min_p, repetition_penalty,
                presence_penalty, frequency_penalty.

        Raises:
            ConfigError: the model is in training mode and has no view.
            ResolventError: logits are not finite. On CUDA they are checked at the end of the stream: a check per token
                would stall the queue.
            ValueError: an option is out of range, or a prompt has an id outside the vocabulary.
        """
        check_tokens(input_ids, self.vocab_size)
        options = SamplingOptions(**sampling)
        sequences = len(input_ids) * samples
        _check_counts(max_new_tokens, samples, logprobs, seeds, sequences, generator)
        if attention_mask is not None:
            check_attention_mask(attention_mask, input_ids)
        if seeds is None:
            uniform = device_uniform(sequences, input_ids.device, generator)
        else:
            uniform = RowGenerators.of_seeds(seeds)
        penalties = _penalties(options, input_ids, attention_mask, samples, self.vocab_size)
        sampler = Sampler([options] * sequences, uniform, penalties)

        return _draws(
            inference_view(self),
            input_ids,
            max_new_tokens,
            samples=samples,
            sampler=sampler,
            top=logprobs,
            ends=_ends(eos_token_id),
            attention_mask=attention_mask,
            state=state,
        )


@torch.inference_mode()
def _draws(
    model: StreamingModel[State],
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    samples: int,
    sampler: Sampler,
    top: int | None,
    ends: list[int],
    attention_mask: Tensor | None,
    state: State | None,
) -> Iterator[Draw]:
    """Yield the draws of ``draws`` from a model in evaluation mode, with options in range."""
    if not max_new_tokens:
        return
    hidden, state = read_prompts(model, input_ids, attention_mask, state)
    if samples > 1:
        hidden, state = hidden.repeat_interleave(samples, dim=0), state.repeat(samples)
    logits = at_least_float32(model.logits(hidden))
    # The reader is the only one that reads on from the state, until the writer captures and drops the reader.
    writer = Writer(TokenReader(model, state.reusable()), sampler, top, ends, logits)
    draw, slots = writer.first, 0
    for remaining in range(max_new_tokens, 0, -1):
        yield draw
        if remaining == 1 or (ends and writer.ended.all()):
            writer.check()
            return
        if not slots and logits.is_cuda and max_new_tokens >= WORTH_CAPTURING:
            slots = SLOTS if model.state_grows and remaining >= SLOTS + WORTH_CAPTURING else remaining
            state = writer.capture(model, state, slots)
        draw, slots = writer(), slots - 1


def _ends(eos_token_id: int | Collection[int] | None) -> list[int]:
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else sorted(eos_token_id)


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
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    return Sampler([options] * len(logits), device_uniform(len(logits), logits.device, generator), None)(logits).token


def _penalties(
    options: SamplingOptions, input_ids: Tensor, mask: Tensor | None, samples: int, vocab_size: int
) -> Penalties | None:
    """Return the penalties of ``samples`` sequences per prompt, (B, N); None where the options have none."""
    if not options.penalises:
        return None
    kept = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    prompts = [ids[keep] for ids, keep in zip(input_ids, kept, strict=True) for _ in range(samples)]
    return Penalties([options] * len(prompts), prompts, vocab_size, input_ids.device)


def _check_counts(
    max_new_tokens: int,
    samples: int,
    logprobs: int | None,
    seeds: Sequence[int] | None,
    sequences: int,
    generator: torch.Generator | None,
) -> None:
    """Raise a ValueError unless the numbers of tokens, samples and seeds are in range and fit each other."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
    if samples < 1:
        raise ValueError(f"samples must be >= 1, got {samples}")
    if logprobs is not None and logprobs < 0:
        raise ValueError(f"logprobs must be >= 0, got {logprobs}")
    if seeds is None:
        return
    if generator is not None:
        raise ValueError("seeds and generator are both given; give one source of randomness")
    if len(seeds) != sequences:
        raise ValueError(f"seeds must have one seed for each of the {sequences} sequences, got {len(seeds)}")
    for seed in seeds:
        check_seed(seed)
