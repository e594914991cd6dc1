"""Blocks that attend in the place of the memory."""

import json

import pytest
import torch
from torch.nn import functional as F

from resolvent import (
    ConfigError,
    Phase2Config,
    Phase2IntegratedModel,
    convert_phase1_to_phase2,
    get_phase2_preset,
    load_model,
    save_model,
)
from resolvent.models.decoding import token_step
from resolvent.models.phase2 import RotaryScaling
from resolvent.models.phase2.decode import TokenStep
from resolvent.ops.attention_window import GROWTH
from resolvent.parallel import SequenceParallel

from ..small import ATTENTION, FULL, HYBRID, PHASE1, PHASE2, tokens


@pytest.mark.parametrize(
    ("name", "layers"), [("tiny", (2,)), ("small", (2,)), ("base", (2, 5)), ("large", (2, 5, 8, 11))]
)
def test_hybrid_presets_attend_in_every_third_block_at_the_same_size(name, layers):
    plain, config = get_phase2_preset(name), get_phase2_preset(f"{name}-hybrid")
    assert (config.attention_layers, config.attention_window) == (layers, plain.n_seq // 2)
    assert plain.attention_layers == ()
    with torch.device("meta"):
        ours, theirs = (Phase2IntegratedModel(c, init=False).num_parameters() for c in (config, plain))
    assert ours == theirs - 3 * plain.num_heads * len(layers)  # η and three numbers of the filters for a temperature


def test_configuration_survives_json():
    config = Phase2Config(attention_layers=(1, 4), attention_window=64)
    written = json.loads(json.dumps(config.to_dict()))
    assert written == config.to_dict()
    again = Phase2Config.from_dict(written)
    assert again == config
    again.validate()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (dict(attention_layers=(1, 6)), r"attention_layers must name blocks of 0..5, each at most once, got \[1, 6\]"),
        (dict(attention_layers=(-1,)), "attention_layers must name blocks"),
        (dict(attention_layers=(1, 1)), "attention_layers must name blocks"),
        (dict(attention_layers=[1]), r"attention_layers must be a tuple of integers, got \[1\]"),
        (dict(attention_layers=(True,)), "attention_layers must be a tuple of integers"),
        (dict(attention_layers=(1.0,)), "attention_layers must be a tuple of integers"),
        (dict(attention_window=0), "attention_window must be > 0, got 0"),
        (
            dict(attention_layers=(1,), head_dim=15),
            "head_dim must be even for the rotary positions of attention, got 15",
        ),
    ],
)
def test_faults_are_named(options, fault):
    with pytest.raises(ConfigError, match=fault):
        Phase2Config(**options).validate()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (dict(bk_core=False, attention_layers=(0,)), "bk_core switched off needs no memory, .* all 6 blocks, got 1"),
        (dict(norm="batch"), "norm must be one of layernorm, rmsnorm, got 'batch'"),
        (dict(norm_eps=0.0), "norm_eps must be > 0, got 0.0"),
        (dict(num_kv_heads=3, conv_size=1), r"num_kv_heads must divide num_heads \(8\), got 3"),
        (dict(num_kv_heads=0), "num_kv_heads must be > 0, got 0"),
        (dict(num_kv_heads=2), "num_kv_heads below num_heads needs conv_size 1, got 4"),
        (dict(qk_norm=False), "qk_norm switched off needs conv_size 1, got 4"),
        (dict(attention_layers=(1,), attention_windows=(1, 2)), r"each of the 1 attention_layers, got \[1, 2\]"),
        (dict(attention_layers=(1,), attention_windows=(-1,)), r"a number >= 0 .*got \[-1\]"),
        (dict(attention_windows=(1.0,)), "attention_windows must be a tuple of integers or None"),
        (
            dict(attention_layers=(1,), attention_windows=(8,), attention_window=8),
            "attention_window has no effect beside attention_windows: leave it out, got 8",
        ),
        (dict(rotary_base=0.0), "rotary_base must be > 0, got 0.0"),
        (
            dict(rotary_scaling=RotaryScaling("yarn")),
            "rotary_scaling: kind must be one of linear, dynamic, llama3, got",
        ),
        (dict(rotary_scaling=RotaryScaling(factor=0.5)), "rotary_scaling: factor must be >= 1, got 0.5"),
        (dict(rotary_scaling=RotaryScaling(high_frequency=1.0)), r"high_frequency must be > low_frequency \(1.0\)"),
        (dict(rotary_scaling="linear"), "rotary_scaling must be RotaryScaling or None, got 'linear'"),
    ],
)
def test_faults_of_the_parts_of_a_transformer_are_named(options, fault):
    with pytest.raises(ConfigError, match=fault):
        Phase2Config(**options).validate()


