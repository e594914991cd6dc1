"""Configuration of Phase 2 and its presets."""

import math
from dataclasses import dataclass
from typing import Self, get_args

from ...errors import ConfigError
from ...files import shown
from ...layers import gated_width
from ...ops.dispatch import BACKENDS
from ...ops.hebbian import CHUNK
from ...ops.rotary import RotaryKind, Scaling
from ..config import ModelConfig, Values, check_fields, must_be_at_least, must_be_positive
from ..phase1.config import Phase1Config

NORMS = ("layernorm", "rmsnorm")


@dataclass
class RotaryScaling(ModelConfig):
    """Scaling of the rotary positions; see ``ops.rotary.Scaling``."""

    kind: RotaryKind = "linear"
    factor: float = 1.0
    """factor of the length"""
    original_length: int = 8192
    """tokens of a training window before the scaling"""
    low_frequency: float = 1.0
    """llama3: turns per original window below which a pair is slow"""
    high_frequency: float = 4.0
    """llama3: turns per original window above which a pair is fast"""

    def _faults(self) -> list[str]:
        faults = must_be_positive(self, "original_length", "low_frequency")
        faults += must_be_at_least(self, 1, "factor")
        if self.kind not in (kinds := get_args(RotaryKind)):
            faults.append(f"kind must be one of {', '.join(kinds)}, got {self.kind!r}")
        if self.high_frequency <= self.low_frequency:
            faults.append(f"high_frequency must be > low_frequency ({self.low_frequency}), got {self.high_frequency}")
        return faults


