"""What a suite refuses before any work, and how lengths are written."""

from pathlib import Path
from typing import Any

import pytest

from angelslim.base.errors import ConfigError
from angelslim.evaluate.suites.suite import Suite, lengths, samples_of


def test_lengths_are_tokens_or_thousands() -> None:
    assert lengths("4k, 512,1K") == (4096, 512, 1024)
    for wrong in ("4m", "-1", "0"):
        with pytest.raises(ConfigError, match="no length"):
            lengths(wrong)


def test_a_suite_is_checked_when_it_is_named() -> None:
    with pytest.raises(ConfigError, match="'ruler'"):
        Suite("rular", (4096,))
    with pytest.raises(ConfigError, match="--lengths"):
        Suite("ruler", ())
    with pytest.raises(ConfigError, match="--data"):
        Suite("longbench", (4096,))


def test_ruler_hides_needles_in_the_given_text(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "hay.txt").write_text("Only this one sentence stands here. " * 5)
    suite = Suite("ruler", (1500,), ["niah_text_single_2"], count=2, text=tmp_path / "hay.txt")
    ((task, found),) = samples_of(suite, tokenizer, 1500)
    assert task.name == "niah_text_single_2" and len(found) == 2
    assert all("Only this one sentence stands here." in sample.prompt for sample in found)
