"""Base of the models of both phases: forward pass, hidden states, observation and losses.

A model maps tokens to logits and keeps nothing between calls: the caller holds the state. A phase adds its parts, and
says how a block is called and what its record means.

Shapes: B batch, N sequence, D model width, V vocabulary, S sequences.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError
from ..layers import ZetaEmbedding
from ..ops import linear_cross_entropy
from ..ops.memory_rotation import Rotation
from ..ops.packed import token_positions
from ..ops.precision import at_least_float32, for_products, wide_dtype
from .config import LanguageModelConfig
from .generation import Generation
from .initialization import init_weights
from .state import ModelState, State
from .token_batch import TokenBatch, check_labels, read_tokens
from .trace import Record, Trace

Config = TypeVar("Config", bound=LanguageModelConfig)


class Block(nn.Module, Generic[Record]):
    """Base of the blocks.

    Attributes:
        compute: the computation, from the residual stream to the block's record; a subclass defines it in the place of
            ``forward``.
        gradient_checkpointing: recompute the block in the backward pass instead of keeping its activations. The name is
            one that Transformers looks for.
    """

    compute: Callable[..., Record]
    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Any] = staticmethod(partial(checkpoint, use_reentrant=False))

    def forward(self, *inputs: object) -> Record:
        """Return ``compute(*inputs)``.

        The hooks of the module, FSDP's among them, do not run again in the backward pass.
        """
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self.compute, *inputs)
        return self.compute(*inputs)

    def state_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of one sequence's state, tensor by tensor."""
        raise NotImplementedError


