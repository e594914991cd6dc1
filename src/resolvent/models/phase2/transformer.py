"""Conversion of pretrained Transformers of the Llama family to Phase 2.

Phase 2 with attention in every block contains these models: RMSNorm, grouped queries, rotary positions and a gated
feed-forward network are switches of ``Phase2Config``. So layer i goes to layer i, and the converted model has the
logits of its source, whole and token by token. BK-Core stands beside the attention behind a map that starts at zero.

A model of fewer attention layers, or of narrower windows, is not exact and starts from what it can take over: memories
get the maps of the attention that they replace, and its rotary positions as their angles.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, ConfigError, check_at_least
from ...files import shown
from ..base import observe
from ..config import Values, check_fields
from .block import blocks_of
from .config import Phase2Config, RotaryScaling
from .conversion_report import ConversionReport, ConvertedTensor
from .model import Phase2IntegratedModel
from .transformer_source import Source, opened

FAMILIES = ("llama", "mistral", "qwen2")
"""Values of ``model_type`` in Transformers' ``config.json`` that can be converted."""

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
)  # fmt: skip
_LONGEST_WINDOW = 2048
"""Largest training window ``n_seq`` that a converted model proposes; it reads any number of tokens."""
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights; whole numbers and numbers of eight bits mean nothing without the scales of their quantisation."""
_RECOMPUTED = "rotary_emb.inv_freq"
"""Ending of tensors in old files that follow from the configuration."""
_ATTENTION = ("attention_layers", "attention_window", "attention_windows")
"""Fields that say what a model attends to; with less than the Transformer does, it is not exact."""
_FASTEST_DECAY = 1 / 8
"""Γ dt at which the fastest head of a memory starts that takes the place of attention; that of the slowest is the
inverse of a training window."""


def convert_transformer(
    source: nn.Module | str | Path | Source, config: Phase2Config | None = None
) -> Phase2IntegratedModel:
    """Convert a Transformer of the Llama family; ``model.conversion_report`` lists every tensor.

    The result has the logits of the source, at any length, streaming and packed, and the dtype of its weights. Tensors
    are read one at a time. With dynamic scaling, logits beyond the original length are those of Transformers when it
    reads token by token.

    Where the configuration names fewer ``attention_layers`` or narrower windows, the result has other logits, and
    ``conversion_report.exact`` is False. The other blocks have memories with the q, k, v and output maps of the
    attention; ``match_readouts`` brings their read-outs to its size, and training does the rest.

    Args:
        source: a Llama, Mistral, Qwen2 or SmolLM2 model of Transformers; the folder that it was saved to, as
            safetensors; a GGUF file, which needs the package ``gguf``; or one of them that ``opened`` has opened.
        config: the configuration; None for ``transformer_config(source)``. It may differ from that in what leaves the
            logits as they are, such as ``n_seq``, ``dropout`` or the fields of BK-Core, and in what it attends to.

    Raises:
        ConfigError: the architecture is not of this family or has a part that Phase 2 lacks, or the configuration
            cannot preserve the model; names every fault.
        CheckpointError: a file is missing or damaged, or its tensors are not those of the configuration.
    """
    with opened(source) as transformer, torch.no_grad():
        fixed = _fixed_fields(transformer)
        config = _config(fixed) if config is None else _preserving(config, fixed)
        mappings = list(_mappings(config))
        _check_tensors(transformer, _without_memory(config, transformer), mappings)
        model = Phase2IntegratedModel(config)
        model.to(_read(transformer, "model.embed_tokens.weight").dtype)
        parameters = dict(model.named_parameters())
        for mapping in mappings:
            rows = slice(mapping.first, mapping.first + transformer.shapes[mapping.source][0])
            parameters[mapping.target][rows].copy_(_read(transformer, mapping.source))
        _slow_memories(model)
    model.conversion_report = _report(model, mappings, exact=config.windows == _config(fixed).windows)
    return model.eval()


def transformer_config(
    source: nn.Module | str | Path | Source,
    *,
    keep_attention: Sequence[int] | None = None,
    attention_window: int | None = None,
    **changes: Any,
) -> Phase2Config:
    """Return the configuration of a Transformer's Phase 2 model.

    Args:
        source: as of ``convert_transformer``.
        keep_attention: layers, counted from 0, that keep their attention; the others become memories. None keeps all.
        attention_window: number of tokens to which they attend at most; None for the windows of the Transformer.
        **changes: other values of fields that keep the logits.

    Raises:
        ConfigError, CheckpointError: as ``convert_transformer`` does.
    """
    check_fields(Phase2Config, changes)
    with opened(source) as transformer:
        fixed = _fixed_fields(transformer)
    config = _config(fixed)
    if keep_attention is not None or attention_window is not None:
        changes = _less_attention(config, keep_attention, attention_window) | changes
    return _preserving(dataclasses.replace(config, **changes), fixed)


@torch.no_grad()
def match_readouts(model: Phase2IntegratedModel, exact: Phase2IntegratedModel, input_ids: Tensor) -> None:
    """Fit the norm weights of memories, channel by channel, to the attention that they replace, by least squares.

    Where the read-out of a memory has nothing in common with that of the attention, its weight becomes small.

    Args:
        model: a model of a Transformer some of whose blocks became memories; it is changed in place.
        exact: the exact model of the same Transformer.
        input_ids: tokens of the fit, (B, N).
    """
    trace = observe(exact, input_ids)
    x, before = trace.entered, None
    for block, attended in zip(blocks_of(model), trace.layers, strict=True):
        if block.hebbian is not None and (weight := block.hebbian.norm_weight) is not None:
            weight.fill_(1.0)
            read, wanted = block(x, before, None, None, None).readout.float(), attended.readout.float()
            weight.copy_((read * wanted).sum(dim=(0, 1)) / read.square().sum(dim=(0, 1)).clamp(min=1e-6))
        x, before = attended.output, attended.readout


# ------------------------------------------------------------------------------------------------------- configuration


def _config(fixed: Values) -> Phase2Config:
    """Return the configuration with these fields, and defaults that keep the logits."""
    values: Values = {"dropout": 0.0, "n_seq": _LONGEST_WINDOW, **fixed}
    config = Phase2Config(**values)
    config.validate()
    return config


def _less_attention(config: Phase2Config, layers: Sequence[int] | None, window: int | None) -> Values:
    """Return the fields with which some layers keep their attention, within a window, and the others have memories."""
    kept = config.attention_layers if layers is None else tuple(sorted(layers))
    if window is not None:
        check_at_least(1, attention_window=window)
    if unknown := sorted({*kept} - {*config.attention_layers}):
        raise ConfigError(
            f"keep_attention must name layers of 0..{config.n_layers - 1}, got {', '.join(map(str, unknown))}"
        )
    windows = tuple(min((w for w in (config.windows[i], window) if w is not None), default=0) for i in kept)
    same = len({*windows}) <= 1
    values: Values = {
        "attention_layers": kept,
        "attention_window": (windows[0] or None) if same and windows else None,
        "attention_windows": None if same else windows,
    }
    if len(kept) < config.n_layers:
        values |= dict(memory_rotation=True, memory_rotation_bias=True, memory_norm_weight=True)
    return values


def _preserving(config: Phase2Config, fixed: Values) -> Phase2Config:
    """Return a configuration, checked to have the fields on which the logits depend, and to attend to no more."""
    pairs = ((name, getattr(config, name), value) for name, value in fixed.items() if name not in _ATTENTION)
    faults = [
        f"{name} is {shown(ours)}, that of the Transformer {shown(theirs)}"
        for name, ours, theirs in pairs
        if ours != theirs
    ]
    if not faults:
        config.validate()
        allowed = _config(fixed).windows
        faults = [
            f"block {i} attends to {window or 'all'} tokens, the Transformer to {most}"
            for i, window in config.windows.items()
            if (most := allowed[i]) is not None and (window is None or window > most)
        ]
    if faults:
        raise ConfigError(
            f"config cannot preserve this Transformer: {'; '.join(faults)}. Leave config out, or start from "
            "transformer_config(source)"
        )
    return config


def _fixed_fields(source: Source) -> Values:
    """Return the fields of the configuration on which the logits depend.

    Raises:
        ConfigError: names every entry that Phase 2 has no counterpart for.
    """
    values = source.values
    if (kind := values.get("model_type")) not in FAMILIES:
        raise ConfigError(f"{source.name}: model_type must be one of {', '.join(FAMILIES)}, got {shown(kind)}")
    if faults := _faults(values):
        raise ConfigError("; ".join([f"{source.name} cannot be converted", *faults]))
    layers, heads = values["num_hidden_layers"], values["num_attention_heads"]
    found = {name.split(".")[2] for name in source.shapes if re.match(r"model\.layers\.\d+\.", name)}
    if layers != len(found):
        raise CheckpointError(
            f"{source.name} does not hold the model of its configuration: num_hidden_layers is {shown(layers)}, and "
            f"its tensors are of {len(found)} layers"
        )
    rotary = _rotary(values)
    return {
        "vocab_size": values["vocab_size"],
        "d_model": values["hidden_size"],
        "n_layers": layers,
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
        "ffn_gated": True,
        "intermediate_size": values["intermediate_size"],
        "norm": "rmsnorm",
        "norm_eps": values["rms_norm_eps"],
        "embedding_scale": 1.0,
        "zeta_positions": False,
        "htt_rank": None,
        "ar_ssm_rank": 0,
        "tie_embeddings": values.get("tie_word_embeddings", "lm_head.weight" not in source.shapes),
        "attention_layers": tuple(range(layers)),
        "conv_size": 1,
        "qk_norm": False,
        "qkv_bias": kind == "qwen2",
        "output_norm": False,
        "output_gate": False,
        "rotary_base": float(rotary["rope_theta"]),
        "rotary_scaling": _scaling(rotary, values),
        **_windows(values),
    }


def _faults(values: Values) -> list[str]:
    """Return a sentence for every entry that is missing or has no counterpart."""
    faults = [
        f"{name} must be a number, got {shown(values.get(name))}"
        for name in _SIZES
        if not isinstance(values.get(name), int | float)
    ]
    if (activation := values.get("hidden_act", "silu")) != "silu":
        faults.append(f"hidden_act must be silu, got {shown(activation)}")
    faults += [
        f"{name} must be False, got {values[name]}" for name in ("attention_bias", "mlp_bias") if values.get(name)
    ]
    if values["model_type"] == "mistral" and "sliding_window" not in values:
        faults.append("sliding_window is missing: a number, or null for none")
    if values["model_type"] == "qwen2" and values.get("use_sliding_window"):
        faults += _faults_of_windows(values)
    entries = {name: values.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
    if wrong := [name for name, value in entries.items() if not isinstance(value, dict)]:
        return [*faults, f"{wrong[0]} must be an object, got {shown(entries[wrong[0]])}"]
    rotary = _rotary(values)
    if not isinstance(rotary["rope_theta"], int | float):
        faults.append(f"rope_theta must be a number, got {shown(rotary['rope_theta'])}")
    if (kind := _kind(rotary)) not in (known := ("default", "linear", "dynamic", "llama3")):
        faults.append(f"the scaling of the rotary positions must be one of {', '.join(known)}, got {shown(kind)}")
    return faults


def _faults_of_windows(values: Values) -> list[str]:
    """Return a sentence for every entry that does not say which layers have windows."""
    kinds, first = values.get("layer_types"), values.get("max_window_layers", 0)
    faults = []
    if kinds is not None and not isinstance(kinds, list):
        faults.append(f"layer_types must be a list, got {shown(kinds)}")
    if kinds is None and not isinstance(first, int):
        faults.append(f"max_window_layers must be an integer, got {shown(first)}")
    return faults


def _rotary(values: Values) -> Values:
    """Return the entries of the rotary positions, which older versions of Transformers keep apart."""
    base = values.get("rope_theta", 10_000.0)
    return {"rope_theta": base, **(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}


def _kind(rotary: Values) -> str:
    return rotary.get("rope_type") or rotary.get("type") or "default"


def _scaling(rotary: Values, values: Values) -> RotaryScaling | None:
    if (kind := _kind(rotary)) == "default":
        return None
    length = rotary.get("original_max_position_embeddings") or values.get("max_position_embeddings")
    fields: Values = {"kind": kind, "factor": rotary.get("factor"), "original_length": length}
    if kind == "llama3":
        fields |= {f"{which}_frequency": rotary.get(f"{which}_freq_factor") for which in ("low", "high")}
    return RotaryScaling(**fields)


def _windows(values: Values) -> Values:
    """Return the fields of the windows: one for all blocks, or one for each."""
    kind, layers, window = values["model_type"], values["num_hidden_layers"], values.get("sliding_window")
    if window is None or kind == "llama" or (kind == "qwen2" and not values.get("use_sliding_window")):
        return {"attention_window": None, "attention_windows": None}
    if kind == "mistral":
        return {"attention_window": window, "attention_windows": None}
    kinds = values.get("layer_types")
    if kinds is None:
        first = values.get("max_window_layers", layers)
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return {"attention_window": None, "attention_windows": windows}


# ------------------------------------------------------------------------------------------------------------- tensors


class _Mapping(NamedTuple):
    """Place of a tensor of the source: rows of a parameter, from ``first`` on."""

    source: str
    target: str
    first: int = 0


def _mappings(config: Phase2Config) -> Iterator[_Mapping]:
    """Yield where every tensor of the source goes."""
    yield _Mapping("model.embed_tokens.weight", "token_embedding.weight")
    query, key, hidden = config.num_heads, config.num_kv_heads or config.num_heads, config.ffn_width
    starts = {"q": 0, "k": query * config.head_dim, "v": (query + key) * config.head_dim}
    for i in range(config.n_layers):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        mixer = f"{ours}.attention" if i in config.attention_layers else f"{ours}.hebbian"
        yield _Mapping(f"{theirs}.input_layernorm.weight", f"{ours}.ln1.weight")
        for part in ("weight", "bias") if config.qkv_bias else ("weight",):
            for name, first in starts.items():
                yield _Mapping(f"{theirs}.self_attn.{name}_proj.{part}", f"{mixer}.qkv_proj.{part}", first)
        yield _Mapping(f"{theirs}.self_attn.o_proj.weight", f"{mixer}.out_proj.weight")
        yield _Mapping(f"{theirs}.post_attention_layernorm.weight", f"{ours}.ln2.weight")
        yield _Mapping(f"{theirs}.mlp.gate_proj.weight", f"{ours}.ffn.in_proj.weight")
        yield _Mapping(f"{theirs}.mlp.up_proj.weight", f"{ours}.ffn.in_proj.weight", hidden)
        yield _Mapping(f"{theirs}.mlp.down_proj.weight", f"{ours}.ffn.out_proj.weight")
    yield _Mapping("model.norm.weight", "ln_f.weight")
    if not config.tie_embeddings:
        yield _Mapping("lm_head.weight", "lm_head.weight")


def tensor_rows(model: Phase2IntegratedModel) -> Iterator[tuple[str, str, slice]]:
    """Yield Transformers' name of each tensor, the parameter that holds it, and its rows in there."""
    mappings = list(_mappings(model.config))
    for mapping, following in zip(mappings, [*mappings[1:], None], strict=True):
        rows = model.get_parameter(mapping.target).shape[0]
        last = following.first if following is not None and following.target == mapping.target else rows
        yield mapping.source, mapping.target, slice(mapping.first, last)


