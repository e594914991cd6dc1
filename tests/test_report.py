"""docs/report.md speaks of code and tests that exist, leaves out nothing that the report names, and counts right."""

import ast
import fnmatch
import functools
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from resolvent import Phase2Config, Phase2IntegratedModel, get_phase2_preset
from resolvent.models.phase2.factory import convert_phase1_to_phase2, create_phase2_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/report.md").read_text(encoding="utf-8")
QUOTED = set(re.findall(r"`([^`\n]+)`", PAGE))
NAMES = sorted(text for text in QUOTED if re.fullmatch(r"(resolvent|src)(\.\w+)+", text))
DEFINITIONS = sorted(text for text in QUOTED if "::" in text)
COMMANDS = sorted(text.split()[1] for text in QUOTED if text.startswith("resolvent "))

FIELDS = (
    "phase1_config", "use_triton_bk", "triton_block_size", "base_decay", "adaptive_decay", "hebbian_eta", "hebbian_dt",
    "num_heads", "head_dim", "snr_threshold", "snr_gamma_boost", "snr_eta_boost", "resonance_enabled",
    "resonance_energy_threshold", "use_zeta_init", "zeta_embedding_trainable", "vocab_size", "d_model", "n_layers",
    "n_seq", "ffn_dim", "dropout", "target_vram_gb", "target_speedup_triton",
)  # fmt: skip
"""The report's fields of the configuration."""

TESTS = {
    "TestPhase2Config::test_default_config": 1,
    "TestPhase2Config::test_config_validation_valid": 1,
    "TestPhase2Config::test_config_validation_invalid_*": 3,
    "TestPhase2Config::test_config_to_dict": 1,
    "TestPhase2Config::test_config_from_dict": 1,
    "TestPresets::test_get_small_preset": 1,
    "TestPresets::test_get_base_preset": 1,
    "TestPresets::test_get_large_preset": 1,
    "TestPresets::test_get_invalid_preset": 1,
    "TestCreatePhase2Model::test_create_with_default_config": 1,
    "TestCreatePhase2Model::test_create_with_preset": 1,
    "TestCreatePhase2Model::test_create_with_custom_config": 1,
    "TestCreatePhase2Model::test_create_with_direct_params": 1,
    "TestCreatePhase2Model::test_model_has_all_components": 1,
    "TestCreatePhase2Model::test_model_forward_pass": 1,
    "TestCreatePhase2Model::test_model_forward_with_diagnostics": 1,
    "TestConvertPhase1ToPhase2::test_convert_simple_model": 1,
    "TestConvertPhase1ToPhase2::test_convert_with_weight_*": 3,
    "TestIntegration::test_create_and_train_step": 1,
    "TestIntegration::test_preset_models_parameter_count": 1,
}
"""The report's tests, as its log writes them, and how many each line stands for."""

SIGNATURES = {
    create_phase2_model: dict.fromkeys(("config", "preset", "vocab_size", "d_model", "n_layers", "n_seq", "device")),
    convert_phase1_to_phase2: dict(
        phase1_model=inspect.Parameter.empty,
        phase2_config=None,
        copy_compatible_weights=True,
        freeze_phase1_weights=False,
    ),
}
"""The report's functions, with the default of each argument."""


@functools.cache
def definitions(path: str) -> set[str]:
    """Functions and methods of a file, ``function`` or ``Class::method``."""
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    methods = {f"{c.name}::{node.name}" for c in classes for node in c.body if isinstance(node, ast.FunctionDef)}
    return methods | {node.name for node in body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves(name):
    pkgutil.resolve_name(name)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_every_test_and_demo_exists(definition):
    path, _, name = definition.partition("::")
    assert name in definitions(path)


def test_every_command_exists():
    from typer.main import get_command

    from resolvent.cli.app import app

    assert COMMANDS
    assert set(COMMANDS) <= get_command(app).commands.keys()


def test_every_field_of_the_report_is_there_with_its_default():
    row = r"^\| `resolvent\.models\.phase2\.config\.Phase2Config\.(\w+)` \| `([^`]+)` \| (?:met|open)"
    assert dict(re.findall(row, PAGE, re.MULTILINE)) == {name: repr(getattr(Phase2Config, name)) for name in FIELDS}


def test_all_24_tests_of_the_report_are_there():
    rows = re.findall(r"^\| `tests/test_phase2_factory\.py::(\S+)` \| (?:passed|failed) \|$", PAGE, re.MULTILINE)
    found = {pattern: len(fnmatch.filter(rows, pattern)) for pattern in TESTS}
    assert found == TESTS
    assert len(rows) == len(set(rows)) == 24


def test_all_demos_are_there():
    demos = {name for name in definitions("examples/phase2_factory_demo.py") if name.startswith("demo_")}
    assert len(demos) == 8
    section = PAGE.partition("\n## 7. ")[2].partition("\n## ")[0]
    assert set(re.findall(r"`examples/phase2_factory_demo\.py::(\w+)` \|$", section, re.MULTILINE)) == demos


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signatures_are_those_of_the_report(function):
    signature = inspect.signature(function)
    named = {p.name: p.default for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(named.items()) == list(SIGNATURES[function].items())
    assert signature.return_annotation is Phase2IntegratedModel


@pytest.mark.parametrize(("preset", "reported"), [("small", "~29M"), ("base", "~71M"), ("large", "~256M")])
def test_presets_are_counted(preset, reported):
    config = get_phase2_preset(preset)
    with torch.device("meta"):
        count = Phase2IntegratedModel(config).num_parameters()
    sizes = f"{config.d_model} | {config.n_layers} | {config.n_seq} | {config.target_vram_gb} GB"
    assert f"| {preset} | {sizes} | {reported} | {count:,} |" in PAGE


def test_the_conversion_of_the_dummy_is_counted():
    with torch.device("meta"):
        parts = (nn.Embedding(50257, 512), *(nn.Linear(512, 512) for _ in range(6)), nn.Linear(512, 50257))
        before = sum(p.numel() for part in parts for p in part.parameters())
        after = Phase2IntegratedModel(Phase2Config(n_layers=4)).num_parameters()
    assert f"{before:,} → {after:,}, {100 * (after / before - 1):+.1f} %" in PAGE
