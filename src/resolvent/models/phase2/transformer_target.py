"""Conversion of Phase 2 models that are Transformers to folders that Transformers loads, with the same tensors.

The inverse of ``convert_transformer``: every field and every part that these Transformers lack is named.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...files import read_json, write_json
from ...tensors import write_tensors
from ..config import Values
from .block import Phase2Block, blocks_of
from .config import Phase2Config
from .model import Phase2IntegratedModel
from .transformer import tensor_rows

_CONFIG, _WEIGHTS, _GENERATION = "config.json", "model.safetensors", "generation_config.json"
_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""Classes of Transformers for each ``model_type``."""


def save_transformer(model: Phase2IntegratedModel, directory: str | Path) -> str:
    """Write a model as a Transformer of the Llama family: ``config.json`` and ``model.safetensors``.

    The tensors are those of the model, bit for bit. Special tokens are those of a ``generation_config.json`` in the
    folder.

    Returns:
        The ``model_type``: ``llama``; ``mistral`` where all blocks attend to one window; ``qwen2`` where q, k and v
        have biases.

    Raises:
        ConfigError: names the first block and part that these Transformers lack.
        CheckpointError: the folder cannot be written.
    """
    directory, kind = Path(directory), _kind(model)
    tensors = {name: model.get_parameter(target).detach()[rows] for name, target, rows in tensor_rows(model)}
    values = _values(model.config, kind, tensors["model.embed_tokens.weight"])
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (settings := directory / _GENERATION).exists():
            roles = [f"{role}_token_id" for role in ("bos", "eos", "pad")]
            values |= {role: token for role, token in read_json(settings).items() if role in roles}
        write_tensors(directory / _WEIGHTS, tensors)
        write_json(directory / _CONFIG, values)
    except OSError as error:
        raise CheckpointError(f"cannot write the Transformer to {directory}: {error}") from error
    return kind


def _kind(model: Phase2IntegratedModel) -> str:
    """Return the ``model_type`` of the Transformer that a model is.

    Raises:
        ConfigError: it is none.
    """
    config = model.config
    fault = next((fault for block in enumerate(blocks_of(model)) for fault in _faults(config, *block)), None)
    if fault is None:
        fault = next(_faults_around(config), None)
    if fault is not None:
        raise ConfigError(f"the model is no Transformer of the Llama family: {fault}")
    windows = {*config.windows.values()}
    if config.qkv_bias:
        return "qwen2"
    return "llama" if windows == {None} else "mistral"


def _faults(config: Phase2Config, i: int, block: Phase2Block) -> Iterator[str]:
    """Yield a sentence for every part of a block that these Transformers lack."""
    name, window = f"block {i} has", config.windows.get(i)
    if block.hebbian is not None:
        yield f"{name} a memory: attention_layers names {len(config.attention_layers)} of {config.n_layers} blocks"
    if block.bk_proj is not None and bool(block.bk_proj.weight.any()):
        yield f"{name} BK-Core, whose map bk_proj is not zero"
    if block.ar_ssm is not None:
        yield f"{name} a semiseparable branch: ar_ssm_rank is {config.ar_ssm_rank}"
    if config.conv_size > 1:
        yield f"{name} a convolution before q, k and v: conv_size is {config.conv_size}"
    if config.qk_norm:
        yield f"{name} normalised queries and keys: qk_norm is True"
    if config.output_norm or config.output_gate:
        yield f"{name} a norm or a gate behind its attention: output_norm is {config.output_norm}, output_gate " + str(
            config.output_gate
        )
    if config.norm != "rmsnorm":
        yield f"{name} norms of another kind: norm is {config.norm!r}, not 'rmsnorm'"
    if not config.ffn_gated:
        yield f"{name} a feed-forward network without gate: ffn_gated is False"
    others = [x for x in config.windows.values() if x is not None or not config.qkv_bias]
    if others and window != others[0] and (window is not None or not config.qkv_bias):
        yield f"{name} a window of {window or 'all'} tokens, another block of {others[0] or 'all'}: " + (
            "these Transformers have one" if config.qkv_bias else "only Qwen2, with biases of q, k and v, has two kinds"
        )


def _faults_around(config: Phase2Config) -> Iterator[str]:
    """Yield a sentence for every part outside the blocks that these Transformers lack."""
    if config.htt_rank is not None:
        yield f"its token embedding is a tensor train: htt_rank is {config.htt_rank}"
    if config.zeta_positions:
        yield "it adds positions to the token vectors: zeta_positions is True"
    if config.embedding_factor != 1:
        yield f"it scales the token vectors: embedding_scale is {config.embedding_factor:g}, not 1"


def _values(config: Phase2Config, kind: str, table: Tensor) -> Values:
    """Return the entries of ``config.json``, which Transformers 4 and 5 read."""
    scaling = config.rotary_scaling
    length = config.n_seq if scaling is None else max(config.n_seq, scaling.original_length)
    values: Values = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rotary_base,
        "rope_scaling": None,
        "max_position_embeddings": length,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "torch_dtype": str(table.dtype).removeprefix("torch."),
    }
    if scaling is not None:
        values["rope_scaling"] = _scaling(config)
        if scaling.kind != "llama3":  # the others read the original length here
            values["max_position_embeddings"] = scaling.original_length
    return values | _window_values(config, kind)


def _scaling(config: Phase2Config) -> dict[str, Any]:
    scaling = config.rotary_scaling
    assert scaling is not None
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        values |= {
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
            "original_max_position_embeddings": scaling.original_length,
        }
    return values


def _window_values(config: Phase2Config, kind: str) -> Values:
    """Return the entries of the windows: of all layers, or of each."""
    windows = list(config.windows.values())
    window = next((w for w in windows if w is not None), None)
    if kind == "llama":
        return {"attention_bias": False, "mlp_bias": False}
    if kind == "mistral":
        return {"sliding_window": window}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in windows]
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": 0,
        "layer_types": kinds,
    }
