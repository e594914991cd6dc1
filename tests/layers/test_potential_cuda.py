"""The layer of the BK-Core on the GPU."""

import pytest
import torch

from resolvent.layers.potential import DissipativeBKLayer, NonHermitianPotential

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("heads", [1, 4])
def test_the_layer_compiles_whole_and_keeps_its_gradients(heads):
    layer = DissipativeBKLayer(NonHermitianPotential(16, heads), backend="triton").cuda()
    projection = torch.nn.Linear(2 * heads, 16).cuda()
    parameters = [*layer.parameters(), *projection.parameters()]
    x = torch.randn(2, 100, 16, device="cuda")

    def loss(x):
        features, gamma, state = layer(x)
        return (projection(features) + x).square().sum() + gamma.sum() + torch.view_as_real(state).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    for _ in range(2):
        found = torch.autograd.grad(compiled(x), parameters)
    for ours, expected in zip(found, torch.autograd.grad(loss(x), parameters), strict=True):
        assert (ours - expected).norm() <= 1e-4 * expected.norm()
