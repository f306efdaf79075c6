from __future__ import annotations

from .planted import babble, counts, run


def test_the_first_of_equal_documents_stays() -> None:
    one, two = babble(1), babble(2)
    ledger, left = run("exact", {}, [one, two, f"  {one.upper()}!\n", two.replace(" ", "\n"), one])
    assert left == [one, two]
    assert counts(ledger) == {"exact duplicate": 3}
    assert [example.note for example in ledger.dropped["exact duplicate"].examples] == [
        f"same as document {place}" for place in (0, 1, 0)
    ]


def test_one_word_makes_another_document() -> None:
    one = babble(1)
    _, left = run("exact", {}, [one, one + " more"])
    assert len(left) == 2


def test_without_normalising_only_equal_characters_count() -> None:
    one = babble(1)
    _, left = run("exact", {"normalise": False}, [one, one.upper(), one])
    assert left == [one, one.upper()]


def test_a_conversation_repeats_a_conversation_of_the_same_words() -> None:
    chat = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "General"}]
    _, left = run("exact", {}, [chat, [{**turn} for turn in chat], "something else"])
    assert left == [chat, "something else"]
