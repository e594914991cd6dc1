"""Sources of a trained Transformer: a model of Transformers in memory, a folder that it was saved to, or a GGUF file.

A source has the entries of Transformers' ``config.json``, whatever it is, and reads one tensor at a time under
Transformers' name for it.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, ConfigError
from ...files import read_json
from ...tensors import TensorFile, indexed_files

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"

_GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_ENTRIES = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
_GGUF_SCALING = {"rope.scaling.type": "rope_type", "rope.scaling.factor": "factor"}


@dataclass(frozen=True)
class Source:
    """A trained Transformer.

    Attributes:
        name: its name, for errors.
        values: entries of Transformers' ``config.json``.
        shapes: shapes of the tensors, by Transformers' names.
        read: returns a tensor, on the CPU.
    """

    name: str
    values: dict[str, Any]
    shapes: Mapping[str, torch.Size]
    read: Callable[[str], Tensor]


@contextmanager
def opened(source: "nn.Module | str | Path | Source") -> Iterator[Source]:
    """Open a source for the time of a ``with`` block; one that is open is yielded as it is.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: a module is no model of Transformers, or the package ``gguf`` is missing.
    """
    with ExitStack() as stack:
        if isinstance(source, Source):
            yield source
        elif isinstance(source, nn.Module):
            yield _of_model(source)
        elif Path(source).is_dir():
            yield _of_folder(Path(source), stack)
        else:
            yield _of_gguf(Path(source))


def _of_model(model: nn.Module) -> Source:
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if to_dict is None:
        raise ConfigError(
            f"the source must be a model of Transformers, a folder or a GGUF file, got {type(model).__name__}"
        )
    values, tensors = to_dict(), dict(model.named_parameters())
    if values.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    shapes = {name: x.shape for name, x in tensors.items()}
    return Source(type(model).__name__, values, shapes, lambda name: tensors[name].detach().cpu())


# ------------------------------------------------------------------------------------------------------------- folders


def _of_folder(folder: Path, stack: ExitStack) -> Source:
    values, files = read_json(folder / _CONFIG), dict[str, TensorFile]()
    for path in _weight_files(folder):
        try:
            file = stack.enter_context(TensorFile(path))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; copy the whole folder again") from error
        files.update(dict.fromkeys(file.shapes, file))
    shapes = {name: file.shapes[name] for name, file in files.items()}
    return Source(str(folder), values, shapes, lambda name: files[name].tensor(name))


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, each of which is there."""
    index, single = folder / _INDEX, folder / _WEIGHTS
    if not index.exists():
        if not single.exists():
            raise CheckpointError(f"{folder} holds no {_WEIGHTS} and no {_INDEX}: save the model as safetensors")
        return [single]
    files = indexed_files(index)
    if missing := [file.name for file in files if not file.exists()]:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(files)} shards: {', '.join(missing)}")
    return files


# ---------------------------------------------------------------------------------------------------------- GGUF files


def _of_gguf(path: Path) -> Source:
    """Open a GGUF file, whose tensors are made float32 where they are quantised."""
    if not path.is_file():
        raise CheckpointError(f"{path} is neither a folder nor a GGUF file")
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise ConfigError("GGUF files need the package gguf: pip install 'resolvent[gguf]'") from error
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    except (OSError, ValueError, IndexError, KeyError) as error:  # of a truncated file, too
        raise CheckpointError(f"cannot read the GGUF file {path}: {error}; copy it again") from error
    tensors = {_transformers_name(tensor.name): tensor for tensor in reader.tensors}
    shapes = {name: torch.Size(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    values = _gguf_values(fields)
    values.setdefault("vocab_size", shapes.get("model.embed_tokens.weight", (0,))[0])
    heads: dict[str, Any] = {"q": values.get("num_attention_heads"), "k": values.get("num_key_value_heads")}
    permuted = values["model_type"] == "llama"

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        try:
            x = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).reshape(shapes[name])
        except NotImplementedError as error:
            raise CheckpointError(f"cannot read {name} in {path}: {error}; take a file with Q8_0 or F16") from error
        found = re.search(r"self_attn\.([qk])_proj\.", name)
        return _unpermuted(x, heads[found[1]]) if found and permuted else x

    return Source(str(path), values, shapes, read)


def _transformers_name(name: str) -> str:
    """Return Transformers' name of a tensor; a name that is not known stays."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in _GGUF_PARTS:
        return f"model.layers.{block[1]}.{_GGUF_PARTS[block[2]]}.{block[3]}"
    return _GGUF_NAMES.get(name, name)


def _gguf_values(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of ``config.json`` that the fields of a GGUF file stand for."""
    kind = fields.get("general.architecture")
    own = {name.removeprefix(f"{kind}."): value for name, value in fields.items()}
    values = {theirs: own[ours] for ours, theirs in _GGUF_ENTRIES.items() if ours in own}
    scaling = {theirs: own[ours] for ours, theirs in _GGUF_SCALING.items() if ours in own}
    return {"model_type": kind, "hidden_act": "silu", "rope_scaling": scaling, **values}


def _unpermuted(x: Tensor, heads: int) -> Tensor:
    """Put the rows of a head that turn together, neighbours in GGUF, half a head apart."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
