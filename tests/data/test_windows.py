from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resolvent.data import PackedBatches, TokenStream, build_tokenizer, documents_as_windows, encode_documents
from resolvent.errors import ConfigError, DataError


def stream_of(lengths):
    """Documents of the given numbers of tokens, each token its own position, so that a batch shows where it is from."""
    lengths = np.array(lengths)
    starts = np.cumsum(lengths + 1) - lengths - 1
    tokens = np.arange(lengths.sum() + len(lengths) + 1, dtype=np.uint32)
    return TokenStream(tokens, starts.astype(np.int64), lengths.astype(np.int64))


STREAMS = st.lists(st.integers(0, 12), min_size=1, max_size=12).map(stream_of)


@st.composite
def packings(draw):
    stream = draw(STREAMS)
    seq_len = draw(st.integers(1, stream.num_predictions))
    return PackedBatches(stream, seq_len, draw(st.integers(1, 5)), draw(st.integers(0, 3)))


def rows(batch, seq_len):
    return [tuple(row) for row in batch.input_ids.view(-1, seq_len).tolist()]


def windows(batches, first, count):
    """`count` windows from number `first` on, in the order in which training meets them."""
    steps = range(first // batches.batch_size, -(-(first + count) // batches.batch_size))
    flat = [row for step in steps for row in rows(batches[step], batches.seq_len)]
    skipped = first - steps.start * batches.batch_size
    return flat[skipped : skipped + count]


def epoch(batches, number):
    size = batches.windows_per_epoch
    return windows(batches, number * size, size)


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@given(packings(), st.integers(0, 20))
def test_labels_are_the_next_tokens_and_segments_restart_at_windows_and_documents(batches, step):
    batch = batches[step]
    length = batches.tokens_per_batch
    assert length == batches.batch_size * batches.seq_len
    assert batch.input_ids.shape == batch.labels.shape == (1, length)
    assert {tensor.dtype for tensor in batch} == {torch.int64}
    assert torch.equal(batch.labels, batch.input_ids + 1), "each token is its position in the stream"

    opening = set(batches.stream.starts.tolist())
    inputs = batch.input_ids[0].tolist()
    bounds = [i for i in range(length) if i % batches.seq_len == 0 or inputs[i] in opening]
    assert batch.cu_seqlens.tolist() == [*bounds, length]


@given(packings(), st.integers(0, 20))
def test_segments_are_runs_of_one_document(batches, step):
    batch = batches[step]
    for first, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        segment = batch.input_ids[0, first:end]
        assert 0 < len(segment) <= batches.seq_len
        assert torch.equal(segment, segment[0] + torch.arange(end - first))
        documents = np.searchsorted(batches.stream.starts, segment.numpy(), side="right")
        assert len(set(documents)) == 1


@given(packings(), st.integers(0, 4))
def test_an_epoch_uses_every_window_exactly_once(batches, number):
    seen = epoch(batches, number)
    counts = Counter(position for window in seen for position in window)
    assert set(counts.values()) == {1}, "no token is predicted twice"
    assert len(seen) == batches.windows_per_epoch
    left_out = batches.stream.num_predictions - len(counts)
    assert 0 <= left_out < batches.seq_len, "what is left out is shorter than a window"

    # The windows tile a ring: each ends where another begins, but for the one before the rest left out.
    ring = batches.stream.num_predictions
    firsts = {window[0] for window in seen}
    ends = {(window[-1] + 1) % ring for window in seen}
    assert len(ends - firsts) == (1 if left_out else 0)


@given(packings(), st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_random_access_equals_sequential(batches, steps):
    sequential = [batches[step] for step in range(max(steps) + 1)]
    for step in steps:
        assert same(batches[step], sequential[step])
        fresh = PackedBatches(batches.stream, batches.seq_len, batches.batch_size, batches.seed)
        assert same(fresh[step], sequential[step])


@given(packings(), st.integers(1, 4))
def test_batch_size_only_groups(batches, batch_size):
    other = PackedBatches(batches.stream, batches.seq_len, batch_size, batches.seed)
    assert windows(batches, 0, 20) == windows(other, 0, 20)


def test_iteration_goes_through_the_steps():
    batches = PackedBatches(stream_of([30]), seq_len=4, batch_size=3)
    for step, batch in zip(range(10), batches, strict=False):
        assert same(batch, batches[step])


def test_epochs_and_seeds_differ_in_cut_and_order():
    stream = stream_of([50] * 20)
    batches = PackedBatches(stream, seq_len=8, batch_size=4, seed=5)
    other = PackedBatches(stream, seq_len=8, batch_size=4, seed=6)
    cuts = [epoch(batches, 0), epoch(batches, 1), epoch(batches, 2), epoch(other, 0), epoch(other, 1)]
    assert len({tuple(cut) for cut in cuts}) == len(cuts)
    assert len({cut[0][0] % 8 for cut in cuts}) > 1, "windows begin elsewhere"
    for cut in cuts:
        neighbours = sum(before[-1] + 1 == after[0] for before, after in pairwise(cut))
        assert neighbours < len(cut) / 10, "windows are shuffled"


def test_a_batch_takes_windows_of_the_next_epoch():
    batches = PackedBatches(stream_of([20]), seq_len=7, batch_size=2)
    assert batches.windows_per_epoch == 3
    assert rows(batches[1], 7) == [epoch(batches, 0)[2], epoch(batches, 1)[0]]


def test_a_batch_may_be_larger_than_an_epoch():
    batches = PackedBatches(stream_of([10]), seq_len=11, batch_size=4)
    assert batches.windows_per_epoch == 1
    for row in rows(batches[3], 11):
        assert sorted(row) == list(range(11))


def test_a_long_run_keeps_going():
    batches = PackedBatches(stream_of([30] * 3), seq_len=16, batch_size=8)
    assert batches[10**9].input_ids.shape == (1, 128)


def test_text_reaches_the_batches():
    tokenizer = build_tokenizer("bytes", [])
    batches = PackedBatches(encode_documents(["abc", "de"], tokenizer), seq_len=7, batch_size=1)
    ring = [256, *b"abc", 256, *b"de", 256]
    batch = batches[0]
    predictions = zip(batch.input_ids[0].tolist(), batch.labels[0].tolist(), strict=True)
    assert sorted(predictions) == sorted(pairwise(ring))


@given(packings(), st.integers(0, 20))
def test_padding_adds_empty_segments_up_to_a_power_of_two(batches, step):
    batch = batches[step]
    padded = batch.padded()
    assert same(padded[:2], batch[:2])
    segments, given = len(padded.cu_seqlens) - 1, len(batch.cu_seqlens) - 1
    assert segments >= max(2, given) and segments.bit_count() == 1
    assert segments == 2 or segments < 2 * given
    assert padded.cu_seqlens.tolist() == batch.cu_seqlens.tolist() + [batches.tokens_per_batch] * (segments - given)


def test_to_device():
    batch = PackedBatches(stream_of([10]), seq_len=4, batch_size=2)[0].to("meta")
    assert {tensor.device.type for tensor in batch} == {"meta"}


def test_data_shorter_than_a_window():
    stream = stream_of([3, 4])
    PackedBatches(stream, seq_len=9)
    with pytest.raises(
        DataError, match=r"has 9 tokens to read.*seq_len=10 needs 10; give more text, or a seq_len \(--seq-len\) of"
    ):
        PackedBatches(stream, seq_len=10)


@pytest.mark.parametrize(("name", "value", "least"), [("seq_len", 0, 1), ("batch_size", -1, 1), ("seed", -3, 0)])
def test_arguments_out_of_range(name, value, least):
    with pytest.raises(ConfigError, match=f"{name} must be >= {least}, got {value}"):
        PackedBatches(stream_of([300]), **{name: value})


def test_negative_step():
    with pytest.raises(IndexError, match="step must be >= 0, got -1"):
        PackedBatches(stream_of([300]))[-1]


# --- evaluation ------------------------------------------------------------------------------------------------------


@given(STREAMS, st.integers(1, 40))
def test_evaluation_predicts_every_token_once_within_its_budget(stream, max_tokens):
    batches = list(documents_as_windows(stream, max_tokens))
    inputs = torch.cat([batch.input_ids[0] for batch in batches])
    labels = torch.cat([batch.labels[0] for batch in batches])
    assert inputs.tolist() == list(range(stream.num_predictions))
    assert labels.tolist() == list(range(1, stream.num_predictions + 1))
    segments = [batch.input_ids[0, i].item() for batch in batches for i in batch.cu_seqlens[:-1].tolist()]
    assert set(stream.starts.tolist()) <= set(segments), "no segment reads on over the end of a document"
    lengths = np.diff(stream.starts, append=stream.num_predictions)
    assert len(segments) == sum(-(-length // max_tokens) for length in lengths), "only longer documents are cut"
    for batch in batches:
        length = batch.input_ids.shape[1]
        assert batch.cu_seqlens[0] == 0
        assert batch.cu_seqlens[-1] == length
        assert length <= max_tokens


def test_evaluation_fills_the_budget():
    sizes = [batch.input_ids.shape[1] for batch in documents_as_windows(stream_of([3, 3, 3, 20, 3, 3]), max_tokens=8)]
    assert sizes == [8, 4, 8, 8, 5, 8]


def test_evaluation_budget_out_of_range():
    with pytest.raises(ConfigError, match="max_tokens must be >= 1, got 0"):
        next(documents_as_windows(stream_of([3]), 0))
