"""Start or resume a training run."""

import dataclasses
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from rich.console import Console

from resolvent.data import load_tokenizer, save_tokenizer
from resolvent.data.cache import VARIABLE
from resolvent.data.chat_template import ChatTemplate
from resolvent.data.hub import PREFIX
from resolvent.device import deterministic
from resolvent.errors import CheckpointError, ConfigError
from resolvent.evaluation import LanguageScore
from resolvent.files import locked
from resolvent.manifest import MANIFEST
from resolvent.models.storage import write_config, write_weights
from resolvent.runs import check_run, run_of
from resolvent.terminal import say, shell_word
from resolvent.training.checkpoint import (
    checkpoint_of,
    find_checkpoint,
    load_average,
    load_trainer_state,
    remove_later,
    write_models,
)
from resolvent.training.config import Tracker, TrainingConfig
from resolvent.training.corpus import Corpus, check_fingerprint, in_folder, load_corpus, text_name
from resolvent.training.ema import WeightAverage
from resolvent.training.initial_model import (
    initial_model,
    model_of_checkpoint,
    saved_model,
    warn_of_untrained_filters,
)
from resolvent.training.lora import base_weights, is_adapted, whole_model
from resolvent.training.memory import check_memory
from resolvent.training.processes import make_accelerator
from resolvent.training.run_folder import beginning, check_new, new_run, read_result, read_run, write_run, write_steps
from resolvent.training.sharding import is_sharded
from resolvent.training.trainer import Trainer, TrainingResult
from resolvent.wording import counted

logger = logging.getLogger(__name__)


def train(config: TrainingConfig, *, overwrite: bool = False, console: Console | None = None) -> TrainingResult:
    """Train a model, fresh or saved, from the first step of a new run.

    Args:
        config: the run.
        overwrite: remove the run in the run folder before the new one begins.
        console: console that shows progress; None shows nothing.

    Raises:
        ConfigError: faults of the configuration, a run folder that is in use, or more memory than there is.
        CheckpointError: there is no model to start from.
        DataError: text or tokenizer that cannot be used.
        NonFiniteError: a loss, a gradient or a weight is not finite, and no rewind is left.
        TrainingInterrupted: SIGINT, SIGTERM or SIGHUP, after saving a checkpoint.
    """
    config.validate()
    check_new(config.run_dir, overwrite=overwrite)
    with new_trainer(config, console) as trainer:
        return _begin(trainer, overwrite)


@contextmanager
def new_trainer(config: TrainingConfig, console: Console | None = None) -> Iterator[Trainer]:
    """Make the trainer of a new run, of which nothing is written yet.

    Args:
        config: the run, validated.
        console: where to show progress; None shows nothing.

    Raises:
        ConfigError, CheckpointError, DataError: as `train` does.
    """
    config = dataclasses.replace(
        config,
        data=_absolute_text(config.data),
        validation_data=_absolute_text(config.validation_data),
        cache=_absolute(config.cache or os.environ.get(VARIABLE)),
        start_from=_absolute(config.start_from),
    )
    with deterministic(config.deterministic):
        saved = saved_model(config)  # before the data: errors come at once
        accelerator = make_accelerator(config)
        console = _console(console, accelerator)
        template_folder = None if config.start_from is None else run_of(Path(config.start_from))
        model, tokenizer = (None, None) if saved is None else saved
        corpus = load_corpus(config, tokenizer, template_folder=template_folder, console=console)
        model = initial_model(config, corpus.tokenizer.get_vocab_size(), accelerator, model)
        if accelerator.is_main_process:
            warn_of_untrained_filters(model)
        check_memory(model, config, accelerator.device, accelerator.num_processes)
        yield Trainer(config, accelerator, corpus, model, console)


def _begin(trainer: Trainer, overwrite: bool) -> TrainingResult:
    config, accelerator, corpus = trainer.config, trainer.accelerator, trainer.corpus
    run_dir, first = config.run_dir, accelerator.is_main_process
    accelerator.wait_for_everyone()  # all processes find the folder empty before one writes
    with new_run(run_dir, overwrite=overwrite) if first else nullcontext() as held:
        with beginning(run_dir) if first else nullcontext():
            if first:
                save_tokenizer(corpus.tokenizer, run_dir)
                if (template := _template(config, corpus)) is not None:
                    template.save(run_dir)
                write_config(trainer.raw_model, run_dir)
                if is_adapted(trainer.raw_model):
                    write_weights(base_weights(trainer.raw_model), run_dir)
            if config.start_from is not None or accelerator.num_processes > 1:
                trainer.save()  # so that any number of processes can resume, also without the folder of --from
            if first:
                write_run(run_dir, config, corpus.fingerprint, held)
        return trainer.run()


