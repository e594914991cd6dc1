"""A model whose parameters, gradients and optimiser state are shared out between processes (FSDP2), block by block.

A parameter is whole only while its block computes. What a process holds are torch's DTensors, sharded in their first
dimension; they go to and from safetensors files through torch.distributed.checkpoint, which reads the shards of any
number of processes into those of any other. Its own format would be a pickle.

FSDP2 knows no scalar parameters: here they are vectors of one, and scalars again in every file.
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
    """Whether a model holds its process's shards only."""
    return isinstance(model, FSDPModule)


def shard(model: IntegratedModel, device: torch.device, *, compile: bool = False) -> IntegratedModel:
    """The same model, shared out between all processes, which all call this.

    Args:
        model: the whole model in the first process, which sends the others their shards; of theirs, only the
            configuration counts, so that it may be on the meta device. It is of no use afterwards.
        device: this process's.
        compile: compile the blocks with torch.compile.
    """
    whole: dict[str, Any] = {}
    if dist.get_rank() == 0:
        whole = {name: _as_vector(x) for name, x in model.state_dict().items()}
    sharded = empty_shards(model, device, compile=compile)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(sharded, whole, options=options)
    return sharded


def empty_shards(model: IntegratedModel, device: torch.device, *, compile: bool = False) -> IntegratedModel:
    """A sharded model of another's configuration, whose weights will be loaded; arguments as of `shard`."""
    model = _without_memory(model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                setattr(module, name, nn.Parameter(_as_vector(parameter)))
    # Nobody writes into what a block returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in cast(Iterable[Block], model.blocks):
        fully_shard(block, mesh=mesh)
        if compile:
            block.compute = torch.compile(block.compute)  # FSDP's hooks stay outside
    fully_shard(model, mesh=mesh)
    tied = model.tied
    model._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))
    if tied:
        model.lm_head.weight = cast(nn.Embedding, model.token_embedding).weight
    return model


def whole_tensor(x: Tensor) -> Tensor:
    """What a sharded tensor is as a whole; all processes call this. Another tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_weights(model: IntegratedModel) -> dict[str, Tensor]:
    """All weights of a sharded model, on the CPU, in the first process, and nothing in the others; all call this.

    They are put together one by one: no device ever holds more than one that is whole.
    """
    weights = {}
    scalars = _scalars(model)
    for name, x in named_weights(model).items():
        tensor = whole_tensor(x)
        if dist.get_rank() == 0:
            weights[name] = tensor.reshape(()).cpu() if name in scalars else tensor.cpu()
    return weights


def shard_names(shards: int) -> list[str]:
    """The files that as many processes write."""
    return [f"shard-{number:05d}-model-00001-of-00001.safetensors" for number in range(1, shards + 1)]


def write_shards(folder: Path, model: IntegratedModel, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of named tensors from each process, which all call this.

    Args:
        folder: where to.
        model: the sharded model that the tensors belong to.
        tensors: of the parameter `name`, itself under `name` and what belongs to it under `name/...`.

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
    """Fill tensors, whole or sharded, from files that one process wrote or any number.

    Arguments are as of `write_shards`. Where there are several processes, all call this.

    Raises:
        CheckpointError: the files cannot be read, lack a tensor or have it in another shape.
    """
    scalars = _scalars(model)
    wanted = {name: _scalar_like(x) if name.partition("/")[0] in scalars else x for name, x in tensors.items()}
    found = stored_shapes(folder)
    for name, x in wanted.items():
        if found.get(name) != x.shape:
            raise CheckpointError(f"{name} in {folder} has the shape {found.get(name)}, not {tuple(x.shape)}")
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that a single process is a single one
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
    """Names and shapes of the tensors in a folder's safetensors files, as if they were whole.

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        for path in folder.glob("*.safetensors"):  # torch opens all of them, and would wait for a pipe's other end
            open_regular(path).close()
        stored = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except OSError as error:
        raise CheckpointError(f"cannot read the tensors in {folder}: {error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read the tensors in {folder}: {error!r}") from error
    return {name: entry.size for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def _without_memory(model: IntegratedModel) -> IntegratedModel:
    """A whole model of the same configuration on the meta device."""
    with torch.device("meta"):
        return PHASES[phase_of(model)].model(model.config, init=False)


def _scalars(model: IntegratedModel) -> set[str]:
    """The parameters that are scalars in a whole model."""
    return {name for name, parameter in _without_memory(model).named_parameters() if parameter.ndim == 0}


def _as_vector(x: Tensor) -> Tensor:
    return x.reshape(1) if x.ndim == 0 else x


def _scalar_like(x: Tensor) -> Tensor:
    return torch.empty((), dtype=x.dtype, device=x.device)
