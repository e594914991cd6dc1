"""Configuration of Phase 1, the static-Hamiltonian model that Phase 2 grows out of."""

from dataclasses import dataclass

from ..config import ModelConfig, must_be_at_least, must_be_positive


@dataclass
class Phase1Config(ModelConfig):
    """Sizes and switches of a Phase 1 model."""

    # Adaptive-rank semiseparable layer (AR-SSM)
    ar_ssm_enabled: bool = True
    ar_ssm_max_rank: int = 32
    ar_ssm_min_rank: int = 4
    ar_ssm_gate_hidden_dim: int | None = None
    ar_ssm_l1_regularization: float = 0.001
    ar_ssm_use_fused_scan: bool = True

    # Holographic tensor-train embedding (HTT)
    htt_enabled: bool = True
    htt_rank: int = 16
    htt_num_cores: int = 2
    htt_phase_encoding: bool = True
    htt_compression_target: float = 0.1

    # Stability
    stability_monitoring_enabled: bool = True
    stability_threshold: float = 1e-6
    schatten_s1_bound: float = 100.0
    schatten_s2_bound: float = 50.0
    gradient_norm_threshold: float = 10.0

    # Memory
    use_gradient_checkpointing: bool = True
    checkpoint_ar_ssm: bool = True
    checkpoint_htt: bool = False
    ffn_rank: int | None = None
    ffn_compression_enabled: bool = True

    # Model architecture
    vocab_size: int = 50257
    d_model: int = 512
    n_layers: int = 6
    n_seq: int = 1024

    # Performance targets
    target_vram_gb: float = 8.0
    target_ppl_degradation: float = 0.05
    target_speedup: float = 3.0

    def _faults(self) -> list[str]:
        faults = []
        if self.ar_ssm_max_rank < self.ar_ssm_min_rank:
            faults.append(
                f"ar_ssm_max_rank must be >= ar_ssm_min_rank ({self.ar_ssm_min_rank}), got {self.ar_ssm_max_rank}"
            )
        faults += must_be_at_least(self, 1, "ar_ssm_min_rank", "htt_rank")
        faults += must_be_at_least(self, 2, "htt_num_cores")
        faults += must_be_at_least(self, 0, "ar_ssm_l1_regularization")
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
            "target_vram_gb",
            "target_ppl_degradation",
            "target_speedup",
        )
        optional = [name for name in ("ar_ssm_gate_hidden_dim", "ffn_rank") if getattr(self, name) is not None]
        return faults + must_be_positive(self, *optional)
