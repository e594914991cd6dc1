"""A little text and a little model, which train in a second."""

from collections.abc import Callable
from pathlib import Path

import pytest

from resolvent.models.phase2 import Phase2Config
from resolvent.training import TrainingConfig

WORDS = [(word, kind) for word in ("river", "stone", "cloud", "tower") for kind in ("eldest", "least", "rarest")]
VERSES = [
    f"Verse {number}. {word} is the {kind} of all {word}s; so says the {kind} père №{number}.\n" * 3
    for number, (word, kind) in enumerate(WORDS)
]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "verses.txt"
    path.write_text("<|endoftext|>\n".join(VERSES), encoding="utf-8")
    return path


@pytest.fixture
def small_config(text_file: Path, tmp_path: Path) -> Callable[..., TrainingConfig]:
    """A configuration that trains in about a second, with some fields replaced."""

    def make(**changes: object) -> TrainingConfig:
        model = Phase2Config(vocab_size=257, d_model=64, n_layers=2, n_seq=64, num_heads=2, head_dim=32, dropout=0.1)
        settings: dict[str, object] = dict(
            preset=None, model=model, data=str(text_file), out=str(tmp_path / "run"), steps=10, seq_len=64, batch_size=2
        )
        settings |= dict(eval_interval=3, eval_tokens=300, final_eval_tokens=0, checkpoint_interval=4, device="cpu")
        return TrainingConfig(**{**settings, **changes})

    return make
