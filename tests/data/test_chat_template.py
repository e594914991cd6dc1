"""Chat templates: rendered as Transformers renders them; only a template makes special tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from resolvent.data import EOT, build_tokenizer
from resolvent.data.chat_template import DEFAULT, ChatTemplate, end_tokens
from resolvent.errors import CheckpointError, DataError

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRICKY = (
    "{% for message in messages %}\n"
    "    {%- if message.role == 'user' %}\n"
    "        [{{ message.content | trim | tojson }}]\n"
    "    {% else %}\n"
    "        {% continue %}\n"
    "    {% endif %}\n"
    "{% endfor %}"
)
MESSAGES = [
    {"role": "user", "content": "Who <|im_end|> are <|endoftext|> you? née"},
    {"role": "assistant", "content": 'I am "<b>" a model.'},
    {"role": "user", "content": " 日本 "},
]


def tokenizer() -> Tokenizer:
    made = build_tokenizer("bytes", [])
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return made


def folder(path: Path, template: str | None = None, **settings: Any) -> Path:
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


@pytest.mark.parametrize("source", [CHATML, TRICKY, DEFAULT], ids=["chatml", "tricky", "default"])
@pytest.mark.parametrize("answer", [True, False])
def test_text_equals_that_of_transformers(source: str, answer: bool, tmp_path: Path):
    from transformers import PreTrainedTokenizerFast

    settings = dict(bos_token=EOT, eos_token="<|im_end|>")
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), chat_template=source, **settings)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=answer)
    assert (
        ChatTemplate.load(folder(tmp_path, source, **settings), tokenizer()).render(MESSAGES, answer=answer).text
        == expected
    )


def test_only_the_template_makes_special_tokens(tmp_path: Path):
    made = tokenizer()
    template = ChatTemplate.load(folder(tmp_path, CHATML), made)
    rendered = template.render(MESSAGES)
    ids = template.encode(rendered)
    start, end = map(made.token_to_id, ("<|im_start|>", "<|im_end|>"))
    assert (ids.count(start), ids.count(end), ids.count(256)) == (5, 4, 0)
    assert made.decode(ids, skip_special_tokens=False) == rendered.text


def test_rest_of_a_conversation_continues_its_beginning(tmp_path: Path):
    template = ChatTemplate.load(folder(tmp_path, CHATML), tokenizer())
    read, whole = template.render(MESSAGES[:1]), template.render(MESSAGES)
    assert template.encode(read) + template.encode(whole, after=read.text) == template.encode(whole)
    with pytest.raises(ValueError, match="does not begin with"):
        template.encode(whole, after=read.text + "x")


@pytest.mark.parametrize("as_list", [False, True])
def test_template_may_be_in_the_settings(as_list: bool, tmp_path: Path):
    source: Any = [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}] if as_list else CHATML
    template = ChatTemplate.load(folder(tmp_path, chat_template=source), tokenizer())
    assert template.render(MESSAGES[:1]).text.startswith("<|im_start|>system\nBe kind.")
    assert template.stop == ()


def test_answer_ends_with_the_tokens_that_the_folder_names(tmp_path: Path):
    made = tokenizer()
    folder(tmp_path, eos_token={"content": "<|im_end|>"})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 65]}))
    assert ChatTemplate.load(tmp_path, made).ends == {256, 65, made.token_to_id("<|im_end|>")}


def test_folder_without_a_template_has_the_default(tmp_path: Path):
    template = ChatTemplate.load(tmp_path, tokenizer())
    assert template.stop and template.ends == {256}
    assert template.render(MESSAGES[:1]).text == f"{EOT}User:\n{MESSAGES[0]['content']}\n\nAssistant:\n"


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('only users') }}", "{{ messages[9].content.x }}", "{{ ''.__class__.__mro__ }}"]
)
def test_template_that_does_not_take_the_messages_is_named(source: str, tmp_path: Path):
    template = ChatTemplate.load(folder(tmp_path, source), tokenizer())
    with pytest.raises(DataError, match="the chat template does not take these messages"):
        template.render(MESSAGES)


def test_template_that_is_not_jinja_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="not valid Jinja"):
        ChatTemplate.load(folder(tmp_path, "{% for %}"), tokenizer())
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="cannot read the chat template"):
        ChatTemplate.load(tmp_path, tokenizer())


def test_end_tokens_are_those_of_the_folder_and_the_separator(tmp_path: Path):
    made = tokenizer()
    eot, end = made.token_to_id(EOT), made.token_to_id("<|im_end|>")
    assert end_tokens(tmp_path, made) == {eot}
    assert end_tokens(folder(tmp_path, eos_token="<|im_end|>"), made) == {eot, end}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, end]}))
    assert end_tokens(tmp_path, made) == {7, eot, end}