def _template(config: TrainingConfig, corpus: Corpus) -> ChatTemplate | None:
    """Return the chat template for a run folder: that of the conversations, or of the model to start from."""
    if corpus.template is not None or config.start_from is None:
        return corpus.template
    template = ChatTemplate.load(run_of(Path(config.start_from)), corpus.tokenizer)
    return None if template.is_default else template


def resume(
    run_dir: str | Path,
    *,
    steps: int | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    data: str | list[str] | None = None,
    validation_data: str | list[str] | None = None,
    cache: str | None = None,
    tracker: Tracker | None = None,
    console: Console | None = None,
) -> TrainingResult:
    """Resume a run from its last whole checkpoint, or from its beginning if there is none.

    A damaged checkpoint is skipped, and a warning is logged. A finished run is not trained or validated again: its
    saved result is returned.

    On the CPU, the result is bit for bit that of a run that was never interrupted.

    The text that the run folder names is read, and the console shows its name. If its tokens differ from those at the
    start of the run, the run does not resume. Neither the tokenizer nor the model of --from is read again.

    Args:
        run_dir: the run folder.
        steps: replaces the run's number of steps, now and whenever it is resumed later. The learning rate then follows
            the schedule of a run of that length, from the current step on. A `wsd` run that has begun to decay goes
            back to the checkpoint from before the decay, and the steps after that one are taken anew, if there are to
            be more of them.
        device: replaces the run's device.
        data: new path of the run's text, if it was moved.
        validation_data: the same for the text to validate on.
        cache: replaces the run's cache. Without it, the run's is used if it is still a cache, and otherwise that of
            the environment or the one beside the run folder.
        tracker: replaces the run's tracker.
        console: console that shows progress; None shows nothing.

    Raises:
        ConfigError: the tracker is unknown or not installed, fewer steps than the run has taken, or more memory than
            there is.
        CheckpointError: no run to resume, another process trains it, no whole checkpoint, changed data, or a number of
            processes that does not divide the batches of a step.
        DataError: the text cannot be read.
        NonFiniteError: a loss, a gradient or a weight is not finite, and no rewind is left.
        TrainingInterrupted: SIGINT, SIGTERM or SIGHUP, after saving a checkpoint.
    """
    run_dir = Path(run_dir)
    config, fingerprint = read_run(run_dir)
    config = dataclasses.replace(
        in_folder(config, run_dir),
        device=device or config.device,
        data=config.data if data is None else _absolute_text(data),
        validation_data=config.validation_data if validation_data is None else _absolute_text(validation_data),
        tracker=tracker or config.tracker,
    )
    config = config if cache is None else dataclasses.replace(config, cache=cache)
    config.validate()
    with deterministic(config.deterministic):
        accelerator = make_accelerator(config)
        with locked(run_dir / MANIFEST) if accelerator.is_main_process else nullcontext():
            return _resume(config, steps, fingerprint, accelerator, _console(console, accelerator))


def _resume(
    config: TrainingConfig, steps: int | None, fingerprint: str, accelerator: Accelerator, console: Console
) -> TrainingResult:
    run_dir = config.run_dir
    check_run(run_dir)
    newest, taken = _newest_checkpoint(config, accelerator)
    before, config = config, _with_steps(config, steps, taken)
    checkpoint = _before_decay(before, config, taken) or newest
    if checkpoint is not None and (finished := _finished(config, checkpoint, taken, accelerator)) is not None:
        say(console, _end_of(config, finished.validation))
        return finished
    for _, paths in config.named_texts():
        say(console, f"Reading   {text_name(paths)}")
    corpus = load_corpus(config, load_tokenizer(run_dir), template_folder=run_dir, console=console)
    check_fingerprint(corpus, fingerprint, config, run_dir, remedy="restore the text, or start a new run")
    if checkpoint is None:
        model = initial_model(config, corpus.tokenizer.get_vocab_size(), accelerator)
    else:
        model = model_of_checkpoint(config, checkpoint, accelerator)
    check_memory(model, config, accelerator.device, accelerator.num_processes)
    trainer = Trainer(config, accelerator, corpus, model, console)
    if config.steps != before.steps:
        say(console, _stretched(before, config, taken, went_back=checkpoint != newest))
        accelerator.wait_for_everyone()  # all processes read before one writes
        if accelerator.is_main_process:
            if checkpoint is not None and checkpoint != newest:
                remove_later(run_dir, checkpoint)
            write_steps(run_dir, config.steps)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    return trainer.run()


