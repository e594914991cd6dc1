"""Several processes that read a sequence read it as one does."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from resolvent.models import IntegratedModel
from resolvent.models.phase1 import Phase1Config, Phase1IntegratedModel
from resolvent.models.phase2 import Phase2Config, Phase2IntegratedModel
from resolvent.parallel import SequenceParallel
from tests.processes import together

LENGTH = 300
SMALL: dict[str, Any] = dict(vocab_size=31, d_model=16, n_layers=3, n_seq=64, num_heads=2, dropout=0.0)
MODELS = {
    "consolidated": Phase2Config(**SMALL, head_dim=8),
    "plain": Phase2Config(**SMALL, head_dim=8, snr_enabled=False, resonance_enabled=False, conv_size=1),
    "converted": Phase2Config(**SMALL, head_dim=8, ar_ssm_rank=4, zeta_embedding_trainable=True),
    "phase 1": Phase1Config(**SMALL, ar_ssm_max_rank=4),
}


def make(config: Phase1Config | Phase2Config, dtype: torch.dtype = torch.float32) -> IntegratedModel:
    """A model in which nothing that starts at zero hides what depends on it."""
    torch.manual_seed(0)
    model = Phase1IntegratedModel(config) if isinstance(config, Phase1Config) else Phase2IntegratedModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model.to(dtype)


def text() -> tuple[Tensor, Tensor]:
    """Tokens and labels of two sequences, of which some labels do not count: all of the last stretch of three."""
    tokens = torch.randint(0, 31, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 1:].clone()
    labels[:, 10:20] = labels[1, 200:] = -100
    return tokens[:, :-1], labels


def pieces(x: Tensor, cuts: list[int]) -> list[Tensor]:
    return list(x.tensor_split(cuts, dim=1))
