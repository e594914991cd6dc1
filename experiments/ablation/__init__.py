"""Ablation of decay rates, SNR filter and resonance of a trained Phase 2 model."""
