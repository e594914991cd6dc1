"""The laws of the state: one forward = any split = token by token; packed = padded = separate; causality."""

import pytest
import torch

from resolvent import Phase1State

from .conftest import small_model

LENGTHS = (1, 63, 64, 65, 500)


def tokens(length, batch=2):
    return torch.randint(0, 97, (batch, length))


def streamed(model, ids, splits):
    state, pieces = None, []
    for piece in ids.split(splits, dim=1):
        logits, state = model(piece, state=state, return_state=True)
        pieces.append(logits)
    return torch.cat(pieces, 1), state


def assert_same(found, expected):
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_any_split_is_the_whole(model, length, size):
    ids = tokens(length)
    whole, last = model(ids, return_state=True)
    found, state = streamed(model, ids, size)
    assert_same(found, whole)
    assert torch.equal(state.position, torch.full((2,), length))
    for a, b in zip(state._tensors().values(), last._tensors().values(), strict=True):
        assert_same(a, b) if b.is_floating_point() or b.is_complex() else None


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        dict(ar_ssm_enabled=False),
        dict(ar_ssm_bounded=False),
        dict(htt_enabled=False),
        dict(htt_phase_encoding=False),
        dict(ffn_rank=5),
        dict(ar_ssm_enabled=False, htt_enabled=False),
        dict(use_gradient_checkpointing=False),
    ],
)
def test_the_law_holds_for_every_switch(options):
    model, ids = small_model(**options), tokens(200)
    assert_same(streamed(model, ids, [50, 1, 80, 69])[0], model(ids))


@torch.no_grad()
@pytest.mark.parametrize("ar_ssm", [True, False])
def test_packed_is_separate(ar_ssm):
    model, lengths = small_model(ar_ssm_enabled=ar_ssm), [5, 64, 1, 200, 130]
    ids = tokens(sum(lengths), batch=1)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packed, state = model(ids, cu_seqlens=offsets, return_state=True)
    for i, length in enumerate(lengths):
        alone, last = model(ids[:, offsets[i] : offsets[i] + length], return_state=True)
        assert_same(packed[:, offsets[i] : offsets[i + 1]], alone)
        assert_same(state[[i]].layers[1].resolvent, last.layers[1].resolvent)
        if ar_ssm:
            assert_same(state[[i]].layers[1].ar_ssm.total, last.layers[1].ar_ssm.total)
    more = tokens(7, batch=5)
    continued = model(more, state=state)
    rest = model(torch.cat([ids[:, offsets[3] : offsets[4]], more[3:4]], 1))
    assert_same(continued[3], rest[0, 200:])


@torch.no_grad()
def test_padding_on_either_side_is_not_read(model):
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
    ids = tokens(50, batch=1)
    before = model(ids)
    for place in range(1, 50):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 97
        after = model(changed)
        assert_same(after[:, :place], before[:, :place])
        assert (after[:, place] - before[:, place]).abs().max() > 1e-3


def test_gradients_flow_through_the_state(model):
    ids = tokens(130)
    weight = model.token_embedding.core1

    def gradient(logits):
        return torch.autograd.grad(logits[:, -1].square().sum(), weight)[0]

    whole = gradient(model(ids))
    _, state = model(ids[:, :70], return_state=True)
    split = gradient(model(ids[:, 70:], state=state))
    torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-3 * whole.abs().max().item())
    assert (gradient(model(ids[:, 70:], state=state.detach())) - whole).norm() > 1e-2 * whole.norm()


@torch.no_grad()
@pytest.mark.parametrize("ar_ssm", [True, False])
def test_states_are_indexed_repeated_moved_and_saved(tmp_path, ar_ssm):
    model, ids = small_model(ar_ssm_enabled=ar_ssm), tokens(70, batch=3)
    _, state = model(ids, return_state=True)
    more = tokens(10, batch=3)
    expected = model(more, state=state)
    order = [2, 0]
    assert_same(model(more[order], state=state[order]), expected[order])
    twice = state.repeat(2)
    assert len(twice) == 6
    assert_same(model(more.repeat_interleave(2, 0), state=twice)[1], expected[0])
    state.save(tmp_path / "state.safetensors")
    loaded = Phase1State.load(tmp_path / "state.safetensors")
    assert torch.equal(model(more, state=loaded), expected)
    assert torch.equal(model(more, state=state.to("cpu")), expected)
    # position 8, g 3 x 8, sum 8 x 8, tail 2 x 48 x 4: whatever was read
    assert state.nbytes == 3 * (8 + 3 * (3 * 8 + ar_ssm * (8 * 8 + 2 * 48 * 4)))


@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_the_forward(model):
    out = model.generate(tokens(7), 80, temperature=0)
    assert torch.equal(out[:, 7:], model(out[:, :-1]).argmax(-1)[:, 6:])


def test_a_foreign_state_is_refused(model):
    _, state = model(tokens(10, 2), return_state=True)
    with pytest.raises(ValueError, match="holds 2 sequences, the input has 3"):
        model(tokens(10, 3), state=state)
    for options in (dict(n_layers=2), dict(num_heads=2), dict(ar_ssm_max_rank=7), dict(ar_ssm_enabled=False)):
        with pytest.raises(ValueError, match="belongs to another model"):
            small_model(**options)(tokens(10, 2), state=state)
