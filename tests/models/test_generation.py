import copy

import pytest
import torch

from resolvent import create_phase2_model
from resolvent.errors import ResolventError
from resolvent.models.decoding import read_token
from resolvent.models.generation import sample
from resolvent.models.reading import PIECE


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_phase2_model(
        vocab_size=50, d_model=32, n_layers=2, n_seq=32, num_heads=2, head_dim=16, dropout=0.3, device="cpu"
    )


def test_greedy_generation_equals_argmax(model):
    prompt = torch.randint(0, 50, (2, 7))
    out = model.generate(prompt, 20, temperature=0)
    logits = model.eval()(out[:, :-1])
    assert torch.equal(out[:, 7:], logits.argmax(-1)[:, 6:])


def test_stream_equals_generate_and_keeps_the_mode(model):
    model.train()
    prompt = torch.randint(0, 50, (2, 7))
    seed = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    streamed = torch.stack(list(model.stream(prompt, 10, generator=seed())), dim=1)
    assert torch.equal(streamed, model.generate(prompt, 10, generator=seed())[:, 7:])
    assert model.training
    assert not torch.equal(streamed, model.generate(prompt, 10, generator=torch.Generator().manual_seed(6))[:, 7:])


def test_prompt_in_pieces_equals_one_forward(model):
    prompt = torch.randint(0, 50, (1, PIECE + 70))
    out = model.generate(prompt, 1, temperature=0)
    assert out[0, -1] == model.eval()(prompt)[0, -1].argmax()


def test_mask_without_padding_equals_no_mask(model, monkeypatch):
    prompt, read = torch.randint(0, 50, (1, PIECE + 70)), []
    hidden_states = model.hidden_states

    def reading(ids, **more):
        read.append(ids.shape[1])
        return hidden_states(ids, **more)

    monkeypatch.setattr(model, "hidden_states", reading)
    out = model.generate(prompt, 1, temperature=0, attention_mask=torch.ones_like(prompt))
    assert read == [PIECE, 70]
    assert torch.equal(out, model.generate(prompt, 1, temperature=0))
    with pytest.raises(ValueError, match="attention_mask"):
        model.generate(prompt, 1, attention_mask=torch.ones(1, 5))


def test_logits_of_one_token_have_the_dtype_of_a_text(model):
    model = copy.deepcopy(model).double().eval()
    prompt = torch.randint(0, 50, (2, 9))
    (hidden, state), whole = model.hidden_states(prompt[:, :-1]), model(prompt)
    logits, _ = read_token(model, prompt[:, -1], state)
    assert hidden.dtype == logits.dtype == torch.float64
    torch.testing.assert_close(logits, whole[:, -1], rtol=1e-10, atol=1e-10)


def test_state_continues_a_text(model):
    model.eval()
    prompt = torch.randint(0, 50, (1, 30))
    _, state = model(prompt[:, :20], return_state=True)
    assert torch.equal(
        model.generate(prompt[:, 20:], 8, temperature=0, state=state)[:, 10:],
        model.generate(prompt, 8, temperature=0)[:, 30:],
    )


def test_generation_stops_when_all_sequences_have_ended(model):
    prompt = torch.randint(0, 50, (2, 5))
    free = model.generate(prompt, 30, temperature=0)[:, 5:]
    eos = int(free[0, 3])
    out = model.generate(prompt, 30, temperature=0, eos_token_id=eos)[:, 5:]
    end = int((out[0] == eos).nonzero()[0])
    assert (out[0, end:] == eos).all()
    other = (free[1] == eos).nonzero()
    assert out.shape[1] == (max(end, int(other[0])) + 1 if len(other) else 30)


def test_several_tokens_end_a_sequence_each_with_its_own(model):
    prompt = torch.randint(0, 50, (2, 5))
    free = model.generate(prompt, 30, temperature=0)[:, 5:]
    ends = {int(free[0, 3]), int(free[1, 5])}
    out = model.generate(prompt, 30, temperature=0, eos_token_id=ends)[:, 5:]
    for row, text in zip(out.tolist(), free.tolist(), strict=True):
        end = next(i for i, token in enumerate(text) if token in ends)
        assert row[: end + 1] == text[: end + 1] and set(row[end:]) == {text[end]}


