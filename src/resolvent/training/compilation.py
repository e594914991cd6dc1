"""Compilation of a model in training with torch.compile, and the choice of whether to wait for it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch._dynamo.exc import TorchDynamoException

from resolvent.errors import ConfigError
from resolvent.models import IntegratedModel
from resolvent.models.phase1 import Phase1Config
from resolvent.training.config import LEAST_COMPILED_BATCHES, TrainingConfig


class Compilation(NamedTuple):
    """Choice for a run.

    Attributes:
        wanted: the model is compiled.
        obstacle: reason that a long run on CUDA is not compiled; "" for none.
    """

    wanted: bool
    obstacle: str = ""


def choose_compilation(config: TrainingConfig, device: torch.device, model: IntegratedModel) -> Compilation:
    """Return whether to compile a model: as the configuration says, or where that repays its time.

    By default, long runs on CUDA are compiled if there is a compiler and the model compiles as one piece.
    """
    if config.compile is not None:
        return Compilation(config.compile)
    if device.type != "cuda" or config.steps * config.accumulation < LEAST_COMPILED_BATCHES:
        return Compilation(False)
    obstacle = _obstacle_in_model(model) or _missing_compiler()
    return Compilation(not obstacle, obstacle)


def compiles_whole(model: IntegratedModel) -> bool:
    """Return True if torch.compile compiles a model as one piece, and does so once in a run."""
    return not _obstacle_in_model(model)


def _obstacle_in_model(model: IntegratedModel) -> str:
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
        owner.compute = torch.compile(owner.compute, fullgraph=compiles_whole(model))


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


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Raise an error of the compiler within the `with` block as one that names the remedy.

    Raises:
        ConfigError: torch.compile cannot compile the model.
    """
    try:
        yield
    except TorchDynamoException as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"torch.compile cannot compile the model ({type(error).__name__}: {first}): train with --no-compile"
        ) from error
