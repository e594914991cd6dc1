"""Configuration of Phase 1, the model of a static Hamiltonian that Phase 2 extends, and its presets."""

from dataclasses import dataclass
from typing import Self

from ...errors import ConfigError
from ...ops.dispatch import BACKENDS
from ..config import ModelConfig, Values, must_be_at_least, must_be_positive


@dataclass
class Phase1Config(ModelConfig):
    """Configuration of a Phase 1 model; ``validate`` checks it, ``to_dict`` and ``from_dict`` store it."""

    listed_by = "resolvent presets --fields --phase 1"

    # Adaptive-rank semiseparable layer (AR-SSM)
    ar_ssm_enabled: bool = True
    ar_ssm_max_rank: int = 32
    """channels of the layer"""
    ar_ssm_min_rank: int = 4
    """channels in use when training begins"""
    ar_ssm_gate_hidden_dim: int | None = None
    """hidden width of the gate; None for a quarter of d_model"""
    ar_ssm_l1_regularization: float = 0.001
    """weight of the mean gate in the penalty that training adds to the loss"""
    ar_ssm_use_fused_scan: bool = True
    """let the prefix sum use a kernel where ``backend`` does; False keeps it on torch"""

    # Holographic tensor-train embedding (HTT)
    htt_enabled: bool = True
    """embed tokens with a tensor train instead of a table"""
    htt_rank: int = 16
    htt_num_cores: int = 2
    """only a train of two cores is implemented"""
    htt_phase_encoding: bool = True
    """a trainable phase for every rank"""
    htt_compression_target: float = 0.1
    """parameters over those of a table; diagnostics report the actual ratio"""

    # Stability, which diagnostics report
    stability_monitoring_enabled: bool = True
    stability_threshold: float = 1e-6
    schatten_s1_bound: float = 100.0
    schatten_s2_bound: float = 50.0
    gradient_norm_threshold: float = 10.0

    # Memory
    use_gradient_checkpointing: bool = True
    """activation checkpointing of the branches of a block"""
    checkpoint_ar_ssm: bool = True
    """also checkpoint the semiseparable branch"""
    checkpoint_htt: bool = False
    """also checkpoint the tensor-train embedding"""
    ffn_rank: int | None = None
    """rank of the feed-forward network's matrices; None for full ones"""
    ffn_compression_enabled: bool = True
    """use ``ffn_rank``; False keeps the matrices full"""

    # Model architecture
    vocab_size: int = 50257
    d_model: int = 512
    n_layers: int = 6
    n_seq: int = 1024
    """tokens of a training window; a model reads any number of them"""

    # Performance targets
    target_vram_gb: float = 8.0
    target_ppl_degradation: float = 0.05
    target_speedup: float = 3.0

    # Beyond the original
    num_heads: int = 8
    """chains of the BK-Core"""
    ffn_dim: int | None = None
    """hidden width of the feed-forward network; None for 4 d_model"""
    dropout: float = 0.1
    embedding_scale: float = 1.0
    """factor of the token vectors"""
    rank_warmup_steps: int = 1000
    """training steps in which the rank rises from its minimum to its maximum"""
    ar_ssm_bounded: bool = True
    """let the semiseparable layers read their sum through ``c / sqrt(1 + c²)``, which keeps the loss on texts that are
    longer than those of training; False is the plain formula"""
    backend: str = "auto"
    """backend of the operators: auto, torch or triton"""

    @classmethod
    def for_hardware(cls, vram_gb: float) -> Self:
        """Return the configuration for a GPU of this memory: up to 8, up to 10, or more GB.

        Raises:
            ConfigError: the memory is not above zero.
        """
        if not vram_gb > 0:
            raise ConfigError(f"vram_gb must be > 0, got {vram_gb}")
        for limit, values in _HARDWARE.items():
            if vram_gb <= limit:
                return cls(**values)
        return cls(**_LARGE_HARDWARE)

    @classmethod
    def for_inference(cls) -> Self:
        """Return a configuration without activation checkpointing."""
        return cls(use_gradient_checkpointing=False, checkpoint_ar_ssm=False)

    @classmethod
    def for_maximum_quality(cls) -> Self:
        """Return a configuration of high ranks."""
        return cls(**_ranks(128, 16, 64, 0.3), ar_ssm_l1_regularization=1e-4, target_ppl_degradation=0.01)

    @classmethod
    def for_maximum_efficiency(cls) -> Self:
        """Return a configuration of low ranks."""
        return cls(**_ranks(16, 2, 8, 0.05), ar_ssm_l1_regularization=0.01, target_vram_gb=6.0)

    @property
    def embedding_factor(self) -> float:
        """Factor of the token vectors."""
        return self.embedding_scale

    @property
    def tie_embeddings(self) -> bool:
        """False: the head has weights of its own."""
        return False

    @property
    def ffn_width(self) -> int:
        """Hidden width of the feed-forward network."""
        return self.ffn_dim if self.ffn_dim is not None else 4 * self.d_model

    @property
    def effective_ffn_rank(self) -> int | None:
        """Rank of the feed-forward network's matrices, None for full ones."""
        return self.ffn_rank if self.ffn_compression_enabled else None

    @property
    def gate_width(self) -> int:
        """Hidden width of the semiseparable layer's gate."""
        if self.ar_ssm_gate_hidden_dim is not None:
            return self.ar_ssm_gate_hidden_dim
        return max(self.d_model // 4, self.ar_ssm_min_rank)

    def rank_at(self, step: int) -> int:
        """Return the rank of the semiseparable layers at a training step; it rises linearly to the maximum."""
        progress = min(1.0, step / self.rank_warmup_steps) if self.rank_warmup_steps else 1.0
        return int(self.ar_ssm_min_rank + progress * (self.ar_ssm_max_rank - self.ar_ssm_min_rank))

    def _faults(self) -> list[str]:
        faults = []
        if self.ar_ssm_max_rank < self.ar_ssm_min_rank:
            faults.append(
                f"ar_ssm_max_rank must be >= ar_ssm_min_rank ({self.ar_ssm_min_rank}), got {self.ar_ssm_max_rank}"
            )
        faults += must_be_at_least(self, 1, "ar_ssm_min_rank", "htt_rank")
        faults += must_be_at_least(self, 2, "htt_num_cores")
        faults += must_be_at_least(self, 0, "ar_ssm_l1_regularization", "rank_warmup_steps")
        if not 0 < self.htt_compression_target < 1:
            faults.append(f"htt_compression_target must be in range (0, 1), got {self.htt_compression_target}")
        faults += must_be_positive(
            self,
            "stability_threshold",
            "schatten_s1_bound",
            "schatten_s2_bound",
            "gradient_norm_threshold",
            "vocab_size",
            "d_model",
            "n_layers",
            "n_seq",
            "num_heads",
            "embedding_scale",
            "target_vram_gb",
            "target_ppl_degradation",
            "target_speedup",
        )
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout must be in [0, 1), got {self.dropout}")
        if self.backend not in BACKENDS:
            faults.append(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        names = ("ar_ssm_gate_hidden_dim", "ffn_rank", "ffn_dim")
        return faults + must_be_positive(self, *(name for name in names if getattr(self, name) is not None))


def _ranks(max_rank: int, min_rank: int, htt_rank: int, compression: float) -> Values:
    return dict(
        ar_ssm_max_rank=max_rank,
        ar_ssm_min_rank=min_rank,
        htt_rank=htt_rank,
        htt_compression_target=compression,
    )


_NO_CHECKPOINTS = dict(use_gradient_checkpointing=False, checkpoint_ar_ssm=False)
_HARDWARE: dict[float, Values] = {
    8.0: dict(**_ranks(16, 4, 8, 0.05), target_vram_gb=8.0),
    10.0: dict(**_ranks(32, 4, 16, 0.1), target_vram_gb=10.0),
}
_LARGE_HARDWARE: Values = dict(**_ranks(64, 8, 32, 0.2), **_NO_CHECKPOINTS, target_vram_gb=24.0)

PRESETS: dict[str, Values] = {
    "tiny": dict(
        **_ranks(16, 4, 16, 0.5),
        **_NO_CHECKPOINTS,
        vocab_size=257,
        d_model=128,
        n_layers=3,
        n_seq=256,
        num_heads=4,
        dropout=0.0,
        target_vram_gb=1.0,
    ),
    "8gb": dict(**_ranks(16, 4, 8, 0.05), ar_ssm_l1_regularization=0.01, target_vram_gb=8.0),
    "10gb": dict(**_ranks(32, 4, 16, 0.1), target_vram_gb=10.0),
    "24gb": dict(
        **_ranks(64, 8, 32, 0.2),
        **_NO_CHECKPOINTS,
        ar_ssm_l1_regularization=1e-4,
        target_vram_gb=24.0,
        target_ppl_degradation=0.01,
    ),
    "inference": dict(**_ranks(32, 4, 16, 0.1), **_NO_CHECKPOINTS, target_speedup=5.0),
    "max_quality": dict(
        **_ranks(128, 16, 64, 0.3),
        **_NO_CHECKPOINTS,
        ar_ssm_l1_regularization=1e-4,
        target_vram_gb=40.0,
        target_ppl_degradation=0.01,
    ),
    "max_efficiency": dict(
        **_ranks(16, 2, 8, 0.05), ar_ssm_l1_regularization=0.01, target_vram_gb=6.0, target_ppl_degradation=0.1
    ),
}

ALIASES = {
    "speed_oriented": "24gb",
    "memory_oriented": "8gb",
    "balanced": "10gb",
    "quality": "max_quality",
    "efficiency": "max_efficiency",
}


def get_phase1_preset(name: str) -> Phase1Config:
    """Return a fresh configuration: ``tiny`` (laptops, bytes), a GPU memory, or an aim; aliases are accepted too.

    Raises:
        ConfigError: there is no such preset.
    """
    key = ALIASES.get(name, name)
    if key not in PRESETS:
        known = ", ".join([*PRESETS, *ALIASES])
        raise ConfigError(f"Unknown preset: {name}. Available presets: {known}")
    return Phase1Config(**PRESETS[key])
