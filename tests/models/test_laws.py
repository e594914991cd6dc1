"""Laws of both phases: one forward = any split = token by token; packed = padded = separate; causality; gradients."""

import pytest
import torch

from ..learning import next_token_loss
from .small import ATTENTION, FULL, HYBRID, PHASE1, PHASE2, tokens

LENGTHS = (1, 63, 64, 65, 1000)
SWITCHES = [
    (PHASE1, dict(ar_ssm_enabled=False)),
    (PHASE1, dict(ar_ssm_bounded=False)),
    (PHASE1, dict(htt_enabled=False)),
    (PHASE1, dict(htt_phase_encoding=False)),
    (PHASE1, dict(ffn_rank=5)),
    (PHASE1, dict(ar_ssm_enabled=False, htt_enabled=False)),
    (PHASE1, dict(use_gradient_checkpointing=False)),
    (PHASE2, dict(conv_size=1)),
    (PHASE2, dict(output_gate=False)),
    (PHASE2, dict(output_norm=False)),
    (PHASE2, dict(snr_enabled=False)),
    (PHASE2, dict(resonance_enabled=False)),
    (PHASE2, dict(snr_enabled=False, resonance_enabled=False)),
    (PHASE2, dict(memory_feedback=False)),
    (PHASE2, dict(adaptive_decay=False)),
    (PHASE2, dict(consolidation_interval=128)),
    (PHASE2, dict(zeta_embedding_trainable=True)),
    (PHASE2, dict(memory_rotation=True)),
    (PHASE2, dict(memory_rotation=True, memory_rotation_orders=(2, 3))),
    (PHASE2, dict(memory_rotation=True, snr_enabled=False, resonance_enabled=False)),
    (PHASE2, dict(ar_ssm_rank=5)),
    (PHASE2, dict(htt_rank=6)),
    (PHASE2, dict(tie_embeddings=True)),
    (HYBRID, dict(conv_size=1)),
    (HYBRID, dict(output_gate=False)),
    (HYBRID, dict(output_norm=False)),
    (HYBRID, dict(attention_window=1)),
    (HYBRID, dict(attention_window=1000)),
    (HYBRID, dict(attention_layers=(0, 2))),
    (HYBRID, dict(memory_feedback=False)),
]
STATES = [
    (PHASE1, {}),
    (PHASE1, dict(ar_ssm_enabled=False)),
    (PHASE2, {}),
    (PHASE2, dict(ar_ssm_rank=5)),
    (PHASE2, dict(memory_rotation=True, memory_rotation_orders=(2, 3))),
    (HYBRID, {}),
    (HYBRID, dict(ar_ssm_rank=5)),
    (ATTENTION, {}),
    (FULL, {}),
]
"""Models whose states consist of different parts."""
NAMES = {PHASE1: "phase1", PHASE2: "phase2", HYBRID: "hybrid", ATTENTION: "attention", FULL: "full"}


@pytest.fixture(params=NAMES, ids=NAMES.values())
def phase(request):
    return request.param


@pytest.fixture
def model(phase):
    return phase.model()


def say(value):
    """Return the name of a case: the phase and its options."""
    if isinstance(value, dict):
        return "-".join(f"{name}={option}" for name, option in value.items()) or "default"
    return NAMES.get(value, str(value))


def streamed(model, ids, splits):
    state, pieces = None, []
    for piece in ids.split(splits, dim=1):
        logits, state = model(piece, state=state, return_state=True)
        pieces.append(logits)
    return torch.cat(pieces, 1), state


def assert_same(found, expected):
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def assert_same_state(found, expected):
    assert torch.equal(found.position, expected.position)
    pairs = zip(found._tensors().values(), expected._tensors().values(), strict=True)
    for a, b in pairs:
        assert_same(a, b)


@torch.no_grad()
@pytest.mark.parametrize("phase", [PHASE1, PHASE2], ids=say)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_any_split_equals_one_forward(model, length, size):
    ids = tokens(length)
    whole, last = model(ids, return_state=True)
    found, state = streamed(model, ids, size)
    assert_same(found, whole)
    assert_same_state(state, last)
    assert torch.equal(state.position, torch.full((2,), length))


