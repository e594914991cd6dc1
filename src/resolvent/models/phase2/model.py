"""The Phase 2 model: token and position embedding, blocks, norm, head.

A block is three residual branches: the resolvent of the tokens' Hamiltonian (BK-Core), the dissipative Hebbian memory,
and a feed-forward network. Γ acts in both of the first two, and a block's memory read-out enters the next block's
potential. A model that grew out of Phase 1 keeps its semiseparable branch, behind the memory.

Shapes: B batch, N sequence, D model width, H heads, K = V head width, S sequences.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ...layers import (
    AdaptiveRankSemiseparableLayer,
    DissipativeBKLayer,
    DissipativeHebbianLayer,
    GatedFeedForward,
    LyapunovStabilityMonitor,
    MemoryResonanceLayer,
    NonHermitianPotential,
    SNRMemoryFilter,
    TensorTrainEmbedding,
    ZetaEmbedding,
)
from ...layers.hebbian import HebbianOutput
from ...ops import Consolidation, MemoryState
from ...ops.hebbian import memory_implementation
from ..base import Block, IntegratedModel
from ..initialization import init_weights
from ..packing import TokenBatch, positions, read_tokens
from .config import Phase2Config
from .decode import TokenStep
from .state import LayerState, Phase2State

if TYPE_CHECKING:
    from .conversion import ConversionReport

_log = logging.getLogger(__name__)


class Phase2Block(Block):
    """One block; ``first`` blocks have no memory before them to feed back."""

    def __init__(self, config: Phase2Config, first: bool = False):
        super().__init__()
        heads, head_dim, width = config.num_heads, config.head_dim, config.d_model
        self.ln1 = nn.LayerNorm(width)
        self.dissipative_bk = DissipativeBKLayer(
            NonHermitianPotential(
                width,
                heads,
                config.base_decay,
                config.adaptive_decay,
                config.hebbian_dt,
                memory_width=heads * head_dim if config.memory_feedback and not first else 0,
                memory_scale=config.feedback_scale,
            ),
            backend=config.backend if config.use_triton_bk else "torch",
            block_size=config.triton_block_size,
        )
        self.bk_proj = nn.Linear(2 * heads, width, bias=False)
        self.ln2 = nn.LayerNorm(width)
        self.hebbian = DissipativeHebbianLayer(
            width,
            heads,
            head_dim,
            config.hebbian_eta,
            config.hebbian_dt,
            config.conv_size,
            config.output_norm,
            config.output_gate,
            config.backend,
        )
        self.consolidation_interval = config.consolidation_interval
        self.snr_filter = (
            SNRMemoryFilter(
                heads,
                config.snr_threshold,
                config.snr_gamma_boost,
                config.snr_eta_boost,
                config.snr_temperature,
                config.snr_trained,
            )
            if config.snr_enabled
            else None
        )
        self.resonance = (
            MemoryResonanceLayer(heads, head_dim, config.resonance_energy_threshold)
            if config.resonance_enabled
            else None
        )
        self.ln_ssm = nn.LayerNorm(width) if config.ar_ssm_rank else None
        self.ar_ssm = (
            AdaptiveRankSemiseparableLayer(
                width, config.ar_ssm_rank, config.gate_width, config.ar_ssm_bounded, config.backend
            )
            if config.ar_ssm_rank
            else None
        )
        self.ln3 = nn.LayerNorm(width)
        self.ffn = (
            GatedFeedForward(width, config.ffn_width)
            if config.ffn_gated
            else nn.Sequential(nn.Linear(width, config.ffn_width), nn.GELU(), nn.Linear(config.ffn_width, width))
        )
        self.dropout = nn.Dropout(config.dropout)

    def consolidation(self) -> Consolidation | None:
        """What acts on the memory at its boundaries; None if nothing does."""
        if self.snr_filter is None and self.resonance is None:
            return None
        return Consolidation(
            self.consolidation_interval,
            self.snr_filter() if self.snr_filter else None,
            self.resonance() if self.resonance else None,
        )

    @property
    def write_gain(self) -> Tensor:
        """What the SNR filter adds at most to a write, as a part of it, (H,) or (); 0 without one."""
        return self.snr_filter.gain if self.snr_filter else torch.zeros(())

    def state_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of one sequence's state, tensor by tensor."""
        heads = self.dissipative_bk.potential.num_heads
        memory, conv_tail = self.hebbian.state_shape
        return [(heads,), memory, memory, memory[:1], conv_tail, *(self.ar_ssm.state_shape if self.ar_ssm else ())]

    def compute(
        self,
        x: Tensor,
        readout: Tensor | None,
        state: LayerState | None,
        position: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, HebbianOutput, LayerState]:
        """x (B, N, D), the previous block's read-out, the block's state and the sequences' positions (S,), if they read
        before -> x, Γ (B, N, H), what the memory layer hands on, and the next state."""
        resolvent, memory, conv_tail, ar_ssm = state if state is not None else (None, None, None, None)
        features, gamma, resolvent = self.dissipative_bk(self.ln1(x), readout, resolvent, cu_seqlens)
        x = x + self.dropout(self.bk_proj(features.to(x.dtype)))
        hebbian = self.hebbian(self.ln2(x), gamma, memory, conv_tail, position, cu_seqlens, self.consolidation())
        x = x + self.dropout(hebbian.output)
        if self.ar_ssm is not None and self.ln_ssm is not None:
            output, _, ar_ssm = self.ar_ssm(self.ln_ssm(x), ar_ssm, cu_seqlens)
            x = x + self.dropout(output)
        x = x + self.dropout(self.ffn(self.ln3(x)))
        return x, gamma, hebbian, LayerState(resolvent, hebbian.state, hebbian.conv_tail, ar_ssm)


