from __future__ import annotations

import pytest

from angelslim.data.curation import texts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat, the hat.", ["The", "cat", "the", "hat"]),
        ("東京 is big", ["東", "京", "is", "big"]),
        ("naïve Straße", ["naïve", "Straße"]),
        ("... !!", []),
    ],
)
def test_words_are_found_in_any_script(text: str, words: list[str]) -> None:
    assert texts.words(text) == words


def test_copies_are_alike_whatever_case_width_space_and_punctuation() -> None:
    plain = texts.normalised("the cat sat on 42 mats")
    assert texts.normalised("The CAT,  sat\non ４２ mats!") == plain
    assert texts.normalised("the cat sat on 43 mats") != plain


def test_texts_of_symbols_alone_are_not_all_alike() -> None:
    assert texts.normalised("+ - *") != texts.normalised("( ) =")


def test_a_short_text_is_one_shingle() -> None:
    assert texts.shingles("One two", 5) == {"one two"}
    assert texts.shingles("a b c d", 3) == {"a b c", "b c d"}


def test_a_conversations_text_and_change_reach_every_turn() -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert texts.text_of(chat) == "Hi\nHo"
    assert texts.changed_record(chat, str.upper) == [
        {"role": "user", "content": "HI"},
        {"role": "assistant", "content": "HO"},
    ]


def test_a_snippet_is_one_line_of_at_most_two_hundred_characters() -> None:
    cut = texts.snippet("a\n b " * 200)
    assert len(cut) == texts.SNIPPET and "\n" not in cut and cut.endswith("…")
