"""The models in Transformers: what it loads, generates, trains and refuses; ``test_trainer`` tests its Trainer."""

import copy
import json
import os
import pickle

import pytest
import torch
import torch.nn.functional as F

from resolvent import ConfigError, Phase1Config, Phase2Config, load_model, save_model
from resolvent.layers import TensorTrainEmbedding

from ..models.small import HYBRID, PHASE1, PHASE2, tokens

if not os.environ.get("CI"):
    pytest.importorskip("transformers", reason="needs Transformers: pip install 'resolvent[hf]'")
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, TextStreamer

from resolvent.hf import Phase1ForCausalLM, Phase1HFConfig, Phase2ForCausalLM, Phase2HFConfig, RecurrentCache

PHASES = {"phase1": PHASE1, "phase2": PHASE2, "hybrid": HYBRID}
CLASSES = {
    "phase1": (Phase1Config, Phase1HFConfig, Phase1ForCausalLM),
    "phase2": (Phase2Config, Phase2HFConfig, Phase2ForCausalLM),
}
WINDOWS_TOO = pytest.mark.parametrize("phase", PHASES)
"""For tests of what a cache holds: a hybrid beside the two phases."""
GREEDY = dict(max_new_tokens=12, do_sample=False)


@pytest.fixture(params=CLASSES)
def phase(request):
    return request.param


@pytest.fixture
def pair(phase, tmp_path):
    """One of our models, and what Transformers loads from its folder."""
    model = PHASES[phase].model()
    save_model(model, tmp_path / "ours")
    return model, AutoModelForCausalLM.from_pretrained(tmp_path / "ours", local_files_only=True)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


class Collector(TextStreamer):
    """Keeps the tokens that are streamed."""

    def __init__(self):
        self.pieces = []

    def put(self, value):
        self.pieces.append(value.flatten())

    def end(self):
        pass


# --- Folders


def test_saved_folder_loads_in_transformers(phase, pair):
    model, hf = pair
    ids = tokens(70)
    assert type(hf) is CLASSES[phase][2] and not hf.training and hf.config.architectures == [type(hf).__name__]
    assert torch.equal(hf(ids).logits, model(ids))
    assert hf.config.to_dataclass() == model.config


@pytest.mark.parametrize(
    ("phase", "options"),
    [("phase1", {}), ("phase1", dict(htt_enabled=False)), ("phase2", {}), ("phase2", dict(tie_embeddings=True))],
)
@pytest.mark.parametrize("shards", ["50KB", "1GB"])
def test_loaded_model_equals_saved(phase, options, shards, tmp_path):
    model = PHASES[phase].model(**options)
    save_model(model, tmp_path / "ours")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    hf.save_pretrained(tmp_path / "theirs", max_shard_size=shards)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (shards == "50KB")
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"), tokens(70)
    assert torch.equal(again(ids).logits, model(ids))
    assert again.model.tied == model.tied
    back = load_model(tmp_path / "theirs", "cpu")
    assert back.config == model.config and torch.equal(back(ids), model(ids))


def test_shards_lie_in_the_folder(pair, tmp_path):
    _, hf = pair
    hf.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    index = tmp_path / "theirs" / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["model.ln_f.weight"] = "../ours/model.safetensors"
    index.write_text(json.dumps(places))
    with pytest.raises(RuntimeError, match=r"must name files beside it in weight_map, got \['\.\./ours"):
        load_model(tmp_path / "theirs")


@pytest.mark.parametrize(("phase", "options"), [("phase1", {}), ("phase2", {}), ("phase2", dict(tie_embeddings=True))])
def test_fresh_weights_are_those_of_a_fresh_model(phase, options):
    small, (_, config_class, model_class) = PHASES[phase], CLASSES[phase]
    sizes = {name: value for name, value in (small.sizes | options).items() if name != "device"}
    torch.manual_seed(5)
    hf = model_class(config_class(**sizes))
    torch.manual_seed(5)
    model = small.create(**small.sizes, **options)
    assert hf.model.tied == model.tied
    pairs = zip(hf.model.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_loading_initialises_only_missing_weights(phase, pair, tmp_path):
    model, hf = pair
    name = "ln_f.bias" if phase == "phase1" else "blocks.1.dissipative_bk.log_zeta"
    weights = hf.state_dict()
    lost = weights.pop(f"model.{name}")
    loaded = type(hf).from_pretrained(None, config=hf.config, state_dict=weights)
    fresh = PHASES[phase].create(**PHASES[phase].sizes).get_parameter(name)
    assert torch.equal(loaded.model.get_parameter(name), fresh) and not torch.equal(fresh, lost)
    for other, parameter in model.named_parameters():
        assert other == name or torch.equal(loaded.model.get_parameter(other), parameter)
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    loaded.post_init()
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())


