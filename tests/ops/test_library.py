from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from resolvent.ops import library


class Pair(NamedTuple):
    """Two tensors, of which the second may be missing."""

    first: Tensor
    second: Tensor | None = None


def allocate(pair: Pair, factor: float, other: Tensor) -> Tensor:
    return torch.empty_like(pair.first)


def product(pair: Pair, factor: float, other: Tensor) -> Tensor:
    assert isinstance(pair, Pair)
    return factor * pair.first * other + (0 if pair.second is None else pair.second)


@pytest.fixture
def operator(monkeypatch):
    """``product`` as an operator of a library of its own, which does not outlive the test."""
    with torch.library._scoped_library("resolvent_test", "FRAGMENT") as scoped:
        monkeypatch.setattr(library, "_library", scoped)
        monkeypatch.setattr(library, "NAMESPACE", "resolvent_test")
        yield library.operator("product", allocate)(product)


def test_a_group_is_passed_field_by_field(operator):
    x, y = torch.randn(2, 3)
    assert str(operator._schema).startswith(
        "resolvent_test::product(Tensor pair_first, Tensor? pair_second, float factor, Tensor other)"
    )
    assert torch.equal(operator(*Pair(x, y), 2.0, y), 2 * x * y + y)
    assert torch.equal(operator(*Pair(x), 2.0, y), 2 * x * y)


def test_an_operator_with_groups_keeps_the_rules_of_torch_library(operator):
    x, y = torch.randn(2, 3)
    torch.library.opcheck(operator, (*Pair(x, y), 2.0, y))


def test_no_function_of_the_operators_has_more_than_15_parameters():
    """Triton's combine functions of a scan take every number of both operands: ``_join`` is one."""
    import ast
    from pathlib import Path

    root = Path(library.__file__).parent
    for path in [*root.rglob("*.py"), root.parent / "models" / "phase2" / "decode_kernels.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name != "_join":
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                assert len(parameters) <= 15, f"{path.name}: {node.name} has {len(parameters)}"