def test_windows_and_scaling_survive_json():
    scaling = RotaryScaling("llama3", 8.0, 64, 1.5, 3.0)
    config = Phase2Config(attention_layers=(1, 4), attention_windows=(0, 64), rotary_scaling=scaling)
    again = Phase2Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.windows == {1: None, 4: 64}
    again.validate()


def test_grouped_heads_of_a_memory_read_shared_keys_and_values():
    model = PHASE2.model(num_heads=4, num_kv_heads=2, conv_size=1)
    whole, state = model(ids := tokens(70)), None
    layer = model.blocks[0].hebbian
    assert layer.qkv_proj.out_features == 8 * 16 and layer.stacked == {"qkv_proj": 4}
    logits = []
    for part in ids.split(30, dim=1):
        out, state = model(part, state=state, return_state=True)
        logits.append(out)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0, atol=1e-4 * float(whole.std()))
    heads = layer.heads(layer.qkv_proj(torch.randn(1, 5, 48)), None, None)
    assert heads.q.shape == (1, 5, 4, 16) and heads.k.shape == heads.v.shape == (1, 5, 2, 16)


def test_an_attending_block_has_no_memory_and_no_filters():
    model = HYBRID.model()
    block, names = model.blocks[1], {name.split(".")[0] for name, _ in model.blocks[1].named_parameters()}
    assert names == {"ln1", "dissipative_bk", "bk_proj", "attention", "ln2", "ffn"}
    assert block.hebbian is block.snr_filter is block.resonance is block.consolidation() is None
    assert block.mixer is block.attention
    assert model.blocks[0].attention is None
    assert model.blocks[0].mixer is model.blocks[0].hebbian


def test_diagnostics_of_an_attending_block_are_those_of_its_potential():
    model, ids = HYBRID.model(), tokens(70)
    logits, found = model(ids, return_diagnostics=True)
    assert torch.equal(logits, model(ids))
    for name in ("snr_stats", "resonance_info", "stability_metrics"):
        assert [len(x) > 0 for x in found[name]] == [True, False, True]
    assert [x.shape for x in found["gamma_values"]] == [(2, 70, 3)] * 3


def test_all_parameters_have_gradients_also_through_recomputed_blocks():
    model, ids = HYBRID.model().train(), tokens(90)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        for block in model.blocks:
            block.gradient_checkpointing = recompute
        model(ids[:, :-1], labels=ids[:, 1:]).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_read_out_of_attention_enters_the_next_potential():
    model, ids = HYBRID.model(), tokens(40)
    before = model(ids)
    model.blocks[2].dissipative_bk.potential.memory_to_potential.weight.data.zero_()
    assert (model(ids) - before).abs().max() > 1e-3


@torch.no_grad()
def test_windows_have_the_dtype_that_was_attended_to():
    model, ids = HYBRID.model(), tokens(70)
    with torch.autocast("cpu", torch.bfloat16):
        whole, state = model(ids, return_state=True)
        window = state.layers[1].window
        assert window.keys.dtype == window.values.dtype == torch.bfloat16
        first, half = model(ids[:, :40], return_state=True)
        rest = model(ids[:, 40:], state=half)
    assert (torch.cat([first, rest], 1).float() - whole.float()).norm() <= 0.05 * whole.float().norm()
    assert half.to(torch.float32).layers[1].window.keys.dtype == torch.bfloat16
    _, wide = model(ids[:, 40:], state=half, return_state=True)  # outside autocast it goes on in float32
    assert wide.layers[1].window.keys.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("phase", [HYBRID, ATTENTION, FULL])
def test_states_of_sequences_join_a_batch_and_leave_it(phase):
    model = phase.model()
    texts = [tokens(length, batch=1) for length in (5, GROWTH + 10, 40)]
    states = [model(text, return_state=True)[1] for text in texts]
    joined, more = type(states[0]).cat(states), tokens(30, batch=3)
    found, after = model(more, state=joined, return_state=True)
    for i, state in enumerate(states):
        expected, _ = model(more[[i]], state=state, return_state=True)
        torch.testing.assert_close(found[[i]], expected, rtol=1e-4, atol=1e-4)
        again = model(more[[i]], state=joined[[i]])
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    assert len(after[1:]) == 2