def test_weights_come_in_the_dtype_asked_for(phase, pair, tmp_path):
    model, _ = pair
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    ids = tokens(70)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half(ids).logits, model.to(torch.bfloat16)(ids))
    half(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)


def test_blocks_offloaded_to_disk(phase, tmp_path):
    model = PHASES[phase].model()
    save_model(model, tmp_path / "ours")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    places = {f"model.{name}": "cpu" for name, _ in hf.model.named_children()}
    places |= {"model.blocks.0": "cpu", "model.blocks.1": "disk", "model.blocks.2": "cpu"}
    del places["model.blocks"]
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", device_map=places, offload_folder=tmp_path / "disk"
    )
    ids = tokens(70)
    assert offloaded.model.blocks[1].ln1.weight.is_meta
    # Where a weight has to be fetched, its product is not merged with others.
    torch.testing.assert_close(offloaded(ids).logits, model(ids), rtol=1e-5, atol=1e-5)
    assert torch.equal(offloaded.generate(ids, **GREEDY), hf.generate(ids, **GREEDY))


# --- Configurations


def test_a_configuration_has_the_fields_of_ours(phase):
    dataclass, config_class, _ = CLASSES[phase]
    config = config_class(n_layers=2, dropout=0.25)
    assert config.to_dataclass() == dataclass(n_layers=2, dropout=0.25)
    again = config_class.from_dict(json.loads(config.to_json_string()))
    assert again.to_dataclass() == config.to_dataclass()
    assert config != config_class(n_layers=2)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 512, 8)
    assert config_class(hidden_size=64).d_model == 64
    assert AutoConfig.for_model(config.model_type, n_layers=2, dropout=0.25) == config


def test_nested_configuration():
    config = Phase2HFConfig(phase1_config={"n_layers": 3})
    assert config.to_dataclass().phase1_config == Phase1Config(n_layers=3)
    assert Phase2HFConfig(**Phase2Config(phase1_config=Phase1Config()).to_dict()).to_dataclass().phase1_config


def test_faults_are_named(phase, pair, tmp_path):
    _, config_class, _ = CLASSES[phase]
    with pytest.raises(ConfigError, match="'n_layer' \\(did you mean 'n_layers'"):
        config_class(n_layer=2)
    with pytest.raises(ConfigError, match="dropout must be in"):
        config_class(dropout=1.5)
    with pytest.raises(ConfigError, match="d_model must be an integer, got 'wide'"):
        config_class(d_model="wide")
    with pytest.raises(RuntimeError, match="format version 7"):
        config_class(format_version=7)
    config = config_class()
    config.dropout = -1
    with pytest.raises(ConfigError, match="dropout must be in"):
        CLASSES[phase][2](config)
    path = tmp_path / "ours" / "config.json"
    path.write_text(path.read_text().replace('"dropout"', '"drop_out"'))
    with pytest.raises(ConfigError, match="'drop_out' \\(did you mean 'dropout'"):
        AutoConfig.from_pretrained(tmp_path / "ours")


def test_only_phase_2_ties():
    assert Phase2HFConfig(tie_word_embeddings=True).tie_embeddings
    assert not Phase1HFConfig(tie_word_embeddings=False).tie_word_embeddings
    with pytest.raises(ConfigError, match="tie_word_embeddings must be False"):
        Phase1HFConfig(tie_word_embeddings=True)


# --- Generation


@WINDOWS_TOO
def test_greedy_generation_equals_generate(pair):
    model, hf = pair
    ids = tokens(70)
    assert torch.equal(hf.generate(ids, **GREEDY), model.generate(ids, 12, temperature=0))


