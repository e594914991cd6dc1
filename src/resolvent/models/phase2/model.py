"""The Phase 2 model: token and position embedding, blocks, norm, head.

A block is three residual branches: the resolvent of the tokens' Hamiltonian (BK-Core), the dissipative Hebbian memory,
and a feed-forward network. Γ acts in both of the first two, and a block's memory read-out enters the next block's
potential.

Shapes: B batch, N sequence, D model width, H heads, K = V head width, S sequences.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...layers import (
    DissipativeBKLayer,
    DissipativeHebbianLayer,
    LyapunovStabilityMonitor,
    MemoryResonanceLayer,
    NonHermitianPotential,
    SNRMemoryFilter,
    ZetaEmbedding,
    ZetaInitializer,
)
from ...layers.hebbian import HebbianOutput
from ...ops import Consolidation, MemoryState
from ..generation import Generation
from ..packing import check_cu_seqlens, positions, unpad
from .config import Phase2Config
from .state import LayerState, Phase2State


class Phase2Block(nn.Module):
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
            SNRMemoryFilter(config.snr_threshold, config.snr_gamma_boost, config.snr_eta_boost, config.snr_temperature)
            if config.snr_enabled
            else None
        )
        self.resonance = (
            MemoryResonanceLayer(heads, head_dim, config.resonance_energy_threshold)
            if config.resonance_enabled
            else None
        )
        self.ln3 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, config.ffn_width), nn.GELU(), nn.Linear(config.ffn_width, width))
        self.dropout = nn.Dropout(config.dropout)

    def consolidation(self) -> Consolidation | None:
        """What acts on the memory at its boundaries; None if nothing does."""
        if self.snr_filter is None and self.resonance is None:
            return None
        return Consolidation(
            self.consolidation_interval,
            self.snr_filter.constants if self.snr_filter else None,
            self.resonance.constants() if self.resonance else None,
        )

    def forward(
        self,
        x: Tensor,
        readout: Tensor | None,
        state: LayerState | None,
        position: Tensor,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, HebbianOutput, LayerState]:
        """x (B, N, D), the previous block's read-out, the block's state and the sequences' positions (S,) ->
        x, Γ (B, N, H), what the memory layer hands on, and the next state."""
        resolvent, memory, conv_tail = state if state is not None else (None, None, None)
        features, gamma, resolvent = self.dissipative_bk(self.ln1(x), readout, resolvent, cu_seqlens)
        x = x + self.dropout(self.bk_proj(features.to(x.dtype)))
        hebbian = self.hebbian(self.ln2(x), gamma, memory, conv_tail, position, cu_seqlens, self.consolidation())
        x = x + self.dropout(hebbian.output)
        x = x + self.dropout(self.ffn(self.ln3(x)))
        return x, gamma, hebbian, LayerState(resolvent, hebbian.state, hebbian.conv_tail)


_WITH_A_FIXED_START = (
    ZetaEmbedding,
    NonHermitianPotential,
    DissipativeBKLayer,
    DissipativeHebbianLayer,
    MemoryResonanceLayer,
)


@dataclass
class _Trace:
    """What one block did, kept for diagnostics."""

    output: Tensor
    gamma: Tensor
    hebbian: HebbianOutput
    before: MemoryState | None


class Phase2IntegratedModel(nn.Module, Generation):
    """A language model whose tokens mix through a resolvent and a dissipative memory, in linear time.

    The model keeps nothing between calls: what it read is in the state that ``forward`` returns.

    Args:
        config: its configuration.
        init: draw fresh weights from the global CPU generator; False where they will be loaded.
    """

    def __init__(self, config: Phase2Config, init: bool = True):
        super().__init__()
        config.validate()
        self.config = config
        self.vocab_size, self.d_model = config.vocab_size, config.d_model
        self.n_layers, self.n_seq = config.n_layers, config.n_seq
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = ZetaEmbedding(config.d_model, config.zeta_embedding_trainable)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Phase2Block(config, first=i == 0) for i in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if init:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights on the CPU from ``generator`` (the global one if None), whatever the model's device.

        Matrices inside the blocks get N(0, std²) with the standard deviation ``1 / sqrt(fan_in)``; with
        ``use_zeta_init`` those of the potential get the zeta spectrum at the same norm. What BK-Core adds to the stream
        starts at zero.
        """
        zeta = ZetaInitializer(generator)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and module is not self.lm_head:
                std = module.in_features**-0.5
                if self.config.use_zeta_init and ".potential." in name:
                    zeta(module.weight, std)
                else:
                    _normal(module.weight, std, generator)
                if module.bias is not None:
                    module.bias.zero_()
        for weight in (self.token_embedding.weight, self.lm_head.weight):
            _normal(weight, 0.02, generator)
        for module in self.modules():
            if isinstance(module, _WITH_A_FIXED_START):
                module.reset_parameters()
        for block in self._blocks:
            block.bk_proj.weight.zero_()

    def forward(
        self,
        input_ids: Tensor,
        *,
        state: Phase2State | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_diagnostics: bool = False,
    ) -> Any:
        """Logits of the next token at every place.

        Args:
            input_ids: tokens, integer (B, N).
            state: what the sequences have read before; None for a fresh start.
            return_state: also return the state after the last token.
            cu_seqlens: offsets of S sequences packed in one row, integer (S + 1,), from 0 to N; needs B = 1. State and
                consolidation restart at each.
            attention_mask: 1 for tokens, 0 for padding on either side, (B, N). Padding is not read, and its logits
                are those of an empty hidden state.
            return_diagnostics: also return what happened inside; changes no logit.

        Returns:
            logits (B, N, vocabulary), float32 outside autocast; followed by the ``Phase2State`` and by the dictionary
            of diagnostics where asked for. The dictionary holds a list with an entry per layer under ``layer_outputs``,
            ``gamma_values``, ``snr_stats``, ``resonance_info`` and ``stability_metrics``, and ``input_embeddings`` and
            ``final_hidden_states``.

        Raises:
            ValueError: tokens, offsets, mask or state do not fit each other or the model.
        """
        diagnostics: dict[str, Any] | None = {} if return_diagnostics else None
        hidden, state = self.hidden_states(
            input_ids, state=state, cu_seqlens=cu_seqlens, attention_mask=attention_mask, diagnostics=diagnostics
        )
        logits = self.lm_head(hidden)
        if not torch.is_autocast_enabled(logits.device.type):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        extras = ([state] if return_state else []) + ([diagnostics] if return_diagnostics else [])
        return (logits, *extras) if extras else logits

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        state: Phase2State | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        diagnostics: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Phase2State]:
        """Everything but the head: final hidden states (B, N, D) and the next state; arguments as in ``forward``.
        ``diagnostics`` is a dictionary to fill."""
        self._check_input(input_ids)
        shape = (input_ids.shape[0], input_ids.shape[1])
        unpadded = None
        if attention_mask is not None:
            if cu_seqlens is not None:
                raise ValueError("give either attention_mask (padded) or cu_seqlens (packed), not both")
            unpadded = unpad(input_ids, attention_mask)
            input_ids, cu_seqlens = unpadded.tokens, unpadded.cu_seqlens
        elif cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, shape)
            cu_seqlens = cu_seqlens.cpu()  # Python reads the offsets, in every layer
        sequences = len(input_ids) if cu_seqlens is None else len(cu_seqlens) - 1
        position = self._start_position(state, sequences, input_ids.device)

        x = self.token_embedding(input_ids)
        place = positions(state.position if state is not None else None, input_ids, cu_seqlens)
        embedded = x + self.position_embedding(place).to(x.dtype)
        x, readout, layers, traces = self.dropout(embedded), None, [], []
        for i, block in enumerate(self.blocks):
            before = state.layers[i] if state is not None else None
            x, gamma, hebbian, layer = block(x, readout, before, position, cu_seqlens)
            readout = hebbian.readout
            layers.append(layer)
            if diagnostics is not None:
                traces.append(_Trace(x, gamma, hebbian, before.memory if before else None))
        hidden = self.ln_f(x)

        lengths = cu_seqlens.diff() if cu_seqlens is not None else torch.full_like(position, shape[1])
        if diagnostics is not None:
            self._diagnose(diagnostics, traces, embedded, hidden, lengths)
        if unpadded is not None:
            hidden = unpadded.restore(hidden, shape)
            for name in ("layer_outputs", "gamma_values", "input_embeddings", "final_hidden_states"):
                if diagnostics is not None:
                    diagnostics[name] = _map_tensors(diagnostics[name], lambda t: unpadded.restore(t, shape))
        return hidden, Phase2State(position + lengths, tuple(layers))

    def num_parameters(self, trainable_only: bool = False) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    @property
    def _blocks(self) -> list[Phase2Block]:
        return list(cast(Iterable[Phase2Block], self.blocks))

    def _diagnose(
        self, diagnostics: dict[str, Any], traces: list[_Trace], embedded: Tensor, hidden: Tensor, lengths: Tensor
    ) -> None:
        with torch.no_grad():
            diagnostics.update(
                input_embeddings=embedded.detach(),
                final_hidden_states=hidden.detach(),
                layer_outputs=[trace.output.detach() for trace in traces],
                gamma_values=[trace.gamma.detach() for trace in traces],
                snr_stats=[],
                resonance_info=[],
                stability_metrics=[],
            )
            for block, trace in zip(self._blocks, traces, strict=True):
                memory = trace.hebbian.state.memory
                snr, resonance = block.snr_filter, block.resonance
                diagnostics["snr_stats"].append(snr.statistics(memory) if snr else {})
                diagnostics["resonance_info"].append(resonance.statistics(memory) if resonance else {})
                diagnostics["stability_metrics"].append(_stability(block, trace, lengths))

    def _check_input(self, input_ids: Tensor) -> None:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be integers (int64 or int32), got {input_ids.dtype}")
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(
                f"input_ids must have shape (batch, sequence) and hold a token, got {tuple(input_ids.shape)}"
            )
        # On CUDA a look at the values would stall the queue; the embedding's own device assertion guards there.
        if input_ids.device.type == "cpu":
            least, most = input_ids.aminmax()
            if least < 0 or most >= self.vocab_size:
                wrong = least if least < 0 else most
                raise ValueError(
                    f"token id {wrong} is outside the vocabulary of {self.vocab_size} (0..{self.vocab_size - 1})"
                )

    def _start_position(self, state: Phase2State | None, sequences: int, device: torch.device) -> Tensor:
        if state is None:
            return torch.zeros(sequences, dtype=torch.long)
        if len(state) != sequences:
            raise ValueError(f"the state holds {len(state)} sequences, the input has {sequences}")
        if state.device != device:
            raise ValueError(f"the state is on {state.device}, the input on {device}; use state.to(device)")
        wanted = [(block.dissipative_bk.potential.num_heads, *block.hebbian.state_shape) for block in self._blocks]
        given = [
            (layer.resolvent.shape[1], layer.memory.memory.shape[1:], layer.conv_tail.shape[1:])
            for layer in state.layers
        ]
        if wanted != given:
            raise ValueError("the state belongs to another model: its layers, heads or widths differ")
        return state.position