@torch.no_grad()
@pytest.mark.parametrize("phase", [HYBRID, ATTENTION, FULL], ids=say)
@pytest.mark.parametrize(("length", "size"), [(1, 1), (24, 1), (60, 1), (25, 7), (300, 24), (300, 100), (700, 256)])
def test_any_split_equals_one_forward_where_blocks_attend(model, length, size):
    ids = tokens(length)
    whole, last = model(ids, return_state=True)
    found, state = streamed(model, ids, size)
    assert_same(found, whole)
    assert_same_state(state, last)


@torch.no_grad()
@pytest.mark.parametrize(("phase", "options"), SWITCHES, ids=say)
def test_any_split_equals_one_forward_for_every_switch(phase, options):
    model, ids = phase.model(**options), tokens(200)
    assert_same(streamed(model, ids, [50, 1, 80, 69])[0], model(ids))


@torch.no_grad()
@pytest.mark.parametrize(("phase", "options"), STATES, ids=say)
def test_packed_equals_separate(phase, options):
    model, lengths = phase.model(**options), [5, 64, 1, 200, 130]
    ids = tokens(sum(lengths), batch=1)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packed, state = model(ids, cu_seqlens=offsets, return_state=True)
    for i, length in enumerate(lengths):
        alone, last = model(ids[:, offsets[i] : offsets[i] + length], return_state=True)
        assert_same(packed[:, offsets[i] : offsets[i + 1]], alone)
        assert_same_state(state[[i]], last)
    assert torch.equal(model(ids, cu_seqlens=offsets.int()), packed)
    more = tokens(7, batch=5)
    continued = model(more, state=state)
    rest = model(torch.cat([ids[:, offsets[3] : offsets[4]], more[3:4]], 1))
    assert_same(continued[3], rest[0, 200:])


@pytest.mark.parametrize(("phase", "options"), STATES, ids=say)
def test_empty_sequences_at_the_end_change_nothing(phase, options):
    model, ids = phase.model(**options), tokens(71, batch=1)
    results = []
    for offsets in ([0, 5, 70], [0, 5, 70, 70, 70]):
        model.zero_grad()
        loss, state = model(ids[:, :-1], labels=ids[:, 1:], cu_seqlens=torch.tensor(offsets), return_state=True)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([loss, *state[:2].tensors(), *gradients])
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


@torch.no_grad()
def test_padded_equals_single_on_either_side(model):
    ids = tokens(100, batch=4)
    mask = torch.ones(4, 100, dtype=torch.long)
    mask[0, :30] = 0
    mask[1, 70:] = 0
    mask[2, 0] = 0
    logits, state = model(ids, attention_mask=mask, return_state=True)
    assert torch.equal(state.position, mask.sum(1))
    generated = model.generate(ids, 5, attention_mask=mask, temperature=0)
    for row in range(4):
        kept = mask[row].bool()
        assert_same(logits[row, kept], model(ids[row : row + 1, kept])[0])
        alone = model.generate(ids[row : row + 1, kept], 5, temperature=0)
        assert torch.equal(generated[row, -5:], alone[0, -5:])


@torch.no_grad()
def test_no_token_changes_an_earlier_logit(model):
    ids = tokens(80, batch=1)
    before = model(ids)
    for place in range(1, 80):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 97
        after = model(changed)
        assert_same(after[:, :place], before[:, :place])
        assert (after[:, place] - before[:, place]).abs().max() > 1e-3


def test_gradient_through_the_state_equals_one_forward(model):
    ids = tokens(130)
    weight = next(model.token_embedding.parameters())

    def gradient(logits):
        return torch.autograd.grad(logits[:, -60:].square().sum(), weight)[0]

    whole = gradient(model(ids))
    _, state = model(ids[:, :70], return_state=True)
    split = gradient(model(ids[:, 70:], state=state))
    torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-3 * whole.abs().max().item())
    assert (gradient(model(ids[:, 70:], state=state.detach())) - whole).norm() > 2e-3 * whole.norm()


def test_gradients_match_finite_differences(model):
    """Compare the derivative of the loss along a random direction of all parameters, in float64."""
    model, ids = model.double(), tokens(130)
    next_token_loss(model, ids, penalty_weight=100).backward()
    direction = [torch.randn_like(p) for p in model.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction, strict=True)).item()

    @torch.no_grad()
    def moved(step):
        for p, d in zip(model.parameters(), direction, strict=True):
            p.add_(d, alpha=step)
        value = next_token_loss(model, ids, penalty_weight=100).item()
        for p, d in zip(model.parameters(), direction, strict=True):
            p.add_(d, alpha=-step)
        return value

    assert slope == pytest.approx((moved(1e-6) - moved(-1e-6)) / 2e-6, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("phase", "options"), STATES, ids=say)