def test_sampling_draws_from_the_distribution_of_the_model(pair):
    """Transformers draws with its own sampler, whose random numbers are those of ``multinomial``."""
    model, hf = pair
    ids = tokens(20)
    torch.manual_seed(3)
    found = hf.generate(ids, max_new_tokens=12, do_sample=True, temperature=0.8, top_k=20, top_p=1.0)
    torch.manual_seed(3)
    for _ in range(12):
        logits = model(ids)[:, -1] / 0.8
        logits = logits.masked_fill(logits < logits.topk(20).values[:, -1:], -torch.inf)
        ids = torch.cat([ids, logits.softmax(-1).multinomial(1)], dim=1)
    assert torch.equal(found, ids)


def test_without_a_cache_the_same_is_generated(pair):
    _, hf = pair
    ids = tokens(20)
    assert torch.equal(hf.generate(ids, use_cache=False, **GREEDY), hf.generate(ids, **GREEDY))


def test_a_streamer_gets_every_token(pair):
    _, hf = pair
    ids, streamer = tokens(20, batch=1), Collector()
    out = hf.generate(ids, streamer=streamer, **GREEDY)
    assert torch.equal(torch.cat(streamer.pieces), out[0]) and len(streamer.pieces) == 13


def test_generation_stops_at_the_end_of_text(pair):
    _, hf = pair
    ids = tokens(20, batch=1).clamp(min=1)  # Transformers takes the 0 of a prompt for padding
    free = hf.generate(ids, **GREEDY)[0, 20:]
    end = free[4].item()
    out = hf.generate(ids, eos_token_id=end, pad_token_id=0, **GREEDY)[0, 20:]
    assert torch.equal(out, free[: free.tolist().index(end) + 1])


@torch.no_grad()
def beams(model, prompt, width, steps):
    """Beam search that reads everything again at every step."""
    found = [(0.0, prompt)]
    for _ in range(steps):
        grown = []
        for score, ids in found:
            scores, next_ids = model(ids[None])[0, -1].log_softmax(-1).topk(width)
            grown += [(score + s.item(), torch.cat([ids, i[None]])) for s, i in zip(scores, next_ids, strict=True)]
        found = sorted(grown, key=lambda item: -item[0])[:width]
    return found


def test_beam_search_reorders_the_state(pair):
    model, hf = pair
    ids = tokens(20)
    out = hf.generate(
        ids, num_beams=4, num_return_sequences=4, return_dict_in_generate=True, output_scores=True, **GREEDY
    )
    for row in range(2):
        expected = beams(model, ids[row], 4, 12)
        assert torch.equal(out.sequences[4 * row : 4 * row + 4], torch.stack([sequence for _, sequence in expected]))
        sums = out.sequences_scores[4 * row : 4 * row + 4] * 12  # the default divides by the length
        assert_close(sums, torch.tensor([score for score, _ in expected]))


@WINDOWS_TOO
@pytest.mark.parametrize("pieces", [None, 16])
def test_left_padded_batch_equals_single_rows(pair, pieces):
    _, hf = pair
    ids, mask = tokens(70, batch=3), torch.ones(3, 70, dtype=torch.long)
    mask[0, :30] = mask[1, :69] = 0
    out = hf.generate(ids, attention_mask=mask, prefill_chunk_size=pieces, **GREEDY)
    logits = hf(ids, attention_mask=mask).logits
    for row in range(3):
        alone = ids[row : row + 1, mask[row].bool()]
        assert torch.equal(out[row, 70:], hf.generate(alone, **GREEDY)[0, alone.shape[1] :])
        assert_close(logits[row, mask[row].bool()], hf(alone).logits[0])


@WINDOWS_TOO
def test_a_prompt_may_be_read_in_pieces(pair):
    _, hf = pair
    ids = tokens(70)
    assert torch.equal(hf.generate(ids, prefill_chunk_size=16, **GREEDY), hf.generate(ids, **GREEDY))


