import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resolvent
from resolvent import ops
from resolvent.errors import ConfigError
from resolvent.ops import ReusedWindow, dispatch, dissipative_memory, local_attention_step, resolvent_diagonal
from resolvent.ops.gated_readout import gated_readout
from resolvent.ops.hebbian import memory_implementation
from resolvent.ops.memory_rotation import Rotation
from resolvent.ops.queries_keys_values import queries_keys_values
from resolvent.ops.rotated_heads import rotated_heads
from resolvent.ops.swiglu import swiglu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def fresh(monkeypatch):
    """No call is counted and no fallback is logged yet."""
    monkeypatch.setattr(dispatch, "calls", type(dispatch.calls)())
    monkeypatch.setattr(dispatch, "_announced", set())


def call(**options):
    alpha = torch.complex(torch.randn(1, 4, 2), -torch.ones(1, 4, 2))
    return resolvent_diagonal(alpha, torch.ones(2), **options)


def test_runs_are_counted(fresh):
    call()
    call(backend="torch")
    assert dispatch.calls == {("resolvent_diagonal", "torch"): 2}


def test_a_question_is_not_counted_as_a_run(fresh):
    """A query for the implementation, as of a model before it generates, does not change the counter."""
    assert memory_implementation("auto", CPU, torch.float32, 64) == "torch"
    assert dispatch.select("auto", CPU, "resolvent_diagonal") == "torch"
    with pytest.raises(ConfigError):
        memory_implementation("triton", CPU, torch.float64, 64)
    assert not dispatch.calls


def test_a_refused_call_is_not_counted(fresh):
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    with pytest.raises(ConfigError, match="dissipative_memory"):
        dissipative_memory(x, x, x, torch.rand(1, 3, 2), torch.ones(2), backend="triton")
    assert not dispatch.calls


@pytest.mark.skipif(not dispatch.interpreting(), reason="Triton compiles for the GPU here")
def test_every_operator_with_a_backend_has_kernels(fresh):
    x, labels = torch.randn(1, 3, 2, 16), torch.zeros(3, dtype=torch.int64)
    call(backend="triton")
    dissipative_memory(x, x, x, torch.rand(1, 3, 2), torch.ones(2), backend="triton")
    ops.gated_prefix_sum(x[:, :, 0], x[:, :, 1], backend="triton")
    ops.linear_cross_entropy(x[0, :, 0], x[0, :, 1], labels, backend="triton")
    gated_readout(x, x.flatten(-2), torch.ones(32), backend="triton")
    queries_keys_values(torch.randn(1, 3, 12), torch.ones(2, 12), torch.zeros(1, 1, 12), 2, backend="triton")
    rotation = Rotation.by(torch.zeros(1, 1, 1, dtype=torch.float64), torch.float32)
    rotated_heads(torch.randn(1, 3, 6), rotation, 1, 1, backend="triton")
    swiglu(torch.randn(3, 8), backend="triton")
    window = ReusedWindow(*torch.randn(2, 1, 4, 2, 16))
    local_attention_step(x[:, 0], x[:, 1], x[:, 2], 1.0, 4, window, labels[:1], backend="triton")
    source = "".join(path.read_text() for path in Path(ops.__file__).parent.glob("*.py"))
    selecting = set(re.findall(r'select\(backend, [\w.]+, "(\w+)"', source))
    selecting.remove("local_attention")  # its kernel is PyTorch's, which no interpreter runs
    assert selecting == {operator for operator, _ in dispatch.calls}
    assert {implementation for _, implementation in dispatch.calls} == {"triton"}


def test_auto_takes_kernels_on_cuda_and_torch_elsewhere():
    assert dispatch.select("auto", CUDA, "some_operator") == "triton"
    assert dispatch.select("auto", CPU, "some_operator") == "torch"
    assert dispatch.select("torch", CUDA, "some_operator") == "torch"
    assert dispatch.select("triton", CUDA, "some_operator") == "triton"


def test_an_unknown_backend_raises():
    with pytest.raises(ConfigError, match="must be one of auto, torch, triton, got 'jax'"):
        call(backend="jax")


def test_a_request_that_cannot_be_met_raises(monkeypatch):
    with pytest.raises(ConfigError, match="backend='triton' cannot run choosy: 9 is wide; use backend='auto'"):
        dispatch.select("triton", CUDA, "choosy", "9 is wide")
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: False)
    with pytest.raises(ConfigError, match="cannot run choosy: Triton is not installed"):
        dispatch.select("triton", CUDA, "choosy")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="backend='triton' cannot run resolvent_diagonal: the tensors are on cpu"):
        call(backend="triton")


def test_a_fallback_is_logged_once(fresh, caplog):
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert dispatch.select("auto", CUDA, "choosy", "9 is wide") == "torch"
    assert caplog.messages == ["running the torch implementation of choosy on cuda: 9 is wide"]
    assert dispatch.select("auto", CPU, "choosy", "10 is wide") == "torch"  # the choice for a CPU is no fallback
    assert len(caplog.messages) == 1


def test_triton_is_imported_by_the_first_launch():
    """Operators import their kernels, and Triton with them, when they launch one: not for torch code."""
    script = (
        "import sys, torch, resolvent.models\n"
        "from resolvent.ops import gated_prefix_sum\n"
        "gated_prefix_sum(torch.ones(1, 3, 2), torch.ones(1, 3, 2))\n"
        "assert not any(name.startswith('resolvent.ops.triton') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_operators_import_nothing_above_them():
    """``ops`` knows tensors and errors; and no file looks at where a function is defined."""
    root = Path(resolvent.__file__).parent
    for path in (root / "ops").rglob("*.py"):
        depth = len(path.relative_to(root).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level >= depth:
                assert node.module == "errors", f"{path.name} imports {node.module}"
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert not (node.module or "").startswith("resolvent"), f"{path.name} imports {node.module}"
    for path in root.rglob("*.py"):
        assert "__module__.startswith" not in path.read_text(), path
