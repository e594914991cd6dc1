"""Train the minute run that the tests keep of every format of saved files.

    python scripts/make_golden_run.py FOLDER

Writes FOLDER/verses.txt, the run FOLDER/run and FOLDER/expected.json, what the run's model says. Done once for a
format, into tests/data/golden/format-N; later releases must read it, so that it is never made again.
"""

import json
import random
import sys
from pathlib import Path

import torch

from resolvent.models.phase2 import Phase2Config
from resolvent.training import TrainingConfig, train

PROMPT = [256, *b"Verse 3:"]
WORDS = ("river", "stone", "cloud", "tower", "père", "№ 9")


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    choice = random.Random(0).choice
    verses = (f"Verse {n}: the {choice(WORDS)} is no {choice(WORDS)}.\n" * 2 for n in range(12))
    (folder / "verses.txt").write_text("<|endoftext|>\n".join(verses), encoding="utf-8")
    model = Phase2Config(
        vocab_size=257, d_model=8, n_layers=1, n_seq=32, num_heads=2, head_dim=8, dropout=0.1, tie_embeddings=True
    )
    config = TrainingConfig(
        data=str(folder / "verses.txt"),
        out=str(folder / "run"),
        preset=None,
        model=model,
        device="cpu",
        steps=6,
        seq_len=32,
        batch_size=2,
        learning_rate=0.01,
        eval_interval=2,
        final_eval_tokens=0,
        checkpoint_interval=3,
    )
    result = train(config)
    with torch.inference_mode():
        logits = result.model(torch.tensor([PROMPT]))[0, -1]
    expected = {"prompt": PROMPT, "logits": logits.tolist(), "validation_loss": result.validation.loss}
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
