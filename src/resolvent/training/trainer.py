"""The training loop."""

import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from tokenizers import Tokenizer

from resolvent.data.stream import token_ids
from resolvent.errors import CheckpointError
from resolvent.evaluation import LanguageScore
from resolvent.evaluation.language import Stretches, sample_stretches
from resolvent.models import IntegratedModel
from resolvent.models.inference import evaluating
from resolvent.terminal import shell_word
from resolvent.training.average import Average
from resolvent.training.checkpoint import (
    TrainerState,
    find_checkpoint,
    load_average,
    load_optimizer,
    load_trainer_state,
    restore_weights,
    save_checkpoint,
    write_models,
)
from resolvent.training.compilation import without_compiled_blocks
from resolvent.training.compute import flops_per_token, peak_flops
from resolvent.training.config import TrainingConfig
from resolvent.training.corpus import Corpus
from resolvent.training.interrupt import StopRequest, TrainingInterrupted
from resolvent.training.introduction import introduce
from resolvent.training.lora import whole_model
from resolvent.training.metrics import FILE_NAME, History, MetricsLog, read_history
from resolvent.training.model_card import write_run_card
from resolvent.training.nonfinite import NonFiniteError, offending_gradient, offending_weight
from resolvent.training.optimizer import learning_rates
from resolvent.training.progress import TrainingDisplay, format_duration
from resolvent.training.run_folder import Scores, write_result
from resolvent.training.tracking import Tracking
from resolvent.training.train_step import WARM_UP_STEPS, TrainStep
from resolvent.training.validation import StoppedInValidation, Validator
from resolvent.wording import counted

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 1024
"""Held-out tokens, document after document, that the model reads for the diagnostics of a tracker."""

REWIND_FACTOR = 0.5
"""Factor of the learning rate at every rewind."""


@dataclass(frozen=True, repr=False)
class TrainingResult:
    """A finished run.

    Attributes:
        run_dir: the run folder, which `load_model` and `load_tokenizer` read.
        model: the trained model, in evaluation mode; of a sharded one, the shards of this process.
        tokenizer: its tokenizer.
        validation: its score on `final_eval_tokens` tokens of held-out text.
        ema_validation: the score of the moving average of the weights, which the folder `ema` in the run folder holds;
            None without one.
    """

    run_dir: Path
    model: IntegratedModel
    tokenizer: Tokenizer
    validation: LanguageScore
    ema_validation: LanguageScore | None = None

    @property
    def history(self) -> History:
        """The metrics of all steps and validations, read from the run folder.

        Raises:
            CheckpointError: the metrics are gone or damaged.
        """
        return read_history(self.run_dir)

    def plot(self, path: str | Path) -> None:
        """Draw the history; see `History.plot`."""
        self.history.plot(path)

    def __repr__(self) -> str:
        loss, bits = self.validation.loss, self.validation.bits_per_byte
        return f"TrainingResult({str(self.run_dir)!r}, validation loss {loss:.4f}, {bits:.4f} bits per byte)"


@dataclass(frozen=True)
class _Step:
    """A step that was taken and is not reported yet.

    Attributes:
        number: number of the step, from one.
        rates: learning rates, as metrics.
        started: start of the step, by ``time.perf_counter``.
        numbers: waits for three values and returns them: the loss, the norm of the gradient before clipping, and a
            number above zero if a process was asked to stop before the step.
    """

    number: int
    rates: dict[str, float]
    started: float
    numbers: Callable[[], list[float]]


