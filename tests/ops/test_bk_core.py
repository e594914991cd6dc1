import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resolvent.ops import (
    dispatch,
    effective_diagonal,
    resolvent_diagonal,
    resolvent_diagonal_reference,
    resolvent_features,
    resolvent_step,
)

from .errors import relative

LENGTHS = (1, 2, 3, 63, 64, 65, 200)


def chain(length: int, heads: int = 3, batch: int = 2, damping: float = 0.05):
    """Random non-Hermitian chains: alpha complex128 (B, N, H) and couplings (H,)."""
    real = torch.randn(2, batch, length, heads, dtype=torch.float64)
    alpha = torch.complex(2 * real[0], -damping - 0.2 * real[1].abs())
    return alpha, torch.rand(heads, dtype=torch.float64) * 2


@pytest.mark.parametrize("form", ["causal", "two_sided"])
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_the_dense_inverse(form, length):
    alpha, coupling = chain(length)
    reference = resolvent_diagonal_reference(alpha, coupling, form)
    assert relative(resolvent_diagonal(alpha, coupling, form=form)[0], reference) <= 1e-10
    single = resolvent_diagonal(alpha.to(torch.complex64), coupling.float(), form=form)[0]
    assert single.dtype == torch.complex64
    assert relative(single, reference) <= 1e-5


@pytest.mark.parametrize("form", ["causal", "two_sided"])
def test_matches_the_dense_inverse_of_512_sites(form):
    alpha, coupling = chain(512, heads=1, batch=1)
    if form == "two_sided":
        reference = resolvent_diagonal_reference(alpha, coupling, form)
        sites = torch.arange(512)
    else:  # the reference inverts one block a site: look at some of them
        sites = torch.tensor([0, 1, 100, 255, 256, 400, 511])
        blocks = [resolvent_diagonal_reference(alpha[:, : i + 1], coupling, "two_sided")[:, -1] for i in sites]
        reference = torch.stack(blocks, dim=1)
    assert relative(resolvent_diagonal(alpha, coupling, form=form)[0][:, sites], reference) <= 1e-10
    single = resolvent_diagonal(alpha.to(torch.complex64), coupling.float(), form=form)[0][:, sites]
    assert relative(single, reference) <= 1e-5


def test_every_physical_quantity_gets_its_true_gradient():
    potential, gamma = torch.randn(2, 9, 3), torch.rand(2, 9, 3)
    per_head = [torch.rand(3), torch.randn(3), torch.rand(3) + 0.1, torch.rand(3), torch.rand(3)]
    inputs = [x.double().requires_grad_() for x in (potential, gamma, *per_head)]
    state = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)

    def causal(potential, gamma, kappa, energy, zeta, h0_super, h0_sub, state):
        alpha = effective_diagonal(potential, gamma, kappa, energy, zeta, h0_diag=-2.0)
        g, final = resolvent_diagonal(alpha, h0_super * h0_sub, initial_state=state)
        return torch.view_as_real(g), torch.view_as_real(final)

    def two_sided(potential, gamma, kappa, energy, zeta, h0_super, h0_sub):
        alpha = effective_diagonal(potential, gamma, kappa, energy, zeta)
        return torch.view_as_real(resolvent_diagonal(alpha, h0_super * h0_sub, form="two_sided")[0])

    assert torch.autograd.gradcheck(causal, (*inputs, state))
    assert torch.autograd.gradcheck(two_sided, inputs)


def test_gradients_in_single_precision():
    def gradients(dtype):
        alpha = chain_alpha.to(dtype).requires_grad_()
        coupling = chain_coupling.to(alpha.real.dtype).requires_grad_()
        g, state = resolvent_diagonal(alpha, coupling)
        loss = torch.view_as_real(g).square().sum() + torch.view_as_real(state).sum()
        return torch.autograd.grad(loss, (alpha, coupling))

    chain_alpha, chain_coupling = chain(1000)
    for single, double in zip(gradients(torch.complex64), gradients(torch.complex128), strict=True):
        assert relative(single, double) <= 1e-5


@pytest.mark.parametrize("splits", [[1] * 65, [64, 1], [1, 64], [30, 30, 5]])
def test_any_split_with_the_state_passed_on_is_the_whole(splits):
    alpha, coupling = chain(65)
    whole, last = resolvent_diagonal(alpha, coupling)
    pieces, state = [], None
    for piece in alpha.split(splits, dim=1):
        g, state = resolvent_diagonal(piece, coupling, initial_state=state)
        pieces.append(g)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


def test_features_are_the_two_parts_of_the_diagonal():
    alpha, coupling = chain(20)
    initial = torch.randn(2, 3, dtype=torch.complex128)
    g, last = resolvent_diagonal(alpha, coupling, initial_state=initial)
    features, state = resolvent_features(alpha, coupling, initial_state=initial)
    assert torch.equal(features, torch.cat([g.real, g.imag], -1))
    assert torch.equal(state, last)


def test_the_step_is_the_recurrence():
    alpha, coupling = chain(50)
    state, steps = torch.zeros_like(alpha[:, 0]), []
    for site in alpha.unbind(1):
        state = resolvent_step(site, coupling, state)
        steps.append(state)
    torch.testing.assert_close(torch.stack(steps, 1), resolvent_diagonal(alpha, coupling)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["causal", "two_sided"])
