"""The Phase 2 block: BK-Core beside a dissipative Hebbian memory, then a feed-forward network.

Each of the two is a residual branch. The first, the mixer, has one norm, one product in and one product out: BK-Core
and memory read the same normed tokens through the concatenated weights of their projections, and read-out and features
enter the residual stream through another product. Γ acts in BK-Core and in the memory. The memory read-out of a block
enters the potential of the next block. A block of a model that grew out of Phase 1 keeps its semiseparable branch,
behind the mixer. In the blocks of ``attention_layers`` attention over the last tokens takes the place of the memory.

Shapes: B batch, N sequence, D model width, H heads of queries, J heads of keys and values, K = V head
width, S sequences.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ...layers import (
    AdaptiveRankSemiseparableLayer,
    DissipativeBKLayer,
    DissipativeHebbianLayer,
    GatedFeedForward,
    LocalAttentionLayer,
    MemoryResonanceLayer,
    NonHermitianPotential,
    RMSNorm,
    SemiseparableState,
    SNRMemoryFilter,
)
from ...layers.heads import Given, HeadsLayer
from ...layers.hebbian import HebbianOutput
from ...layers.linear import has_hook, product_of_parts, products
from ...layers.local_attention import AttentionOutput
from ...ops import Consolidation
from ...ops.memory_rotation import Rotation
from ...ops.precision import for_products
from ..base import Block, IntegratedModel
from .config import Phase2Config
from .state import LayerState, Phase2State


class Phase2Record(NamedTuple):
    """Record of what a Phase 2 block computed.

    Attributes:
        output: residual stream behind the block, (B, N, D).
        features: features [Re g, Im g] of the resolvent, (B, N, 2H); None without BK-Core.
        gamma: decay rate Γ, (B, N, H); None without BK-Core.
        memory_input: normed tokens, which BK-Core and memory read, or the attention in its place, (B, N, D).
        readout: its read-out, normalised and not gated, (B, N, HV).
        values: values that were written, (B, N, H, V), or attended to, (B, N, J, V).
        state: state after the last token; without the window where no state was asked for.
    """

    output: Tensor
    features: Tensor | None
    gamma: Tensor | None
    memory_input: Tensor
    readout: Tensor
    values: Tensor
    state: LayerState


def stream_norm(config: Phase2Config) -> nn.Module:
    """Return a norm of the residual stream."""
    return (RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm)(config.d_model, config.norm_eps)


class Phase2Block(Block[Phase2Record]):
    """BK-Core beside a dissipative Hebbian memory, then a feed-forward network: two norms, two residual branches.

    Args:
        config: the configuration.
        layer: number of the block, from 0: the first has no read-out of a block before to feed back, and those of
            ``attention_layers`` attend.

    Attributes:
        dissipative_bk: BK-Core; None where it is left out.
        hebbian: the memory; None where the block attends.
        attention: the attention in its place; None where it does not.
    """

    def __init__(self, config: Phase2Config, layer: int = 0):
        super().__init__()
        attends, width = layer in config.attention_layers, config.d_model
        self.ln1 = stream_norm(config)
        self.dissipative_bk = _bk_layer(config, layer)
        self.bk_proj = nn.Linear(2 * config.num_heads, width, bias=False) if config.bk_core else None
        self.hebbian = None if attends else _memory(config)
        self.attention = attention_layer(config, layer) if attends else None
        self.consolidation_interval = config.consolidation_interval
        self.snr_filter = None if attends else _snr_filter(config)
        self.resonance = None if attends else _resonance(config)
        self.ln_ssm = stream_norm(config) if config.ar_ssm_rank else None
        self.ar_ssm = _semiseparable(config)
        self.ln2 = stream_norm(config)
        self.ffn = (
            GatedFeedForward(width, config.ffn_width, config.backend)
            if config.ffn_gated
            else nn.Sequential(nn.Linear(width, config.ffn_width), nn.GELU(), nn.Linear(config.ffn_width, width))
        )
        self.dropout = nn.Dropout(config.dropout)

    def consolidation(self) -> Consolidation | None:
        """Return the filters that act on the memory at its boundaries; None if there are none."""
        if self.snr_filter is None and self.resonance is None:
            return None
        return Consolidation(
            self.consolidation_interval,
            self.snr_filter() if self.snr_filter else None,
            self.resonance() if self.resonance else None,
        )

    @property
    def amplification(self) -> Tensor:
        """Largest factor of a memory in the SNR filter, (H,) or (); 1 without one."""
        return self.snr_filter.amplification if self.snr_filter else torch.ones(())

    @property
    def mixer(self) -> HeadsLayer:
        """The memory, or the attention in its place."""
        mixer = self.hebbian or self.attention
        assert mixer is not None
        return mixer

    def state_shapes(self) -> list[tuple[int, ...]]:
        bk, ar_ssm = self.dissipative_bk, self.ar_ssm.state_shape if self.ar_ssm else ()
        resolvent = [] if bk is None else [(bk.potential.num_heads,)]
        if self.attention is not None:
            window, conv_tail = self.attention.state_shape
            return [*resolvent, conv_tail, *ar_ssm, window, window]
        assert self.hebbian is not None
        memory, conv_tail = self.hebbian.state_shape
        phases = [] if self.hebbian.rotation_proj is None else [(memory[1] // 2,)]
        return [*resolvent, memory, memory[:1], conv_tail, *ar_ssm, *phases]

    def compute(
        self,
        x: Tensor,
        readout: Tensor | None,
        state: LayerState | None,
        position: Tensor | None,
        cu_seqlens: Tensor | None,
        rotation: Rotation | None = None,
        return_state: bool = True,
    ) -> Phase2Record:
        """Run the block.

        Args:
            x: residual stream, (B, N, D).
            readout: memory read-out of the block before, (B, N, HV); None for the first block.
            state: the block's state before the first token; None for a fresh start.
            position: tokens that the sequences have read before, (S,); None for a fresh start.
            cu_seqlens: offsets of packed sequences.
            rotation: rotary positions of the tokens; None where the block computes them, or does not attend.
            return_state: compute the state after the last token.
        """
        resolvent, ar_ssm = (None, None) if state is None else (state.resolvent, state.ar_ssm)
        # 1. One norm and one product in, the short convolution behind it.
        normed = for_products(self.ln1(x))
        potential = [] if self.dissipative_bk is None else self.dissipative_bk.potential.projections
        conv_tail = None if state is None else state.conv_tail
        if has_hook(self.mixer):  # which fetches its weights: it computes its inputs itself
            given, of_potential = None, products(normed, potential)
        else:
            given, of_potential = self.mixer.given(normed, conv_tail, cu_seqlens, potential)
        # 2. BK-Core: the resolvent of the tokens' Hamiltonian.
        features, gamma = None, None
        if self.dissipative_bk is not None:
            features, gamma, resolvent = self.dissipative_bk(
                normed, readout, state=resolvent, cu_seqlens=cu_seqlens, projected=of_potential
            )
        # 3. Memory, with the same Γ, or attention.
        read = self._read(normed, gamma, state, position, cu_seqlens, given, rotation, features, return_state)
        # 4. One product out, of the gated read-out with the features behind it.
        widths, maps = [read.readout.shape[-1]], [self.mixer.out_proj]
        if features is not None and self.bk_proj is not None:
            widths, maps = [*widths, features.shape[-1]], [*maps, self.bk_proj]
        x = x + self._dropped(product_of_parts(read.gated, widths, maps))
        # 5. The semiseparable branch of a converted model.
        if self.ar_ssm is not None and self.ln_ssm is not None:
            output, _, ar_ssm = self.ar_ssm(self.ln_ssm(x), ar_ssm, cu_seqlens)
            x = x + self._dropped(output)
        # 6. Feed-forward network.
        x = x + self._dropped(self.ffn(self.ln2(x)))
        return Phase2Record(x, features, gamma, normed, read.readout, read.values, self._state(read, resolvent, ar_ssm))

    def _dropped(self, x: Tensor) -> Tensor:
        """Return what a branch adds to the residual stream, under dropout in training."""
        return self.dropout(x) if self.training else x

    def _read(
        self,
        x: Tensor,
        gamma: Tensor | None,
        state: LayerState | None,
        position: Tensor | None,
        cu_seqlens: Tensor | None,
        given: Given | None,
        rotation: Rotation | None,
        features: Tensor | None,
        return_state: bool,
    ) -> HebbianOutput | AttentionOutput:
        """Read the memory, or attend."""
        conv_tail = None if state is None else state.conv_tail
        if self.hebbian is not None:
            assert gamma is not None
            memory, phases = (None, None) if state is None else (state.memory, state.phases)
            return self.hebbian(
                x,
                gamma,
                state=memory,
                conv_tail=conv_tail,
                position=position,
                cu_seqlens=cu_seqlens,
                consolidation=self.consolidation(),
                phases=phases,
                given=given,
                features=features,
            )
        assert self.attention is not None
        window = None
        if state is not None:
            window = state.cache if self.attention.window is None else state.window
            if window is None:
                raise ValueError("the state belongs to another model: one of its windows grows, or none of them does")
        return self.attention(
            x,
            state=window,
            conv_tail=conv_tail,
            position=position,
            cu_seqlens=cu_seqlens,
            given=given,
            rotation=rotation,
            features=features,
            return_state=return_state,
        )

    def _state(
        self, read: HebbianOutput | AttentionOutput, resolvent: Tensor | None, ar_ssm: SemiseparableState | None
    ) -> LayerState:
        if isinstance(read, HebbianOutput):
            return LayerState(resolvent, read.state, read.conv_tail, ar_ssm, read.phases)
        assert self.attention is not None
        window, cache = (None, read.state) if self.attention.window is None else (read.state, None)
        return LayerState(resolvent, None, read.conv_tail, ar_ssm, None, window, cache)


def _bk_layer(config: Phase2Config, layer: int) -> DissipativeBKLayer | None:
    if not config.bk_core:
        return None
    potential = NonHermitianPotential(
        config.d_model,
        config.num_heads,
        base_decay=config.base_decay,
        adaptive_decay=config.adaptive_decay,
        dt=config.hebbian_dt,
        memory_width=config.num_heads * config.head_dim if config.memory_feedback and layer else 0,
        memory_scale=config.feedback_scale,
        least_decay=config.least_decay,
    )
    backend = config.backend if config.use_triton_bk else "torch"
    return DissipativeBKLayer(potential, backend=backend, block_size=config.triton_block_size)


def _memory(config: Phase2Config) -> DissipativeHebbianLayer:
    return DissipativeHebbianLayer(
        config.d_model,
        config.num_heads,
        config.head_dim,
        eta=config.hebbian_eta,
        dt=config.hebbian_dt,
        conv_size=config.conv_size,
        output_norm=config.output_norm,
        output_gate=config.output_gate,
        backend=config.backend,
        rotation=config.memory_rotation,
        num_kv_heads=config.num_kv_heads,
        qkv_bias=config.qkv_bias,
        norm_weight=config.memory_norm_weight,
        rotary=(config.rotary_base, config.scaling) if config.memory_rotation_bias else None,
        rotation_orders=tuple(config.memory_rotation_orders),
    )


def attention_layer(
    config: Phase2Config, layer: int, kind: type[LocalAttentionLayer] = LocalAttentionLayer
) -> LocalAttentionLayer:
    """Return the attention of a block, of a kind that takes the arguments of ``LocalAttentionLayer``."""
    return kind(
        config.d_model,
        config.num_heads,
        config.head_dim,
        config.windows[layer],
        conv_size=config.conv_size,
        output_norm=config.output_norm,
        output_gate=config.output_gate,
        backend=config.backend,
        num_kv_heads=config.num_kv_heads,
        qk_norm=config.qk_norm,
        qkv_bias=config.qkv_bias,
        rotary_base=config.rotary_base,
        rotary_scaling=config.scaling,
    )


def _snr_filter(config: Phase2Config) -> SNRMemoryFilter | None:
    if not config.snr_enabled:
        return None
    return SNRMemoryFilter(
        config.num_heads,
        threshold=config.snr_threshold,
        gamma_boost=config.snr_gamma_boost,
        eta_boost=config.snr_eta_boost,
        temperature=config.snr_temperature,
        trained=config.snr_trained,
        paired=config.memory_rotation,
    )


def _resonance(config: Phase2Config) -> MemoryResonanceLayer | None:
    if not config.resonance_enabled:
        return None
    return MemoryResonanceLayer(config.num_heads, config.head_dim, config.resonance_energy_threshold)


def _semiseparable(config: Phase2Config) -> AdaptiveRankSemiseparableLayer | None:
    if not config.ar_ssm_rank:
        return None
    return AdaptiveRankSemiseparableLayer(
        config.d_model, config.ar_ssm_rank, config.gate_width, config.ar_ssm_bounded, config.backend
    )


Phase2Model = IntegratedModel[Phase2Config, Phase2Record, Phase2State]


def blocks_of(model: Phase2Model) -> list[Phase2Block]:
    """Return the blocks of a Phase 2 model, from the first to the last."""
    return [cast(Phase2Block, block) for block in model.blocks]