def _stability(block: Phase2Block, trace: _Trace, lengths: Tensor) -> dict[str, Tensor]:
    layer, after = block.hebbian, trace.hebbian.state.memory
    writes = trace.hebbian.values.norm(dim=-1, dtype=layer.eta.dtype) * layer.eta
    before = trace.before.memory if trace.before is not None else torch.zeros_like(after)
    return LyapunovStabilityMonitor.metrics(
        before,
        after,
        _per_sequence(writes, lengths, "amax", 0.0),
        _per_sequence(trace.gamma * layer.dt, lengths, "amin", torch.inf),
        (lengths * layer.dt).to(after.device),
        block.snr_filter.constants.eta_boost if block.snr_filter else 1.0,
    )


def _per_sequence(x: Tensor, lengths: Tensor, reduce: str, empty: float) -> Tensor:
    """Extreme over the tokens of each sequence: (B, N, H) -> (S, H)."""
    heads = x.shape[-1]
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(x.device)
    out = x.new_full((len(lengths), heads), empty)
    return out.scatter_reduce(0, sequence[:, None].expand(-1, heads), x.reshape(-1, heads), reduce)


def _map_tensors(value: Any, function: Any) -> Any:
    return [function(v) for v in value] if isinstance(value, list) else function(value)


def _normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """N(0, std²) drawn on the CPU, so that every device gets the same weights."""
    if not weight.is_meta:
        weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu") * std)
