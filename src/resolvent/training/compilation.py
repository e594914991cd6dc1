"""Compilation of a model in training with torch.compile, and the choice of whether to wait for it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from resolvent.models import IntegratedModel
from resolvent.models.phase1 import Phase1Config
from resolvent.training.config import LEAST_COMPILED_BATCHES, TrainingConfig


class Compilation(NamedTuple):
    """Choice for a run.

    Attributes:
        wanted: the model is compiled: by a single process as a whole, by several block by block.
        padded: the offsets of documents lie on the device, filled up to a power of two: compiled code serves any
            number of documents, and no step waits for a copy.
        replayed: forward and backward passes are replayed from CUDA graphs.
        obstacle: reason that a long run of one process on CUDA is not compiled; "" for none.
    """

    wanted: bool
    padded: bool = False
    replayed: bool = False
    obstacle: str = ""


def choose_compilation(
    config: TrainingConfig, device: torch.device, processes: int, model: IntegratedModel
) -> Compilation:
    """Return whether a run compiles its model, and how: as the configuration says, or where that repays its time.

    By default, long runs of one process on CUDA are compiled if there is a compiler and the model compiles as one
    piece.

    With several processes, compiled code ends with each block, and no CUDA graph holds it: DDP and FSDP send gradients
    and weights of a block while others compute.
    """
    on_cuda = device.type == "cuda"
    long = on_cuda and processes == 1 and config.steps * config.accumulation >= LEAST_COMPILED_BATCHES
    obstacle = obstacle_in_model(model) or _missing_compiler() if config.compile is None and long else ""
    wanted = long and not obstacle if config.compile is None else config.compile
    padded = wanted and on_cuda and not model.reads_offsets
    return Compilation(wanted, padded, replayed=padded and processes == 1, obstacle=obstacle)


def obstacle_in_model(model: IntegratedModel) -> str:
    """Return what cuts the compiled code of a model into pieces, or changes it in a run; "" for nothing."""
    if isinstance(model.config, Phase1Config):
        return "the rank of a Phase 1 model changes in training"
    return "Python reads the offsets of documents in this model" if model.reads_offsets else ""


def _missing_compiler() -> str:
    """Return what torch.compile lacks to compile for CUDA; "" if it lacks nothing."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    compiler = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([compiler] if compiler else ["gcc", "clang"])):
        return f"Triton finds no C compiler ({f'CC={compiler}' if compiler else 'gcc or clang'})"
    return ""


def compile_blocks(model: IntegratedModel) -> None:
    """Compile the computation of every block; what wraps a block, hooks of FSDP and DDP among it, stays in Python.

    Blocks that differ in their weights only share the compiled code.
    """
    for block in model.blocks:
        owner: Any = block
        owner.compute = torch.compile(owner.compute, fullgraph=not obstacle_in_model(model))


@contextmanager
def without_compiled_blocks(model: IntegratedModel) -> Iterator[None]:
    """Run the blocks of `compile_blocks` as they are written within the `with` block: inputs there have many shapes."""
    compiled = {block: vars(block).pop("compute") for block in model.blocks if "compute" in vars(block)}
    try:
        yield
    finally:
        for block, compute in compiled.items():
            vars(block)["compute"] = compute


def remove_compiled_blocks(model: IntegratedModel) -> None:
    """Undo `compile_blocks`."""
    for block in model.blocks:
        vars(block).pop("compute", None)
