"""Chains for the tests of the BK-Core's kernels, and what they are held to."""

import torch

from resolvent.ops import resolvent_diagonal

from ..errors import relative

WEAK, STRONG = 1e-2, 1.0


def chain(length, heads=3, batch=1, damping=WEAK, disorder=2.0):
    """Random non-Hermitian chains as float32 holds them: alpha complex128 (B, N, H) and couplings (H,).

    What disorder localises, a chain forgets after some ten sites. Without, it remembers some 1 / damping of them.
    """
    real = torch.randn(2, batch, length, heads)
    alpha = torch.complex(disorder * real[0], -damping * (1 + real[1].abs()))
    return alpha.to(torch.complex128), (0.2 + 1.8 * torch.rand(heads)).double()


def states(sequences, heads=3):
    """Values that a resolvent can take: in the upper half plane."""
    return torch.complex(torch.randn(sequences, heads), torch.rand(sequences, heads)).to(torch.complex128)


def run(alpha, coupling, initial_state=None, *, dtype=torch.complex64, **options):
    """Both results, then the gradients of a loss that reads both."""
    inputs = [alpha.to(dtype), coupling.to(dtype.to_real())]
    if initial_state is not None:
        inputs.append(initial_state.to(dtype))
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    state = inputs[2] if initial_state is not None else None
    results = [x for x in resolvent_diagonal(*inputs[:2], initial_state=state, **options) if x is not None]
    torch.manual_seed(1)  # the same loss whatever computes it
    # Weights with a mean: without, the gradient of a coupling is what random signs leave of a long sum.
    weights = [torch.randn_like(x, dtype=torch.complex128) + (1 + 1j) for x in results]
    loss = sum((weight * x).sum().real for weight, x in zip(weights, results, strict=True))
    return [x.detach() for x in results] + list(torch.autograd.grad(loss, inputs))


def check(alpha, coupling, initial_state=None, block_size=256, **options):
    """Hold the kernels' results to 1e-5 and their gradients to 1e-4 of what torch computes in complex128."""
    exact = run(alpha, coupling, initial_state, dtype=torch.complex128, backend="torch", **options)
    found = run(alpha, coupling, initial_state, backend="triton", block_size=block_size, **options)
    results = len(exact) - (2 if initial_state is None else 3)
    for i, (ours, reference) in enumerate(zip(found, exact, strict=True)):
        assert ours.shape == reference.shape
        assert relative(ours, reference) <= (1e-5 if i < results else 1e-4), i
