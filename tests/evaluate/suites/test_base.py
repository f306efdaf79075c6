"""Samples fill their length and no more, and each is drawn for itself."""

import random
from typing import Any

import pytest

from angelslim.base.errors import DataError
from angelslim.evaluate.suites.base import Sample, Task, samples, tokens_of, written
from angelslim.evaluate.suites.scorers import string_match_all


def words(rng: random.Random, size: int) -> Sample:
    return Sample("w" * rng.randint(1, 3) * size, ("a",), " The answer is")


TASK = Task("words", words, 16, string_match_all)


def test_a_sample_has_at_most_its_length_and_nearly_that(tokenizer: Any) -> None:
    for length in (200, 1000):
        found = [len(tokens_of(tokenizer, sample)) + 16 for sample in samples(TASK, tokenizer, length, 8)]
        assert max(found) <= length
        assert max(found) > length - 24


def test_ten_samples_begin_a_hundred(tokenizer: Any) -> None:
    assert samples(TASK, tokenizer, 300, 3, seed=1) == samples(TASK, tokenizer, 300, 6, seed=1)[:3]
    assert samples(TASK, tokenizer, 300, 6, seed=1) != samples(TASK, tokenizer, 300, 6, seed=2)


def test_a_length_without_room_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="60 tokens"):
        samples(TASK, tokenizer, 60, 1)


def test_the_answer_begins_behind_the_chat_format(tokenizer: Any) -> None:
    sample = Sample("Who?", ("I",), " It is")
    assert written(tokenizer, sample).endswith("</think>\n\nIt is")
    assert written(tokenizer, sample, chat=False) == "Who? It is"