def test_states_are_indexed_repeated_moved_and_saved(phase, options, tmp_path):
    model, ids = phase.model(**options), tokens(70, batch=3)
    _, state = model(ids, return_state=True)
    more = tokens(10, batch=3)
    expected = model(more, state=state)
    order = [2, 0]
    assert_same(model(more[order], state=state[order]), expected[order])
    twice = state.repeat(2)
    assert len(twice) == 6
    assert_same(model(more.repeat_interleave(2, 0), state=twice)[1], expected[0])
    state.save(tmp_path / "state.safetensors")
    loaded = phase.state.load(tmp_path / "state.safetensors")
    assert torch.equal(model(more, state=loaded), expected)
    assert torch.equal(model(more, state=state.to("cpu")), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("phase", "options", "size"),
    [
        (PHASE1, dict(ar_ssm_enabled=False), 3 * 8),  # g of 3 heads
        (PHASE1, {}, 3 * 8 + 8 * 8 + 2 * 48 * 4),  # ... the sum of 8 channels, the conv state of 2 tokens
        (PHASE2, dict(memory_rotation=True), 3 * 8 + 3 * 16 * 16 * 4 + 3 * 4 + 3 * 144 * 4 + 8 * 8),  # ... 8 phases
        (PHASE2, {}, 3 * 8 + 3 * 16 * 16 * 4 + 3 * 4 + 3 * 144 * 4),  # g; S; Γ̄; the conv state of 3 tokens
        (ATTENTION, {}, 3 * 8 + 3 * 144 * 4 + 2 * 24 * 48 * 4),  # g; the conv state; keys and values of 24 tokens
    ],
    ids=say,
)
def test_state_size_is_constant(phase, options, size):
    model = phase.model(**options)
    for length in (1, 70, 200):
        _, state = model(tokens(length, batch=3), return_state=True)
        assert state.nbytes == 3 * (8 + 3 * size)  # a position, and the size in each of 3 layers


@torch.no_grad()
@pytest.mark.slow
def test_state_of_a_hybrid_is_as_large_after_a_million_tokens():
    model = HYBRID.model(d_model=16, num_heads=1, attention_window=64)
    sizes, state = [], None
    for piece in tokens(1_000_000, batch=1).split(62_500, dim=1):
        _, state = model.hidden_states(piece, state=state)
        sizes.append(state.sizes)
    assert state.position.item() == 1_000_000 and sizes == 16 * [sizes[0]]
    memory, window = 4 * (16 * 16 + 1), 4 * 2 * 64 * 16  # S and Γ̄; keys and values of 64 tokens
    attending = len(model.config.attention_layers)
    assert sizes[0]["memory"] == (model.config.n_layers - attending) * memory
    assert sizes[0]["window"] == attending * window and sum(sizes[0].values()) == state.nbytes


@torch.no_grad()
def test_greedy_generation_equals_argmax(model):
    out = model.generate(tokens(7), 80, temperature=0)
    assert torch.equal(out[:, 7:], model(out[:, :-1]).argmax(-1)[:, 6:])


@torch.no_grad()
def test_calls_are_independent(model):
    ids = tokens(90)
    first = model(ids)
    model(tokens(33))
    assert torch.equal(model(ids), first)


@pytest.mark.parametrize(
    ("phase", "options"),
    [
        (PHASE1, dict(n_layers=2)),
        (PHASE1, dict(num_heads=2)),
        (PHASE1, dict(ar_ssm_max_rank=7)),
        (PHASE1, dict(ar_ssm_enabled=False)),
        (PHASE2, dict(n_layers=2)),
        (PHASE2, dict(num_heads=2)),
        (PHASE2, dict(head_dim=8)),
        (PHASE2, dict(conv_size=3)),
        (HYBRID, dict(attention_window=25)),
        (HYBRID, dict(attention_window=None)),
        (HYBRID, dict(attention_layers=(2,))),
        (HYBRID, dict(attention_layers=())),
    ],
    ids=say,
)
def test_state_of_another_model_is_refused(phase, options):
    model = phase.model()
    _, state = model(tokens(10, 2), return_state=True)
    with pytest.raises(ValueError, match="holds 2 sequences, the input has 3"):
        model(tokens(10, 3), state=state)
    with pytest.raises(ValueError, match="belongs to another model"):
        phase.model(**options)(tokens(10, 2), state=state)