class IntegratedModel(Generation[State], Generic[Config, Record, State]):
    """A language model that keeps nothing between calls: what it has read is in the state that it returns."""

    penalised: ClassVar[bool] = False
    """``forward`` has a penalty to return, with ``return_penalty=True``, that training adds to the loss."""

    state_type: type[State]

    _checked: tuple[object, ...] | None = None
    """Signature of the last state that was checked, with that of the input."""

    config: Config
    vocab_size: int
    d_model: int
    n_layers: int
    token_embedding: nn.Module
    position_embedding: ZetaEmbedding | None
    dropout: nn.Dropout
    blocks: nn.ModuleList
    ln_f: nn.Module
    lm_head: nn.Linear

    def __init__(self, config: Config, init: bool = True) -> None:
        """Check a configuration and make its parts, in the order of a forward pass: they are drawn and saved in it."""
        super().__init__()
        config.validate()
        self.config = config
        self.vocab_size, self.d_model, self.n_layers = config.vocab_size, config.d_model, config.n_layers
        self.token_embedding = self._make_token_embedding(config)
        self.position_embedding = self._make_position_embedding(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(self._make_block(config, layer) for layer in range(config.n_layers))
        self.ln_f = self._make_norm(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = cast(nn.Embedding, self.token_embedding).weight
        if init:
            self.init_weights()

    def _make_token_embedding(self, config: Config) -> nn.Module:
        raise NotImplementedError

    def _make_position_embedding(self, config: Config) -> ZetaEmbedding | None:
        return ZetaEmbedding(config.d_model)

    def _make_norm(self, config: Config) -> nn.Module:
        return nn.LayerNorm(config.d_model)

    def _make_block(self, config: Config, layer: int) -> Block[Record]:
        raise NotImplementedError

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights on the CPU, whatever the model's device; see ``models.initialization``.

        They come from ``generator``, the global one if None.
        """
        init_weights(self, generator, self.zeta_potential)

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_diagnostics: bool = False,
        return_penalty: bool = False,
    ) -> Any:
        """Compute the logits of the next token at every position or, given labels, their loss.

        Args:
            input_ids: tokens, integer (B, N).
            labels: the token that follows each of ``input_ids``, int64 (B, N), or -100 at positions that do not count,
                padding among them. The loss takes the place of the logits, which are then never held all at once; where
                no label counts, it is exactly zero, with zero gradients.
            state: state after the tokens that the sequences have read before; None for a fresh start.
            return_state: also return the state after the last token.
            cu_seqlens: offsets of S sequences packed in one row, integer (S + 1,), from 0 to N; needs B = 1. State and
                consolidation restart at each.
            attention_mask: 1 for tokens, 0 for padding on either side, (B, N). Padding is not read, and its logits
                are those of an empty hidden state.
            return_diagnostics: also return the diagnostics, ``Phase1Diagnostics`` or ``Phase2Diagnostics``; changes no
                logit.
            return_penalty: also return what training adds to the loss, a float32 scalar: in Phase 1 the mean gate of
                the semiseparable layers times ``ar_ssm_l1_regularization``, in Phase 2 zero.

        Returns:
            logits (B, N, V), float32 outside autocast, or the mean negative log-likelihood of the labels (nats per
            token), a scalar; followed by the state, by the dictionary of diagnostics and by the penalty, in this order,
            where asked for.

        Raises:
            ValueError: tokens, labels, offsets, mask or state do not fit each other or the model.
        """
        options = dict(recorded=return_diagnostics or return_penalty, return_state=return_state)
        trace = self._run(input_ids, state, cu_seqlens, attention_mask, **options)
        extras: list[object] = []
        if return_state:
            extras.append(trace.after)
        if return_diagnostics:
            extras.append(self.diagnostics(trace))
        if return_penalty:
            extras.append(self.penalty(trace))
        output = self._predict(trace.hidden, labels)
        return (output, *extras) if extras else output

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Compute everything but the head: final hidden states (B, N, D) and the next state.

        Arguments are as in ``forward``.
        """
        trace = self._run(input_ids, state, cu_seqlens, attention_mask, recorded=False, return_state=True)
        return trace.hidden, trace.after

    def _run(
        self,
        input_ids: Tensor,
        state: State | None,
        cu_seqlens: Tensor | None,
        attention_mask: Tensor | None,
        *,
        recorded: bool,
        return_state: bool,
    ) -> Trace[Record, State]:
        """Compute everything but the head.

        ``recorded`` keeps the record of every block, ``return_state`` the state after the last token.
        """
        # 1. Drop the padding; look up how far every sequence has been read.
        batch = read_tokens(input_ids, self.vocab_size, cu_seqlens, attention_mask)
        position = self._start_position(state, batch)
        start = None if state is None else position
        # 2. Embed tokens and positions.
        vectors = self._embed_tokens(batch.input_ids)
        positions = token_positions(start, batch.input_ids, batch.cu_seqlens)
        embedded, rotation = self._add_positions(vectors, positions), self._rotation(positions, wide_dtype(vectors))
        # 3. Run the blocks.
        x = entered = self.dropout(embedded)
        record, records, layers = None, [], []
        for i, block in enumerate(self.blocks):
            before = None if state is None else state.layers[i]
            record = self._run_block(block, x, record, before, start, batch.cu_seqlens, rotation, return_state)
            x = record.output
            layers.append(record.state)
            if recorded:
                records.append(record)
        # 4. Normalise.
        after = self.state_type(batch.advance(position), tuple(layers)) if return_state else None
        return Trace(batch, state, vectors, embedded, entered, tuple(records), self.ln_f(x), after)

    def _embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Return the vectors of tokens: integer (B, N) -> (B, N, D)."""
        return self.token_embedding(input_ids)

    def _add_positions(self, vectors: Tensor, position: Tensor) -> Tensor:
        """Return the input embeddings (B, N, D) of token vectors (B, N, D) at positions (B, N).

        Under autocast the residual stream has autocast's dtype from here on: half the bytes of all that norms and sums
        move.
        """
        if self.position_embedding is not None:
            vectors = vectors + self.position_embedding(position).to(vectors.dtype)
        return for_products(vectors * self.embedding_factor)

    def _rotation(self, position: Tensor, dtype: torch.dtype) -> Rotation | None:
        """Return the rotary positions that all blocks share, for tensors of ``dtype``; None without attention."""
        return None

    def _run_block(
        self,
        block: nn.Module,
        x: Tensor,
        previous: Record | None,
        state: Any,
        start: Tensor | None,
        cu_seqlens: Tensor | None,
        rotation: Rotation | None,
        return_state: bool,
    ) -> Record:
        """Run a block on the residual stream.

        Args:
            block: the block.
            x: residual stream, (B, N, D).
            previous: record of the block before; None for the first block.
            state: the block's state before the first token; None for a fresh start.
            start: tokens that the sequences have read before, (S,); None for a fresh start.
            cu_seqlens: offsets of packed sequences.
            rotation: rotary positions of the tokens.
            return_state: compute the whole state after the last token. A state that costs nothing may be there anyhow.
        """
        raise NotImplementedError

    def _predict(self, hidden: Tensor, labels: Tensor | None) -> Tensor:
        """Return the logits of hidden states (B, N, D) or, given labels (B, N), their mean loss.

        Raises:
            ValueError: the labels do not fit the tokens.
        """
        if labels is None:
            return self.logits(hidden)
        check_labels(labels, hidden)
        return self.loss(hidden, labels)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D), at least float32 outside autocast."""
        logits = self.lm_head(hidden)
        return logits if torch.is_autocast_enabled(logits.device.type) else at_least_float32(logits)

    def loss(self, hidden: Tensor, labels: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """Return the negative log-likelihood (nats) of labels (B, N) given hidden states (B, N, D), a scalar.

        No more than a chunk of the logits is in memory at once.
        """
        flat, backend = hidden.flatten(0, 1), self.config.backend
        return linear_cross_entropy(flat, self.lm_head.weight, labels.flatten(), reduction=reduction, backend=backend)

    def diagnostics(self, trace: Trace[Record, State]) -> Mapping[str, object]:
        """Return the diagnostics of a trace: a dictionary of tensors without gradients."""
        raise NotImplementedError

    def penalty(self, trace: Trace[Record, State], mask: Tensor | None = None) -> Tensor:
        """Return the term that training adds to the loss, a float32 scalar: zero, unless a phase has a penalty.

        ``mask``, bool (B, N), names the tokens that it is a mean over; None for all.
        """
        return torch.zeros((), device=trace.normed.device)

    def _start_position(self, state: State | None, batch: TokenBatch) -> Tensor:
        """Return how many tokens the sequences have read, int64 (S,).

        The counts are on the CPU, or on the device of the offsets or of the state's position.

        Raises:
            ValueError: the state is of other sequences, another device or another model.
        """
        if state is None:
            offsets = batch.cu_seqlens
            return torch.zeros(batch.sequences, dtype=torch.long, device="cpu" if offsets is None else offsets.device)
        if not isinstance(state, ModelState):
            raise ValueError(f"state must be a ModelState, as the model returns it, got {type(state).__name__}")
        dtype, device = wide_dtype(self.lm_head.weight), batch.input_ids.device
        if torch.compiler.is_compiling():
            state.check(self.state_shapes(), batch.sequences, device, dtype)
            return state.position
        seen = (state.signature(), batch.sequences, device, dtype)
        if seen != self._checked:  # token after token, the state stays as it is
            state.check(self.state_shapes(), batch.sequences, device, dtype)
            self._checked = seen
        return state.position

    def state_shapes(self) -> list[list[tuple[int, ...]]]:
        """Return the shapes of one sequence's state: of every layer, every tensor."""
        return [block.state_shapes() for block in self._blocks]

    def num_parameters(self, trainable_only: bool = False) -> int:
        """Return the number of parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    @torch.no_grad()
    def shrink_vocabulary(self, vocab_size: int) -> None:
        """Drop the tokens from ``vocab_size`` on out of embedding and head, in place; the others keep their logits.

        Raises:
            ConfigError: the model has fewer tokens, or its embedding has no rows to drop.
        """
        embedding = self.token_embedding
        if not isinstance(embedding, nn.Embedding):
            kind = type(embedding).__name__
            raise ConfigError(f"vocab_size must stay {self.vocab_size}: the {kind} has no rows that could be dropped")
        if not 0 < vocab_size <= self.vocab_size:
            raise ConfigError(f"vocab_size must be in 1..{self.vocab_size} to shrink, got {vocab_size}")
        tied = self.tied
        embedding.weight = _first_rows(embedding.weight, vocab_size)
        self.lm_head.weight = embedding.weight if tied else _first_rows(self.lm_head.weight, vocab_size)
        embedding.num_embeddings = self.lm_head.out_features = self.vocab_size = vocab_size
        self.config = dataclasses.replace(cast(Any, self.config), vocab_size=vocab_size)

    def recompute_blocks(self) -> None:
        """Recompute the blocks in the backward pass: training keeps the input of every block only."""
        for block in self._blocks:
            block.gradient_checkpointing = True

    def update_rank_schedule(self, step: int) -> int | None:
        """Adapt to a training step, before it. A model without a schedule does nothing and returns None."""
        del step
        return None

    @property
    def n_seq(self) -> int:
        """Tokens of a training window; a model reads any number of them."""
        return self.config.n_seq

    @property
    def tied(self) -> bool:
        """The head uses the table of the token embedding."""
        return self.lm_head.weight is getattr(self.token_embedding, "weight", None)

    @property
    def embedding_factor(self) -> float:
        """Factor of the token vectors."""
        return self.config.embedding_factor

    @property
    def zeta_potential(self) -> bool:
        """Fresh weights of the potential have the spectrum of the zeta zeros."""
        return False

    @property
    def reads_offsets(self) -> bool:
        """Python reads the offsets of packed sequences: on a device, it would wait for them.

        For the next state of a model whose state grows, Python reads them in any case.
        """
        return False

    @property
    def _blocks(self) -> Sequence[Block[Record]]:
        return [cast(Block, block) for block in self.blocks]


def _first_rows(weight: nn.Parameter | Tensor, count: int) -> nn.Parameter:
    return nn.Parameter(weight[:count].clone(), requires_grad=weight.requires_grad)


def observe(
    model: IntegratedModel[Config, Record, State],
    input_ids: Tensor,
    *,
    state: State | None = None,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Trace[Record, State]:
    """Read tokens as ``hidden_states`` does, and keep what every layer computes.

    This is the one way to look inside a model: diagnostics, trackers, the inspection page and experiments use it. It
    changes no number, and needs no hooks; the records carry gradients where gradients are enabled.

    Args:
        model: the model.
        input_ids: tokens, integer (B, N).
        state: state after the tokens that the sequences have read before; None for a fresh start.
        cu_seqlens: offsets of packed sequences, as in ``forward``.
        attention_mask: 1 for tokens, 0 for padding, as in ``forward``.

    Returns:
        Final hidden states, the next state, and a ``Phase1Record`` or ``Phase2Record`` per layer.

    Raises:
        ValueError: tokens, offsets, mask or state do not fit each other or the model.
    """
    return model._run(input_ids, state, cu_seqlens, attention_mask, recorded=True, return_state=True)
