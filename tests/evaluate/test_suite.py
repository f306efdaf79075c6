from __future__ import annotations

import pytest

from angelslim.base.errors import ConfigError, DataError
from angelslim.evaluate.suite import evaluate, evaluation_text


def test_the_suite_in_order(model, tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some text to score " * 20)
    scores = evaluate(
        model,
        tokenizer,
        text=path,
        tasks=["addition", "recall"],
        samples=2,
        speed=True,
        max_tokens=64,
        max_new_tokens=4,
    )
    names = ["perplexity", "addition", "recall", "prefill", "decode", "ttft", "tpot"]
    assert [score.metric for score in scores] == names
    assert scores[0].samples == 63 and scores[1].samples == 2


def test_the_default_text_is_the_evaluation_split(model, tokenizer):
    default = evaluate(model, tokenizer, max_tokens=50)
    assert [score.samples for score in default] == [49]
    assert len(evaluation_text()) > 10_000


def test_mistakes_surface_before_anything_runs(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("angelslim.evaluate.suite.perplexity", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(ConfigError, match="additon"):
        evaluate(model, tokenizer, tasks=["additon"])
    with pytest.raises(DataError, match="does not exist"):
        evaluate(model, tokenizer, text=tmp_path / "none.txt")


def test_perplexity_can_be_left_out(model, tokenizer):
    assert evaluate(model, tokenizer, text=False) == []
