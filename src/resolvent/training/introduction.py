"""Introduction of a run on the console: the model, the text and the settings."""

from resolvent.models.phases import phase_of
from resolvent.training.config import FROM_RATE, TrainingConfig, weighted_paths
from resolvent.training.corpus import Corpus
from resolvent.training.optimizer import learning_rates
from resolvent.training.train_step import TrainStep
from resolvent.wording import counted, readings


def introduce(config: TrainingConfig, corpus: Corpus, step: TrainStep, *, first_step: int, tokens_per_step: int) -> str:
    """Return a message of several lines: the model, the text and the settings of a run.

    Args:
        config: the run.
        corpus: its text.
        step: its training step.
        first_step: steps before this process.
        tokens_per_step: tokens of a step, over all processes.
    """
    train, held_out = corpus.train, corpus.validation
    part = held_out.num_bytes / (train.num_bytes + held_out.num_bytes)
    share = "" if config.validation_data else f" ({part:.1%} of the bytes)"
    start = f"from step {first_step:,} of" if first_step else "for"
    passes = readings(config.steps * tokens_per_step / train.num_predictions)
    lines = [
        f"Model     {_model(config, step)}",
        f"Text      {train.num_bytes:,} bytes in {counted(train.num_documents, 'document')} to learn from",
        *([f"Windows   {_mixture(config)}"] if corpus.mixture else []),
        f"Held out  {held_out.num_bytes:,} bytes in {counted(held_out.num_documents, 'document')}{share}",
        f"Tokens    {train.num_predictions:,} to learn from, vocabulary of {corpus.tokenizer.get_vocab_size():,}",
        f"Training  {_learning_rates(config, step)}",
        f"          {start} {counted(config.steps, 'step')} of {counted(tokens_per_step, 'token')} ({passes}), into "
        f"{config.run_dir}",
    ]
    if step.compilation.wanted:
        lines.append("Compiling the model; the first step takes a minute or two (not with --no-compile)")
    elif step.compilation.obstacle:
        lines.append(f"Not compiled, since {step.compilation.obstacle}")
    return "\n".join(lines)


def _model(config: TrainingConfig, step: TrainStep) -> str:
    """Return phase, origin and size of the model, and where it is trained."""
    model, processes = step.raw_model, step.accelerator.num_processes
    total, trained = model.num_parameters(), model.num_parameters(trainable_only=True)
    origin = f"from {config.start_from}" if config.start_from else config.preset or "own configuration"
    of_them = f" of which {trained:,} are trained ({trained / total:.1%})," if trained < total else ""
    precision = "bf16" if step.accelerator.mixed_precision == "bf16" else "fp32"
    devices = step.device if processes == 1 else f"{processes} processes ({config.parallel}), {step.device.type}"
    return f"Phase {phase_of(model)}, {origin}: {total:,} parameters,{of_them} {precision} on {devices}"


def _learning_rates(config: TrainingConfig, step: TrainStep) -> str:
    """Return the schedule and the highest learning rates."""
    peak = config.peak_learning_rate(step.raw_model.d_model)
    text = f"{config.schedule} schedule with a peak learning rate of {peak:.2g}"
    if (muon := learning_rates(step.raw_optimizer).get("muon_lr")) is not None:
        text += f" (AdamW) and {muon:.2g} (Muon)"
    if config.start_from and config.learning_rate is None and config.lora is None:
        text += f", {FROM_RATE:g} of that for fresh weights, since the model is trained already (--learning-rate)"
    return text


def _mixture(config: TrainingConfig) -> str:
    """Return the shares of texts that are mixed."""
    paths = weighted_paths(config.data if isinstance(config.data, list) else [str(config.data)])
    whole = sum(weight or 0 for _, weight in paths)
    return ", ".join(f"{(weight or 0) / whole:.0%} from {path}" for path, weight in paths)
