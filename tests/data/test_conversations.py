"""Conversations as streams: labels computed by hand; packed windows; errors that name the conversation."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from resolvent.data import EOT, PackedBatches, TokenStream, build_tokenizer
from resolvent.data.cache import TokenCache
from resolvent.data.chat_template import ChatTemplate
from resolvent.data.conversations import Conversations
from resolvent.data.stream import inputs_and_labels, token_ids
from resolvent.errors import DataError
from resolvent.ops import IGNORED

END = 256
"""The id of `<|endoftext|>`; those of other tokens are bytes."""
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}"
    "{{ message.content if loop.last or message.role == 'user' else '(said)' }}{{ eos_token }}"
    "{% endfor %}"
)


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(path: Path, *conversations: Any) -> Path:
    path.write_text("".join(json.dumps({"messages": messages, "id": 7}) + "\n" for messages in conversations))
    return path


def template(source: str | None = None, tokenizer: Tokenizer | None = None) -> ChatTemplate:
    tokenizer = tokenizer or build_tokenizer("bytes", [])
    if source is None:
        return ChatTemplate.default(tokenizer)
    special = {"bos_token": EOT, "eos_token": "<|im_end|>"}
    return ChatTemplate(source, tokenizer, special, frozenset([tokenizer.token_to_id("<|im_end|>")]))


def stream(path: Path, cache: Path, **options: Any) -> TokenStream:
    text, tokenizer = Conversations([str(path)], template(**options)), options.get("tokenizer")
    return TokenCache(cache).tokens(text, tokenizer or build_tokenizer("bytes", []), None).streams["train"]


def test_labels_equal_a_mask_computed_by_hand(tmp_path: Path):
    talk = [{"role": "system", "content": "S"}, *turn("Hi", "Yo!"), *turn("1", "é")]
    found = stream(write(tmp_path / "chat.jsonl", talk, turn("a", "b")), tmp_path / "cache")
    ids = [
        *(END, *b"System:\nS\n\nUser:\nHi\n\nAssistant:\nYo!", END, *b"\n\n"),
        *(*b"User:\n1\n\nAssistant:\n\xc3\xa9", END, *b"\n\n"),
        *(END, *b"User:\na\n\nAssistant:\nb", END, *b"\n\n"),
        END,
    ]
    # Of "System:\nS\n\n" 11 bytes, "User:\nHi\n\n" 10, "Assistant:\n" 11, and <|endoftext|> before them are read only.
    written = [0] * 33 + [1] * 4 + [0] * (2 + 9 + 11) + [1] * 3 + [0] * 2 + [0] * (1 + 9 + 11) + [1] * 2 + [0] * 3
    assert token_ids(found.tokens[:]).tolist() == ids
    inputs, labels = inputs_and_labels(found.tokens[:])
    assert inputs.tolist() == ids[:-1]
    assert labels.tolist() == [i if write else IGNORED for i, write in zip(ids[1:], written[1:], strict=True)]
    assert found.starts.tolist() == [0, 64]
    assert found.byte_lengths.tolist() == [5, 1]
    assert found.count_targets() == 4 + 3 + 2


def test_template_of_transformers_decides_the_end_of_an_answer(tmp_path: Path):
    tokenizer = build_tokenizer("bytes", [])
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    path = write(tmp_path / "chat.jsonl", turn("Say <|im_end|>", "No <|im_end|>"))
    found = stream(path, tmp_path / "cache", source=CHATML, tokenizer=tokenizer)
    _, labels = inputs_and_labels(found.tokens[:])
    predicted = labels[labels != IGNORED]
    assert predicted.tolist() == [*b"No <|im_end|>", 258]
    assert token_ids(found.tokens[:]).tolist()[0] == 257  # as the server reads it: no separator before the template


def test_window_keeps_conversations_apart_and_predicts_answers_only(tmp_path: Path):
    talks = [turn(f"q{number}", f"answer {number}") for number in range(20)]
    found = stream(write(tmp_path / "chat.jsonl", *talks), tmp_path / "cache")
    for step in range(30):
        batch = PackedBatches(found, seq_len=100, batch_size=2, seed=3)[step]
        inputs, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
        bounds = batch.cu_seqlens.tolist()
        assert {0, 100, 200} <= set(bounds)
        for start, end in pairwise(bounds):
            said = bytes(token for token in labels[start:end] if 0 <= token < END)
            whole = bytes(token for token in inputs[start:end] if token < END)
            if inputs[start] != END or not whole.startswith(
                b"User:\nq"
            ):  # the rest of a conversation, without its question
                assert said == b""
            elif end not in (100, 200):
                assert said == b"answer " + whole[7 : whole.index(b"\n\n")]


def test_conversation_longer_than_a_window_is_predicted_in_all_its_windows(tmp_path: Path):
    found = stream(write(tmp_path / "chat.jsonl", turn("q", "x" * 500)), tmp_path / "cache")
    batch = PackedBatches(found, seq_len=50, batch_size=found.num_predictions // 50, seed=1)[0]
    assert int((batch.labels != IGNORED).sum()) > 440


def test_split_keeps_conversations_whole(tmp_path: Path):
    talks = [turn(f"question {number}", "word " * (1 + number % 5)) for number in range(40)]
    text = Conversations([str(write(tmp_path / "chat.jsonl", *talks))], template())
    folder = TokenCache(tmp_path / "cache").tokens(text, build_tokenizer("bytes", []), 0.25)
    train, held_out = folder.streams["train"], folder.streams["held-out"]
    assert train.num_documents + held_out.num_documents == 40
    share = held_out.num_bytes / (train.num_bytes + held_out.num_bytes)
    assert share == pytest.approx(0.25, abs=0.06)
    for part in (train, held_out):
        assert part.tokens[-1] == ~END
        assert (token_ids(part.tokens[part.starts]) == END).all()


def test_another_template_makes_other_tokens_from_the_same_cache(tmp_path: Path):
    path = write(tmp_path / "chat.jsonl", turn("a", "b"))
    tokenizer = build_tokenizer("bytes", [])
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    ours = stream(path, tmp_path / "cache", tokenizer=tokenizer)
    theirs = stream(path, tmp_path / "cache", source=CHATML, tokenizer=tokenizer)
    assert len(ours.tokens) != len(theirs.tokens)
    again = stream(path, tmp_path / "cache", tokenizer=tokenizer)
    assert np.array_equal(again.tokens[:], ours.tokens[:])


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ("Hi", "must be a list of objects"),
        ([{"role": "user"}], "must be a list of objects"),
        ([{"role": "user", "content": 1e3}], "must be a list of objects"),
        ([{"role": "user", "content": "Hi"}], "has words to learn"),
        (
            [*turn("a", "b"), {"role": "narrator", "content": "c"}, *turn("d", "e")],
            "does not take these messages: unknown role: narrator",
        ),
    ],
)
def test_error_names_the_conversation(messages: Any, fault: str, tmp_path: Path):
    path = write(tmp_path / "chat.jsonl", turn("a", "b"), messages)
    with pytest.raises(DataError, match=rf"chat\.jsonl: conversation 2: .*{fault}"):
        stream(path, tmp_path / "cache")


def test_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path):
    tokenizer = build_tokenizer("bytes", [])
    tokenizer.add_special_tokens(["<|im_end|>"])
    path = write(tmp_path / "chat.jsonl", [*turn("a", "b"), *turn("c", "d")])
    with pytest.raises(DataError, match="conversation 1: the chat template writes the turns before message 4"):
        stream(path, tmp_path / "cache", source=FORGETFUL, tokenizer=tokenizer)


def test_plain_text_is_refused(tmp_path: Path):
    path = tmp_path / "chat.txt"
    path.write_text("User: Hi\n")
    with pytest.raises(DataError, match="not JSON"):
        stream(path, tmp_path / "cache")


def test_saved_template_is_the_one_that_is_loaded(tmp_path: Path):
    from resolvent.data import save_tokenizer

    tokenizer = build_tokenizer("bytes", [])
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    save_tokenizer(tokenizer, tmp_path)
    for made in (template(CHATML, tokenizer), template(tokenizer=tokenizer)):
        made.save(tmp_path)
        loaded = ChatTemplate.load(tmp_path, tokenizer)
        assert loaded.render(turn("a", "b")).text == made.render(turn("a", "b")).text
        assert made.ends <= loaded.ends
