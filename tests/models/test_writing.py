"""Captured streams equal those that Python launches step by step."""

import pytest
import torch

from resolvent.errors import ConfigError, ResolventError
from resolvent.models import generation, writing
from resolvent.models.decoding import TokenReader, token_step
from resolvent.models.sampling import Penalties, RowGenerators, Sampler, SamplingOptions
from resolvent.models.writing import Writer
from resolvent.ops.attention_window import GROWTH

from .graphs import launched
from .small import FULL, HYBRID, PHASE1, PHASE2, tokens

OPTIONS = {
    "greedy": dict(temperature=0),
    "temperature": dict(temperature=0.8),
    "filters": dict(temperature=0.9, top_k=20, top_p=0.95, min_p=0.01),
    "penalties": dict(temperature=0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    "penalties and filters": dict(top_k=10, repetition_penalty=1.3, frequency_penalty=0.2),
}
PHASES = dict(phase1=PHASE1, phase2=PHASE2, hybrid=HYBRID, full=FULL)


@torch.no_grad()
@pytest.mark.parametrize("ends", [[], [*range(20)]], ids=["endless", "ending"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_captured_writer_draws_the_same_tokens(options, ends, monkeypatch):
    monkeypatch.setattr(writing, "captured", launched)
    torch.manual_seed(0)
    model, prompt = HYBRID.model(), tokens(40, 3)
    logits, state = model.read(prompt)

    def tokens_of(captured):
        of_rows = [SamplingOptions(**options)] * 3
        penalties = Penalties(of_rows, list(prompt), model.vocab_size, prompt.device) if of_rows[0].penalises else None
        sampler = Sampler(of_rows, RowGenerators.of_seeds([4, 5, 6]), penalties)
        writer = Writer(token_step(model, state), sampler, 2, ends, logits)
        if captured:
            writer.capture(model, state, 30)
        drawn = torch.stack([writer.first.token, *(writer().token for _ in range(30))])
        assert writer.ended.any() == bool(ends)
        return drawn

    assert torch.equal(tokens_of(True), tokens_of(False))


@torch.no_grad()
def test_captured_writer_gives_a_state_that_grows_room_again_and_again(monkeypatch):
    monkeypatch.setattr(writing, "captured", launched)
    torch.manual_seed(0)
    model, prompt = FULL.model(), tokens(GROWTH - 3, 2)
    logits, state = model.read(prompt)
    sampler = Sampler([SamplingOptions(temperature=0)] * 2, RowGenerators.of_seeds([0, 1]), None)
    writer = Writer(TokenReader(model, state), sampler, None, [], logits)
    drawn, slots = [writer.first.token], []
    for room in (2, 6, 40):
        state = writer.capture(model, state, room)
        caches = [layer.cache.keys for layer in state.layers if layer.cache is not None]
        slots.append(caches[0].shape[1])
        drawn += [writer().token for _ in range(room)]
        now = [layer.cache.keys for layer in state.layers if layer.cache is not None]
        assert all(a is b for a, b in zip(caches, now, strict=True))
    assert slots == [GROWTH, 2 * GROWTH, 2 * GROWTH]
    expected = model.generate(prompt, len(drawn), temperature=0)
    assert torch.equal(torch.stack(drawn, 1), expected[:, prompt.shape[1] :])
    with pytest.raises(ConfigError, match="no step with a state of fixed size"):
        token_step(model, state)


@pytest.fixture(params=PHASES.values(), ids=PHASES.keys())
def model(request):
    torch.manual_seed(0)
    return request.param.model().cuda()


def streamed(model, monkeypatch, captured, count=80, batch=3, **options):
    """Return the draws of a stream, captured or launched step by step."""
    monkeypatch.setattr(generation, "WORTH_CAPTURING", 0 if captured else 1 << 60)
    torch.manual_seed(1)
    return list(model.draws(tokens(40, batch).cuda(), count, **options))


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.token, b.token)
        if b.logprob is not None:
            torch.testing.assert_close(a.logprob, b.logprob, rtol=1e-3, atol=1e-3)
            assert torch.equal(a.top_tokens[:, 0], b.top_tokens[:, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_captured_streams_draw_the_same_tokens(model, options, monkeypatch):
    options = options | dict(seeds=[4, 5, 6], logprobs=2)
    assert_equal(*(streamed(model, monkeypatch, captured, **options) for captured in (True, False)))


@pytest.mark.gpu
def test_captured_streams_take_generators_of_any_device(model, monkeypatch):
    for device in ("cpu", "cuda"):
        seeded = [dict(generator=torch.Generator(device).manual_seed(3)) for _ in range(2)]
        assert_equal(*(streamed(model, monkeypatch, i == 0, **options) for i, options in enumerate(seeded)))
    assert_equal(*(streamed(model, monkeypatch, captured) for captured in (True, False)))


@pytest.mark.gpu
def test_captured_streams_end_with_their_sequences(model, monkeypatch):
    free = streamed(model, monkeypatch, True, temperature=0, batch=2)
    eos = [int(free[10].token[0]), int(free[5].token[1])]
    found, expected = (
        streamed(model, monkeypatch, captured, temperature=0, batch=2, eos_token_id=eos) for captured in (True, False)
    )
    assert_equal(found, expected)


@pytest.mark.gpu
def test_captured_streams_check_logits_at_the_end(model, monkeypatch):
    model.ln_f.weight.data[3] = torch.nan
    for temperature in (0, 1.0):
        with pytest.raises(ResolventError, match="row 0 is nan"):
            streamed(model, monkeypatch, True, temperature=temperature)