def test_packed_is_separate(form):
    lengths = [0, 5, 64, 1, 0, 130, 0]
    alpha, coupling = chain(sum(lengths), batch=1)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    states = torch.randn(len(lengths), 3, dtype=torch.complex128) if form == "causal" else None
    packed, final = resolvent_diagonal(alpha, coupling, initial_state=states, cu_seqlens=offsets, form=form)
    for i, length in enumerate(lengths):
        if length == 0:
            if form == "causal":
                assert torch.equal(final[i], states[i])
            continue
        span = slice(offsets[i], offsets[i + 1])
        state = states[i : i + 1] if form == "causal" else None
        alone, last = resolvent_diagonal(alpha[:, span], coupling, initial_state=state, form=form)
        torch.testing.assert_close(packed[:, span], alone, rtol=1e-10, atol=1e-10)
        if form == "causal":
            torch.testing.assert_close(final[i], last[0], rtol=1e-10, atol=1e-10)


def test_gradients_of_packed_states():
    alpha, coupling = chain(12, batch=1)
    alpha.requires_grad_()
    states = torch.randn(3, 3, dtype=torch.complex128, requires_grad=True)
    offsets = torch.tensor([0, 5, 5, 12])

    def run(alpha, coupling, states):
        outputs = resolvent_diagonal(alpha, coupling, initial_state=states, cu_seqlens=offsets)
        return tuple(torch.view_as_real(x) for x in outputs)

    assert torch.autograd.gradcheck(run, (alpha, coupling.requires_grad_(), states))


def test_the_causal_form_sees_no_later_site():
    alpha, coupling = chain(40)
    before = resolvent_diagonal(alpha, coupling)[0]
    for site in (1, 17, 39):
        changed = alpha.clone()
        changed[:, site] += 1
        after = resolvent_diagonal(changed, coupling)[0]
        torch.testing.assert_close(after[:, :site], before[:, :site], rtol=1e-12, atol=1e-12)
        assert (after[:, site] != before[:, site]).all()


extreme = st.floats(-1e30, 1e30, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-30)


@given(
    potentials=st.lists(st.one_of(st.floats(-3, 3), extreme), min_size=1, max_size=70),
    gamma=st.floats(0, 1e3),
    kappa=st.floats(0, 10),
    zeta=st.floats(1e-3, 10),
    coupling=st.floats(0, 100),
    form=st.sampled_from(["causal", "two_sided"]),
)
def test_bounded_by_construction(potentials, gamma, kappa, zeta, coupling, form):
    potential = torch.tensor(potentials, dtype=torch.float32).view(1, -1, 1)
    one = torch.ones(1)
    alpha = effective_diagonal(potential, one.expand_as(potential) * gamma, one * kappa, one * 0, one * zeta)
    g, _ = resolvent_diagonal(alpha, one * coupling, form=form)
    assert torch.view_as_real(g).isfinite().all()
    assert (g.abs() * (kappa * gamma + zeta) <= 1 + 1e-3).all()
    if form == "causal":
        assert (g.imag >= 0).all()


def test_a_hundred_thousand_sites_need_no_rescaling():
    potential = 3 * torch.randn(1, 100_000, 2)
    one = torch.ones(2)
    alpha = effective_diagonal(potential, torch.zeros_like(potential), one, 0 * one, 1e-3 * one)
    alpha.requires_grad_()
    g, _ = resolvent_diagonal(alpha, one)
    torch.view_as_real(g).sum().backward()
    assert torch.view_as_real(g).isfinite().all()
    assert torch.view_as_real(alpha.grad).isfinite().all()
    assert (g.abs() <= 1e3).all()


def test_non_finite_input_stays_visible():
    alpha, coupling = chain(8)
    alpha[0, 3, 0] = complex(float("nan"), -1)
    assert resolvent_diagonal(alpha, coupling)[0][0, 3, 0].isnan()


@pytest.mark.parametrize("form", ["causal", "two_sided"])
def test_an_empty_chain_has_an_empty_diagonal(form):
    alpha, coupling = chain(0)
    diagonal, _ = resolvent_diagonal(alpha, coupling, form=form)
    assert diagonal.shape == alpha.shape


def test_the_two_sided_form_is_two_causal_runs():
    """Whatever runs the causal form, the two-sided form is made of it in one place."""
    alpha, coupling = chain(9)
    before = dispatch.calls.copy()
    two_sided, state = resolvent_diagonal(alpha, coupling, form="two_sided")
    assert dispatch.calls - before == {("resolvent_diagonal", "torch"): 2}
    assert state is None
    left, right = (resolvent_diagonal(x, coupling)[0] for x in (alpha, alpha.flip(1)))
    neighbours = (
        torch.nn.functional.pad(left[:, :-1], (0, 0, 1, 0)),
        torch.nn.functional.pad(right[:, :-1], (0, 0, 1, 0)),
    )
    torch.testing.assert_close(two_sided, 1 / (alpha - coupling * neighbours[0] - coupling * neighbours[1].flip(1)))


def test_wrong_calls_are_named():
    alpha, coupling = chain(8)
    with pytest.raises(ValueError, match="form must be"):
        resolvent_diagonal(alpha, coupling, form="anti")
    with pytest.raises(ValueError, match="expected alpha"):
        resolvent_diagonal(alpha, coupling[:2])
    with pytest.raises(ValueError, match="takes no initial_state"):
        resolvent_diagonal(alpha, coupling, initial_state=alpha[:, 0], form="two_sided")
    with pytest.raises(ValueError, match=r"initial_state must have shape \(\d, \d\), got"):
        resolvent_diagonal(alpha, coupling, initial_state=alpha[:1, 0])
    with pytest.raises(ValueError, match="batch of one"):
        resolvent_diagonal(alpha, coupling, cu_seqlens=torch.tensor([0, 8]))
