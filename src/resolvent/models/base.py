"""What the models of both phases are: text in, logits out, with a state that the caller holds."""

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..device import pick_device
from ..errors import ConfigError
from ..ops import linear_cross_entropy
from ..ops.precision import at_least_float32, for_products
from .config import ModelConfig, check_fields
from .generation import Generation
from .state import ModelState, named_tensors
from .token_batch import TokenBatch

_log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=ModelConfig)
Model = TypeVar("Model", bound="IntegratedModel")


class Block(nn.Module):
    """Base of the blocks.

    Attributes:
        compute: what a block does; a subclass defines it in the place of ``forward``.
        gradient_checkpointing: whether training computes the block anew in the backward pass instead of keeping what it
            computed. The name is the one by which Transformers finds what it can switch.
    """

    compute: Callable[..., Any]
    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Any = staticmethod(partial(checkpoint, use_reentrant=False))

    def forward(self, *inputs: Any) -> Any:
        """``compute(*inputs)``. What hangs on the module, FSDP's hooks among them, does not run again with it."""
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self.compute, *inputs)
        return self.compute(*inputs)


class IntegratedModel(nn.Module, Generation):
    """A language model that keeps nothing between calls: what it read is in the state that ``forward`` returns."""

    penalised: ClassVar[bool] = False
    """Whether ``forward`` has a penalty to return, with ``return_penalty=True``, that training adds to the loss."""

    config: Any
    vocab_size: int
    d_model: int
    n_layers: int
    token_embedding: nn.Module
    position_embedding: nn.Module
    blocks: nn.ModuleList
    ln_f: nn.LayerNorm
    lm_head: nn.Linear

    @property
    def tied(self) -> bool:
        """Whether the head uses the token embedding's table."""
        return self.lm_head.weight is getattr(self.token_embedding, "weight", None)

    @property
    def n_seq(self) -> int:
        """Tokens of the windows that the model is trained on; it reads any number of them."""
        return self.config.n_seq

    @property
    def reads_offsets(self) -> bool:
        """Whether Python reads the offsets of packed sequences, for which it would wait if they were on a device."""
        return False

    def __init__(self, config: Any, init: bool = True):
        """A model of a configuration; ``init=False`` leaves its weights to be loaded."""
        super().__init__()
        config.validate()
        self.config = config
        self.vocab_size, self.d_model = config.vocab_size, config.d_model
        self.n_layers = config.n_layers

    def num_parameters(self, trainable_only: bool = False) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def update_rank_schedule(self, step: int) -> int | None:
        """Adapt to a training step, before it; a model without a schedule does nothing and returns None."""
        del step
        return None

    def recompute_blocks(self) -> None:
        """Let training keep what enters the blocks only, and compute the rest anew in the backward pass."""
        for block in self.blocks:
            cast(Block, block).gradient_checkpointing = True

    def state_shapes(self) -> list[list[tuple[int, ...]]]:
        """Shapes of one sequence's state: of every layer, every tensor."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D), at least float32 outside autocast."""
        logits = self.lm_head(hidden)
        return logits if torch.is_autocast_enabled(logits.device.type) else at_least_float32(logits)

    def nats(self, hidden: Tensor, labels: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """Nats of labels (B, N) after hidden states (B, N, D), a scalar; no more than a chunk of the logits lies in
        memory at once."""
        flat, backend = hidden.flatten(0, 1), self.config.backend
        return linear_cross_entropy(flat, self.lm_head.weight, labels.flatten(), reduction=reduction, backend=backend)

    def fused_step(self, state: Any) -> Callable[[Tensor], Tensor] | None:
        """Kernels that read one token after another, changing ``state``, whose position is on its device (see
        ``models.decoding``); None where there are none for this model."""
        del state
        return None

    def _predict(self, hidden: Tensor, labels: Tensor | None) -> Tensor:
        """Logits of hidden states (B, N, D); given labels (B, N), their mean nats instead.

        Raises:
            ValueError: the labels have another shape than the tokens.
        """
        if labels is not None:
            if labels.shape != hidden.shape[:-1]:
                expected, got = tuple(hidden.shape[:-1]), tuple(labels.shape)
                raise ValueError(f"labels must have the shape of input_ids, {expected}, got {got}")
            return self.nats(hidden, labels)
        return self.logits(hidden)

    def _embed(self, vectors: Tensor, place: Tensor) -> Tensor:
        """What enters the first block (B, N, D), of the tokens' vectors (B, N, D) and places (B, N). Under autocast
        the stream of the blocks is of its dtype from here on: half the bytes of all that norms and sums move."""
        return for_products((vectors + self.position_embedding(place).to(vectors.dtype)) * self.embedding_factor)

    @property
    def embedding_factor(self) -> float:
        """What the tokens' vectors are multiplied by. A table starts as small as a head needs it: as they are, its rows
        would drown in what the first block adds to them."""
        scale = self.config.embedding_scale
        return self.d_model**0.5 if scale is None else scale

    def _start_position(self, state: ModelState | None, batch: TokenBatch) -> Tensor:
        """Tokens that the sequences have read, int64 (S,): on the CPU, or where the offsets or the state have it.

        Raises:
            ValueError: the state is of other sequences, another device or another model.
        """
        if state is None:
            offsets = batch.cu_seqlens
            return torch.zeros(batch.sequences, dtype=torch.long, device="cpu" if offsets is None else offsets.device)
        if len(state) != batch.sequences:
            raise ValueError(f"the state holds {len(state)} sequences, the input has {batch.sequences}")
        device = batch.input_ids.device
        if state.device != device:
            raise ValueError(f"the state is on {state.device}, the input on {device}; use state.to(device)")
        given = [[tuple(x.shape[1:]) for _, x in named_tensors(layer)] for layer in state.layers]
        if self.state_shapes() != given:
            raise ValueError("the state belongs to another model: its layers, heads or widths differ")
        return state.position


def resolve_config(base: Config, sizes: dict[str, int | None], others: dict[str, Any]) -> Config:
    """A copy of ``base`` with the sizes that are not None and the other fields replaced.

    Raises:
        ConfigError: a field does not exist.
    """
    overrides: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None} | others
    check_fields(type(base), overrides)
    return dataclasses.replace(base, **overrides)


def check_origin(config: ModelConfig | None, preset: str | None, kind: type[ModelConfig]) -> None:
    """Raise a ConfigError where a model shall be made from both a configuration and a preset, or from a configuration
    of another kind."""
    if config is not None and preset is not None:
        raise ConfigError(f"give either config or preset, not both (preset={preset!r})")
    if config is not None and not isinstance(config, kind):
        raise ConfigError(
            f"config must be a {kind.__name__}, got {config!r}; presets and fields go by name (preset=...)"
        )


def place(model: Model, device: torch.device | str | None) -> Model:
    """The model on ``device``; None for CUDA where there is one, and the CPU otherwise."""
    device = device if device is not None else pick_device("auto")
    _log.info("created %s with %s parameters on %s", type(model).__name__, f"{model.num_parameters():,}", device)
    return model.to(device)