@dataclass
class Phase2Config(ModelConfig):
    """Configuration of a Phase 2 model; ``validate`` checks it, ``to_dict`` and ``from_dict`` store it."""

    listed_by = "resolvent presets --fields"

    # Phase 1 compatibility
    phase1_config: Phase1Config | None = None
    """configuration of the Phase 1 model that was converted, if any"""

    # BK-Core Triton
    use_triton_bk: bool = True
    """let the BK-Core use its Triton kernel where ``backend`` does; False keeps it on torch"""
    triton_block_size: int = 256
    """most lanes of one program of the kernel; a lane holds eight sites of a chain"""

    # Non-Hermitian potential
    base_decay: float = 0.01
    """decay rate Γ, per unit time, at which the slowest head of a fresh model forgets"""
    adaptive_decay: bool = True
    """let Γ depend on the token"""

    # Dissipative Hebbian memory
    hebbian_eta: float = 0.1
    """initial learning rate η of every head"""
    hebbian_dt: float = 1.0
    """time per token"""
    num_heads: int = 8
    head_dim: int = 64

    # SNR memory filter
    snr_threshold: float = 2.0
    """multiple of a memory's rms above which a component is signal"""
    snr_gamma_boost: float = 2.0
    """factor of the decay rate of noise, at full strength"""
    snr_eta_boost: float = 1.5
    """factor of the learning rate of signal, at full strength"""

    # Memory resonance
    resonance_enabled: bool = True
    resonance_energy_threshold: float = 0.1
    """multiple of the mean energy above which a mode resonates"""

    # Zeta initialisation
    use_zeta_init: bool = True
    zeta_embedding_trainable: bool = False
    """train the frequencies of the positions"""

    # Model architecture
    vocab_size: int = 50257
    d_model: int = 512
    n_layers: int = 6
    n_seq: int = 1024
    """tokens of a training window; a model reads any number of them"""
    ffn_dim: int | None = None
    """hidden width of a plain feed-forward network, of which a gated one has two thirds; None for 4 d_model"""
    dropout: float = 0.1

    # Performance targets of `resolvent benchmark`
    target_vram_gb: float = 8.0
    target_speedup_triton: float = 3.0

    # Beyond the report
    least_decay: float | None = None
    """least decay rate Γ that training can reach: the inverse of the longest reach of a memory; None for the smaller of
    1e-4 and a tenth of ``base_decay``"""
    embedding_scale: float | None = None
    """factor of the token vectors; None for sqrt(d_model), which brings them to the size of what the blocks add"""
    ffn_gated: bool = True
    """SwiGLU feed-forward network, at about as many parameters; False is Linear, GELU, Linear"""
    snr_enabled: bool = True
    snr_temperature: float = 0.5
    """softness of the SNR threshold"""
    snr_trained: bool = True
    """train the strength of the filter, from near zero; False is full strength"""
    consolidation_interval: int = 4 * CHUNK
    """tokens between two consolidations of a memory"""
    memory_feedback: bool = True
    """add the previous block's memory read-out to the potential"""
    feedback_scale: float | None = None
    """factor of that read-out; None for the inverse square root of its width"""
    memory_rotation: bool = False
    """rotate queries and keys by accumulated angles that depend on the tokens, so that a memory can count"""
    memory_rotation_orders: tuple[int, ...] = (2,)
    """orders n of equal groups of pairs of channels, whose angles have plateaus at multiples of 1 / n of a turn; (2, 3)
    for halves in half of the pairs, and thirds in the others"""
    memory_rotation_bias: bool = False
    """add a trained bias to these angles, which starts at the rotary positions of attention"""
    conv_size: int = 4
    """width of the short convolution before q, k, v in tokens; 1 for none"""
    output_norm: bool = True
    """RMS-normalise the memory read-out of each head"""
    memory_norm_weight: bool = False
    """RMS-normalise the memory read-out, whatever ``output_norm``, and multiply it by trained weights"""
    output_gate: bool = True
    """gate the memory read-out"""
    attention_layers: tuple[int, ...] = ()
    """blocks, counted from 0, in which attention reads in the place of the memory"""
    attention_window: int | None = None
    """number of tokens to which such a block attends; None for all, with a state that grows"""
    attention_windows: tuple[int, ...] | None = None
    """number of tokens for each of ``attention_layers``, 0 for all; None for ``attention_window`` in every one"""
    backend: str = "auto"
    """backend of the operators: auto, torch or triton"""

    # Parts of a Transformer, which its conversion switches
    bk_core: bool = True
    """BK-Core beside the attention; False leaves it out, where every block attends"""
    norm: str = "layernorm"
    """norm of the residual stream: layernorm or rmsnorm"""
    norm_eps: float = 1e-5
    num_kv_heads: int | None = None
    """heads of keys and values, which equally many of ``num_heads`` share; None for ``num_heads``"""
    qk_norm: bool = True
    """L2-normalise queries and keys of attention and train its temperature; False fixes it at 1 / sqrt(head_dim).
    Those of a memory, whose bound rests on the norm, always are"""
    qkv_bias: bool = False
    """add biases to queries, keys and values"""
    rotary_base: float = 10_000.0
    """base of the rotary positions of attention"""
    rotary_scaling: RotaryScaling | None = None
    """scaling of the rotary positions; None for none"""
    zeta_positions: bool = True
    """add positions to the token vectors"""
    intermediate_size: int | None = None
    """hidden width of the feed-forward network as it is, in the place of ``ffn_dim``; None for that"""

    # Parts that a converted model carries over
    ar_ssm_rank: int = 0
    """channels of Phase 1's semiseparable branch; 0 for none"""
    ar_ssm_gate_hidden_dim: int | None = None
    """hidden width of the gate of this branch; None for a quarter of d_model"""
    ar_ssm_bounded: bool = True
    """let this branch read its sum through ``c / sqrt(1 + c²)``"""
    htt_rank: int | None = None
    """embed tokens with a tensor train of this rank; None for a table"""
    htt_phase_encoding: bool = True
    """a trainable phase for every rank of the tensor train"""
    tie_embeddings: bool = False
    """use the table of the token embedding in the head"""

    @classmethod
    def from_phase1(cls, phase1_config: Phase1Config, **overrides: object) -> Self:
        """Return the Phase 2 configuration of a Phase 1 model: its sizes and targets, and Phase 2's defaults elsewhere.

        A training window of ``n_seq`` tokens has several consolidations.

        Raises:
            ConfigError: an override is no field.
        """
        check_fields(cls, overrides)
        shared = (
            "vocab_size", "d_model", "n_layers", "n_seq", "num_heads", "ffn_dim", "dropout", "embedding_scale",
            "backend", "target_vram_gb",
        )  # fmt: skip
        taken: Values = {name: getattr(phase1_config, name) for name in shared}
        values: Values = {"phase1_config": phase1_config, "ffn_gated": False, **taken, **overrides}
        sizes = values["d_model"], values["num_heads"], values["n_seq"]
        if all(isinstance(size, int) for size in sizes):  # else ``validate`` names the wrong one
            width, heads, window = sizes
            interval = max(CHUNK, window // 4 // CHUNK * CHUNK)
            values.setdefault("head_dim", max(1, width // max(1, heads)))
            values.setdefault("consolidation_interval", min(interval, cls.consolidation_interval))
        return cls(**values)

    @property
    def embedding_factor(self) -> float:
        """Factor of the token vectors.

        The table starts as small as the head needs it: without the default factor, its rows would be negligible beside
        what the first block adds to them.
        """
        return self.d_model**0.5 if self.embedding_scale is None else self.embedding_scale

    @property
    def ffn_width(self) -> int:
        """Hidden width of the feed-forward network."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        plain = self.ffn_dim if self.ffn_dim is not None else 4 * self.d_model
        return gated_width(plain) if self.ffn_gated else plain

    @property
    def gate_width(self) -> int:
        """Hidden width of the semiseparable branch's gate."""
        return self.ar_ssm_gate_hidden_dim if self.ar_ssm_gate_hidden_dim is not None else max(1, self.d_model // 4)

    @property
    def windows(self) -> dict[int, int | None]:
        """Number of tokens to which each block of ``attention_layers`` attends; None for all."""
        if self.attention_windows is None:
            return dict.fromkeys(self.attention_layers, self.attention_window)
        return {i: window or None for i, window in zip(self.attention_layers, self.attention_windows, strict=True)}

    @property
    def scaling(self) -> Scaling | None:
        """Scaling of the rotary positions, for the operator."""
        return None if self.rotary_scaling is None else Scaling(**vars(self.rotary_scaling))

    def _faults(self) -> list[str]:
        faults = [*self._range_faults(), *self._memory_faults(), *self._layer_faults(), *self._transformer_faults()]
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout must be in [0, 1), got {self.dropout}")
        if self.consolidation_interval > 0 and self.consolidation_interval % CHUNK:
            faults.append(f"consolidation_interval must be a multiple of {CHUNK}, got {self.consolidation_interval}")
        if self.backend not in BACKENDS:
            faults.append(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if self.phase1_config is not None:
            faults += [f"phase1_config: {fault}" for fault in self.phase1_config.faults()]
        return faults

    def _range_faults(self) -> list[str]:
        """Return a fault for every number that is too small."""
        faults = must_be_positive(
            self,
            "base_decay",
            "hebbian_eta",
            "hebbian_dt",
            "snr_threshold",
            "resonance_energy_threshold",
            "d_model",
            "n_layers",
            "n_seq",
            "vocab_size",
            "num_heads",
            "head_dim",
            "triton_block_size",
            "snr_temperature",
            "consolidation_interval",
            "target_vram_gb",
            "target_speedup_triton",
            "norm_eps",
            "rotary_base",
        )
        faults += must_be_at_least(self, 1, "snr_gamma_boost", "snr_eta_boost", "conv_size")
        faults += must_be_at_least(self, 0, "ar_ssm_rank")
        optional = (
            "ffn_dim",
            "ar_ssm_gate_hidden_dim",
            "htt_rank",
            "embedding_scale",
            "feedback_scale",
            "attention_window",
            "num_kv_heads",
            "intermediate_size",
        )
        return faults + must_be_positive(self, *(name for name in optional if getattr(self, name) is not None))

    def _memory_faults(self) -> list[str]:
        """Return the faults of decay and rotation."""
        faults = []
        if self.least_decay is not None and not 0 < self.least_decay < self.base_decay:
            faults.append(f"least_decay must be > 0 and < base_decay ({self.base_decay}), got {self.least_decay}")
        if self.memory_rotation and self.head_dim % 2:
            faults.append(f"memory_rotation turns pairs of channels: head_dim must be even, got {self.head_dim}")
        faults += self._order_faults()
        if self.memory_rotation_bias and not self.memory_rotation:
            faults.append("memory_rotation_bias needs memory_rotation, which is off")
        if self.memory_rotation_bias and self.hebbian_dt * math.pi <= 1:
            faults.append(
                "memory_rotation_bias turns a pair by up to one radian per token, a memory by less than π hebbian_dt: "
                f"hebbian_dt must be > 1/π, got {self.hebbian_dt}"
            )
        return faults

    def _layer_faults(self) -> list[str]:
        """Return the faults of a shared table, and of the blocks that attend."""
        faults = []
        if self.tie_embeddings and self.htt_rank is not None:
            faults.append(f"tie_embeddings needs a table to share: leave out htt_rank, got {self.htt_rank}")
        if len({*self.attention_layers} & {*range(self.n_layers)}) < len(self.attention_layers):
            layers, last = shown(list(self.attention_layers)), self.n_layers - 1
            faults.append(f"attention_layers must name blocks of 0..{last}, each at most once, got {layers}")
        if self.attention_layers and self.head_dim % 2:
            faults.append(f"head_dim must be even for the rotary positions of attention, got {self.head_dim}")
        return faults

    def _order_faults(self) -> list[str]:
        orders, pairs = self.memory_rotation_orders, self.head_dim // 2
        faults = []
        if not orders or min(orders) < 2:
            faults.append(f"memory_rotation_orders must be numbers >= 2, got {shown(list(orders))}")
        elif tuple(orders) != (2,) and not self.memory_rotation:
            faults.append("memory_rotation_orders other than (2,) need memory_rotation, got False")
        elif self.memory_rotation and pairs % len(orders):
            faults.append(
                f"memory_rotation_orders must be a number that divides head_dim / 2 ({pairs}), got {len(orders)} orders"
            )
        if tuple(orders) != (2,) and self.memory_rotation_bias:
            faults.append(
                "memory_rotation_bias starts at angles of every size, which orders other than (2,) have not: "
                f"memory_rotation_orders must be (2,), got {shown(list(orders))}"
            )
        return faults

    def _transformer_faults(self) -> list[str]:
        """Return the faults of the parts of a Transformer."""
        faults, windows, attending = [], self.attention_windows, len(self.attention_layers)
        if self.norm not in NORMS:
            faults.append(f"norm must be one of {', '.join(NORMS)}, got {shown(self.norm)}")
        if self.num_kv_heads is not None and self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
            faults.append(f"num_kv_heads must divide num_heads ({self.num_heads}), got {self.num_kv_heads}")
        if self.num_kv_heads not in (None, self.num_heads) and self.conv_size != 1:
            faults.append(f"num_kv_heads below num_heads needs conv_size 1, got {self.conv_size}")
        if not self.qk_norm and self.conv_size != 1:
            faults.append(f"qk_norm switched off needs conv_size 1, got {self.conv_size}")
        if not self.bk_core and attending < self.n_layers:
            faults.append(
                f"bk_core switched off needs no memory, which reads its Γ: attention_layers must name all "
                f"{self.n_layers} blocks, got {attending}"
            )
        if windows is not None and (len(windows) != attending or any(window < 0 for window in windows)):
            faults.append(
                f"attention_windows must be a number >= 0 for each of the {attending} attention_layers, "
                f"got {shown(list(windows))}"
            )
        if windows is not None and self.attention_window is not None:
            faults.append(
                f"attention_window has no effect beside attention_windows: leave it out, got {self.attention_window}"
            )
        if self.rotary_scaling is not None:
            faults += [f"rotary_scaling: {fault}" for fault in self.rotary_scaling.faults()]
        return faults


PRESETS: dict[str, Values] = {
    "tiny": dict(
        vocab_size=257,
        d_model=128,
        n_layers=3,
        n_seq=256,
        num_heads=4,
        head_dim=32,
        dropout=0.0,
        consolidation_interval=64,
        target_vram_gb=1.0,
    ),
    "small": dict(d_model=256, n_layers=4, n_seq=512, num_heads=4, target_vram_gb=4.0),
    "base": dict(d_model=512, n_layers=6, n_seq=1024, num_heads=8, target_vram_gb=8.0),
    "large": dict(d_model=1024, n_layers=12, n_seq=2048, num_heads=16, target_vram_gb=16.0),
}

PRESETS |= {
    f"{name}-hybrid": {
        **values,
        "attention_layers": tuple(range(2, values["n_layers"], 3)),
        "attention_window": values["n_seq"] // 2,
    }
    for name, values in PRESETS.items()
}


def get_phase2_preset(name: str) -> Phase2Config:
    """Return a fresh configuration: ``tiny`` (laptops, bytes), ``small``, ``base`` or ``large``, or a hybrid of each.

    ``tiny-hybrid``, ``small-hybrid``, ``base-hybrid`` and ``large-hybrid`` attend in every third block, to the last
    half of a training window.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"Unknown preset: {name}. Available presets: {', '.join(PRESETS)}")
    return Phase2Config(**PRESETS[name])
