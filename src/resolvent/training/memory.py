"""Estimate the memory of a training run before it starts.

Otherwise, the operating system kills a run that does not fit, without a message.
"""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Literal

import torch

from resolvent.errors import ConfigError
from resolvent.memory import Memory, machine_memory
from resolvent.models import IntegratedModel
from resolvent.models.phase1 import Phase1Config
from resolvent.models.phase2 import Phase2Config
from resolvent.ops.cross_entropy import LOGITS_BYTES
from resolvent.training.config import TrainingConfig
from resolvent.training.optimizer import parts_of_matrices
from resolvent.wording import counted

_BYTES_PER_PARAMETER = 16
"""Weight, gradient, and AdamW's two averages, in float32."""
_BYTES_PER_WEIGHT = 4
_BYTES_SAVED_BY_MUON = 4
"""It keeps one average of a matrix."""
_LIBRARIES = 40_000_000
"""Bytes of code and buffers that PyTorch loads with the first training step."""
_KEPT_WHEN_RECOMPUTED = 11
"""Numbers per token and unit of width that a block keeps under activation checkpointing."""
_BLOCKS_RECOMPUTED = 1.6
"""Blocks whose tensors the backward pass holds at once under activation checkpointing: one and its gradients."""
_KEPT_BY_KERNELS = 0.54
"""Numbers that the blocks keep with the kernels of CUDA, over those of the operators in plain PyTorch."""
_KEPT_BY_KERNELS_WHEN_RECOMPUTED = 2
"""Numbers per token and unit of width that a block keeps there under activation checkpointing."""
_CERTAIN_PART = 2 / 3
"""An estimate is within a factor of 1.5 of the memory taken."""