@dataclass
class _Trace:
    """What one block did, kept for diagnostics."""

    output: Tensor
    gamma: Tensor
    hebbian: HebbianOutput
    before: MemoryState | None


class Phase2IntegratedModel(IntegratedModel):
    """A language model whose tokens mix through a resolvent and a dissipative memory, in linear time.

    The model keeps nothing between calls: what it read is in the state that ``forward`` returns.

    Args:
        config: its configuration.
        init: draw fresh weights from the global CPU generator; False where they will be loaded.

    Attributes:
        conversion_report: what became of every tensor, where the model was converted.
    """

    conversion_report: "ConversionReport | None" = None

    def __init__(self, config: Phase2Config, init: bool = True):
        super().__init__(config)
        self.token_embedding = (
            nn.Embedding(config.vocab_size, config.d_model)
            if config.htt_rank is None
            else TensorTrainEmbedding(
                config.vocab_size, config.d_model, config.htt_rank, phase_encoding=config.htt_phase_encoding
            )
        )
        self.position_embedding = ZetaEmbedding(config.d_model, config.zeta_embedding_trainable)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Phase2Block(config, first=i == 0) for i in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = cast(nn.Embedding, self.token_embedding).weight
        if init:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights on the CPU from ``generator`` (the global one if None), whatever the model's device; see
        ``models.initialization``."""
        init_weights(self, generator, self.config.use_zeta_init)

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        state: Phase2State | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_diagnostics: bool = False,
    ) -> Any:
        """Logits of the next token at every place, or, given labels, how well they are predicted.

        Args:
            input_ids: tokens, integer (B, N).
            labels: the token that follows each of ``input_ids``, int64 (B, N), or -100 at places that do not count,
                padding among them. The mean loss takes the place of the logits, which then are never held all at once.
            state: what the sequences have read before; None for a fresh start.
            return_state: also return the state after the last token.
            cu_seqlens: offsets of S sequences packed in one row, integer (S + 1,), from 0 to N; needs B = 1. State and
                consolidation restart at each.
            attention_mask: 1 for tokens, 0 for padding on either side, (B, N). Padding is not read, and its logits
                are those of an empty hidden state.
            return_diagnostics: also return what happened inside; changes no logit.

        Returns:
            logits (B, N, vocabulary), float32 outside autocast, or the labels' mean nats, a scalar; followed by the
            ``Phase2State`` and by the dictionary of diagnostics where asked for. The dictionary holds a list with an
            entry per layer under ``layer_outputs``, ``gamma_values``, ``snr_stats`` (its ``strength`` says how strongly
            the SNR filter acts), ``resonance_info`` and ``stability_metrics``, and ``input_embeddings`` and
            ``final_hidden_states``.

        Raises:
            ValueError: tokens, labels, offsets, mask or state do not fit each other or the model.
        """
        diagnostics: dict[str, Any] | None = {} if return_diagnostics else None
        hidden, state = self.hidden_states(
            input_ids, state=state, cu_seqlens=cu_seqlens, attention_mask=attention_mask, diagnostics=diagnostics
        )
        output = self._predict(hidden, labels)
        extras = ([state] if return_state else []) + ([diagnostics] if return_diagnostics else [])
        return (output, *extras) if extras else output

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        state: Phase2State | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        diagnostics: dict[str, Any] | None = None,
        outputs: list[Tensor] | None = None,
    ) -> tuple[Tensor, Phase2State]:
        """Everything but the head: final hidden states (B, N, D) and the next state; arguments as in ``forward``.
        ``diagnostics`` is a dictionary to fill, ``outputs`` a list for what enters the first block and what leaves each
        (B, N, D)."""
        batch = read_tokens(input_ids, self.vocab_size, cu_seqlens, attention_mask)
        position = self._start_position(state, batch)
        start = position if state is not None else None
        place = positions(start, batch.input_ids, batch.cu_seqlens)
        embedded = self._embed(self.token_embedding(batch.input_ids), place)
        x, readout, layers, traces = self.dropout(embedded), None, [], []
        if outputs is not None:
            outputs.append(batch.restore(x))
        for i, block in enumerate(self.blocks):
            before = state.layers[i] if state is not None else None
            x, gamma, hebbian, layer = block(x, readout, before, start, batch.cu_seqlens)
            readout = hebbian.readout
            layers.append(layer)
            if outputs is not None:
                outputs.append(batch.restore(x))
            if diagnostics is not None:
                traces.append(_Trace(x, gamma, hebbian, before.memory if before else None))
        hidden = self.ln_f(x)

        if diagnostics is not None:
            self._diagnose(diagnostics, traces, embedded, hidden, batch)
        return batch.restore(hidden), Phase2State(batch.advance(position), tuple(layers))

    def state_shapes(self) -> list[list[tuple[int, ...]]]:
        return [block.state_shapes() for block in self._blocks]

    def fused_step(self, state: Phase2State) -> Callable[[Tensor], Tensor] | None:
        obstacle = TokenStep.obstacle(self, state)
        if obstacle:
            _log.info("one token at a time without kernels of its own: %s", obstacle)
        return None if obstacle else TokenStep(self, state)

    @property
    def reads_offsets(self) -> bool:
        head, config = self.lm_head.weight, self.config
        return memory_implementation(config.backend, head.device, head.dtype, config.head_dim) == "torch"

    @property
    def _blocks(self) -> list[Phase2Block]:
        return list(cast(Iterable[Phase2Block], self.blocks))

    def _diagnose(
        self, diagnostics: dict[str, Any], traces: list[_Trace], embedded: Tensor, hidden: Tensor, batch: TokenBatch
    ) -> None:
        with torch.no_grad():
            diagnostics.update(
                input_embeddings=batch.restore(embedded.detach()),
                final_hidden_states=batch.restore(hidden.detach()),
                layer_outputs=[batch.restore(trace.output.detach()) for trace in traces],
                gamma_values=[batch.restore(trace.gamma.detach()) for trace in traces],
                snr_stats=[],
                resonance_info=[],
                stability_metrics=[],
            )
            for block, trace in zip(self._blocks, traces, strict=True):
                memory = trace.hebbian.state.memory
                snr, resonance = block.snr_filter, block.resonance
                diagnostics["snr_stats"].append(snr.statistics(memory) if snr else {})
                diagnostics["resonance_info"].append(resonance.statistics(memory) if resonance else {})
                diagnostics["stability_metrics"].append(_stability(block, trace, batch.lengths))


def _stability(block: Phase2Block, trace: _Trace, lengths: Tensor) -> dict[str, Tensor]:
    layer, after = block.hebbian, trace.hebbian.state
    writes = trace.hebbian.values.norm(dim=-1, dtype=layer.eta.dtype) * layer.eta
    before = trace.before if trace.before is not None else MemoryState(*map(torch.zeros_like, after))
    return LyapunovStabilityMonitor.metrics(
        before,
        after,
        _per_sequence(writes, lengths, "amax", 0.0),
        _per_sequence(trace.gamma * layer.dt, lengths, "amin", torch.inf),
        (lengths * layer.dt).to(after.memory.device),
        block.write_gain,
    )


def _per_sequence(x: Tensor, lengths: Tensor, reduce: str, empty: float) -> Tensor:
    """Extreme over the tokens of each sequence: (B, N, H) -> (S, H)."""
    heads = x.shape[-1]
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(x.device)
    out = x.new_full((len(lengths), heads), empty)
    return out.scatter_reduce(0, sequence[:, None].expand(-1, heads), x.reshape(-1, heads), reduce)