@torch.no_grad()
@WINDOWS_TOO
def test_cache_continues_a_text(pair):
    model, hf = pair
    ids = tokens(70)
    first = hf(ids[:, :30])
    cache = first.past_key_values
    assert isinstance(cache, RecurrentCache) and cache.get_seq_length() == 30 and cache.batch_size == 2
    kept = copy.copy(cache)
    assert_close(hf(ids[:, 30:], past_key_values=cache).logits, model(ids)[:, 30:])
    assert cache.get_seq_length() == 70 and kept.get_seq_length() == 30
    out = hf.generate(ids, past_key_values=kept, **GREEDY)
    assert torch.equal(out, hf.generate(ids, **GREEDY))
    assert hf(ids, use_cache=False).past_key_values is None


@torch.no_grad()
@WINDOWS_TOO
def test_a_cache_is_reordered_repeated_and_reset(pair):
    _, hf = pair
    ids = tokens(30, batch=3)
    cache = hf(ids).past_key_values
    cache.reorder_cache(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    more = tokens(5, batch=4)
    whole = torch.cat([ids[[2, 2, 0, 0]], more], dim=1)
    assert_close(hf(more, past_key_values=cache).logits, hf(whole).logits[:, 30:])
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized


def test_prompt_without_a_last_token_is_refused(pair):
    _, hf = pair
    ids, mask = tokens(10, batch=3), torch.ones(3, 10, dtype=torch.long)
    mask[0], mask[2, 7:] = 0, 0
    with pytest.raises(ValueError, match=r"must end with 1 in every row, got 0 in rows \[0, 2\]: pad on the left, and"):
        hf.generate(ids, attention_mask=mask, bos_token_id=5, **GREEDY)
    mask[0, -1], mask[2] = 1, mask[2].flip(0)
    assert hf.generate(ids, attention_mask=mask, **GREEDY).shape == (3, 22)
    alone = hf.generate(bos_token_id=5, **GREEDY)
    assert torch.equal(alone, hf.generate(torch.tensor([[5]]), **GREEDY))


def test_output_attentions_is_refused(pair):
    """Transformers asks every model for its attention weights; the blocks have none."""
    _, hf = pair
    ids = tokens(20)
    assert hf(ids, output_attentions=True).attentions is None
    out = hf.generate(ids, output_attentions=True, output_hidden_states=True, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, hf.generate(ids, **GREEDY))
    assert set(out.attentions) == {None} and len(out.hidden_states) == 12
    assert len(out.hidden_states[0]) == hf.config.n_layers + 1


def test_guidance_has_a_state_of_its_own(pair):
    """Classifier-free guidance reads two sequences with one model: from the prompt, and from its last token."""
    _, hf = pair
    ids, scale = tokens(20, batch=1), 1.5
    whole, bare = ids, ids[:, -1:]
    for _ in range(12):
        guided, free = (hf(read).logits[:, -1].log_softmax(-1) for read in (whole, bare))
        token = (free + scale * (guided - free)).argmax(-1, keepdim=True)
        whole, bare = torch.cat([whole, token], dim=1), torch.cat([bare, token], dim=1)
    assert torch.equal(hf.generate(ids, guidance_scale=scale, **GREEDY), whole)


@pytest.mark.slow
def test_compiled_model_has_the_same_loss(pair):
    _, hf = pair
    ids, mask = tokens(40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0
    compiled = torch.compile(hf, backend="eager")
    options = dict(attention_mask=mask, labels=ids)
    torch.testing.assert_close(compiled(ids, **options).loss, hf(ids, **options).loss)


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        (dict(penalty_alpha=0.6, top_k=4), "contrastive search"),
        (dict(dola_layers="low"), "dola generation"),
        (dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5), "group beam search"),
        (dict(num_beams=2, force_words_ids=[[5]]), "constrained beam search"),
    ],
)
def test_modes_of_downloaded_code_are_refused(options, mode):
    hf = Phase2ForCausalLM(Phase2HFConfig(vocab_size=97, d_model=16, n_layers=1, n_seq=64, num_heads=1, head_dim=8))
    message = f"Phase2ForCausalLM generates greedily, by sampling and with beams, not by {mode}"
    with pytest.raises(ValueError, match=message):
        hf.generate(tokens(10), trust_remote_code=True, **options, **GREEDY)


