from __future__ import annotations

import pytest

from angelslim.base.errors import ConfigError
from angelslim.data.curation.stages.denoise import tidy, without_markup

from .planted import babble, counts, made, run


def cleaned(text: str, **options: object) -> str:
    _, left = run("denoise", dict(options), [text])
    assert isinstance(left[0], str)
    return left[0]


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("a\x00b\x1bc\ufeff", "abc"),
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("<p class='x'>Hello</p><br/>you &amp; me", "Hello\n\nyou & me"),
        ("before<script>var a = '<p>';</script>after<!-- note -->.", "beforeafter."),
        ("one\u00a0two   \n\n\n\n\nthree\t\n", "one two\n\nthree"),
        ("e\u0301te\u0301", "été"),
    ],
)
def test_noise_goes(dirty: str, clean: str) -> None:
    assert cleaned(dirty) == clean


@pytest.mark.parametrize(
    "text",
    [
        "if a < b and c > d: x = y << 2",
        "for i in range(3):\n    for j in range(i):\n        print(i, j)",
        "AT&T and R&D; Tom & Jerry",
        "vector<int> v; map<string, double> m;",
        "क्\u200dष और 👩\u200d🔬",
    ],
)
def test_what_is_no_noise_stays(text: str) -> None:
    assert cleaned(text) == text


def test_cleaning_twice_changes_nothing_more() -> None:
    text = tidy(without_markup("<div><p>One</p>\n\n\n<ul><li>two</ul></div>"))
    assert tidy(without_markup(text)) == text


def test_lines_by_pattern_go() -> None:
    text = "Keep this\nAccept all cookies\nand this about cookies"
    assert cleaned(text, lines=["accept .*cookies"]) == "Keep this\nand this about cookies"


def test_lines_that_many_documents_of_a_source_share_go() -> None:
    documents = [f"Home | News\n{babble(seed, 20)}\nAll rights reserved" for seed in range(4)]
    other = f"Home | News\n{babble(9, 20)}"
    ledger, left = run("denoise", {"repeated_in": 3}, [*documents, other], [0, 0, 0, 0, 1])
    assert left == [*(babble(seed, 20) for seed in range(4)), other], "another source has lines of its own"
    assert ledger.changed["repeated lines"].documents == 4
    assert ledger.changed["repeated lines"].characters == 4 * (
        len("Home | News\n") + len("\nAll rights reserved")
    )


def test_counts_say_what_was_changed_and_sizes_follow() -> None:
    ledger, left = run("denoise", {}, ["clean", "dir\x00ty", "<b>bold</b>"])
    assert left == ["clean", "dirty", "bold"]
    applied = {name: reason.documents for name, reason in ledger.changed.items()}
    assert applied == {"unicode form": 0, "markup": 1, "control characters": 1, "white space": 0}
    assert ledger.changed["markup"].characters == 7
    assert ledger.sizes.tolist() == [5, 5, 4]


def test_a_document_of_noise_alone_is_dropped() -> None:
    ledger, left = run("denoise", {}, ["<div></div>\x00", "text"])
    assert left == ["text"] and counts(ledger) == {"nothing but noise": 1}


def test_conversations_keep_their_turns() -> None:
    chat = [{"role": "user", "content": "<b>Hi</b>"}, {"role": "assistant", "content": "Ho\x00"}]
    _, left = run("denoise", {}, [chat])
    assert left == [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"lines": ["(open"]}, "regular expression"),
        ({"repeated_in": 1}, "every line"),
        ({"marcup": True}, "'markup'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        made("denoise", options)
