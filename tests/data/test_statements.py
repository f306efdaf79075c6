"""The words of tiny-long are all different and read as one word each."""

import re

from angelslim.data.statements import END, MARKERS, MOST_WORDS, REMEMBER, key_words, statement, value_words


def test_keys_values_and_markers_are_words_of_their_own() -> None:
    words = [*key_words(MOST_WORDS), *value_words(MOST_WORDS), *MARKERS]
    assert len(set(words)) == len(words)
    assert all(re.fullmatch(r"\w+", word) for word in words)


def test_a_smaller_language_is_the_beginning_of_a_larger_one() -> None:
    assert key_words(8) == key_words(80)[:8] and value_words(8) == value_words(80)[:8]


def test_a_statement_ends() -> None:
    assert statement(REMEMBER, ["bakiru", "39213"]) == f"{REMEMBER} bakiru 39213 {END}"
