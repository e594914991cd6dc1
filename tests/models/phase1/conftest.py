"""Small models whose weights are large, so that nothing they do is lost in rounding."""

import pytest
import torch

from resolvent import Phase1IntegratedModel, create_phase1_model

SMALL = dict(
    vocab_size=97, d_model=48, n_layers=3, n_seq=64, num_heads=3, dropout=0.0, ar_ssm_max_rank=8, htt_rank=6,
    device="cpu",
)  # fmt: skip


def small_model(spread: float = 0.15, **options) -> Phase1IntegratedModel:
    model = create_phase1_model(**{**SMALL, **options})
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * spread)
    return model.eval()


@pytest.fixture
def model() -> Phase1IntegratedModel:
    return small_model()
