from __future__ import annotations

import doctest

import pytest

from angelslim.base import errors
from angelslim.base.errors import ConfigError, MissingExtra, UserError, did_you_mean


def test_an_error_says_where_what_and_how():
    assert str(UserError("It is wrong.", fix="Mend it.", where="a.yaml")) == "a.yaml: It is wrong. Mend it."
    assert str(UserError("It is wrong.")) == "It is wrong."


def test_every_kind_is_a_user_error():
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and kind.__module__ == errors.__name__
    ]
    assert all(issubclass(kind, UserError) for kind in kinds)
    assert len(kinds) >= 7


def test_a_missing_extra_names_the_command():
    error = MissingExtra("lm-eval", "eval", "Measuring tasks")
    assert "pip install 'angelslim[eval]'" in str(error) and "Measuring tasks" in str(error)


@pytest.mark.parametrize(
    "word, known, answer",
    [
        ("qwenn3", ["qwen3", "llama"], "Did you mean 'qwen3'?"),
        ("zzz", ["b", "a"], "Known: a, b."),
        ("zzz", [], ""),
    ],
)
def test_suggestions(word, known, answer):
    assert did_you_mean(word, known) == answer


def test_examples_in_docstrings():
    assert doctest.testmod(errors).failed == 0


def test_a_config_error_can_be_caught_as_a_user_error():
    with pytest.raises(UserError):
        raise ConfigError("x")