def test_unsupported_options_are_refused(pair):
    _, hf = pair
    ids = tokens(10)
    with pytest.raises(ValueError, match="past_key_values must be a RecurrentCache, got DynamicCache"):
        hf(ids, past_key_values=DynamicCache())
    with pytest.raises(TypeError, match="takes no inputs_embeds"):
        hf(ids, inputs_embeds=torch.zeros(2, 10, 48))
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        hf.generate(ids[:1], assistant_model=hf, **GREEDY)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        hf.generate(ids[:1], prompt_lookup_num_tokens=3, **GREEDY)
    with pytest.raises(ValueError, match="not used by the model: \\['tokeniser'\\]"):
        hf.generate(ids[:1], tokeniser=1, **GREEDY)


# --- Losses


def expected_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("skip_logits", [True, False])
def test_labels_are_shifted_by_the_model(pair, skip_logits):
    _, hf = pair
    ids = tokens(70)
    labels = ids.clone()
    labels[0, :20] = -100
    out = hf(ids, labels=labels, skip_logits=skip_logits)
    expected = expected_loss(hf(ids).logits, labels)
    assert (out.logits is None) == skip_logits
    torch.testing.assert_close(out.loss, expected)
    for found, wanted in zip(
        torch.autograd.grad(out.loss, list(hf.parameters()), materialize_grads=True),
        torch.autograd.grad(expected, list(hf.parameters()), materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    half = hf(ids, labels=labels, num_items_in_batch=2 * (labels[:, 1:] != -100).sum())
    torch.testing.assert_close(half.loss, expected / 2)
    assert hf(ids, labels=torch.full_like(ids, -100), num_items_in_batch=7).loss == 0
    assert hf.train()(ids, labels=torch.full_like(ids, -100), num_items_in_batch=7).loss == 0


def test_shifted_labels_replace_labels(pair):
    _, hf = pair
    ids, targets, mask = tokens(70), tokens(70), torch.ones(2, 70, dtype=torch.long)
    targets[1, 50:], mask[0, :30] = -100, 0
    loss = hf(ids, attention_mask=mask, labels=ids, shift_labels=targets).loss
    logits = hf(ids, attention_mask=mask).logits
    read, wanted = (torch.cat([x[0, 30:], x[1, :50]]) for x in (logits, targets))
    torch.testing.assert_close(loss, F.cross_entropy(read, wanted))
    assert list(hf.train()(ids, attention_mask=mask, shift_labels=targets)) == ["loss"]


def test_training_holds_no_logits_and_no_state(phase, pair):
    _, hf = pair
    ids = tokens(70)
    out = hf.train()(ids, labels=ids)
    assert list(out) == ["loss"]
    penalty = out.loss - hf(ids, labels=ids, skip_logits=False).loss
    assert penalty == 0 and list(hf(ids, labels=ids, skip_logits=False)) == ["loss", "logits"]
    evaluated = hf.eval()(ids, labels=ids).loss
    if phase == "phase1":  # whose penalty is part of what training minimises, at the places that predict
        _, diagnostics = hf.model(ids, return_diagnostics=True)
        gates = torch.stack([gate[:, :-1].mean() for gate in diagnostics["gate_values"]])
        penalty = hf.config.ar_ssm_l1_regularization * gates.mean()
        torch.testing.assert_close(out.loss, evaluated + penalty)
        assert penalty > 0
    else:
        torch.testing.assert_close(out.loss, evaluated)


def test_padding_predicts_nothing(pair):
    _, hf = pair
    ids, mask = tokens(70), torch.ones(2, 70, dtype=torch.long)
    mask[0, :30] = 0
    loss = hf(ids, attention_mask=mask, labels=ids).loss
    alone = [hf(row[None], labels=row[None]).loss * (len(row) - 1) for row in (ids[0, 30:], ids[1])]
    torch.testing.assert_close(loss, sum(alone) / (39 + 69))


@pytest.mark.parametrize("value", [torch.nan, 2.0, -1.0])
def test_mask_values_other_than_0_and_1_are_refused(pair, value):
    _, theirs = pair
    with pytest.raises(ValueError, match=f"attention_mask must be 1 for tokens and 0 for padding, got {value}"):
        theirs(torch.zeros(2, 3, dtype=torch.long), attention_mask=torch.full((2, 3), value))


def test_loss_without_counted_labels_is_zero(pair):
    _, theirs = pair
    ids = torch.zeros(2, 5, dtype=torch.long)
    loss = theirs.train()(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in theirs.parameters() if p.grad is not None)


def test_logits_to_keep(pair):
    _, hf = pair
    ids = tokens(30)
    whole = hf(ids).logits
    assert_close(hf(ids, logits_to_keep=2).logits, whole[:, -2:])
    assert_close(hf(ids, logits_to_keep=torch.tensor([3, 7])).logits, whole[:, [3, 7]])


def test_hidden_states_of_all_blocks(pair):
    model, hf = pair
    ids = tokens(30)
    states = hf(ids, output_hidden_states=True).hidden_states
    _, diagnostics = model(ids, return_diagnostics=True)
    inner = [diagnostics["input_embeddings"], *diagnostics["layer_outputs"][:-1], diagnostics["final_hidden_states"]]
    assert all(torch.equal(a, b) for a, b in zip(states, inner, strict=True))


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_checkpointed_blocks_have_the_same_gradients(pair, options):
    _, hf = pair
    hf.train()
    ids, calls = tokens(70), []
    parameters = [p for p in hf.parameters()]
    expected = torch.autograd.grad(hf(ids, labels=ids).loss, parameters, materialize_grads=True)
    hf.gradient_checkpointing_enable(options)
    hf.model.blocks[1].ln1.register_forward_hook(lambda *_: calls.append(1))
    loss = hf(ids, labels=ids).loss
    assert hf.is_gradient_checkpointing and len(calls) == 1
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    assert len(calls) >= 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    hf.gradient_checkpointing_disable()
    assert not hf.is_gradient_checkpointing


# --- Vocabularies and adapters


def test_a_table_of_tokens_can_grow(tmp_path):
    save_model(PHASE2.model(), tmp_path)
    hf = Phase2ForCausalLM.from_pretrained(tmp_path)
    ids = tokens(30)
    before = hf(ids).logits
    hf.resize_token_embeddings(110)
    assert hf.config.to_dataclass().vocab_size == hf.model.vocab_size == 110
    assert_close(hf(ids).logits[..., :97], before)
    assert hf(torch.full((1, 5), 109)).logits.shape == (1, 5, 110)
    hf.save_pretrained(tmp_path / "grown")
    assert torch.equal(load_model(tmp_path / "grown", "cpu")(ids), hf(ids).logits)


def test_tensor_train_embedding_is_kept(tmp_path):
    save_model(PHASE1.model(), tmp_path)
    hf = Phase1ForCausalLM.from_pretrained(tmp_path)
    assert isinstance(hf.get_input_embeddings(), TensorTrainEmbedding)
    with pytest.raises(ConfigError, match="must be a table to be resized, got a TensorTrainEmbedding"):
        hf.resize_token_embeddings(128)


def test_models_are_copied_and_pickled(pair):
    """``torch.save`` of a model, processes that are spawned with it, and copies of it while it reads."""
    _, hf = pair
    ids = tokens(30)
    with torch.no_grad():
        expected = hf(ids)
    for again in (pickle.loads(pickle.dumps(hf)), copy.deepcopy(hf)):
        assert torch.equal(again(ids).logits, expected.logits) and again.config == hf.config
    for cache in (pickle.loads(pickle.dumps(expected.past_key_values)), copy.deepcopy(expected.past_key_values)):
        assert cache.get_seq_length() == 30
        kept = copy.copy(expected.past_key_values)
        assert torch.equal(hf(ids, past_key_values=cache).logits, hf(ids, past_key_values=kept).logits)


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "out_proj"]])
def test_adapters_act_on_all_targets(pair, targets, tmp_path):
    peft = pytest.importorskip("peft") if not os.environ.get("CI") else __import__("peft")
    model, hf = pair
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(hf, config).train()
    ids = tokens(70)
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.any() for p in trained)
    adapted.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    logits = adapted(input_ids=ids).logits
    assert (logits - model(ids)).abs().max() > 0.1
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=ids).logits, logits)
    assert torch.equal(again.generate(input_ids=ids, **GREEDY), adapted.generate(input_ids=ids, **GREEDY))
    assert_close(again.merge_and_unload()(ids).logits, logits)
