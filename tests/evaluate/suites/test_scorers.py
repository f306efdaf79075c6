"""Each score against figures worked out by hand, or against a slower definition."""

import random
from itertools import combinations

import pytest

from angelslim.base.errors import MissingExtra
from angelslim.evaluate.suites import longbench, scorers
from angelslim.evaluate.suites.base import Sample


def test_containment() -> None:
    sample = Sample("", ("Alpha", "beta", "gamma", "delta"))
    assert scorers.string_match_all("ALPHA and Beta, no more", sample) == 0.5
    assert scorers.string_match_part("delta", sample) == 1
    assert scorers.string_match_part("epsilon", sample) == 0


def test_f1_ignores_case_signs_and_articles() -> None:
    assert scorers.qa_f1("The Cat, sat.", "a cat SAT") == 1
    assert scorers.qa_f1("cat sat on mats", "cat sat") == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert scorers.qa_f1("", "cat") == 0


def test_a_longest_common_subsequence_is_one() -> None:
    rng = random.Random(0)
    for _ in range(50):
        one, other = ("".join(rng.choices("abc", k=rng.randint(0, 7))) for _ in range(2))
        found = "".join(scorers.subsequence(one, other))
        pieces = {"".join(part) for size in range(8) for part in combinations(one, size)}
        shared = [
            "".join(part)
            for size in range(8)
            for part in combinations(other, size)
            if "".join(part) in pieces
        ]
        assert found in shared and len(found) == max(map(len, shared))


def test_rouge_l_counts_the_words_of_all_sentences_once() -> None:
    # Lin's example: of w1..w5, "w1 w2" is in one sentence and "w1 w3 w5" in the other: four words are shared
    value = scorers.rouge_l("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5")
    recall, precision = 4 / 5, 4 / 8
    assert value == pytest.approx(2 * precision * recall / (precision + recall))
    assert scorers.rouge_l("", "w1") == scorers.rouge_l("...", "w1") == 0


def test_classes_share_the_point() -> None:
    classes = ("Group", "Groups", "City")
    assert scorers.classification("It is City", "City", classes) == 1
    assert scorers.classification("City or Group", "City", classes) == 0.5
    assert scorers.classification("Groups", "Groups", classes) == 1  # Group is a part of the right name
    assert scorers.classification("none", "City", classes) == 0


def test_numbers_share_the_point() -> None:
    assert scorers.number_share("5, or 7", "5") == 0.5
    assert scorers.number_share("no idea", "5") == 0


def test_code_is_compared_by_its_first_line_of_code() -> None:
    assert scorers.code_similarity("\n```python\n# a comment\nreturn x\nmore", "return x") == 1
    assert scorers.code_similarity("abcd", "abxy") == 0.5
    assert scorers.code_similarity("# nothing", "return") == 0


def test_chinese_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match="longbench"):
        scorers.qa_f1_zh("你好", "你好")


def test_chinese_words_lose_their_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "cut", list)  # every sign a word
    assert scorers.qa_f1_zh("你好。", "你好") == 1
    assert scorers.rouge_l_zh("你好", "你好") == pytest.approx(1)


def test_chinese_is_cut_into_words(capfd: pytest.CaptureFixture[str]) -> None:
    """Five words in the reply, three in the answer, three in common; the package that cuts says nothing."""
    reply, answer = "一共有九十艘船。", "九十艘船"
    assert scorers.cut(answer) == ["九十", "艘", "船"]
    assert scorers.qa_f1_zh(reply, answer) == pytest.approx(0.75)
    assert longbench.score("dureader", "一共有九十艘船", Sample("", (answer,))) == pytest.approx(0.75)
    assert capfd.readouterr().err == ""
