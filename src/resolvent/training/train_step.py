"""One training step: forward and backward passes, clipping, and an update of the weights."""

import warnings
from collections.abc import Callable, Iterator
from itertools import repeat

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor
from torch.nn.utils import get_total_norm

from resolvent.data import Batch
from resolvent.models import IntegratedModel
from resolvent.models.compilation import compiler_errors
from resolvent.ops import IGNORED
from resolvent.training.compilation import (
    choose_compilation,
    compile_blocks,
    obstacle_in_model,
    remove_compiled_blocks,
)
from resolvent.training.config import TrainingConfig
from resolvent.training.corpus import Corpus
from resolvent.training.ema import WeightAverage
from resolvent.training.memory import keeps_whole_weights
from resolvent.training.optimizer import optimizer_of_run
from resolvent.training.sharding import is_sharded, keep_whole_weights, local_tensor

WARM_UP_STEPS = 3
"""Steps in which a compiled model is compiled and recorded."""


class TrainStep:
    """Training step of a run, call after call; which step it is, the caller says.

    The optimiser itself skips a step whose loss or gradient is not finite.

    Args:
        config: a valid configuration.
        accelerator: device, precision and processes.
        corpus: text of the run.
        model: model of the run, on the accelerator's device, or sharded.

    Attributes:
        batches: batches of the text, by number.
        raw_model: the model.
        model: the same, as the accelerator has prepared it.
        raw_optimizer: the optimiser, whose state checkpoints hold.
        average: moving average of the weights; None without one.
        compilation: choice of whether and how the model is compiled.
        sharded: the model is sharded over the processes.
    """

    def __init__(
        self, config: TrainingConfig, accelerator: Accelerator, corpus: Corpus, model: IntegratedModel
    ) -> None:
        self.config, self.accelerator, self.device, self.raw_model = config, accelerator, accelerator.device, model
        self.batches = corpus.batches(
            seq_len=config.window(model.n_seq), batch_size=config.batch_size, seed=config.seed
        )
        self._weighted = corpus.train.signed
        if config.recompute:
            model.recompute_blocks()
        self.raw_optimizer = optimizer_of_run(config, model)
        self._found_inf = self.raw_optimizer.found_inf = torch.zeros((), device=self.device)
        self.sharded = is_sharded(model)
        if self.sharded and keeps_whole_weights(model, self.device):
            keep_whole_weights(model)
        self.compilation = choose_compilation(config, self.device, accelerator.num_processes, model)
        if self.compilation.wanted:
            self._compile()
        if self.sharded:  # it needs autocast only
            self.model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
            self._optimizer = accelerator.prepare_optimizer(self.raw_optimizer)
        else:
            self.model, self._optimizer = accelerator.prepare(model, self.raw_optimizer)
        self.average = WeightAverage(model, config.ema) if config.ema else None

    def _compile(self) -> None:
        """Have the model compiled: by a single process as a whole, and by several processes block by block."""
        # The operators compute with complex numbers in kernels of their own.
        warnings.filterwarnings(
            "ignore", message="Torchinductor does not support code generation for complex operators"
        )
        if self.accelerator.num_processes > 1:
            compile_blocks(self.raw_model)
        elif compiler := self.accelerator.state.dynamo_plugin:
            compiler.backend, compiler.fullgraph = DynamoBackend.INDUCTOR, not obstacle_in_model(self.raw_model)
            compiler.mode = "reduce-overhead" if self.compilation.replayed else "default"

    def __call__(
        self,
        step: int,
        batches: int,
        factor: float,
        *,
        stopping: bool = False,
        look: Callable[[], None] | None = None,
    ) -> Tensor:
        """Update the weights once, along the gradient of the mean loss over the step's batches.

        Args:
            step: number of steps before this one.
            batches: number of batches of a step, over all processes.
            factor: learning rates as a part of the highest.
            stopping: True if this process was asked to stop.
            look: is called when the gradients are there, before they are clipped.

        Returns:
            (3,) on the device: the loss, the gradient's norm before clipping, and above zero if a process was asked to
            stop.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if self.config.start_from is None:  # with fewer channels, a saved model would be another function
            self.raw_model.update_rank_schedule(step)
        loss, asked = self._over_processes(self.gradient(step, batches), stopping)
        if look is not None:
            look()
        norm = self._clip()
        self._found_inf.logical_or_(~(loss + norm).isfinite())
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self.average is not None:
            self.average.update(step + 1)
        return torch.stack([loss, norm, asked])

    def gradient(self, step: int, batches: int) -> Tensor:
        """Compute the gradient into the parameters; return the mean loss of this process's batches, on the device.

        The arguments are those of a call.
        """
        accelerator, config = self.accelerator, self.config
        mine = range(accelerator.process_index, batches, accelerator.num_processes)
        accelerator.gradient_accumulation_steps = len(mine)
        loss_sum = torch.zeros((), device=self.device)
        for number, batch, weight in self._weighted_batches(step, batches, mine):
            # Randomness, too, is a function of the batch alone: a resumed run needs no generator's state, nor as many
            # processes as before.
            seeds = np.random.SeedSequence((config.seed, step, number))
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
            with accelerator.accumulate(self.model), compiler_errors("train with --no-compile"):
                loss, penalty = self._loss(batch)
                loss = loss * weight
                accelerator.backward(loss + penalty)
            loss_sum += loss.detach()
            if self.compilation.replayed and number == mine[0] != mine[-1]:
                self._move_gradients()
        return loss_sum / len(mine)

    def _weighted_batches(self, step: int, count: int, mine: range) -> Iterator[tuple[int, Batch, Tensor | float]]:
        """Yield this process's batches with number and weight, in the mean over all tokens that the step predicts.

        Batches of text predict equally many tokens. How many those of conversations predict depends on the answers, so
        that the processes add up their counts.
        """
        batches = (self.batches[step * count + number] for number in mine)
        if count == 1 or not self._weighted:
            yield from zip(mine, batches, repeat(1.0), strict=False)
            return
        held = list(batches)
        predicted = torch.tensor([int((batch.labels != IGNORED).sum()) for batch in held], dtype=torch.float64)
        total = self.accelerator.reduce(predicted.sum().to(self.device), reduction="sum")
        weights = (count * predicted.to(self.device) / total.clamp(min=1)).float()
        yield from zip(mine, held, weights, strict=True)

    def _over_processes(self, loss: Tensor, stopping: bool) -> Tensor:
        """Return (2,) on the device: the mean loss of all processes, and a number above zero if any is to stop."""
        asked = torch.full_like(loss, stopping)
        return self.accelerator.reduce(torch.stack([loss, asked]), reduction="mean")

    @torch.no_grad()
    def _clip(self) -> Tensor:
        """Clip the gradient; return its norm before clipping, on the device.

        Of a sharded gradient, every process clips its shards: DTensors would be sent one by one.
        """
        gradients = [local_tensor(x.grad) for x in self.raw_model.parameters() if x.grad is not None]
        norm = get_total_norm(gradients)
        if self.sharded:
            norm = self.accelerator.reduce(norm.square(), reduction="sum").sqrt()
        if self.config.grad_clip:
            torch._foreach_mul_(gradients, (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def reset(self) -> None:
        """Forget gradients and faults: the run goes back to a checkpoint."""
        self._optimizer.zero_grad()
        self._found_inf.zero_()

    def unwrap(self) -> None:
        """Take autocast and compiled code off the model."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        remove_compiled_blocks(self.raw_model)

    def _move_gradients(self) -> None:
        """Copy the gradients, which are to be summed, out of the memory that the next replay of a graph overwrites."""
        for parameter in self.raw_model.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor | float]:
        """Return the loss in nats per token, and the penalty of the model."""
        options = {"return_penalty": True} if self.raw_model.penalised else {}
        if self.compilation.replayed:
            torch.compiler.cudagraph_mark_step_begin()  # the outputs of the last replay are not used any more
        if self.compilation.padded:
            # No code reads the offsets on the CPU, and the number of segments selects a CUDA graph.
            input_ids, labels, cu_seqlens = batch.padded().to(self.device)
            torch._dynamo.mark_dynamic(cu_seqlens, 0)  # compiled once, for any number of segments
        else:
            # The offsets stay on the CPU, where the model reads them without waiting for the device.
            input_ids, labels, _ = batch.to(self.device)
            cu_seqlens = batch.cu_seqlens
        output = self.model(input_ids, labels=labels, cu_seqlens=cu_seqlens, **options)
        return output if options else (output, 0.0)
