"""Bodies of requests: one fault is reported, not one for every item of a list, which would take the server seconds."""

import json

import pytest
from pydantic import ValidationError

from resolvent.serving.schemas import ChatBody, CompletionBody

MANY = 3000


@pytest.mark.parametrize(
    "prompt",
    [[1] + ["a"] * MANY, ["a"] * MANY, [[1]] * MANY, [["a"]] * MANY, [[1] + ["a"] * MANY], [True] * MANY, [{}] * MANY],
    ids=lambda prompt: str(prompt)[:20],
)
def test_wrong_prompt_is_one_fault(prompt: object):
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate_json(json.dumps({"model": "m", "prompt": prompt}))
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    "part",
    [
        {"messages": [5] * MANY},
        {"messages": [{"role": "x", "content": 1}] * MANY},
        {"messages": [{"role": "user", "content": [{}] * MANY}]},
        {"stop": [5] * MANY},
    ],
    ids=lambda part: str(part)[:30],
)
def test_wrong_list_is_few_faults(part: dict[str, object]):
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **part}
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate_json(json.dumps(body))
    assert caught.value.error_count() < 5


@pytest.mark.parametrize("prompt", ["", "a", [], ["a", "b"], [1, 2], [[1], [2, 3]], [1] * 100_000])
def test_every_kind_of_prompt_is_taken(prompt: object):
    body = CompletionBody.model_validate_json(json.dumps({"model": "m", "prompt": prompt}))
    assert body.prompt == prompt
