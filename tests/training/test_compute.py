"""FLOPs of a training step, and the part of a device's speed that a run reaches."""

from io import StringIO

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from resolvent.models.phase1 import Phase1Config, Phase1IntegratedModel
from resolvent.models.phase2 import Phase2Config, Phase2IntegratedModel
from resolvent.ops.hebbian import CHUNK
from resolvent.training.compute import embedding_parameters, flops_per_token, peak_flops
from resolvent.training.progress import TrainingDisplay


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_torch_counts(tied: bool):
    """But for the products within a chunk, which the recurrence does without."""
    config = Phase2Config(
        vocab_size=512, d_model=64, n_layers=3, n_seq=128, num_heads=2, head_dim=32, tie_embeddings=tied
    )
    model = Phase2IntegratedModel(config)
    ids = torch.randint(512, (2, 128))
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    counted = counter.get_total_flops() / ids.numel()
    within_chunks = 3 * (3 * 2) * 2 * CHUNK * (32 + 32)
    assert flops_per_token(model) + within_chunks == pytest.approx(counted, rel=0.005)


def test_embedding_is_not_multiplied():
    sizes = dict(d_model=32, n_layers=2, n_seq=64, num_heads=2, head_dim=16, tie_embeddings=False)
    small, large = (Phase2IntegratedModel(Phase2Config(vocab_size=size, **sizes)) for size in (300, 400))
    assert embedding_parameters(large) == 400 * 32
    assert flops_per_token(large) - flops_per_token(small) == 6 * 100 * 32


@pytest.mark.parametrize("window", [None, 16])
def test_attention_counts_the_tokens_that_it_attends_to(window: int | None):
    sizes = dict(vocab_size=300, d_model=32, n_layers=2, n_seq=64, num_heads=2, head_dim=16)
    model = Phase2IntegratedModel(Phase2Config(**sizes, attention_layers=(1,), attention_window=window))
    attended = sum(min(token + 1, window or 64) for token in range(64)) / 64
    products = 6 * (model.num_parameters() - embedding_parameters(model))
    assert flops_per_token(model) - products == pytest.approx(12 * 2 * 16 * (16 + attended), abs=12 * 2 * 16)


def test_tensor_train_embedding_is_not_multiplied():
    model = Phase1IntegratedModel(Phase1Config(vocab_size=300, d_model=32, n_layers=1, n_seq=64))
    assert flops_per_token(model) == 6 * (model.num_parameters() - embedding_parameters(model))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), "bf16") == peak
    assert peak_flops(torch.device("cuda"), "no") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None


@pytest.mark.parametrize(("most", "shown"), [(4000.0, "  25.0% MFU  "), (None, " tokens/s  lr")])
def test_utilisation_is_shown_where_it_is_known(most: float | None, shown: str):
    output = StringIO()
    display = TrainingDisplay(
        Console(file=output, width=200), steps=3, first_step=0, log_interval=1, most_tokens_per_second=most
    )
    display.step(1, loss=2.0, bits_per_byte=2.5, learning_rate=0.1, tokens=500, seconds=0.5)
    assert shown in output.getvalue()
