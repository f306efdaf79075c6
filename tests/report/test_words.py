from __future__ import annotations

import doctest
import math

import pytest

from angelslim.evaluate.base import Score
from angelslim.report import layers, words


def test_doctests():
    for module in (words, layers):
        result = doctest.testmod(module)
        assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize(
    "score, text",
    [
        (None, "not evaluated"),
        (Score("perplexity", 9.8421, stderr=0.2134), "9.842"),
        (Score("addition", 100.0, "%", stderr=0.0), "100.0 ±0"),
        (Score("gsm8k/acc", 0.51234, stderr=0.0123), "0.512 ±0.012"),
        (Score("ttft", 0.1234, "ms"), "0.12"),
        (Score("decode", 246.4, "tokens/s"), "246"),
        (Score("perplexity", 54321.0), "54,321"),
        (Score("perplexity", math.inf), "infinite"),
        (Score("perplexity", math.nan), "not a number"),
    ],
)
def test_figure(score, text):
    assert words.figure(score) == text


def test_sizes():
    assert words.megabytes(11_670_000) == "11.67 MB"
    assert words.megabytes(999_400_000) == "999 MB"
    assert words.megabytes(15_231_000_000) == "15.23 GB"
    assert [words.parameters(n) for n in (512, 5_832_192, 7_615_616_512)] == ["512", "5.83 M", "7.62 B"]
    assert words.decibels(math.inf) == "exact"


def test_change():
    assert words.change(Score("a", 99.5, "%"), Score("a", 97.0, "%")) == "-2.5 points"
    assert words.change(Score("p", 10.0), Score("p", 10.5)) == "+5.0 %"
    assert words.change(Score("p", 0.0), Score("p", 1.0)) == ""


@pytest.mark.parametrize(
    "before, after, expected",
    [
        (Score("a", 99.5, "%", stderr=0.5), Score("a", 99.0, "%", stderr=1.1), "same"),
        (Score("a", 99.5, "%", stderr=0.5), Score("a", 95.0, "%", stderr=1.1), "worse"),
        (Score("a", 90.0, "%", stderr=0.5), Score("a", 95.0, "%", stderr=1.1), "better"),
        # a paired measure: its own standard error must not hide a real change
        (
            Score("perplexity", 9.84, better="lower", stderr=0.2),
            Score("perplexity", 9.95, better="lower", stderr=0.2),
            "worse",
        ),
        (
            Score("perplexity", 9.84, better="lower", stderr=0.2),
            Score("perplexity", 9.841, better="lower", stderr=0.2),
            "same",
        ),
        (Score("p", 9.84, better="lower"), Score("p", 9.5, better="lower"), "better"),
    ],
)
def test_verdict(before, after, expected):
    assert words.verdict(before, after) == expected
