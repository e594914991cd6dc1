import itertools

import pytest
import torch

from resolvent import create_phase2_model
from resolvent.models.sampling import Penalties, RowGenerators, RowSampler, Sampler, SamplingOptions

from .small import HYBRID, PHASE1, PHASE2, tokens

VARIED = [
    SamplingOptions(temperature=0),
    SamplingOptions(temperature=0.7, top_k=5),
    SamplingOptions(temperature=1.3, top_p=0.8),
    SamplingOptions(min_p=0.2, repetition_penalty=1.4),
    SamplingOptions(presence_penalty=1.5, frequency_penalty=0.5),
    SamplingOptions(top_k=20, top_p=0.9, min_p=0.01),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_phase2_model(
        vocab_size=50,
        d_model=32,
        n_layers=2,
        n_seq=32,
        num_heads=2,
        head_dim=16,
        consolidation_interval=64,
        device="cpu",
    )


def sampler_of(options, seeds, vocabulary=30):
    penalised = [(o, torch.tensor([seed])) for o, seed in zip(options, seeds, strict=True) if o.penalises]
    penalties = Penalties(*zip(*penalised, strict=True), vocabulary, torch.device("cpu")) if penalised else None
    return RowSampler(options, RowGenerators.of_seeds(seeds), penalties)


def test_row_with_own_options_equals_sampling_alone():
    seeds, logits = range(len(VARIED)), 3 * torch.randn(20, len(VARIED), 30)
    together, alone = sampler_of(VARIED, seeds), [sampler_of([o], [s]) for o, s in zip(VARIED, seeds, strict=True)]
    for step in logits:
        expected = torch.cat([sampler(step[[row]]).token for row, sampler in enumerate(alone)])
        assert torch.equal(together(step).token, expected)


def test_sequences_join_and_leave_a_sampler():
    seeds, logits = list(range(len(VARIED))), 3 * torch.randn(9, len(VARIED), 30)
    whole, part = sampler_of(VARIED, seeds), sampler_of(VARIED[:3], seeds[:3])
    expected = torch.stack([whole(step).token for step in logits])
    for step, tokens_ in zip(logits[:3, :3], expected[:3, :3], strict=True):
        assert torch.equal(part(step).token, tokens_)
    late = sampler_of(VARIED[3:], seeds[3:])
    for step in logits[:3, 3:]:
        late(step)
    joined = RowSampler.cat([part, late])
    assert torch.equal(joined(logits[3]).token, expected[3])
    rows = [5, 1, 3]
    left = joined[rows]
    for step, tokens_ in zip(logits[4:], expected[4:], strict=True):
        assert torch.equal(left(step[rows]).token, tokens_[rows])


def test_sampler_without_penalties_joins_one_with():
    plain = sampler_of([SamplingOptions(temperature=0)], [0])
    penalised = sampler_of([SamplingOptions(temperature=0, presence_penalty=2.0)], [1])
    both = RowSampler.cat([plain, penalised])
    logits = torch.zeros(2, 30).index_fill(1, torch.tensor([4]), 1.0).index_fill(1, torch.tensor([7]), 0.5)
    assert both(logits).token.tolist() == [4, 4]
    assert both(logits).token.tolist() == [4, 7]


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]).log().expand(6000, -1)
    sampler = Sampler([SamplingOptions()] * 6000, RowGenerators.of_seeds(range(6000)), None)
    counts = torch.bincount(sampler(logits).token, minlength=5) / 6000
    torch.testing.assert_close(counts, logits[0].exp(), rtol=0, atol=0.03)
    assert counts[4] == 0


@pytest.mark.parametrize("number", [0.0, 0.25, 1 - 2**-53])
def test_extreme_random_numbers_draw_possible_tokens(number):
    logits = torch.tensor([[-torch.inf, 0.3, -torch.inf, 0.1, -torch.inf]])
    sampler = Sampler([SamplingOptions()], lambda: torch.tensor([number], dtype=torch.float64), None)
    assert sampler(logits).token.item() in (1, 3)


def test_min_p_keeps_tokens_by_their_ratio_to_the_likeliest():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, -1)
    for min_p, kept in ((0.0, {0, 1, 2, 3}), (0.25, {0, 1, 2}), (0.55, {0, 1}), (1.0, {0})):
        sampler = Sampler([SamplingOptions(min_p=min_p)] * 2000, RowGenerators.of_seeds(range(2000)), None)
        assert set(sampler(logits).token.tolist()) == kept


