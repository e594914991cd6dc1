"""The Phase 1 model: tensor-train token embedding, positions, blocks, norm, head.

A block is up to three residual branches: the resolvent of a static Hamiltonian in which every token is a potential
(BK-Core), the adaptive-rank semiseparable layer (AR-SSM), and a feed-forward network.

Shapes: B batch, N sequence, D model width, H heads, R rank, S sequences.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...layers import TensorTrainEmbedding, ZetaEmbedding
from ...ops.precision import wide_dtype
from ..base import IntegratedModel
from ..initialization import init_weights
from ..token_batch import TokenBatch, positions, read_tokens
from .block import Phase1Block, _recomputed
from .config import Phase1Config
from .state import Phase1State


@dataclass
class _Trace:
    """What one block did, kept for diagnostics."""

    output: Tensor
    features: Tensor
    gates: Tensor | None


class Phase1IntegratedModel(IntegratedModel):
    """A language model whose tokens mix through the resolvent of a static Hamiltonian and a gated sum of the past.

    The model keeps nothing between calls: what it read is in the state that ``forward`` returns.

    Args:
        config: its configuration.
        init: draw fresh weights from the global CPU generator; False where they will be loaded.
    """

    penalised = True

    def __init__(self, config: Phase1Config, init: bool = True):
        super().__init__(config)
        self.token_embedding = (
            TensorTrainEmbedding(
                config.vocab_size, config.d_model, config.htt_rank, config.htt_num_cores, config.htt_phase_encoding
            )
            if config.htt_enabled
            else nn.Embedding(config.vocab_size, config.d_model)
        )
        self.position_embedding = ZetaEmbedding(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Phase1Block(config) for _ in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if init:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights on the CPU from ``generator`` (the global one if None), whatever the model's device; see
        ``models.initialization``."""
        init_weights(self, generator)

    @property
    def rank(self) -> int | None:
        """Channels of the semiseparable layers that are in use; None without such layers."""
        layer = self._blocks[0].ar_ssm
        return layer.rank if layer is not None else None

    def update_rank_schedule(self, step: int) -> int | None:
        """Set the semiseparable layers' rank to what the configuration schedules for a training step.

        A pure function of the step, so that a resumed run needs no more than its number. Channels that were not in
        use yet add nothing, so that the model computes the same before and after, and with all of them.

        Returns:
            the rank; None without such layers.
        """
        for block in self._blocks:
            if block.ar_ssm is not None:
                block.ar_ssm.set_rank(self.config.rank_at(step))
        return self.rank

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        state: Phase1State | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_diagnostics: bool = False,
        return_penalty: bool = False,
    ) -> Any:
        """Logits of the next token at every place, or, given labels, how well they are predicted.

        Args:
            input_ids: tokens, integer (B, N).
            labels: the token that follows each of ``input_ids``, int64 (B, N), or -100 at places that do not count,
                padding among them. The mean loss takes the place of the logits, which then are never held all at once.
            state: what the sequences have read before; None for a fresh start.
            return_state: also return the state after the last token.
            cu_seqlens: offsets of S sequences packed in one row, integer (S + 1,), from 0 to N; needs B = 1. The state
                restarts at each.
            attention_mask: 1 for tokens, 0 for padding on either side, (B, N). Padding is not read, and its logits
                are those of an empty hidden state.
            return_diagnostics: also return what happened inside; changes no logit.
            return_penalty: also return what training adds to the loss: the mean gate of the semiseparable layers
                times ``ar_ssm_l1_regularization``, a float32 scalar; zero without such layers.

        Returns:
            logits (B, N, vocabulary), float32 outside autocast, or the labels' mean nats, a scalar; followed by the
            ``Phase1State``, by the dictionary of diagnostics and by the penalty where asked for. The dictionary holds a
            list with an entry per layer under ``layer_outputs``, ``gate_values``, ``effective_rank``,
            ``gate_sparsity`` and ``stability_metrics``, and ``stability_warnings``, ``htt_compression_ratio``,
            ``input_embeddings`` and ``final_hidden_states``.

        Raises:
            ValueError: tokens, labels, offsets, mask or state do not fit each other or the model.
        """
        diagnostics: dict[str, Any] | None = {} if return_diagnostics else None
        gates: list[Tensor] | None = [] if return_penalty else None
        hidden, state = self.hidden_states(
            input_ids,
            state=state,
            cu_seqlens=cu_seqlens,
            attention_mask=attention_mask,
            diagnostics=diagnostics,
            gates=gates,
        )
        extras: list[Any] = [state] * return_state + [diagnostics] * return_diagnostics
        if gates is not None:
            extras.append(self.penalty(gates, hidden))
        output = self._predict(hidden, labels)
        return (output, *extras) if extras else output

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        state: Phase1State | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        diagnostics: dict[str, Any] | None = None,
        outputs: list[Tensor] | None = None,
        gates: list[Tensor] | None = None,
    ) -> tuple[Tensor, Phase1State]:
        """Everything but the head: final hidden states (B, N, D) and the next state; arguments as in ``forward``.
        ``diagnostics`` is a dictionary to fill, ``outputs`` a list for what enters the first block and what leaves each
        (B, N, D), ``gates`` one for the gates (B, N, rank) of every layer."""
        batch = read_tokens(input_ids, self.vocab_size, cu_seqlens, attention_mask)
        position = self._start_position(state, batch)
        config = self.config
        x = _recomputed(
            config.use_gradient_checkpointing and config.checkpoint_htt, self.token_embedding, batch.input_ids
        )
        place = positions(state.position if state is not None else None, batch.input_ids, batch.cu_seqlens)
        embedded = self._embed(x, place)
        x, layers, traces = self.dropout(embedded), [], []
        if outputs is not None:
            outputs.append(batch.restore(x))
        for i, block in enumerate(self.blocks):
            x, features, gate, layer = block(x, state.layers[i] if state is not None else None, batch.cu_seqlens)
            layers.append(layer)
            if outputs is not None:
                outputs.append(batch.restore(x))
            if gates is not None and gate is not None:
                gates.append(gate)
            if diagnostics is not None:
                traces.append(_Trace(x, features, gate))
        hidden = self.ln_f(x)
        if diagnostics is not None:
            self._diagnose(diagnostics, traces, embedded, hidden, batch)
        return batch.restore(hidden), Phase1State(batch.advance(position), tuple(layers))

    def state_shapes(self) -> list[list[tuple[int, ...]]]:
        return [block.state_shapes() for block in self._blocks]

    @property
    def _blocks(self) -> list[Phase1Block]:
        return list(cast(Iterable[Phase1Block], self.blocks))

    def penalty(self, gates: list[Tensor], like: Tensor) -> Tensor:
        """The mean gate of all layers, weighted; zero without layers that have gates, on the device of ``like``."""
        means = [gate.mean(dtype=wide_dtype(gate)) for gate in gates]
        mean = torch.stack(means).mean() if means else torch.zeros((), device=like.device)
        return self.config.ar_ssm_l1_regularization * mean

    @torch.no_grad()
    def _diagnose(
        self, diagnostics: dict[str, Any], traces: list[_Trace], embedded: Tensor, hidden: Tensor, batch: TokenBatch
    ) -> None:
        config, embedding = self.config, self.token_embedding
        gates = [trace.gates.detach() for trace in traces if trace.gates is not None]
        metrics = [_stability(trace.features) for trace in traces] if config.stability_monitoring_enabled else []
        diagnostics.update(
            input_embeddings=batch.restore(embedded.detach()),
            final_hidden_states=batch.restore(hidden.detach()),
            layer_outputs=[batch.restore(trace.output.detach()) for trace in traces],
            gate_values=[batch.restore(g) for g in gates],
            effective_rank=[g.sum(-1).mean() for g in gates],
            gate_sparsity=[(g < 0.5).float().mean() for g in gates],
            htt_compression_ratio=(embedding.compression_ratio if isinstance(embedding, TensorTrainEmbedding) else 1.0),
            stability_metrics=metrics,
            stability_warnings=[w for i, m in enumerate(metrics) for w in _warnings(config, i, m)],
        )


def _stability(features: Tensor) -> dict[str, Tensor]:
    """How near the chains came to a pole, from the features [Re g, Im g] (B, N, 2H): the least pivot ``min 1 / |g|``
    of the factorised ``H - z``, and the mean (s1) and root mean square (s2) of ``|g|``."""
    size = torch.complex(*features.detach().float().chunk(2, dim=-1)).abs()
    return {"least_pivot": 1 / size.max(), "s1": size.mean(), "s2": size.square().mean().sqrt()}


def _warnings(config: Phase1Config, layer: int, metrics: dict[str, Tensor]) -> list[str]:
    """What of a layer's metrics is beyond the configured bounds, non-finite values included."""
    pivot, s1, s2 = (metrics[name].item() for name in ("least_pivot", "s1", "s2"))
    checks = (
        (pivot > config.stability_threshold, f"least pivot {pivot:g}, threshold {config.stability_threshold:g}"),
        (s1 < config.schatten_s1_bound, f"s1 {s1:g}, bound {config.schatten_s1_bound:g}"),
        (s2 < config.schatten_s2_bound, f"s2 {s2:g}, bound {config.schatten_s2_bound:g}"),
    )
    return [f"layer {layer}: {text}" for fine, text in checks if not fine]
