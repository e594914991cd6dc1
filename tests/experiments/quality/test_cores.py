import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.quality.attention import WindowedAttention
from experiments.quality.cores import UnitLowerInverse, gated_delta_rule, gated_linear_attention
from experiments.quality.mixers import GLA, Attention, GatedDeltaNet, Mamba2, Mamba3, Mixer

LENGTHS = [1, 63, 64, 130]
MIXERS = {
    "attention": lambda: Attention(32, 2),
    "gla": lambda: GLA(32, 2),
    "mamba2": lambda: Mamba2(32, head_dim=16, state=8),
    "gated-deltanet": lambda: GatedDeltaNet(32, 2, expand=2),
    "windowed": lambda: WindowedAttention(32, 2, window=30),
    "mamba3": lambda: Mamba3(32, head_dim=16, state=8),
}


def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    state, outputs = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=torch.float64), []
    for t in range(q.shape[1]):
        state = log_decay[:, t].exp().unsqueeze(-1) * state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1)


def delta_rule_reference(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    state, outputs = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=torch.float64), []
    for t in range(q.shape[1]):
        state = log_decay[:, t, :, None, None].exp() * state
        held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        change = beta[:, t].unsqueeze(-1) * (v[:, t] - held)
        state = state + k[:, t].unsqueeze(-1) * change.unsqueeze(-2)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1)


def draw(length: int, *, keys: int = 6, values: int = 5) -> list[Tensor]:
    shapes = [(2, length, 3, keys), (2, length, 3, keys), (2, length, 3, values)]
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [q, F.normalize(k, dim=-1), v]


def check(core, reference, inputs: list[Tensor], rtol: float = 1e-9) -> None:
    """Outputs and all gradients agree."""
    weights = torch.randn_like(inputs[2])
    results = []
    for function in (core, reference):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        output = function(*leaves)
        (output * weights).sum().backward()
        results.append([output.detach(), *(x.grad for x in leaves)])
    for found, exact in zip(*results, strict=True):
        assert (found - exact).norm() <= rtol * exact.norm()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("strength", [0.01, 2.0], ids=["weak", "strong"])
def test_gated_linear_attention_is_its_recurrence(length: int, strength: float):
    inputs = draw(length)
    check(gated_linear_attention, linear_attention_reference, [*inputs, -strength * torch.rand_like(inputs[0])])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("strength", [0.01, 3.0], ids=["weak", "strong"])
def test_the_gated_delta_rule_is_its_recurrence(length: int, strength: float):
    inputs = draw(length)
    gates = torch.rand(2, *inputs[0].shape[:3], dtype=torch.float64)
    check(gated_delta_rule, delta_rule_reference, [*inputs, -strength * gates[0], gates[1]])


def test_equal_keys_replace_each_other_in_float32():
    """The hardest system to solve: with β = 1 each token reads what it wrote, whatever was there."""
    q, _, v = (x.float() for x in draw(128, keys=16))
    k = F.normalize(torch.ones_like(q), dim=-1)
    ones, zeros = torch.ones(2, *q.shape[:3])
    y = gated_delta_rule(k, k, v, 0 * zeros, ones)
    torch.testing.assert_close(y, v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 16])
def test_inverse_of_unit_lower_triangles(size: int):
    lower = torch.randn(3, 2, size, size, dtype=torch.float64).tril(-1).requires_grad_()
    exact = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + lower)
    torch.testing.assert_close(UnitLowerInverse.apply(lower), exact)
    weights = torch.randn_like(exact)
    found = torch.autograd.grad((UnitLowerInverse.apply(lower) * weights).sum(), lower)[0]
    expected = torch.autograd.grad((exact * weights).sum(), lower)[0].tril(-1)
    torch.testing.assert_close(found, expected)


def fresh(make) -> Mixer:
    mixer = make()
    with torch.no_grad():
        mixer.reset(torch.Generator().manual_seed(0))
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer.double()


@pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)
def test_mixers_are_causal_and_read_everything_before(make):
    mixer, x = fresh(make), torch.randn(1, 70, 32, dtype=torch.float64)
    changed = x.clone()
    changed[0, 40] += 1
    differs = (mixer(changed) - mixer(x)).abs().amax(-1)[0] > 1e-9
    reach = 30 + mixer.layer.conv_shape[0] if isinstance(mixer, WindowedAttention) else 30
    assert not differs[:40].any() and differs[40 : 40 + reach].all()


def test_attention_is_a_softmax_over_turned_keys():
    mixer, x = fresh(MIXERS["attention"]), torch.randn(1, 9, 32, dtype=torch.float64)
    q, k, v = mixer.qkv_proj(x)[0].unflatten(-1, (3, 2, 16)).permute(1, 2, 0, 3)
    angles = torch.arange(9.0).double()[:, None] * 10_000.0 ** -(torch.arange(0, 16, 2) / 16).double()

    def turned(y: Tensor) -> Tensor:
        z = torch.complex(y[..., :8], y[..., 8:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag], dim=-1)

    scores = turned(q) @ turned(k).mT / 4
    weights = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
    exact = mixer.out_proj((weights @ v).permute(1, 0, 2).flatten(1))
    torch.testing.assert_close(mixer(x)[0], exact, rtol=1e-5, atol=1e-5)