def test_penalties_equal_those_of_transformers_and_openai():
    from transformers import RepetitionPenaltyLogitsProcessor

    options = [SamplingOptions(repetition_penalty=1.7), SamplingOptions(presence_penalty=0.4, frequency_penalty=0.3)]
    prompts, drawn = [torch.tensor([1, 2, 2]), torch.tensor([5])], torch.tensor([[3, 7], [4, 7], [3, 1]])
    penalties, logits = Penalties(options, prompts, 10, torch.device("cpu")), torch.randn(2, 10).double()
    for token in drawn:
        penalties.count(token)
    found = penalties.apply(logits)
    read = torch.cat([prompts[0], drawn[:, 0]])[None]
    torch.testing.assert_close(found[:1], RepetitionPenaltyLogitsProcessor(1.7)(read, logits[:1]))
    expected = logits[1].clone()
    expected[7] -= 0.4 + 2 * 0.3
    expected[1] -= 0.4 + 0.3
    torch.testing.assert_close(found[1], expected)


@pytest.mark.parametrize("phase", [PHASE1, PHASE2, HYBRID], ids=["phase1", "phase2", "hybrid"])
@pytest.mark.parametrize("options", [dict(temperature=0), dict(top_p=0.9), dict(repetition_penalty=1.3)], ids=str)
def test_batch_with_seeds_equals_single_sequences(phase, options):
    model, prompts, seeds = phase.model(), tokens(20, batch=3), [4, 5, 6]
    together = model.generate(prompts, 25, seeds=seeds, **options)
    alone = [model.generate(prompts[[i]], 25, seeds=[seed], **options) for i, seed in enumerate(seeds)]
    assert torch.equal(together, torch.cat(alone))


def test_samples_of_one_reading_equal_repeated_prompts(model, monkeypatch):
    prompts, read = torch.randint(0, 50, (2, 9)), []
    expected = model.generate(prompts.repeat_interleave(3, dim=0), 12, seeds=range(6))
    hidden_states = model.hidden_states
    monkeypatch.setattr(
        model, "hidden_states", lambda ids, **more: read.append(ids.shape) or hidden_states(ids, **more)
    )
    model.eval()
    found = torch.stack(list(model.stream(prompts, 12, samples=3, seeds=range(6))), dim=1)
    assert read[0] == (2, 9)
    assert torch.equal(found, expected[:, 9:])


def test_samples_continue_their_prompts(model):
    prompts = torch.randint(0, 50, (2, 9))
    whole = model.generate(prompts, 5, samples=3, seeds=range(6))
    assert whole.shape == (6, 14)
    assert torch.equal(whole[:, :9], prompts.repeat_interleave(3, dim=0))


def test_logprobs_equal_those_of_a_forward_pass(model):
    prompt = torch.randint(0, 50, (2, 9))
    draws = list(model.draws(prompt, 8, logprobs=3, temperature=0.5, presence_penalty=1.0, seeds=[1, 2]))
    new = torch.stack([draw.token for draw in draws], dim=1)
    expected = model.eval()(torch.cat([prompt, new[:, :-1]], dim=1))[:, 8:].log_softmax(-1)
    found = torch.stack([draw.logprob for draw in draws], dim=1)
    torch.testing.assert_close(found, expected.gather(-1, new[..., None])[..., 0], rtol=1e-4, atol=1e-5)
    top = torch.stack([draw.top_logprobs for draw in draws], dim=1)
    torch.testing.assert_close(top, expected.topk(3).values, rtol=1e-4, atol=1e-5)
    index = torch.stack([draw.top_tokens for draw in draws], dim=1)
    torch.testing.assert_close(expected.gather(-1, index), expected.topk(3).values, rtol=1e-4, atol=1e-5)


def test_strong_presence_penalty_avoids_repetition(model):
    prompt = torch.randint(0, 50, (1, 9))
    plain = model.generate(prompt, 30, temperature=0)[0, 9:].unique()
    penalised = model.generate(prompt, 30, temperature=0, frequency_penalty=2.0)[0, 9:].unique()
    assert len(penalised) > len(plain)


def test_repetition_penalty_does_not_see_padding(model):
    prompt = torch.randint(1, 50, (1, 6))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], dim=1)
    mask = (padded > 0).long()
    options = dict(temperature=0, repetition_penalty=3.0)
    expected = model.generate(prompt, 10, **options)[:, 6:]
    assert torch.equal(model.generate(padded, 10, attention_mask=mask, **options)[:, 10:], expected)


@pytest.mark.parametrize(
    "options",
    [
        *(dict(min_p=value) for value in (-0.1, 1.1, float("nan"))),
        *(dict(repetition_penalty=value) for value in (0, -1, float("inf"), float("nan"))),
        *({name: value} for name, value in itertools.product(("presence_penalty", "frequency_penalty"), (-2.1, 2.1))),
        dict(samples=0),
        dict(logprobs=-1),
        dict(seeds=[1, 2]),
        dict(seeds=[-1]),
        pytest.param(dict(seeds=[1], generator=torch.Generator()), id="seeds and generator"),
    ],
    ids=str,
)
def test_error_names_options_out_of_range(model, options):
    with pytest.raises(ValueError, match=next(iter(options)).removesuffix("s")):
        model.draws(torch.zeros(1, 3, dtype=torch.long), 2, **options)
