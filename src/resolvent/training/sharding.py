"""Sharding of parameters, gradients and optimiser state over processes (FSDP2), block by block.

A parameter is whole only while its block computes. A process holds torch's DTensors, sharded in their first dimension.
torch.distributed.checkpoint writes them to safetensors files and reads the shards of any number of processes into those
of any other; its own format would be a pickle.

FSDP2 supports no scalar parameters: a sharded model has vectors of one element instead, and every file has scalars.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from resolvent.errors import CheckpointError
from resolvent.files import open_regular
from resolvent.models import IntegratedModel
from resolvent.models.base import Block
from resolvent.models.phases import PHASES, phase_of
from resolvent.models.storage import named_weights


def is_sharded(model: nn.Module) -> bool:
    """Return True if a model holds only the shards of its process."""
    return isinstance(model, FSDPModule)


def shard(model: IntegratedModel, device: torch.device) -> IntegratedModel:
    """Return the model, sharded over all processes; all processes call this.

    Args:
        model: the whole model in the first process, which sends the other processes their shards. In these, only the
            configuration is used, so that the model may be on the meta device. Do not use it afterwards.
        device: the device of this process.
    """
    whole: dict[str, Any] = {}
    if dist.get_rank() == 0:
        whole = {name: _as_vector(x) for name, x in model.state_dict().items()}
    sharded = empty_shards(model, device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(sharded, whole, options=options)
    return sharded


def empty_shards(model: IntegratedModel, device: torch.device) -> IntegratedModel:
    """Return a sharded model with the configuration of another and uninitialised weights; arguments as of `shard`."""
    model = _without_memory(model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                setattr(module, name, nn.Parameter(_as_vector(parameter)))
    # No operation writes into the output of a block.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in cast(Iterable[Block], model.blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    tied = model.tied
    model._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))
    if tied:
        model.lm_head.weight = cast(nn.Embedding, model.token_embedding).weight
    return model


def keep_whole_weights(model: IntegratedModel) -> None:
    """Have a sharded model keep whole weights from the forward to the backward pass, which takes memory and no time."""
    cast(FSDPModule, model).set_reshard_after_forward(False)


def free_whole_weights(model: nn.Module) -> None:
    """Free the whole weights that a forward pass without a backward pass leaves in a sharded model."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_tensor(x: Tensor) -> Tensor:
    """Gather a sharded tensor; all processes call this. A tensor that is not sharded is returned unchanged."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_tensor(x: Tensor) -> Tensor:
    """Return the shard of this process. A tensor that is not sharded is returned unchanged."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole_weights(model: IntegratedModel) -> dict[str, Tensor]:
    """Gather all weights of a sharded model on the CPU of the first process; all processes call this.

    The other processes return nothing. Weights are gathered one by one: a device holds at most one whole weight.
    """
    weights = {}
    scalars = _scalars(model)
    for name, x in named_weights(model).items():
        tensor = whole_tensor(x)
        if dist.get_rank() == 0:
            weights[name] = tensor.reshape(()).cpu() if name in scalars else tensor.cpu()
    return weights


def shard_names(shards: int) -> list[str]:
    """Return the names of the files that a number of processes write."""
    return [f"shard-{number:05d}-model-00001-of-00001.safetensors" for number in range(1, shards + 1)]


def write_shards(folder: Path, model: IntegratedModel, tensors: Mapping[str, Tensor]) -> None:
    """Write one file of named tensors per process; all processes call this.

    Args:
        folder: the folder to write to.
        model: the sharded model that the tensors belong to.
        tensors: the parameter `name` under `name`, and its optimiser state under `name/...`.

    Raises:
        OSError: one of the processes cannot write.
    """
    scalars = _scalars(model)
    stored = {
        name: whole_tensor(x).reshape(()) if name.partition("/")[0] in scalars else x for name, x in tensors.items()
    }
    try:
        dcp.save(stored, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, OSError):
            raise OSError(f"process {rank}: {cause}") from error
        raise


def read_shards(folder: Path, model: IntegratedModel, tensors: Mapping[str, Tensor]) -> None:
    """Read whole or sharded tensors from files that any number of processes wrote.

    Arguments are as of `write_shards`. All processes of a run call this.

    Raises:
        CheckpointError: the files cannot be read, lack a tensor or hold it in another shape.
    """
    scalars = _scalars(model)
    wanted = {name: _scalar_like(x) if name.partition("/")[0] in scalars else x for name, x in tensors.items()}
    found = stored_shapes(folder)
    for name, x in wanted.items():
        if found.get(name) != x.shape:
            raise CheckpointError(f"{name} in {folder} has the shape {found.get(name)}, not {tuple(x.shape)}")
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # a single process is intended
            dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(f"cannot read the checkpoint {folder}: {error}") from error
    with torch.no_grad():
        for name, x in tensors.items():
            if isinstance(x, DTensor) and wanted[name] is not x:
                x.copy_(distribute_tensor(_as_vector(wanted[name]), x.device_mesh, x.placements))
            elif wanted[name] is not x:
                x.copy_(wanted[name])


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """Return names and whole shapes of the tensors in the safetensors files of a folder.

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        for path in folder.glob("*.safetensors"):  # torch opens all of them, and would block on a pipe
            open_regular(path).close()
        stored = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except OSError as error:
        raise CheckpointError(f"cannot read the tensors in {folder}: {error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read the tensors in {folder}: {error!r}") from error
    return {name: entry.size for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def _without_memory(model: IntegratedModel) -> IntegratedModel:
    """Return a whole model of the same configuration on the meta device."""
    with torch.device("meta"):
        return PHASES[phase_of(model)].model(model.config, init=False)


def _scalars(model: IntegratedModel) -> set[str]:
    """Return the names of the parameters that are scalars in a whole model."""
    return {name for name, parameter in _without_memory(model).named_parameters() if parameter.ndim == 0}


def _as_vector(x: Tensor) -> Tensor:
    return x.reshape(1) if x.ndim == 0 else x


def _scalar_like(x: Tensor) -> Tensor:
    return torch.empty((), dtype=x.dtype, device=x.device)