def test_zero_new_tokens_return_the_prompt(model):
    prompt = torch.randint(0, 50, (2, 5))
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_top_k_and_top_p_keep_the_likeliest_tokens():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    assert set(sample(logits, top_k=2).tolist()) == {0, 1}
    assert set(sample(logits, top_p=0.75).tolist()) == {0, 1}
    assert set(sample(logits, top_p=0.81).tolist()) == {0, 1, 2}
    assert set(sample(logits, top_p=0.1).tolist()) == {0}
    assert set(sample(logits, temperature=0).tolist()) == {0}
    assert set(sample(logits, temperature=1e-39).tolist()) == {0}
    counts = torch.bincount(sample(logits), minlength=4) / 4000
    torch.testing.assert_close(counts, logits[0].exp(), rtol=0, atol=0.04)
    hot = torch.bincount(sample(logits, temperature=5.0), minlength=4) / 4000
    assert hot[3] > 0.12


@pytest.mark.parametrize(
    "options", [dict(temperature=-1), dict(temperature=float("inf")), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)]
)
def test_error_names_options_out_of_range(model, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        model.generate(torch.zeros(1, 3, dtype=torch.long), 2, **options)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.stream(torch.zeros(1, 3, dtype=torch.long), -1)  # raised before the first token


@pytest.mark.parametrize("prompt", [[[1, 2]], torch.tensor([1, 2]), torch.tensor([[50]]), torch.tensor([[0.5]])])
def test_prompt_outside_the_vocabulary_is_refused_before_reading(model, prompt):
    with pytest.raises(ValueError, match=r"input_ids must|outside the vocabulary"):
        model.stream(prompt, 3)


SMALLEST = 5e-324
"""Smallest positive float; it is 0 in float32."""


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-46, SMALLEST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_smallest_temperature_equals_argmax(temperature, dtype):
    logits = torch.tensor([[0.5, -3.0, 0.75, 0.7], [-1e30, 2e-3, 1e-3, -torch.inf]]).to(dtype)
    assert sample(logits.repeat(50, 1), temperature=temperature).tolist() == [2, 1] * 50
    assert sample(logits, temperature=temperature, top_k=1, top_p=SMALLEST).tolist() == [2, 1]


@pytest.mark.parametrize("temperature", [1e38, 1e39, 1.7e308])
def test_largest_temperature_draws_all_but_excluded_tokens(temperature):
    logits = torch.tensor([[0.5, -3e4, -torch.inf, 3e38]]).expand(300, -1)
    assert set(sample(logits, temperature=temperature).tolist()) == {0, 1, 3}


@pytest.mark.parametrize("top_p", [SMALLEST, 1e-46, 1e-8])
def test_smallest_top_p_equals_argmax(top_p):
    logits = torch.tensor([[0.0, 1.0, 0.9]]).expand(100, -1)
    assert set(sample(logits, top_p=top_p).tolist()) == {1}


def test_limits_beyond_the_vocabulary_keep_all_tokens():
    logits = torch.zeros(300, 3)
    for options in (dict(top_k=2**70), dict(top_p=1.0), dict(top_p=1 - 1e-16)):
        assert set(sample(logits, **options).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("options", [dict(temperature=0), {}, dict(top_k=2), dict(top_p=0.5)], ids=str)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_nonfinite_logits_raise(options, value):
    logits = torch.randn(3, 4)
    logits[1] = float(value)
    with pytest.raises(ResolventError, match=f"largest logit of row 1 is {value}: the weights or the state"):
        sample(logits, **options)
    logits[1, 2] = -torch.inf
    with pytest.raises(ResolventError, match="row 1"):
        sample(logits, **options)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_nonfinite_weights_raise(model, temperature):
    broken = copy.deepcopy(model)
    broken.ln_f.weight.data[3] = torch.nan
    with pytest.raises(ResolventError, match="row 0 is nan"):
        broken.generate(torch.zeros(2, 3, dtype=torch.long), 5, temperature=temperature)


@pytest.mark.parametrize("top_k", [2.5, float("nan"), "3"])
def test_top_k_must_be_an_integer(model, top_k):
    with pytest.raises(ValueError, match="top_k must be an integer >= 1"):
        model.generate(torch.zeros(1, 3, dtype=torch.long), 2, top_k=top_k)
