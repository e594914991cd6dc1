import math

import pytest

from resolvent.data import build_tokenizer
from resolvent.errors import DataError
from resolvent.inspection import inspect_model
from resolvent.inspection.words import compare, word_numbers
from tests.data.test_detokenization import metaspace
from tests.models.small import PHASE2

TEXT = "the nation a law of the people"


def test_tokens_belong_to_the_word_of_their_last_character():
    assert word_numbers(["<|endoftext|>", "The", " c", "at", "\n", "\n", " sat"]) == [0, 1, 2, 2, 3, 3, 3]
    assert word_numbers(["<|endoftext|>", *"a bc "]) == [0, 1, 2, 2, 2, 3]


def test_part_of_a_character_belongs_to_the_next_word():
    assert word_numbers(["<|endoftext|>", "a", " ", "", "è"]) == [0, 1, 2, 2, 2]


def test_a_text_of_parts_of_characters():
    assert word_numbers(["<|endoftext|>", ""]) == [0, 1]


def test_losses_of_words_add_up_for_different_tokenizers():
    tokenizer = metaspace()
    pieces = inspect_model(PHASE2.model(vocab_size=tokenizer.get_vocab_size()), tokenizer, TEXT)
    single = inspect_model(PHASE2.model(vocab_size=257), build_tokenizer("bytes", []), " " + TEXT)
    found = compare(pieces, single)
    assert "".join(found.words) == " " + TEXT
    for row, inspection, bits in zip(found.nats, (pieces, single), found.bits_per_byte, strict=True):
        assert sum(row) == pytest.approx(sum(inspection.nats), rel=1e-3)
        assert bits == pytest.approx(sum(row) / len(" " + TEXT) / math.log(2), rel=1e-3)


def test_a_word_that_one_model_read_in_part_is_left_out():
    model, tokenizer = PHASE2.model(vocab_size=257), build_tokenizer("bytes", [])
    whole, short = inspect_model(model, tokenizer, TEXT), inspect_model(model, tokenizer, TEXT, length=8)
    assert compare(whole, short).words == ["the"]


def test_texts_without_a_common_word_are_refused():
    model, tokenizer = PHASE2.model(vocab_size=257), build_tokenizer("bytes", [])
    with pytest.raises(DataError, match="common word"):
        compare(inspect_model(model, tokenizer, TEXT), inspect_model(model, tokenizer, "another text"))
