"""Measure the host microseconds of a call of every operator with kernels: Python and the launcher, not the kernels.

On CUDA, a kernel of the sizes here ends before the next one is launched. Compare two trees on one machine:

    PYTHONPATH=OLD/src python scripts/launch_time.py old.json
    PYTHONPATH=NEW/src python scripts/launch_time.py new.json --against old.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from resolvent import ops
from resolvent.models.decoding import token_step
from resolvent.models.phase2 import Phase2Config
from resolvent.models.phase2.model import Phase2IntegratedModel
from resolvent.ops.queries_keys_values import queries_keys_values

HEADS, WIDTH = 2, 64
CALLS, REPEATS = 30, 15

Run = Callable[..., Any]


def cases(device: torch.device) -> Iterator[tuple[str, Run, list[Tensor]]]:
    """Yield a name, an operator and its differentiable inputs."""

    def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    offsets = torch.tensor([0, 5, 64])
    for mechanisms in ("plain", "consolidated"):
        rule = _rule(device) if mechanisms == "consolidated" else None
        for layout, length in (("rectangle", 64), ("packed", 64), ("segments", 2048), ("one token", 1)):
            tokens = [on_device(1, length, HEADS, WIDTH, dtype=torch.bfloat16) for _ in range(3)]
            decay, eta = torch.rand(1, length, HEADS, device=device), torch.rand(HEADS, device=device)
            cu_seqlens, sequences = (offsets, 2) if layout == "packed" else (None, 1)
            matrices = on_device(2, sequences, HEADS, WIDTH, WIDTH).unbind()
            state = ops.MemoryState(*matrices, torch.rand(sequences, HEADS, device=device))

            def memory(*x: Tensor, rule: Any = rule, state: Any = state, cu_seqlens: Any = cu_seqlens) -> Any:
                options = dict(initial_state=state, cu_seqlens=cu_seqlens, consolidation=rule, backend="triton")
                return ops.dissipative_memory(*x, **options)[0]

            yield f"memory, {mechanisms}, {layout}", memory, [*tokens, decay, eta]

    for layout, length in (("rectangle", 64), ("packed", 64), ("segments", 2**14), ("two-sided", 64)):
        alpha = torch.complex(on_device(1, length, HEADS), -torch.rand(1, length, HEADS, device=device))
        form = "two_sided" if layout == "two-sided" else "causal"

        def resolvent(alpha: Tensor, coupling: Tensor, form: Any = form, packed: bool = layout == "packed") -> Any:
            options = dict(form=form, cu_seqlens=offsets if packed else None, backend="triton")
            return torch.view_as_real(ops.resolvent_diagonal(alpha, coupling, **options)[0])

        yield f"BK-Core, {layout}", resolvent, [alpha, torch.rand(HEADS, device=device)]

    projected, weight = on_device(1, 64, 3 * HEADS * WIDTH), on_device(4, 3 * HEADS * WIDTH)

    def heads(projected: Tensor, weight: Tensor) -> Any:
        tail = projected.new_zeros(1, 3, projected.shape[-1])
        return torch.cat(queries_keys_values(projected, weight, tail, HEADS, backend="triton")[:3])

    yield "queries, keys, values", heads, [projected, weight]

    def prefix_sum(gates: Tensor, values: Tensor) -> Any:
        return ops.gated_prefix_sum(gates, values)[0]

    yield "prefix sum", prefix_sum, [torch.rand(1, 64, 16, device=device), on_device(1, 64, 16)]

    labels = torch.randint(257, (64,), device=device)

    def loss(hidden: Tensor, weight: Tensor) -> Any:
        return ops.linear_cross_entropy(hidden, weight, labels, backend="triton")

    yield "loss", loss, [on_device(64, WIDTH), on_device(257, WIDTH)]


def _rule(device: torch.device) -> ops.Consolidation:
    strength, sharpness, bias = torch.rand(3, HEADS, device=device).unbind()
    snr = ops.SNRFilter(2.0, 0.5, 2.0, 1.5, strength)
    return ops.Consolidation(64, snr, ops.Resonance(torch.eye(WIDTH, device=device), 0.1, sharpness, bias))


def decode(device: torch.device) -> Run:
    """Return a step of one token through a model of two blocks."""
    config = Phase2Config(vocab_size=257, d_model=128, n_layers=2, num_heads=HEADS, head_dim=WIDTH, dropout=0.0)
    model = Phase2IntegratedModel(config).eval().to(device)
    with torch.no_grad():
        _, state = model(torch.zeros(1, 9, dtype=torch.int64, device=device), return_state=True)
    model.config.backend = "triton"
    step, token = token_step(model, state), torch.zeros(1, dtype=torch.int64, device=device)
    return lambda: step(token)


def microseconds(prepare: Callable[[], Run], synchronize: Callable[[], None]) -> float:
    """Return the median, over repeats, of the time of a call of what ``prepare`` returns."""
    times = []
    for _ in range(REPEATS + 2):
        runs = [prepare() for _ in range(CALLS)]
        synchronize()
        start = time.perf_counter()
        for run in runs:
            run()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
        synchronize()
    return statistics.median(times[2:])


def measure(device: torch.device, synchronize: Callable[[], None]) -> dict[str, float]:
    """Return the microseconds of every case, forward, and backward where there is a gradient."""
    found = {}

    def record(name: str, prepare: Callable[[], Run], enabled: bool) -> None:
        with torch.set_grad_enabled(enabled):
            found[name] = microseconds(prepare, synchronize)
        print(f"{name:48} {found[name]:8.1f} us", flush=True)

    for name, operator, inputs in cases(device):
        record(f"{name}, forward", lambda operator=operator, inputs=inputs: lambda: operator(*inputs), False)
        leaves = [x.detach().requires_grad_() for x in inputs]
        record(f"{name}, forward for training", lambda run=operator, x=leaves: lambda: run(*x), True)

        def backward(operator: Run = operator, leaves: list[Tensor] = leaves) -> Run:
            output = operator(*leaves)
            upstream = torch.ones_like(output)
            return lambda: torch.autograd.grad(output, leaves, upstream)

        record(f"{name}, backward", backward, True)
    step = decode(device)
    record("decode, one token", lambda: step, False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", help="file to write the microseconds to")
    parser.add_argument("--against", help="file of another tree, for the ratios to it")
    arguments = parser.parse_args()
    found = measure(torch.device("cuda"), torch.cuda.synchronize)
    with open(arguments.json, "w") as file:
        json.dump(found, file, indent=1)
    if arguments.against:
        with open(arguments.against) as file:
            before = json.load(file)
        ratios = {name: found[name] / before[name] for name in found if name in before}
        print("\nratio to the other tree")
        for name, ratio in ratios.items():
            print(f"{name:48} {ratio:8.3f}")
        print(f"{'geometric mean':48} {statistics.geometric_mean(ratios.values()):8.3f}")


if __name__ == "__main__":
    main()
