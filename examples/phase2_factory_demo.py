"""Demos of the factory report.

    python examples/phase2_factory_demo.py

Presets, a custom configuration, single values, a forward pass with diagnostics, conversion from Phase 1, validation, a
comparison of the presets, and the report's training loop.
"""

import torch
import torch.nn as nn
from rich.console import Console
from rich.table import Table

from resolvent.models.phase1 import create_phase1_model
from resolvent.models.phase2 import (
    Phase2Config,
    Phase2IntegratedModel,
    convert_phase1_to_phase2,
    create_phase2_model,
    get_phase2_preset,
)

PRESETS = ("tiny", "small", "base", "large")
console = Console()


def describe(model: Phase2IntegratedModel) -> str:
    return (
        f"{model.num_parameters():,} parameters, d_model {model.d_model}, {model.n_layers} layers, n_seq {model.n_seq}"
    )


def demo_presets() -> None:
    for name in PRESETS:
        console.print(f"  {name:6} {describe(create_phase2_model(preset=name))}")


def demo_custom_configuration() -> None:
    config = Phase2Config(vocab_size=30000, d_model=768, n_layers=8, base_decay=0.015, hebbian_eta=0.12)
    console.print(f"  {describe(create_phase2_model(config=config))}")


def demo_direct_parameters() -> None:
    console.print(f"  {describe(create_phase2_model(vocab_size=25000, d_model=512, n_layers=6, n_seq=2048))}")


def demo_forward_pass() -> None:
    model = create_phase2_model(preset="small", vocab_size=1000).eval()
    device = model.lm_head.weight.device
    input_ids = torch.randint(0, model.vocab_size, (2, 128), device=device)
    with torch.no_grad():
        logits, diagnostics = model(input_ids, return_diagnostics=True)
    console.print(f"  logits {tuple(logits.shape)}, {logits.dtype}")
    table = Table("layer", "Γ mean", "Γ range", "SNR mean", "modes that resonate", "energy / bound")
    for layer in range(model.n_layers):
        gamma = diagnostics["gamma_values"][layer]
        stability = diagnostics["stability_metrics"][layer]
        table.add_row(
            str(layer),
            f"{gamma.mean():.3f}",
            f"{gamma.min():.3f} .. {gamma.max():.3f}",
            f"{diagnostics['snr_stats'][layer]['mean_snr'].mean():.2f}",
            f"{diagnostics['resonance_info'][layer]['num_resonant'].float().mean():.1f} of {model.config.head_dim}",
            f"{(stability['energy'] / stability['energy_bound']).max():.3f}",
        )
    console.print(table)


class DummyPhase1Model(nn.Module):
    """Any module: token embedding and output are found by their shapes and roles."""

    def __init__(self, vocab_size: int = 50257, d_model: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(6))
        self.output = nn.Linear(d_model, vocab_size)


def demo_conversion() -> None:
    dummy = DummyPhase1Model()
    model = convert_phase1_to_phase2(dummy, Phase2Config(n_layers=4))  # at which the report's counts are reached
    before, after = sum(p.numel() for p in dummy.parameters()), model.num_parameters()
    console.print(f"  a dummy: {before:,} -> {after:,} parameters ({after / before - 1:+.1%})")
    console.print(f"    {model.conversion_report.summary()}")

    phase1 = create_phase1_model(preset="tiny").eval()
    for parameter in phase1.parameters():  # as if it were trained: fresh branches add nothing
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model = convert_phase1_to_phase2(phase1, freeze_phase1_weights=True).eval()
    input_ids = torch.randint(0, 257, (2, 600), device=model.lm_head.weight.device)
    with torch.no_grad():
        difference = (model(input_ids) - phase1(input_ids)).abs().max().item()
    console.print(
        f"  Phase 1: {phase1.num_parameters():,} -> {model.num_parameters():,} parameters, of which "
        f"{model.num_parameters(trainable_only=True):,} are new and train; logits differ by {difference:.1e}"
    )


def demo_validation() -> None:
    Phase2Config().validate()
    console.print("  the defaults are valid")
    wrong = Phase2Config(base_decay=-0.01, num_heads=0, dropout=1.5)
    try:
        wrong.validate()
    except ValueError as error:
        console.print(f"  {error}", markup=False)


def demo_comparison() -> None:
    table = Table("", *PRESETS)
    configs = [get_phase2_preset(name) for name in PRESETS]
    for field in ("d_model", "n_layers", "n_seq", "num_heads", "head_dim", "vocab_size", "target_vram_gb"):
        table.add_row(field, *(str(getattr(config, field)) for config in configs))
    console.print(table)


def demo_training_loop() -> None:
    vocab_size = 100
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = torch.arange(8 * 33 * 30, device=device).view(30, 8, 33) ** 2 % 97  # a sequence with a rule to find
    dataloader = [{"input_ids": ids[:, :-1], "target_ids": ids[:, 1:].contiguous()} for ids in text]

    model = create_phase2_model(preset="tiny", vocab_size=vocab_size)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, batch in enumerate(dataloader):
        input_ids = batch["input_ids"]
        target_ids = batch["target_ids"]
        output = model(input_ids)
        loss = nn.functional.cross_entropy(
            output.view(-1, vocab_size),
            target_ids.view(-1),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == len(dataloader) - 1:
            console.print(f"  step {step:2}  loss {loss.item():.3f}")


DEMOS = {
    "Presets": demo_presets,
    "A custom configuration": demo_custom_configuration,
    "Single values": demo_direct_parameters,
    "Forward pass with diagnostics": demo_forward_pass,
    "Phase 1 becomes Phase 2": demo_conversion,
    "Validation": demo_validation,
    "The presets side by side": demo_comparison,
    "The training loop of the report": demo_training_loop,
}


def main() -> None:
    torch.manual_seed(0)
    for number, (title, demo) in enumerate(DEMOS.items(), start=1):
        console.rule(f"Demo {number}: {title}", align="left")
        demo()


if __name__ == "__main__":
    main()
