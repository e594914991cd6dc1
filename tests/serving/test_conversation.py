"""Conversations: a turn reads its own tokens; saved, undone and cut conversations equal those that were not."""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from resolvent.data import EOT, build_tokenizer
from resolvent.data.chat_template import ChatTemplate
from resolvent.errors import CheckpointError, ConfigError
from resolvent.models.sampling import SamplingOptions
from resolvent.serving.chat import Chat
from resolvent.serving.conversation import Conversation
from tests.models.small import FULL, HYBRID, PHASE1, PHASE2

TOKENIZER = build_tokenizer("bytes", [])


PHASES = dict(phase1=PHASE1, phase2=PHASE2, hybrid=HYBRID, full=FULL)
every_model = pytest.mark.parametrize("model", PHASES.values(), ids=PHASES.keys(), indirect=True)


@pytest.fixture(scope="module", params=[HYBRID], ids=["hybrid"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param.model(vocab_size=257)


def talk(model: Any, template: str | None = None, *, max_tokens: int = 15, stop: tuple[str, ...] = (), **options: Any):
    chat = ChatTemplate(template, TOKENIZER, {"bos_token": EOT, "eos_token": EOT}, frozenset({256}))
    chat.stop = stop
    sampling = SamplingOptions(**{"temperature": 0, **options})
    return Conversation(model, TOKENIZER, chat, seed=1, options=sampling, max_tokens=max_tokens)


def answer(conversation: Conversation, text: str) -> str:
    return "".join(conversation.say(text))


def encoded(conversation: Conversation, messages: list[dict[str, Any]], after: str = "") -> list[int]:
    return conversation._template.encode(conversation._template.render(messages), after=after)


@every_model
def test_answer_equals_generate_after_the_whole_conversation(model: Any):
    conversation = talk(model)
    for text in ("one", "two <|endoftext|>", "three née"):
        messages = [*conversation.messages, {"role": "user", "content": text}]
        read = conversation._read
        ids = torch.tensor([[*read.tokens, *encoded(conversation, messages, after=read.text)]])
        found = answer(conversation, text)
        new = model.generate(ids, 15, temperature=0, eos_token_id=256)[0, ids.shape[1] :].tolist()
        assert found == TOKENIZER.decode([token for token in new if token != 256])
        assert conversation.messages[-1] == {"role": "assistant", "content": found}


def test_turn_reads_its_own_tokens_however_long_the_conversation(model: Any):
    conversation, costs = talk(model, max_tokens=5), []
    for _ in range(12):
        answer(conversation, "hello")
        costs.append(conversation.cost)
    assert set(costs[1:]) == {1 + len("\n\nUser:\nhello\n\nAssistant:\n")}
    assert conversation.tokens > 12 * 20


def test_template_that_rewrites_earlier_turns_is_read_again(model: Any):
    source = "{{ messages | length }}{% for m in messages %}{{ m.content }}.{% endfor %}"
    conversation = talk(model, source)
    for text in ("a", "b"):
        answer(conversation, text)
        assert conversation.cost == len(encoded(conversation, conversation.messages[:-1]))


def test_answer_that_is_cut_counts_up_to_there(model: Any):
    whole = answer(talk(model, max_tokens=40), "hello")
    cut = whole[10:12]
    stopped, broken = talk(model, max_tokens=40, stop=(cut,)), talk(model, max_tokens=40)
    assert answer(stopped, "hello") == whole[: whole.index(cut)]
    pieces, shown = broken.say("hello"), ""
    while len(shown) < 10:
        shown += next(pieces)
    pieces.close()
    assert broken.messages[-1]["content"] == shown
    for conversation in (stopped, broken):
        answer(conversation, "go on")
        expected = talk(model, max_tokens=40, stop=conversation._template.stop)
        expected.messages = conversation.messages[:2]
        assert answer(expected, "go on") == conversation.messages[-1]["content"]
        assert expected.tokens == conversation.tokens


@every_model
def test_undone_turn_leaves_no_trace(model: Any):
    conversation, expected = talk(model), talk(model)
    for each in (conversation, expected):
        answer(each, "one")
    answer(conversation, "two")
    assert conversation.undo()
    assert answer(conversation, "three") == answer(expected, "three")
    assert conversation._read.tokens == expected._read.tokens
    assert conversation.cost == expected.cost
    assert conversation.undo() and conversation.undo() and not conversation.undo()
    assert conversation.messages == [] and conversation.tokens == 0


@every_model
def test_saved_conversation_goes_on_to_the_bit(model: Any, tmp_path: Path):
    conversation = talk(model)
    with pytest.raises(ConfigError, match="nothing to save"):
        conversation.save(tmp_path / "talk")
    answer(conversation, "one")
    conversation.save(tmp_path / "talk")
    other = talk(model)
    other.load(tmp_path / "talk")
    assert other.messages == conversation.messages
    for each in (conversation, other):
        answer(each, "two")
    assert other.messages == conversation.messages
    assert other.cost == conversation.cost
    pairs = zip(other._read.state.tensors(), conversation._read.state.tensors(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    read = type(conversation._read.state).load(tmp_path / "talk")  # a state as any other
    assert int(read.position) < other.tokens


def test_file_of_another_model_or_none_is_refused(model: Any, tmp_path: Path):
    conversation = talk(model)
    answer(conversation, "one")
    conversation.save(tmp_path / "talk")
    torch.manual_seed(9)
    with pytest.raises(CheckpointError, match="a conversation with another model, or with other --weights"):
        talk(PHASE2.model(vocab_size=257)).load(tmp_path / "talk")
    conversation._read.state.save(tmp_path / "state")
    with pytest.raises(CheckpointError, match="holds no conversation"):
        conversation.load(tmp_path / "state")
    (tmp_path / "talk").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot read"):
        conversation.load(tmp_path / "talk")
    assert len(conversation.messages) == 2


def test_system_message_is_read_with_the_next_turn(model: Any):
    conversation = talk(model)
    answer(conversation, "one")
    conversation.set_system("Be brief.")
    messages = [*conversation.messages, {"role": "user", "content": "two"}]
    answer(conversation, "two")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert conversation.cost == len(encoded(conversation, messages))
    conversation.set_system("")
    assert conversation.messages[0]["role"] == "user"


def lines(chat: Chat, *typed: str) -> Iterator[str]:
    for line in typed:
        yield "".join(chat.respond(line))


def test_commands_change_the_conversation(model: Any, tmp_path: Path):
    conversation = talk(model)
    chat = Chat(conversation)
    said = list(
        lines(chat, "hello", "", "/set temperature 0.7", "/set top_k 4", "/set top_k none", "/set max_tokens 3")
    )
    assert said == [conversation.messages[1]["content"] + "\n", "", *said[2:]]
    assert said[2:] == ["temperature is 0.7\n", "top_k is 4\n", "top_k is none\n", "max_tokens is 3\n"]
    assert conversation.options == SamplingOptions(temperature=0.7) and conversation.max_tokens == 3
    path = tmp_path / "a talk"
    saved, loaded = lines(chat, f"/save '{path}'", f"/load '{path}'")
    assert saved == f"Saved in {path}, after {conversation.tokens} tokens\n"
    assert loaded == f"Loaded {path}: 1 turn, {conversation.tokens} tokens\n"
    assert list(lines(chat, "/undo", "/undo")) == ["The last turn is taken back.\n", "There is no turn to take back.\n"]
    next(lines(chat, "/system Be brief."))
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert "/save FILE" in next(lines(chat, "/help"))
    assert not chat.over
    assert next(lines(chat, "/quit")) == "" and chat.over


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/dance", "there is no command /dance; /help lists them"),
        ("/set colour red", "there is no option 'colour'; there are repetition_penalty"),
        ("/set temperature hot", "temperature must be a number, got 'hot'"),
        ("/set temperature -1", "temperature must be >= 0 and finite, got -1.0"),
        ("/set top_k 1.5", "top_k must be a whole number, got '1.5'"),
        ("/set max_tokens 0", "max_tokens must be a whole number >= 1, got '0'"),
        ("/save", "name one FILE, with quotes where it has blanks; got 0 words"),
        ("/save 'a", "No closing quotation"),
        ("/load /missing/talk", "cannot read /missing/talk"),
        ("/save talk", "there is nothing to save: say something first"),
    ],
)
def test_wrong_command_is_named_and_changes_nothing(model: Any, line: str, told: str):
    conversation = talk(model)
    said = next(lines(Chat(conversation), line))
    assert said.startswith("Error: ") and told in said
    assert conversation.messages == [] and conversation.options == SamplingOptions(temperature=0)


@pytest.mark.slow
def test_first_token_of_turn_100_takes_the_time_of_turn_2(model: Any):
    """Turns of both conversations alternate, in time of this process."""
    conversations = [talk(model, max_tokens=16), talk(model, max_tokens=16)]
    question = "What is the capital of Orrin, and how far is the river from it?"
    for conversation, turns in zip(conversations, (1, 99), strict=True):
        for _ in range(turns):
            answer(conversation, question)
    ratios = []
    for _ in range(40):
        seconds = []
        for conversation in conversations:
            started = time.process_time()
            pieces = conversation.say(question)
            next(pieces, None)
            seconds.append(time.process_time() - started)
            pieces.close()
            conversation.undo()
        ratios.append(seconds[1] / seconds[0])
    assert statistics.median(ratios) < 1.1
