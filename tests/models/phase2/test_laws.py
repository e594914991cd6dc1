"""The laws of the state: one forward = any split = token by token; packed = padded = separate; causality."""

import pytest
import torch

from resolvent import Phase2State

from .conftest import small_model

LENGTHS = (1, 63, 64, 65, 1000)


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
        dict(conv_size=1),
        dict(output_gate=False),
        dict(output_norm=False),
        dict(snr_enabled=False),
        dict(resonance_enabled=False),
        dict(snr_enabled=False, resonance_enabled=False),
        dict(memory_feedback=False),
        dict(adaptive_decay=False),
        dict(consolidation_interval=128),
        dict(zeta_embedding_trainable=True),
        dict(ar_ssm_rank=5),
        dict(htt_rank=6),
        dict(tie_embeddings=True),
    ],
)
def test_the_law_holds_for_every_switch(options):
    model, ids = small_model(**options), tokens(200)
    assert_same(streamed(model, ids, [50, 1, 80, 69])[0], model(ids))


@torch.no_grad()
def test_packed_is_separate(model):
    lengths = [5, 64, 1, 200, 130]
    ids = tokens(sum(lengths), batch=1)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packed, state = model(ids, cu_seqlens=offsets, return_state=True)
    for i, length in enumerate(lengths):
        alone, last = model(ids[:, offsets[i] : offsets[i] + length], return_state=True)
        assert_same(packed[:, offsets[i] : offsets[i + 1]], alone)
        assert_same(state[[i]].layers[1].memory.memory, last.layers[1].memory.memory)
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
    for row in range(4):
        kept = mask[row].bool()
        assert_same(logits[row, kept], model(ids[row : row + 1, kept])[0])
    generated = model.generate(ids, 5, attention_mask=mask, temperature=0)
    for row in range(4):
        alone = model.generate(ids[row : row + 1, mask[row].bool()], 5, temperature=0)
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


def test_gradients_flow_through_the_state(model):
    ids = tokens(130)
    loss = model(ids)[:, -1].square().sum()
    whole = torch.autograd.grad(loss, model.token_embedding.weight)[0]
    _, state = model(ids[:, :70], return_state=True)
    split = torch.autograd.grad(model(ids[:, 70:], state=state)[:, -1].square().sum(), model.token_embedding.weight)[0]
    torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-3 * whole.abs().max().item())
    cut = torch.autograd.grad(
        model(ids[:, 70:], state=state.detach())[:, -1].square().sum(), model.token_embedding.weight
    )[0]
    assert (cut - whole).norm() > 1e-2 * whole.norm()


def test_early_tokens_reach_the_last_loss_of_a_fresh_model():
    from resolvent import create_phase2_model

    model = create_phase2_model(preset="small", vocab_size=500, device="cpu").eval()
    ids = torch.randint(0, 500, (1, 512))
    other = ids.clone()
    other[:, :256] = torch.randint(0, 500, (1, 256))
    with torch.no_grad():
        a, b = model(ids)[:, -1], model(other)[:, -1]
    assert (a - b).norm() / a.norm() > 1e-2
    embedded = model.token_embedding(ids).detach().requires_grad_()
    model.token_embedding.forward = lambda _: embedded
    model(ids)[:, -1].square().sum().backward()
    norms = embedded.grad[0].norm(dim=-1)
    assert norms[0] > 1e-4 * norms[-1]


@torch.no_grad()
def test_states_are_indexed_repeated_moved_and_saved(model, tmp_path):
    ids = tokens(70, batch=3)
    _, state = model(ids, return_state=True)
    more = tokens(10, batch=3)
    expected = model(more, state=state)
    order = [2, 0]
    assert_same(model(more[order], state=state[order]), expected[order])
    twice = state.repeat(2)
    assert len(twice) == 6
    assert_same(model(more.repeat_interleave(2, 0), state=twice)[1], expected[0])
    state.save(tmp_path / "state.safetensors")
    loaded = Phase2State.load(tmp_path / "state.safetensors")
    assert torch.equal(model(more, state=loaded), expected)
    assert torch.equal(model(more, state=state.to("cpu")), expected)
    # position 8, g 3 x 8, S and ΔS 2 x 3 x 16 x 16 x 4, Γ̄ 3 x 4, conv tail 3 x 144 x 4
    assert state.nbytes == 3 * (8 + 3 * (3 * 8 + 2 * 3 * 16 * 16 * 4 + 3 * 4 + 3 * 144 * 4))


@torch.no_grad()
def test_calls_leave_nothing_behind(model):
    ids = tokens(90)
    first = model(ids)
    model(tokens(33))
    assert torch.equal(model(ids), first)
