"""The model card of a finished run."""

from pathlib import Path

from resolvent.evaluation import LanguageScore
from resolvent.models import IntegratedModel
from resolvent.models.card import write_card
from resolvent.training.config import TrainingConfig
from resolvent.training.corpus import Corpus
from resolvent.wording import counted, readings


def write_run_card(
    config: TrainingConfig, corpus: Corpus, model: IntegratedModel, tokens_per_step: int, score: LanguageScore
) -> None:
    """Write the card of a run into its folder. It names texts and models, but not the folders they are in.

    Raises:
        OSError: the folder cannot be written.
    """
    origin = "" if config.start_from is None else f" on from the model `{Path(config.start_from).name}`"
    adapted = "" if config.lora is None else f", as low-rank adapters ({config.lora}),"
    paths = [config.data] if isinstance(config.data, str) else config.data
    text = "the State of the Union addresses" if paths is None else ", ".join(f"`{Path(path).name}`" for path in paths)
    learned = "the assistant's answers in" if config.format == "chat" else "the text"
    passes = config.steps * tokens_per_step / corpus.train.num_predictions
    made = [
        f"Trained{origin}{adapted} for {counted(config.steps, 'step')} of {counted(tokens_per_step, 'token')} with "
        f"{config.optimizer}, seed {config.seed}.",
        f"Learned from {learned} {text}: {corpus.train.num_bytes:,} bytes; the run read {readings(passes)}.",
    ]
    measured = {
        "loss (nats per token)": f"{score.loss:.4f}",
        "perplexity": f"{score.perplexity:,.3f}",
        "bits per byte": f"{score.bits_per_byte:.4f}",
        "tokens": f"{score.tokens:,}",
    }
    write_card(config.run_dir, model, made, measured=measured)