def _without_memory(config: Phase2Config, source: Source) -> Phase2IntegratedModel:
    """Return a model on the meta device: sizes that no tensor has need no memory.

    Raises:
        CheckpointError: the product of two sizes is no size.
    """
    try:
        with torch.device("meta"):
            return Phase2IntegratedModel(config, init=False)
    except RuntimeError as error:
        raise CheckpointError(f"{source.name} does not hold the model of its configuration: {error}") from error


def _read(source: Source, name: str) -> Tensor:
    """Read a tensor.

    Raises:
        CheckpointError: it has other numbers than floating-point ones, or some that are not finite.
    """
    x = source.read(name)
    if x.dtype not in _DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise CheckpointError(
            f"{name} in {source.name} is {str(x.dtype).removeprefix('torch.')}, not one of {known}: save the model "
            "with weights that are not quantised"
        )
    if not x.isfinite().all():
        raise CheckpointError(f"{name} in {source.name} has values that are not finite: copy the model again")
    return x


def _check_tensors(source: Source, model: Phase2IntegratedModel, mappings: list[_Mapping]) -> None:
    """Check that the source has the tensors of its configuration, and no other.

    Raises:
        CheckpointError: names the tensors that are missing, have no place, or do not fill theirs.
    """
    wanted = {mapping.source for mapping in mappings}
    head = {"lm_head.weight"} if model.tied else set[str]()
    other = {name for name in source.shapes if not name.endswith(_RECOMPUTED)} - wanted - head
    faults = [f"{name} is missing" for name in sorted(wanted - source.shapes.keys())]
    faults += [f"{name} has no place in a model of this configuration" for name in sorted(other)]
    filled = dict[str, int]()
    for mapping in mappings:
        shape, target = source.shapes.get(mapping.source), model.get_parameter(mapping.target).shape
        if shape is not None and (shape[1:] != target[1:] or filled.get(mapping.target, 0) != mapping.first):
            faults.append(f"{mapping.source} has the shape {tuple(shape)}, which does not fit the configuration")
        elif shape is not None:
            filled[mapping.target] = mapping.first + shape[0]
    if not faults:
        short = [name for name, rows in filled.items() if rows != model.get_parameter(name).shape[0]]
        faults += [f"{name} has {model.get_parameter(name).shape[0]} rows, its source {filled[name]}" for name in short]
    if faults:
        rest = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"{source.name} does not hold the model of its configuration: {'; '.join(faults[:5])}{rest}"
        )


def _slow_memories(model: Phase2IntegratedModel) -> None:
    """Let the memories decay slowly, whatever the token: attention forgets nothing."""
    for block in blocks_of(model):
        if block.hebbian is not None and block.dissipative_bk is not None:
            potential = block.dissipative_bk.potential
            slowest = max(1 / model.n_seq, 2 * potential.least_decay * potential.dt)
            spread = torch.linspace(0, 1, potential.num_heads, dtype=torch.float64)
            potential.set_decays(slowest * (max(slowest, _FASTEST_DECAY) / slowest) ** spread)
            if potential.gamma_proj is not None:
                potential.gamma_proj.weight.zero_()
            if block.hebbian.rotation_proj is not None:
                block.hebbian.rotation_proj.weight.zero_()


def _report(model: Phase2IntegratedModel, mappings: list[_Mapping], *, exact: bool) -> ConversionReport:
    sources = dict[str, list[str]]()
    for mapping in mappings:
        sources.setdefault(mapping.target, []).append(mapping.source)
    tensors = [
        ConvertedTensor("copied" if name in sources else "new", name, tuple(x.shape), tuple(sources.get(name, ())))
        for name, x in model.named_parameters()
    ]
    return ConversionReport(tuple(tensors), exact=exact)
