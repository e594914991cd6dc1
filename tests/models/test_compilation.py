"""Compiled steps of one token on the CPU, beside steps that are not compiled."""

import copy
import pickle

import pytest
import torch
import torch._inductor.config

from resolvent.errors import ConfigError
from resolvent.models.compilation import compiled, compiler_errors
from resolvent.models.decoding import TokenReader, read_token
from resolvent.models.weights import prepare_weights

from .small import PHASE1, PHASE2

HYBRID = dict(n_layers=2, attention_layers=(1,), attention_window=24, d_model=256, num_heads=4, head_dim=64)


STEPPED = dict(n_layers=2, attention_layers=(1,), attention_window=24)


class Scale:
    factor = torch.tensor(2.0)

    def times(self, x):
        return self.factor * x


@pytest.fixture
def eager(monkeypatch):
    """Let ``torch.compile`` trace, without a compiler behind it."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, *, options, **keywords: compile(f, backend="eager", **keywords))


def stepped(model, state, tokens, compiled):
    """Return the logits behind each of the tokens (B, N), and the last state."""
    if compiled:
        model.compile_steps()
    reader = TokenReader(model, state)
    return torch.stack([reader(token).clone() for token in tokens.T], 1), reader.state


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("sequences", [1, 3])
@torch.no_grad()
def test_a_step_is_one_piece_and_is_compiled_once(sequences):
    torch.manual_seed(0)
    model = PHASE2.model(**STEPPED)
    ids = torch.randint(model.vocab_size, (sequences, 62))
    _, state = model.read(ids)
    tokens = torch.randint(model.vocab_size, (sequences, 6))
    expected, after = stepped(model, state, tokens, compiled=False)
    torch._dynamo.utils.counters.clear()
    found, state = stepped(model, state, tokens, compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for a, b in zip(state.tensors(), after.tensors(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_models_do_not_share_compiled_code():
    one, other = (compiled(Scale.times) for _ in range(2))
    assert one.__wrapped__.__code__ is not other.__wrapped__.__code__


def test_compilation_is_refused_by_name():
    with pytest.raises(ConfigError, match="Phase1IntegratedModel has no step"):
        PHASE1.model().compile_steps()
    with pytest.raises(ConfigError, match="cannot be compiled: its memory rotates"):
        PHASE2.model(memory_rotation=True).compile_steps()
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(ConfigError, match=r"C\+\+ compiler.*install g\+\+.*leave out --compile"):
        PHASE2.model().compile_steps()


@torch.no_grad()
def test_a_later_hook_is_no_silent_fallback():
    model = PHASE2.model()
    model.compile_steps()
    _, state = model.read(torch.zeros(1, 5, dtype=torch.int64))
    model.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match=r"blocks\.0 has a hook; leave out --compile"):
        TokenReader(model, state)(torch.zeros(1, dtype=torch.int64))


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("full", 1e-5), ("int8", 2e-2), ("bfloat16", 2e-2)])
def test_compiled_steps_equal_those_that_are_not(precision, tolerance):
    torch.manual_seed(0)
    model = PHASE2.model(**HYBRID, vocab_size=300).eval()
    model = model.bfloat16() if precision == "bfloat16" else prepare_weights(model, precision)
    ids, tokens = torch.randint(300, (1, 250)), torch.randint(300, (1, 70))
    greedy = model.generate(ids, 20, temperature=0)
    with torch.no_grad():
        _, state = model.read(ids)
        expected, after = stepped(model, state, tokens, compiled=False)
        found, state = stepped(model, state, tokens, compiled=True)
    assert (found - expected).abs().max() <= tolerance * max(1, expected.abs().max())
    for a, b in zip(state.tensors(), after.tensors(), strict=True):
        torch.testing.assert_close(a, b, atol=10 * tolerance, rtol=10 * tolerance)
    assert torch.equal(model.generate(ids, 20, temperature=0), greedy)


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
@torch.no_grad()
def test_one_code_serves_any_number_of_sequences():
    torch.manual_seed(0)
    model = PHASE2.model(**STEPPED)
    _, state = model.read(torch.randint(model.vocab_size, (7, 40)))
    plain = [TokenReader(model, state[:rows]) for rows in (1, 2, 3, 7)]
    model.compile_steps()
    torch._dynamo.utils.counters.clear()
    for reader in plain:
        rows = len(reader.state)
        token = torch.randint(model.vocab_size, (rows,))
        read_token(model, token, state[:rows])
        torch.testing.assert_close(TokenReader(model, state[:rows])(token), reader(token), atol=1e-5, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


LIMITS = {
    r"/cache.*TORCHINDUCTOR_CACHE_DIR, or leave out --compile": OSError(30, "Read-only file system", "/cache"),
    r"compiled as often as .* call compile_steps\(\) again": torch._dynamo.exc.FailOnRecompileLimitHit("hard"),
}


@pytest.mark.parametrize("message", LIMITS)
@torch.no_grad()
def test_limits_of_the_compiler_name_the_remedy(message, monkeypatch):
    def fail(*_, **__):
        raise LIMITS[message]

    model = PHASE2.model(n_layers=1)
    model.compile_steps()
    _, state = model.read(torch.zeros(1, 5, dtype=torch.int64))
    monkeypatch.setattr("resolvent.models.compilation.compiled", lambda _: fail)
    with pytest.raises(ConfigError, match=message):
        TokenReader(model, state)(torch.zeros(1, dtype=torch.int64))


def test_errors_of_the_compiler_name_the_remedy():
    with pytest.raises(ConfigError, match=r"cannot compile the model .*: be patient"), compiler_errors("be patient"):
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no space"), None)


def assert_steps_equal_the_forward_pass(model, tolerance=1e-5):
    with torch.no_grad():
        _, state = model.read(torch.randint(model.vocab_size, (1, 30)))
        reader = TokenReader(model, state)
        for token in torch.randint(model.vocab_size, (3, 1)):
            expected, state = read_token(model, token, state)
            found = reader(token)
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def train(model):
    model.train()
    ids = torch.randint(model.vocab_size, (2, 20))
    model(ids, labels=ids).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.eval()


OTHER_VALUES = {
    "training": train,
    "loaded weights": lambda model: model.load_state_dict(PHASE2.model(**STEPPED).state_dict()),
    "assigned weights": lambda model: model.load_state_dict(PHASE2.model(**STEPPED).state_dict(), assign=True),
}


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
def test_code_serves_weights_that_have_changed():
    torch.manual_seed(0)
    model = PHASE2.model(**STEPPED)
    model.compile_steps()
    assert_steps_equal_the_forward_pass(model)
    torch._dynamo.utils.counters.clear()
    for change in OTHER_VALUES.values():
        change(model)
        assert_steps_equal_the_forward_pass(model)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


def untie(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)


OTHER_STRUCTURES = {
    "float64": lambda model: model.double(),
    "layout": lambda model: prepare_weights(model, "full"),
    "vocabulary": lambda model: model.shrink_vocabulary(model.vocab_size - 8),
    "table of its own": untie,
    "constant": lambda model: setattr(model.blocks[0].hebbian, "dt", 0.5),
}


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("change", OTHER_STRUCTURES.values(), ids=OTHER_STRUCTURES)
def test_another_structure_is_compiled_anew(change):
    torch.manual_seed(0)
    model = PHASE2.model(**STEPPED, tie_embeddings=True)
    model.compile_steps()
    assert_steps_equal_the_forward_pass(model)
    torch._dynamo.utils.counters.clear()
    change(model)
    assert_steps_equal_the_forward_pass(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_compiled_model_are_apart(copied):
    torch.manual_seed(0)
    model = PHASE2.model(**STEPPED)
    model.compile_steps()
    assert_steps_equal_the_forward_pass(model)
    other = copied(model)
    train(other)
    for one in (model, other):
        assert_steps_equal_the_forward_pass(one)
    assert other._compiled is not None
