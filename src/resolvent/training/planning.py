"""Plan of a run: sizes, memory, arithmetic and expected time."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from resolvent.terminal import say
from resolvent.training.compute import embedding_parameters, flops_per_token
from resolvent.training.config import TrainingConfig
from resolvent.training.memory import Estimate, gib, memory_of, memory_of_run
from resolvent.training.progress import format_duration, frozen_part
from resolvent.training.run import new_trainer
from resolvent.training.train_step import WARM_UP_STEPS
from resolvent.training.trainer import Trainer
from resolvent.wording import counted, readings

_TIMED_STEPS = 5
_VALIDATING_COSTS = 1 / 3
"""Time to predict a token, as a part of that to train on it."""


@dataclass(frozen=True, repr=False)
class RunPlan:
    """Sizes and expected time of a run.

    Attributes:
        parameters: parameters of the model.
        trained_parameters: those that the run trains.
        embedding_parameters: those of the token embedding.
        flops_per_token: FLOPs to train on a token.
        memory: estimated bytes at the peak; on the CPU, of all processes.
        measured_memory: bytes at the peak of the timed steps on CUDA; None where nothing was timed, and on the CPU.
        free_memory: bytes that are free on the device.
        steps: steps of the run.
        tokens: tokens of all steps.
        validated_tokens: tokens of all validations.
        text_tokens: tokens of the text to learn from.
        tokens_per_second: the speed.
        timed_steps: steps that the speed was measured in; 0 where it was given.
    """

    parameters: int
    trained_parameters: int
    embedding_parameters: int
    flops_per_token: int
    memory: Estimate
    measured_memory: int | None
    free_memory: int
    steps: int
    tokens: int
    validated_tokens: int
    text_tokens: int
    tokens_per_second: float
    timed_steps: int

    @property
    def passes(self) -> float:
        """Number of times that the run reads the text."""
        return self.tokens / self.text_tokens

    @property
    def seconds(self) -> float:
        """Expected time of all steps and validations."""
        return (self.tokens + _VALIDATING_COSTS * self.validated_tokens) / self.tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        return dataclasses.asdict(self) | {"passes": self.passes, "seconds": self.seconds}

    def __repr__(self) -> str:
        time = format_duration(self.seconds)
        return f"RunPlan({self.parameters:,} parameters, {self.tokens:,} tokens, {gib(self.memory.total)}, {time})"

    def __str__(self) -> str:
        memory, measured = self.memory, self.measured_memory
        read = readings(self.passes, f"the text of {counted(self.text_tokens, 'token')}")
        source = f"measured in {counted(self.timed_steps, 'step')}" if self.timed_steps else "as given"
        return (
            f"Model     {self.parameters:,} parameters, {self.parameters - self.embedding_parameters:,} without the "
            f"token embedding{frozen_part(self.parameters, self.trained_parameters)}\n"
            f"Compute   {_flops(self.flops_per_token)} per token, {_flops(self.flops_per_token * self.tokens)} in all\n"
            f"Memory    about {gib(memory.total)}: {gib(memory.parameters)} for parameters and optimiser, "
            f"{gib(memory.activations)} for activations; "
            f"{f'measured {gib(measured)}; ' if measured is not None else ''}{gib(self.free_memory)} free\n"
            f"Tokens    {self.tokens:,} in {counted(self.steps, 'step')}, which read {read}; "
            f"{self.validated_tokens:,} in validations\n"
            f"Time      {format_duration(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s, {source}"
        )


def _flops(count: float) -> str:
    """Return a number of FLOPs in the unit that gives up to three digits before the point."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if count < 1000:
            return f"{count:,.1f} {unit}FLOPs"
        count /= 1000
    return f"{count:,.1f} EFLOPs"


def plan_run(
    config: TrainingConfig, *, tokens_per_second: float | None = None, console: Console | None = None
) -> RunPlan:
    """Return the sizes and the expected time of a run. No run folder is made; the cache keeps the tokens for the run.

    Args:
        config: the run.
        tokens_per_second: the speed to expect, of all processes together; None measures a few steps.
        console: where to show progress; None shows nothing.

    Raises:
        ConfigError: faults of the configuration, or more memory than there is.
        CheckpointError: there is no model to start from.
        DataError: text or tokenizer that cannot be used.
    """
    config.validate()
    with new_trainer(config, console) as trainer:
        model, device = trainer.raw_model, trainer.device
        processes = trainer.accelerator.num_processes
        free_memory = memory_of(device).available
        timed = tokens_per_second is None
        if timed:
            first = ", after compiling the model" if trainer.train_step.compilation.wanted else ""
            say(trainer.console, f"Timing {_TIMED_STEPS} steps on {device}{first}")
        return RunPlan(
            parameters=model.num_parameters(),
            trained_parameters=model.num_parameters(trainable_only=True),
            embedding_parameters=embedding_parameters(model),
            flops_per_token=flops_per_token(model),
            memory=memory_of_run(model, config, device, processes, recompute=config.recompute),
            tokens_per_second=_measured_speed(trainer) if tokens_per_second is None else tokens_per_second,
            timed_steps=_TIMED_STEPS if timed else 0,
            measured_memory=torch.cuda.max_memory_allocated(device) if timed and device.type == "cuda" else None,
            free_memory=free_memory,
            steps=config.steps,
            tokens=config.steps * trainer.tokens_per_step,
            validated_tokens=_validated_tokens(trainer),
            text_tokens=trainer.corpus.train.num_predictions,
        )


def _measured_speed(trainer: Trainer) -> float:
    """Return the tokens per second of a few steps."""
    trainer.train_step.model.train()
    factor = trainer.config.rate_factor(0)
    ends = []
    for steps in (WARM_UP_STEPS, _TIMED_STEPS):
        numbers = [trainer.update(factor) for _ in range(steps)]
        torch.stack(numbers).tolist()  # waits for the device
        ends.append(time.perf_counter())
    return _TIMED_STEPS * trainer.tokens_per_step / (ends[1] - ends[0])


def _validated_tokens(trainer: Trainer) -> int:
    """Return the tokens of all validations of a run, those of the moving average counted again."""
    config, held_out = trainer.config, trainer.corpus.validation.num_predictions
    on_the_way = (config.steps - 1) // config.eval_interval if config.eval_interval else 0
    total = 0
    for count, final in ((on_the_way, False), (1, True)):
        wanted = config.validation_tokens(trainer.tokens_per_step, final=final)
        total += count * min(wanted or held_out, held_out)
    return total * (2 if config.ema else 1)