_KEPT_WHOLE_PART = 1 / 16
"""Part of a device's memory that the whole weights of a sharded model may take between its passes."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """Memory of a training step at its peak.

    Attributes:
        parameters: bytes of weights, gradients and optimiser state.
        activations: bytes of the tensors that the forward pass saves for the backward pass.
        libraries: bytes of code and buffers that PyTorch loads with the first step.
    """

    parameters: int
    activations: int
    libraries: int = _LIBRARIES

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.parameters + self.activations + self.libraries

    def times(self, copies: int) -> "Estimate":
        """Return the memory of several processes that train at once."""
        return Estimate(copies * self.parameters, copies * self.activations, copies * self.libraries)


def estimate_memory(
    model: IntegratedModel,
    *,
    tokens: int,
    bytes_per_number: int = 4,
    recompute: bool = False,
    averaged: bool = False,
    shares: int = 1,
    optimizer: Literal["muon", "adamw"] = "adamw",
    cuda: bool = False,
    keeps_gradients: bool = True,
) -> Estimate:
    """Estimate the memory of a training step.

    On a CPU, a block keeps about `7 D + 27 H K + 3 F` numbers per token: D is the width of the model, H K that of the
    memory's heads (Phase 2 only) and F that of the feed-forward network. The backward pass works on one block more.
    With `recompute`, a block keeps `11 D` numbers, and the backward pass holds 1.6 whole blocks. Logits are computed in
    chunks, so that the vocabulary counts only through the parameters, of 16 bytes each, or 12 if Muon moves them, and 4
    where they are not trained.

    On CUDA, the kernels of Phase 2 keep about half as many numbers, and the peak is where the backward pass begins:
    there are logits and the gradient of the head, and no other gradient yet, unless steps accumulate or processes
    share them.

    Args:
        model: the model.
        tokens: tokens of a batch.
        bytes_per_number: bytes of an activation: 4, or 2 under autocast.
        recompute: whether activation checkpointing is on.
        averaged: whether there is a moving average of the weights.
        shares: processes that weights, gradients and optimiser state are sharded over.
        optimizer: optimizer of the run.
        cuda: whether the model is trained on CUDA.
        keeps_gradients: whether gradients of all parameters lie in memory when the backward pass begins.
    """
    config = model.config
    by_kernels = cuda and isinstance(config, Phase2Config)
    activations = tokens * _numbers_per_token(config, by_kernels, recompute) * bytes_per_number
    if by_kernels:
        logits = min(LOGITS_BYTES, tokens * config.vocab_size * bytes_per_number)
        activations += logits + (4 + bytes_per_number) * config.vocab_size * config.d_model
    trained = model.num_parameters(trainable_only=True)
    per_parameter = _BYTES_PER_PARAMETER + 4 * averaged - 4 * (by_kernels and not keeps_gradients)
    parameters = per_parameter * trained + 4 * (model.num_parameters() - trained)
    if optimizer == "muon":
        parameters -= _BYTES_SAVED_BY_MUON * sum(x.numel() for x in parts_of_matrices(model))
    return Estimate(parameters // shares, round(activations), 0 if cuda else _LIBRARIES)


def _numbers_per_token(config: Phase1Config | Phase2Config, by_kernels: bool, recompute: bool) -> float:
    """Return the numbers that all blocks keep per token for the backward pass, which works on one block more."""
    block = 7 * config.d_model + 27 * _memory_width(config) + 3 * _feed_forward_width(config)
    if by_kernels:
        block *= _KEPT_BY_KERNELS
    if not recompute:
        return (config.n_layers + 1) * block
    kept, at_once = (
        (_KEPT_BY_KERNELS_WHEN_RECOMPUTED, 1.0) if by_kernels else (_KEPT_WHEN_RECOMPUTED, _BLOCKS_RECOMPUTED)
    )
    return config.n_layers * kept * config.d_model + at_once * block


def _memory_width(config: Phase1Config | Phase2Config) -> int:
    """Return the width of all heads of a memory; 0 in Phase 1."""
    return config.num_heads * config.head_dim if isinstance(config, Phase2Config) else 0


def _feed_forward_width(config: Phase1Config | Phase2Config) -> int:
    """Return the hidden width of a plain feed-forward network; a gated one, of two thirds of it, keeps as much."""
    if isinstance(config, Phase2Config) and config.intermediate_size is not None:
        return config.intermediate_size * 3 // 2 if config.ffn_gated else config.intermediate_size
    return 4 * config.d_model if config.ffn_dim is None else config.ffn_dim


def memory_of_run(
    model: IntegratedModel, config: TrainingConfig, device: torch.device, processes: int, *, recompute: bool
) -> Estimate:
    """Estimate the memory of a run on a device; on the CPU, that of all processes, which share the machine.

    Args:
        model: the model.
        config: the run.
        device: where it is trained.
        processes: processes of the run.
        recompute: whether activation checkpointing is on.
    """
    on_cuda = device.type == "cuda"
    estimate = estimate_memory(
        model,
        tokens=config.batch_size * config.window(model.n_seq),
        bytes_per_number=2 if on_cuda and config.precision != "fp32" else 4,
        recompute=recompute,
        averaged=config.ema > 0,
        shares=processes if config.parallel == "fsdp" else 1,
        optimizer=config.optimizer,
        cuda=on_cuda,
        keeps_gradients=config.accumulation > 1 or processes > 1,
    )
    if config.parallel == "fsdp" and processes > 1 and keeps_whole_weights(model, device):
        whole = _BYTES_PER_WEIGHT * model.num_parameters()
        estimate = dataclasses.replace(estimate, parameters=estimate.parameters + whole)
    return estimate.times(1 if on_cuda else processes)


def keeps_whole_weights(model: IntegratedModel, device: torch.device) -> bool:
    """Return True if a sharded model has memory to keep whole weights from the forward to the backward pass."""
    return _BYTES_PER_WEIGHT * model.num_parameters() <= _KEPT_WHOLE_PART * memory_of(device).total


def check_memory(model: IntegratedModel, config: TrainingConfig, device: torch.device, processes: int) -> None:
    """Warn if a run may take more memory than is free.

    Args:
        model: the model.
        config: the run.
        device: where it is trained.
        processes: processes of the run; on the CPU, they share the memory of the machine.

    Raises:
        ConfigError: the run takes more memory than there is.
    """
    memory = memory_of(device)
    window = config.window(model.n_seq)
    needed, recomputed = (
        memory_of_run(model, config, device, processes, recompute=anew) for anew in (config.recompute, True)
    )
    if needed.total <= memory.available:
        return
    what = (
        f"about {gib(needed.total)}: {gib(needed.parameters)} for parameters and optimizer, "
        f"{gib(needed.activations)} for batches of {counted(config.batch_size, 'window')} of {counted(window, 'token')}"
    )
    remedy = "lower --batch-size or --seq-len"
    if not config.recompute:
        remedy += f", or use --recompute, with which it takes about {gib(recomputed.total)}"
    if _CERTAIN_PART * needed.total > memory.total:
        raise ConfigError(f"training takes {what}; there are {gib(memory.total)} in all: {remedy}")
    logger.warning(f"Training takes {what}; {gib(memory.available)} are free. If it is killed, {remedy}")


def gib(size: int) -> str:
    """Return bytes in GiB, for messages: with one decimal, or two below 1 GiB."""
    return f"{size / 2**30:.{1 if size >= 2**30 else 2}f} GiB"


def memory_of(device: torch.device) -> Memory:
    """Return the memory of a device; for the CPU, that of the machine."""
    if device.type == "cuda":
        available, total = torch.cuda.mem_get_info(device)
        return Memory(total, available)
    return machine_memory()