def test_mamba2_is_its_recurrence():
    mixer, x = fresh(MIXERS["mamba2"]), torch.randn(1, 70, 32, dtype=torch.float64)
    gate, mixed, dt = mixer.in_proj(x[0]).split([64, 80, 4], dim=-1)
    tail = F.pad(mixed, (0, 0, 3, 0))
    mixed = F.silu(sum(mixer.conv_weight[j] * tail[3 - j : 73 - j] for j in range(4)))
    values, keys, queries = mixed[:, :64].unflatten(-1, (4, 16)), mixed[:, 64:72], mixed[:, 72:]
    dt = F.softplus(dt + mixer.dt_bias)
    state, outputs = torch.zeros(4, 16, 8, dtype=torch.float64), []
    for t in range(70):
        keep = torch.exp(-dt[t] * mixer.log_a.exp())
        state = keep[:, None, None] * state + dt[t, :, None, None] * values[t].unsqueeze(-1) * keys[t]
        outputs.append(state @ queries[t] + mixer.skip[:, None] * values[t])
    y = torch.stack(outputs).flatten(1) * F.silu(gate)
    exact = mixer.out_proj(y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm_weight)
    torch.testing.assert_close(mixer(x)[0], exact, rtol=1e-9, atol=1e-9)


def test_mamba3_is_its_recurrence():
    mixer, x = fresh(MIXERS["mamba3"]), torch.randn(1, 70, 32, dtype=torch.float64)
    gate, v, k, q, dt, rate, mix, angle = mixer.in_proj(x[0]).split([64, 64, 8, 8, 4, 4, 4, 2], dim=-1)
    v, dt = v.unflatten(-1, (4, 16)), F.softplus(dt + mixer.dt_bias)
    alpha = torch.exp(-dt * F.softplus(rate).clamp(min=1e-4))
    turn = torch.polar(torch.ones(70, 4, 2).double(), -math.pi * angle.tanh()[:, None] * dt[..., None])

    def normed(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        return y[:, None] + bias.view(4, 8)

    k, q = normed(k, mixer.key_weight, mixer.key_bias), normed(q, mixer.query_weight, mixer.query_bias)

    def pairs(y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.complex(y[..., :2], y[..., 2:4]), y[..., 4:]

    turning = torch.zeros(4, 2, 16, dtype=torch.complex128)
    still, outputs = torch.zeros(4, 4, 16, dtype=torch.float64), []
    for t in range(70):
        keep, share = alpha[t, :, None, None], mix[t].sigmoid()
        before = max(t - 1, 0)
        late = ((1 - share) * dt[t])[:, None, None] * v[before, :, None] * (t > 0)
        new = (share * dt[t])[:, None, None] * v[t, :, None]
        (key, key_still), (old, old_still) = pairs(k[t]), pairs(k[before])
        turning = turn[t][..., None] * keep * (turning + old[..., None] * late) + key[..., None] * new
        still = keep * (still + old_still[..., None] * late) + key_still[..., None] * new
        query, query_still = pairs(q[t])
        read = (query.conj()[..., None] * turning).real.sum(1) + (query_still[..., None] * still).sum(1)
        outputs.append(read + mixer.skip[:, None] * v[t])
    y = torch.stack(outputs).flatten(1) * F.silu(gate)
    exact = mixer.out_proj(y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm_weight)
    torch.testing.assert_close(mixer(x)[0], exact, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS)
def test_mixers_compile_as_one_graph(make):
    mixer, x = fresh(make).float(), torch.randn(2, 70, 32)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (mixer, compiled):
        mixer.zero_grad()
        y = function(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in mixer.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()
    torch._dynamo.reset()


def test_state_bytes_are_those_of_what_is_carried():
    attention, gla, mamba, delta, windowed, turning = (make() for make in MIXERS.values())
    assert attention.state_bytes(10) == 4 * 10 * 2 * 32
    assert gla.state_bytes(10) == 4 * 2 * 8 * 16
    assert mamba.state_bytes(10) == 4 * (4 * 16 * 8 + 3 * 80)
    assert delta.state_bytes(10) == 4 * (2 * 16 * 32 + 3 * 128)
    assert turning.state_bytes(10) == 4 * (4 * 16 * 8 + 4 * (8 + 16)) + 8 * 4 * 2
    assert windowed.state_bytes(10) == 4 * (2 * 10 * 32 + 3 * 96)
    assert windowed.state_bytes(1000) == 4 * (2 * 30 * 32 + 3 * 96)
