"""LoRA adapters in a model's folder, in the files of PEFT: read, and added to the weights.

A folder with adapters has the weights of the adapted model beside them. A checkpoint has adapters alone; the weights
are in its run folder.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import read_json, shown
from ..manifest import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_FILE
from ..tensors import read_tensors

PREFIX = "base_model.model.model."
"""Beginning of the names in PEFT's file: its wrapper, and the class for Transformers around the model."""

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_PLAIN = {"peft_type": "LORA", "bias": "none"}
_CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of those values of PEFT's init_lora_weights that change the weights of the adapted model, too."""
_OFF = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")
"""Settings of PEFT that would make other weights of the same tensors."""


def has_adapters(directory: Path) -> bool:
    """Return True if a folder has adapters beside or in the place of a model's weights."""
    return any((directory / name).exists() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))


@dataclass(frozen=True)
class Adapters:
    """Low-rank matrices that are added to weights: ``W + scaling * up @ down``.

    Attributes:
        tensors: the matrices by the names of PEFT's file without ``PREFIX``.
        config: settings of PEFT.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> "Adapters":
        """Read the adapters of a folder.

        Raises:
            CheckpointError: a file is missing or damaged, or the adapters are of another kind.
        """
        path = directory / ADAPTER_CONFIG
        config = read_json(path)
        wrong = [name for name, value in _PLAIN.items() if config.get(name) != value]
        wrong += [name for name in _OFF if config.get(name)]
        wrong += ["init_lora_weights"] if str(config.get("init_lora_weights")).startswith(_CHANGED) else []
        if wrong:
            raise CheckpointError(
                f"{path} has {wrong[0]} = {shown(config.get(wrong[0]))}, and only plain LoRA is read: merge the "
                "adapters with PEFT's merge_and_unload"
            )
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(f"{path} must have r and lora_alpha, got {shown(rank)} and {shown(alpha)}")
        tensors = read_tensors(directory / ADAPTER_WEIGHTS)
        return cls({name.removeprefix(PREFIX): x for name, x in tensors.items()}, config)

    @property
    def scaling(self) -> float:
        """Factor of the product of two matrices."""
        return self.config["lora_alpha"] / self.config["r"]

    @torch.no_grad()
    def merge(self, weights: dict[str, Tensor]) -> None:
        """Add the adapters to the weights of a model, by their names in files.

        Raises:
            ValueError: an adapter fits no weight.
        """
        layers = {name.removesuffix(end) for name in self.tensors for end in (_DOWN, _UP) if name.endswith(end)}
        if len(self.tensors) != 2 * len(layers):
            raise ValueError(f"{len(self.tensors)} tensors are not the pairs of matrices of {len(layers)} layers")
        for layer in sorted(layers):
            weight = weights.get(f"{layer}.weight")
            down, up = (self.tensors[layer + end] for end in (_DOWN, _UP))
            rank = self.config["r"]
            if weight is None or down.shape != (rank, weight.shape[-1]) or up.shape != (len(weight), rank):
                raise ValueError(f"the adapter of {layer} fits no weight of the model")
            weights[f"{layer}.weight"] = weight + ((up @ down) * self.scaling).to(weight.dtype)


def base_folder(directory: Path) -> Path:
    """Return the folder of the weights that a folder's adapters belong to: itself, or the run folder around it.

    Raises:
        CheckpointError: neither has weights.
    """
    around = (directory.parent, directory.parent.parent)  # of a moving average, and of a checkpoint
    if any(directory.glob("model*.safetensors")):
        return directory
    run_dir = next((folder for folder in around if (folder / RUN_FILE).exists()), directory)
    if not any(run_dir.glob("model*.safetensors")):
        raise CheckpointError(
            f"{directory} holds adapters alone, and {run_dir} lacks the weights that they are for: put "
            "model.safetensors of their run folder there"
        )
    return run_dir