def _newest_checkpoint(config: TrainingConfig, accelerator: Accelerator) -> tuple[Path | None, int]:
    """Return the newest whole checkpoint of a run, and its step; None and 0 where the run starts from its beginning.

    Raises:
        CheckpointError: no checkpoint is whole, or there is none and the run began with a saved model.
    """
    checkpoint, faults = find_checkpoint(config.run_dir)
    if checkpoint is None:
        if config.start_from is None:
            return None, 0
        # The first checkpoint existed before the run could be resumed. The folder of --from is not read again.
        raise CheckpointError(
            f"{config.run_dir} has lost its checkpoints. To begin it anew: resolvent train --from "
            f"{shell_word(config.start_from)}, with another --out"
        )
    if accelerator.is_main_process:
        for fault in faults:
            logger.warning("Going back to %s: %s", checkpoint.name, fault)
    return checkpoint, load_trainer_state(checkpoint).step


def _end_of(config: TrainingConfig, score: LanguageScore) -> str:
    """Return a message: the run is finished, its score, and the command that takes more steps."""
    return (
        f"The run in {config.run_dir} is finished: step {config.steps:,} of {config.steps:,}, validation loss "
        f"{score.loss:.4f}, {score.bits_per_byte:.4f} bits/byte. Go on with: resolvent train --resume "
        f"{shell_word(config.run_dir)} --steps N, N more than {config.steps}"
    )


def _with_steps(config: TrainingConfig, steps: int | None, taken: int) -> TrainingConfig:
    """Return a configuration with another number of steps; None keeps the number."""
    if steps is None:
        return config
    changed = dataclasses.replace(config, steps=steps)
    changed.validate()
    if steps < taken:
        raise ConfigError(
            f"the run {config.run_dir} has taken {counted(taken, 'step')}: steps must be >= {taken}, got {steps}"
        )
    return changed


def _before_decay(before: TrainingConfig, after: TrainingConfig, taken: int) -> Path | None:
    """Return the checkpoint that a longer `wsd` run goes on from; None where that is the newest."""
    stable = before.stable_steps
    if after.steps <= before.steps or stable is None or taken <= stable:
        return None
    return checkpoint_of(before.run_dir, stable)


def _stretched(before: TrainingConfig, after: TrainingConfig, taken: int, *, went_back: bool) -> str:
    """Return a message: the effect of another number of steps on the learning rate."""
    text = f"Steps     {after.steps:,} instead of {before.steps:,}: "
    if went_back:
        stable = before.stable_steps
        return f"{text}back to step {stable:,}, the last before the decay of the learning rate, and on at its peak"
    change = "stretched" if after.steps > before.steps else "shortened"
    text += f"the {after.schedule} schedule is {change} to them"
    if 0 < taken < after.steps:
        last, following = before.rate_factor(taken - 1), after.rate_factor(taken)
        text += f"; the learning rate goes from {last:.0%} of its peak, in step {taken:,}, to {following:.0%}"
    return text


def _finished(config: TrainingConfig, checkpoint: Path, taken: int, accelerator: Accelerator) -> TrainingResult | None:
    """Return the result of a finished run; None if the run is not finished or its last validation is missing."""
    run_dir = config.run_dir
    scores = read_result(run_dir, config.steps) if taken == config.steps else None
    if scores is None:
        return None
    model = model_of_checkpoint(config, checkpoint, accelerator)
    average = WeightAverage(model, config.ema) if config.ema else None
    if average is not None:
        load_average(checkpoint, model, average)
    if accelerator.is_main_process or is_sharded(model):
        write_models(run_dir, model, average)  # those in the folder may be damaged
    accelerator.wait_for_everyone()
    return TrainingResult(run_dir, whole_model(model).eval(), load_tokenizer(run_dir), *scores)


def _console(console: Console | None, accelerator: Accelerator) -> Console:
    """Return the console in the first process and a silent one in all others."""
    return console if console is not None and accelerator.is_main_process else Console(quiet=True)


def _absolute(path: str | None) -> str | None:
    """Return an absolute path, so that a run can be resumed from any working directory."""
    if path and path.startswith(PREFIX):
        place, comma, options = path.removeprefix(PREFIX).partition(",")
        return f"{PREFIX}{Path(place).resolve() if Path(place).exists() else place}{comma}{options}"
    return str(Path(path).resolve()) if path else path


def _absolute_text(data: str | list[str] | None) -> str | list[str] | None:
    return [str(_absolute(path)) for path in data] if isinstance(data, list) else _absolute(data)