def test_states_of_different_windows_do_not_join():
    states = [HYBRID.model(attention_window=window)(tokens(9, 1), return_state=True)[1] for window in (20, 24, None)]
    for other in states[:2]:
        with pytest.raises(ValueError, match="belong to different models"):
            type(other).cat([states[2], other])
    with pytest.raises(ValueError, match="belong to different models"):
        type(states[0]).cat(states[:2])


@torch.no_grad()
@pytest.mark.parametrize("phase", [HYBRID, FULL])
def test_generation_updates_windows_in_place(phase, monkeypatch):
    model, addresses = phase.model(conv_size=1), []  # without a convolution there is no step but the forward pass
    original = type(model).hidden_states

    def spy(self, ids, **options):
        hidden, state = original(self, ids, **options)
        layer = state.layers[1]
        addresses.append((layer.window or layer.cache).keys.data_ptr())
        return hidden, state

    monkeypatch.setattr(type(model), "hidden_states", spy)
    prompt = tokens(30)
    _, before = model.hidden_states(prompt)
    kept = [x.clone() for x in before.tensors()]
    addresses.clear()
    out = model.generate(prompt[:, -1:], 20, temperature=0, state=before)
    assert len({*addresses[1:]}) == 1  # the first is that of the prompt
    assert all(torch.equal(a, b) for a, b in zip(before.tensors(), kept, strict=True))
    whole = torch.cat([prompt, prompt[:, -1:], out[:, 1:]], 1)
    assert torch.equal(out[:, 1:], model(whole[:, :-1]).argmax(-1)[:, -20:])


def test_a_state_that_grows_is_refused_where_its_size_must_be_fixed():
    model = FULL.model()
    _, state = model(tokens(5), return_state=True)
    with pytest.raises(ConfigError, match=r"attention_window=None.*no step with a state of fixed size"):
        token_step(model, state)
    with pytest.raises(ConfigError, match="attention_window=None cannot be trained with stretches"):
        SequenceParallel(model)


@torch.no_grad()
def test_steps_of_a_forward_pass_equal_the_pass():
    model, ids = HYBRID.model(conv_size=1), tokens(40)
    _, state = model(ids[:, :20], return_state=True)
    step = token_step(model, state)
    assert not isinstance(step, TokenStep)
    steps = torch.stack([step(token).clone() for token in ids[:, 20:].T], 1)
    torch.testing.assert_close(steps, model(ids)[:, 20:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_saved_models_compute_the_same(tmp_path):
    model, ids = HYBRID.model(), tokens(50)
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model").eval()
    assert again.config == model.config
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (dict(n_layers=2, attention_layers=(1,)), {}),
        (dict(n_layers=1, attention_layers=(0,)), dict(cu_seqlens=torch.tensor([0, 20, 60]))),
    ],
    ids=["rectangle", "packed"],
)
def test_compiles_to_one_graph(sizes, options):
    torch._dynamo.reset()
    model, ids = HYBRID.model(backend="torch", **sizes).train(), tokens(60, 1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, **options), model(ids, **options))
    torch._dynamo.reset()


@pytest.mark.slow
def test_it_learns_to_copy_within_its_window():
    """Train attending blocks to repeat the token 8 places back, which no memory of its size learns as soon."""
    torch.manual_seed(0)
    model = PHASE2.create(**{**PHASE2.sizes, "n_layers": 2}, attention_layers=(0, 1), attention_window=12).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        ids = torch.randint(0, 97, (8, 40))
        logits = model(ids)[:, 8:]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, :-8].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


@torch.no_grad()
@pytest.mark.parametrize("window", [16, None])
def test_conversion_to_a_hybrid_is_exact_full_and_streaming(window):
    source = PHASE1.model()
    config = Phase2Config.from_phase1(source.config, attention_layers=(1,), attention_window=window)
    model = convert_phase1_to_phase2(source, config).eval()
    for length in (1, 40, 130):
        ids = tokens(length)
        assert (model(ids) - source(ids)).abs().max() <= 1e-5
    first, state = model(ids[:, :60], return_state=True)
    found = torch.cat([first, model(ids[:, 60:], state=state)], 1)
    assert (found - source(ids)).abs().max() <= 1e-5
    assert model.config.attention_layers == (1,)
    notes = {tensor.name: tensor.note for tensor in model.conversion_report.tensors}
    assert notes["blocks.1.attention.out_proj.weight"] == "no attention until training asks for it"