def _on_its_way(x: torch.Tensor) -> Callable[[], list[float]]:
    """Start the copy of a tensor to the CPU; return a function that waits for its values."""
    if x.device.type != "cuda":
        return x.tolist
    there = x.to("cpu", non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()

    def wait() -> list[float]:
        ready.synchronize()
        return there.tolist()

    return wait


class Trainer:
    """A run in progress.

    On a GPU a step is reported while the next one is computed: with a synchronisation at every step, the GPU would be
    idle for a third of the time.

    Args:
        config: a valid configuration.
        accelerator: device, precision and processes.
        corpus: text of the run.
        model: model of the run, on the accelerator's device, or sharded.
        console: console that shows progress.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        corpus: Corpus,
        model: IntegratedModel,
        console: Console,
    ) -> None:
        self.config, self.accelerator, self.corpus, self.console = config, accelerator, corpus, console
        self.run_dir = config.run_dir
        self.device = accelerator.device
        self.state = TrainerState(step=0, processes=accelerator.num_processes, loss_average=Average())
        self.bits_per_byte_per_nat = corpus.tokens_per_byte / math.log(2)
        self.peak_learning_rate = config.peak_learning_rate(model.d_model)
        self.raw_model = model
        self.train_step = TrainStep(config, accelerator, corpus, model)
        self.taken: deque[_Step] = deque()
        self.lag = 1 if self.device.type == "cuda" else 0
        self.reported_at, self.stopping = 0.0, False
        self.validator = Validator(
            accelerator,
            self.train_step.model,
            batch_tokens=self.train_step.batches.tokens_per_batch,
            sharded=self.train_step.sharded,
        )

    @property
    def batches_per_step(self) -> int:
        """Number of batches of a step, over all processes."""
        return self.config.accumulation * self.state.processes

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens of a step, over all processes."""
        return self.train_step.batches.tokens_per_batch * self.batches_per_step

    def restore(self, checkpoint: Path) -> None:
        """Load the optimiser state and the trainer state of a checkpoint; the model has its weights already."""
        self.state = load_trainer_state(checkpoint)
        if self.batches_per_step % self.accelerator.num_processes:
            raise CheckpointError(
                f"a step of the run {self.run_dir} has {counted(self.batches_per_step, 'batch', 'batches')}, which "
                f"{self.accelerator.num_processes} processes cannot share evenly: resume it with a divisor of that"
            )
        load_optimizer(checkpoint, self.raw_model, self.train_step.raw_optimizer)
        if self.train_step.average is not None:
            load_average(checkpoint, self.raw_model, self.train_step.average)

    def run(self) -> TrainingResult:
        """Train until the last step, save the model, and validate it.

        Raises:
            CheckpointError: the run folder cannot be written; its earlier checkpoints are unchanged.
            NonFiniteError: a loss, a gradient or a weight is not finite, and no rewind is left.
            TrainingInterrupted: SIGINT or SIGTERM, after saving a checkpoint.
        """
        try:
            return self._run()
        except OSError as error:
            raise CheckpointError(
                f"{error}. Earlier checkpoints are whole: make the folder writable or free space on its disk, then go "
                f"on with --resume {shell_word(self.run_dir)}"
            ) from error

    def _run(self) -> TrainingResult:
        started = time.perf_counter()
        self.train_step.model.train()
        self.display = self._new_display()
        self._introduce()
        with self._metrics_log() as self.metrics, self._tracking() as self.tracking, self.display:
            # A run that was killed here may lack its weights, although its checkpoint is whole; a rewind needs a first
            # checkpoint.
            if self.state.step or self.config.rewinds:
                self.save()
            with StopRequest(self.display.hang_up) as stop:
                while self.state.step < self.config.steps:
                    try:
                        if not self.state.validation_due:
                            self._step(stop)
                        self._after_step(stop)
                    except NonFiniteError as fault:
                        self._rewind(fault)
            scores = self._validate(final=True)
            if self.accelerator.is_main_process:
                self.metrics.sync()
                write_run_card(self.config, self.corpus, self.raw_model, self.tokens_per_step, scores.validation)
                write_result(self.run_dir, self.state.step, scores)
        self.display.say(f"Done in {format_duration(time.perf_counter() - started)}; the model is in {self.run_dir}")
        self.train_step.unwrap()
        return TrainingResult(self.run_dir, whole_model(self.raw_model).eval(), self.corpus.tokenizer, *scores)

    def _step(self, stop: StopRequest) -> None:
        """Take a step, and report those that are computed."""
        step, started = self.state.step, time.perf_counter()
        factor = self.config.rate_factor(step) * REWIND_FACTOR**self.state.rewinds
        checked = self._is_checked(step + 1)
        if checked:  # trackers log its gradients, and no earlier step afterwards
            self._report_all_but(0)
        numbers = self.update(
            factor,
            stopping=stop.signal_number is not None,
            look=partial(self.tracking.log_gradients, step + 1, self.raw_model) if checked else None,
        )
        self.taken.append(
            _Step(self.state.step, learning_rates(self.train_step.raw_optimizer), started, _on_its_way(numbers))
        )
        self._report_all_but(self.lag)

    def update(self, factor: float, *, stopping: bool = False, look: Callable[[], None] | None = None) -> torch.Tensor:
        """Update the weights once; arguments and result are those of `TrainStep`."""
        numbers = self.train_step(self.state.step, self.batches_per_step, factor, stopping=stopping, look=look)
        self.state.step += 1
        return numbers

    def _report_all_but(self, count: int) -> None:
        """Report the steps that were taken, except the last ``count``.

        Raises:
            NonFiniteError: a loss or the norm of a gradient is not finite; this step and later ones changed nothing.
        """
        while len(self.taken) > count:
            step = self.taken.popleft()
            loss, grad_norm, stopping = step.numbers()
            self.stopping |= stopping > 0
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise self._failed(step.number, loss, grad_norm)
            now = time.perf_counter()
            seconds, self.reported_at = now - max(step.started, self.reported_at), now
            self._report(step.number, loss, grad_norm, step.rates, seconds)

    def _failed(self, step: int, loss: float, grad_norm: float) -> NonFiniteError:
        """Return the error of a step, whose gradient is computed again: it may have been overwritten."""
        self.taken.clear()
        name = "the loss"
        if math.isfinite(loss):
            self.state.step = step - 1
            self.train_step.gradient(step - 1, self.batches_per_step)
            name = offending_gradient(self.raw_model)
        event = f"the loss is {loss} and its gradient's norm {grad_norm}, first of all {name}; the step was not taken"
        return self._not_finite(step, name, event)

    def _report(self, step: int, loss: float, grad_norm: float, rates: dict[str, float], seconds: float) -> None:
        average = self.state.loss_average.update(loss)
        record = dict(
            tokens=step * self.tokens_per_step,
            loss=loss,
            bits_per_byte=loss * self.bits_per_byte_per_nat,
            grad_norm=grad_norm,
            tokens_per_second=self.tokens_per_step / seconds,
            **rates,
        )
        self.metrics.write(step=step, **record)
        self.tracking.log(step, "training", record)
        self.display.step(
            step,
            loss=average,
            bits_per_byte=average * self.bits_per_byte_per_nat,
            learning_rate=rates["lr"],
            tokens=self.tokens_per_step,
            seconds=seconds,
        )

    def _not_finite(self, step: int, name: str, event: str) -> NonFiniteError:
        return NonFiniteError(
            step,
            name,
            event,
            f"Train again with a learning rate below {self.peak_learning_rate:g}, a warm-up of more than "
            f"{counted(self.config.warmup, 'step')}, or more --rewinds than {self.config.rewinds}",
        )

    def _rewind(self, fault: NonFiniteError) -> None:
        """Go back to the last whole checkpoint, with a lower learning rate, if a rewind is left."""
        rewinds = self.state.rewinds + 1
        if rewinds > self.config.rewinds:
            raise fault
        checkpoint, _ = find_checkpoint(self.run_dir)
        if checkpoint is None:
            raise fault
        restore_weights(checkpoint, self.raw_model)
        self.restore(checkpoint)
        self.train_step.reset()
        self.state.rewinds, self.state.validation_due = rewinds, False
        self.metrics.go_back(self.state.step)
        self.tracking.go_back(self.state.step, rewinds)
        # The record is one of the first repeated step: a run that resumes before that step writes the record again.
        first, factor = self.state.step + 1, REWIND_FACTOR**rewinds
        self.metrics.write(step=first, rewinds=rewinds, failed_step=fault.step, not_finite=fault.name, lr_factor=factor)
        if self.accelerator.is_main_process:
            place = f"{checkpoint.name}, with {factor:g} of the learning rate"
            event = f"step {fault.step}: {fault.event}"
            logger.warning("Rewind %d of %d, to %s: %s", rewinds, self.config.rewinds, place, event)

    def _after_step(self, stop: StopRequest) -> None:
        """Validate and save at their intervals, and stop if a signal asked for it.

        Raises:
            NonFiniteError: a weight before a validation or a checkpoint is not finite, or the loss of a validation.
            TrainingInterrupted: a signal asked to stop.
        """
        config, step, state = self.config, self.state.step, self.state
        state.validation_due = self._is_checked(step) and step < config.steps
        saving = _is_due(step, config.checkpoint_interval) or step in (config.steps, config.stable_steps)
        if state.validation_due or saving:
            self._report_all_but(0)
        # A signal may reach processes at different steps; they stop when all of them received it.
        asked = self.stopping if self.accelerator.num_processes > 1 else stop.signal_number is not None
        stopping = asked and step < config.steps
        if (state.validation_due or saving) and (name := offending_weight(self.raw_model)):
            raise self._not_finite(step, name, f"the step left {name} with values that are not finite")
        if state.validation_due and not stopping:
            try:
                self._validate(stop)
                state.validation_due = False
            except StoppedInValidation:
                stopping = True
        if stopping:
            self.display.say(f"Stopping after step {step}: saving a checkpoint (a second signal stops at once)")
            self._report_all_but(0)
        if saving or stopping:
            self._save()
        if stopping:
            raise TrainingInterrupted(stop.signal_number or signal.SIGTERM, self.run_dir, step)

    def _validate(self, stop: StopRequest | None = None, *, final: bool = False) -> Scores:
        """Score held-out text, divided among the processes, by the weights and by their moving average.

        Raises:
            NonFiniteError: the loss is not finite.
            StoppedInValidation: a process was asked to stop.
        """
        step = self.state.step
        sample = sample_stretches(
            self.corpus.validation, self.config.validation_tokens(self.tokens_per_step, final=final)
        )
        if final:
            self.display.say(f"Validating on {sample.num_predictions:,} held-out tokens")
        with without_compiled_blocks(self.raw_model):
            score, averaged = self._score(sample, stop), None
            if (average := self.train_step.average) is not None:
                with average.in_place():
                    averaged = self._score(sample, stop)
        if averaged is not None:
            ema = dict(ema_loss=averaged.loss, ema_bits_per_byte=averaged.bits_per_byte)
            self.tracking.log(step, "validation", ema)
        self.metrics.write_validation(step, score, averaged, final=final)
        self.tracking.log(step, "validation", dict(loss=score.loss, bits_per_byte=score.bits_per_byte))
        if not self.train_step.sharded:  # no process holds whole blocks for diagnostics
            with without_compiled_blocks(self.raw_model), evaluating(self.raw_model):
                self.tracking.log_diagnostics(step, self.raw_model)
        self.display.validation(step, score, averaged)
        return Scores(score, averaged)

    def _score(self, sample: Stretches, stop: StopRequest | None) -> LanguageScore:
        """Score a sample by the weights that the model has."""
        total = self.validator.nats(sample, self.display, stop)
        if not math.isfinite(total):
            raise self._not_finite(self.state.step, "the validation loss", f"the loss of a validation is {total}")
        return LanguageScore.from_totals(total, sample.num_predictions, sample.num_bytes)

    def _is_checked(self, step: int) -> bool:
        """Return True if a validation and diagnostics follow a step."""
        return _is_due(step, self.config.eval_interval) or step == self.config.steps

    def save(self) -> None:
        """Write a checkpoint, and the weights into the run folder, so that its model can be used at any time.

        All processes call this. If the model is not sharded, only the first one writes.

        Raises:
            OSError: the folder cannot be written.
        """
        config, first = self.config, self.accelerator.is_main_process
        if first or self.train_step.sharded:
            save_checkpoint(
                self.run_dir,
                self.raw_model,
                self.train_step.raw_optimizer,
                self.state,
                average=self.train_step.average,
                keep=config.keep_checkpoints,
                keep_step=config.stable_steps,
            )
            write_models(self.run_dir, self.raw_model, self.train_step.average)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        """Write the metrics to disk, then save a checkpoint."""
        if self.accelerator.is_main_process:
            self.metrics.sync()
            self.state.metrics_sha256 = self.metrics.sha256
        self.save()

    def _metrics_log(self) -> MetricsLog:
        state, writes = self.state, self.accelerator.is_main_process
        step, validated = state.step, not state.validation_due
        log = MetricsLog(self.run_dir, step, writes, state.metrics_sha256, validated=validated)
        if writes and step and not log.exists:
            logger.warning("%s is missing: a new one begins after step %d", self.run_dir / FILE_NAME, step)
            log = MetricsLog(self.run_dir, step)
        return log

    def _tracking(self) -> Tracking:
        tokens = np.concatenate(sample_stretches(self.corpus.validation, _PROBE_TOKENS).sequences)
        probe = torch.from_numpy(token_ids(tokens[:_PROBE_TOKENS]))
        return Tracking(self.accelerator, self.config, self.state.step, probe)

    def _introduce(self) -> None:
        sizes = dict(first_step=self.state.step, tokens_per_step=self.tokens_per_step)
        self.display.say(introduce(self.config, self.corpus, self.train_step, **sizes))

    def _new_display(self) -> TrainingDisplay:
        peak = peak_flops(self.device, self.accelerator.mixed_precision)
        processes = self.accelerator.num_processes
        return TrainingDisplay(
            self.console,
            steps=self.config.steps,
            first_step=self.state.step,
            log_interval=self.config.log_interval,
            warm_up=WARM_UP_STEPS if self.train_step.compilation.wanted else 0,
            most_tokens_per_second=None if peak is None else processes * peak / flops_per_token(self.raw_model),
        )


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
