"""Sparse prefill by name: the same figures for dense and sparse, options before files, one error for a bad name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from angelslim.base.errors import ConfigError
from angelslim.methods.sparse.metadata import HeadRule, Metadata, fingerprint
from angelslim.methods.sparse.selectors.base import SELECTORS
from angelslim.methods.sparse.using import attention_context, attentions, sparse_attention
from families import random_model

PROMPT = torch.randint(3, 80, (1, 128), generator=torch.Generator().manual_seed(1))


def run(model: object) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(PROMPT).logits  # type: ignore[operator]
    return logits


def test_a_context_for_dense_and_sparse() -> None:
    model = random_model("qwen3")
    expected = run(model)
    with attention_context(model, "dense") as stats:
        run(model)
    assert (stats.density, stats.calls, stats.fallbacks, stats.selector_ms) == (1.0, 0, {}, 0.0)
    with attention_context(model, "stem", 0.5, block=16, kernel="dense") as stats:
        assert not torch.allclose(run(model), expected)
    assert stats.density == pytest.approx(0.5, abs=0.03) and stats.calls == 2
    assert stats.selector_ms > 0 and stats.kernel_ms > 0 and stats.fallbacks == {}
    assert torch.equal(run(model), expected), "removed at the end"


@pytest.mark.parametrize("name", list(SELECTORS))
def test_every_selector_at_density_one_is_dense(name: str) -> None:
    model = random_model("qwen3")
    expected = run(model)
    with attention_context(model, name, 1.0, block=16, kernel="dense") as stats:
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    assert stats.density == 1.0 and stats.calls == 2


def test_a_file_and_what_is_given_beside(tmp_path: Path) -> None:
    model = random_model("llama")
    rules = (HeadRule("dense", layers=(0,)), HeadRule("uniform", {"density": 0.4}))
    Metadata(rules, 16, 32, "dense", fingerprint(model.config)).write(tmp_path)
    with sparse_attention(model, tmp_path) as attached:
        run(model)
    whole = attached.total()
    assert whole["fallbacks"] == {"set dense": 1} and whole["density"] == pytest.approx(0.4, abs=0.03)
    with sparse_attention(model, tmp_path, density=0.8, crossover=64) as attached:
        run(model)
    assert attached.total()["density"] == pytest.approx(0.8, abs=0.03)
    with sparse_attention(model, tmp_path, crossover=256) as attached:
        run(model)
    assert attached.total()["fallbacks"] == {"set dense": 1, "below the crossover length": 1}
    with pytest.raises(ConfigError, match="this one has 'qwen3'"):
        sparse_attention(random_model("qwen3"), tmp_path)


def test_wrong_words() -> None:
    model = random_model("qwen3")
    with pytest.raises(ConfigError, match="Did you mean 'xattention'"):
        sparse_attention(model, "xatention")
    for density in (0.0, 1.5, -1.0):
        with pytest.raises(ConfigError, match="share of the causal area"):
            sparse_attention(model, "stem", density=density)
        with (
            pytest.raises(ConfigError, match="share of the causal area"),
            attention_context(model, "dense", density),
        ):
            pass
    with pytest.raises(ConfigError, match="no option"):
        sparse_attention(model, "stem", options={"sink": 3})


def test_what_a_measurement_compares(tmp_path: Path) -> None:
    assert attentions([], tmp_path) == ["dense"]
    assert attentions(["dense", "stem", "dense"], tmp_path, 0.3, 64) == ["dense", "stem"]
    for given in ({"density": 0.3}, {"block": 64}):
        with pytest.raises(ConfigError, match=f"A {next(iter(given))} is given and no sparse attention"):
            attentions([], tmp_path, **given)
    with pytest.raises(ConfigError, match="A block has 0 tokens"):
        attentions(["stem"], tmp_path, block=0)
    Metadata((HeadRule("uniform"),)).write(tmp_path)
    assert attentions([], tmp_path, 0.3, 64) == [str(tmp_path)], "the folder's own, at another density"
