"""Processes of a run: the accelerator that they share, and how they leave each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DynamoBackend,
    TorchDynamoPlugin,
    parse_flag_from_env,
)

from resolvent.device import pick_device
from resolvent.errors import ConfigError
from resolvent.training.config import TrainingConfig
from resolvent.training.tracking import tracker_options


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Return the accelerator of a run: device, precision and processes.

    Raises:
        ConfigError: Accelerate is configured to shard the model itself.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ConfigError("accelerate launch is configured for FSDP: use --parallel fsdp, and launch without it")
    device = pick_device(config.device)
    precision = {"auto": "bf16" if device.type == "cuda" else "no", "fp32": "no", "bf16": "bf16"}[config.precision]
    if not torch.distributed.is_initialized():
        # Accelerate keeps the settings of a process's first Accelerator and refuses others.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    _join_processes(device)
    replicas = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        gradient_accumulation_steps=config.accumulation,
        dynamo_plugin=TorchDynamoPlugin(backend=DynamoBackend.NO),  # the trainer decides
        kwargs_handlers=[replicas],
        **tracker_options(config),
    )


def _join_processes(device: torch.device) -> None:
    """Join the processes that torchrun started on CUDA; on the CPU, and for a single process, Accelerate does so.

    The group knows the device of this process: without it, NCCL guesses the device at every barrier, and warns.
    """
    local = os.environ.get("LOCAL_RANK")
    if device.type == "cuda" and local is not None and not torch.distributed.is_initialized():
        own = torch.device("cuda", int(local))
        torch.cuda.set_device(own)
        torch.distributed.init_process_group("nccl", device_id=own)


@contextmanager
def leaving_processes() -> Iterator[None]:
    """Leave the process group of a run, if there is one, at the end of the `with` block: this process trains no more.

    To leave NCCL, processes wait for each other. After an error in one of them, they would wait for ever.
    """
    try:
        yield
    except BaseException:
        group = torch.distributed.group.WORLD
        if group is not None and torch.distributed.get_backend() == "nccl":
            group.abort()
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
