"""Phase 2 on CUDA: results of the CPU, captured steps, and passes that never synchronize."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from resolvent.errors import ResolventError
from resolvent.models import generation
from resolvent.models.phase2 import Phase2IntegratedModel, get_phase2_preset

from .conftest import small_model

pytestmark = pytest.mark.gpu


def pair(**options):
    here = small_model(spread=0.1, **options)
    return here, copy.deepcopy(here).cuda()


def close(found, expected):
    return (found.cpu() - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("packed", [False, True])
def test_logits_and_gradients_equal_cpu(packed):
    here, there = pair()
    ids = torch.randint(0, 97, (1, 300))
    options = {"cu_seqlens": torch.tensor([0, 5, 130, 300])} if packed else {}
    expected, found = here(ids, **options), there(ids.cuda(), **options)
    assert close(found, expected)
    expected.square().mean().backward()
    found.square().mean().backward()
    a = torch.cat([p.grad.flatten() for p in here.parameters()])
    b = torch.cat([p.grad.cpu().flatten() for p in there.parameters()])
    assert (a - b).norm() / a.norm() < 1e-2


@torch.no_grad()
def test_streaming_moved_states_and_generation():
    here, there = pair()
    ids = torch.randint(0, 97, (2, 150))
    expected, last = here(ids, return_state=True)
    logits, state = there(ids[:, :100].cuda(), return_state=True)
    more, state = there(ids[:, 100:].cuda(), state=state, return_state=True)
    assert close(torch.cat([logits, more], 1), expected)
    assert close(state.layers[1].memory.memory, last.layers[1].memory.memory)
    assert close(there(ids.cuda(), state=last.to("cuda")), here(ids, state=last))
    with pytest.raises(ValueError, match=r"use state\.to"):
        there(ids.cuda(), state=last)
    mask = torch.ones(2, 150)
    mask[0, :40] = 0
    assert close(there(ids.cuda(), attention_mask=mask.cuda())[0, 40:], here(ids[:1, 40:])[0])
    assert torch.equal(
        there.generate(ids.cuda(), 30, temperature=0).cpu()[:, :160], here.generate(ids, 30, temperature=0)[:, :160]
    )


@pytest.mark.parametrize("kernels", [True, False])
def test_captured_step_equals_single_steps(kernels, monkeypatch):
    _, there = pair(**({} if kernels else {"backend": "torch"}))
    prompts, mask = torch.randint(0, 97, (3, 50), device="cuda"), torch.ones(3, 50, device="cuda")
    mask[1, :21] = 0  # rows reach their boundaries at different steps
    captured = there.generate(prompts, 150, temperature=0, attention_mask=mask)
    monkeypatch.setattr(generation, "WORTH_CAPTURING", 1000)
    assert torch.equal(there.generate(prompts, 150, temperature=0, attention_mask=mask), captured)


@pytest.mark.parametrize("own", [True, False], ids=["generator of its own", "the device's generator"])
def test_threads_capture_steps_concurrently(own):
    """Threads with a generator of their own draw what they draw alone; all can share that of the device."""
    _, there = pair(dropout=0.3)
    there.train()

    def write(seed):
        prompt = torch.full((1, 9), seed, device="cuda")
        generator = torch.Generator("cuda").manual_seed(seed) if own else None
        return there.generate(prompt, generation.WORTH_CAPTURING + 20, generator=generator)

    alone = [write(seed) for seed in range(10)]
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(write, range(10)))
    assert there.training
    assert all(a.shape == b.shape and (not own or torch.equal(a, b)) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_nonfinite_weights_raise(temperature):
    _, there = pair()
    there.ln_f.weight.data[3] = torch.nan
    with pytest.raises(ResolventError, match="row 0 is nan"):
        there.generate(torch.zeros(2, 3, dtype=torch.long, device="cuda"), 5, temperature=temperature)


def test_offsets_on_the_device_equal_offsets_on_the_cpu():
    _, there = pair()
    ids, labels = torch.randint(0, 97, (2, 1, 300), device="cuda")
    offsets = torch.tensor([0, 5, 130, 130, 300])
    results = []
    for place in ("cpu", "cuda"):
        there.zero_grad()
        loss, state = there(ids, labels=labels, cu_seqlens=offsets.to(place), return_state=True)
        loss.backward()
        results.append([loss, *state.tensors()[1:], *(p.grad for p in there.parameters() if p.grad is not None)])
        assert state.position.tolist() == [5, 125, 0, 170]
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_empty_sequences_at_the_end_change_nothing(place):
    _, there = pair()
    ids, labels = torch.randint(0, 97, (2, 1, 300), device="cuda")
    results = []
    for offsets in ([0, 5, 130, 300], [0, 5, 130, 300, 300, 300, 300, 300, 300]):
        there.zero_grad()
        loss = there(ids, labels=labels, cu_seqlens=torch.tensor(offsets, device=place))
        loss.backward()
        results.append([loss, *(p.grad for p in there.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7


def test_replayed_step_reads_new_offsets():
    """A graph recorded with the first offsets must read the next ones."""
    _, there = pair()
    torch._dynamo.reset()
    replayed = torch.compile(there, fullgraph=True, mode="reduce-overhead")
    ids, labels = torch.randint(0, 97, (2, 1, 300), device="cuda")
    losses = []
    # Two numbers of sequences: the first time each is warmed up, the second time recorded, then replayed.
    for number in range(10):
        offsets = torch.tensor([0, 20 + 9 * number, 200 - number, *([300] if number % 2 else [250, 300, 300])])
        results = []
        for model in (there, replayed):
            torch.compiler.cudagraph_mark_step_begin()
            there.zero_grad()
            on_device = offsets.cuda()
            torch._dynamo.mark_dynamic(on_device, 0)
            loss = model(ids, labels=labels, cu_seqlens=on_device)
            loss.backward()
            gradients = [p.grad for p in there.parameters() if p.grad is not None]
            results.append([x.detach().clone() for x in (loss, *gradients)])
        (loss, *expected), (found, *gradients) = results
        assert (found - loss).abs() <= 1e-4 * loss, number
        for a, b in zip(gradients, expected, strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6, number
        losses.append(loss.item())
    assert max(losses) / min(losses) > 1.002, "the offsets must matter for this test to see anything"


def test_packed_step_with_offsets_on_the_device_never_synchronizes():
    _, there = pair()
    ids, labels = torch.randint(0, 97, (2, 1, 256), device="cuda")
    offsets = [torch.tensor(x, device="cuda") for x in ([0, 100, 256], [0, 7, 256])]
    there(ids, labels=labels, cu_seqlens=offsets[0]).backward()  # tables that are made once may synchronize
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there(ids, labels=labels, cu_seqlens=offsets[1]).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_step_never_synchronizes():
    _, there = pair()
    ids, labels = torch.randint(0, 97, (2, 1, 256), device="cuda")
    there(ids, labels=labels).backward()  # tables that are made once may synchronize
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there(ids, labels=labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_compiled_hybrid_gradients_equal_eager():
    config = dataclasses.replace(get_phase2_preset("base-hybrid"), n_layers=3, attention_layers=(2,), dropout=0.0)
    model = Phase2IntegratedModel(config).cuda()
    ids, labels = torch.randint(0, config.vocab_size, (2, 2, 1024), device="cuda")
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(ids, labels=labels)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[1] - gradients[0]).norm() < 2e-2 * gradients[0].norm()


def test_bfloat16_autocast_trains():
    _, there = pair(dropout=0.1)
    there.train()
    optimizer = torch.optim.AdamW(there.parameters(), lr=3e-3, fused=True)
    ids = torch.randint(0, 97, (4, 200), device="cuda")
    losses = []
    for _ in range(100):
        with torch.autocast("cuda", torch.bfloat16):
            logits = there(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
