"""MinHash against the exact Jaccard index of the shingle sets."""

from __future__ import annotations

import math
import random

import pytest

from angelslim.base.errors import ConfigError, MissingExtra
from angelslim.data.curation.texts import shingles

from .planted import babble, counts, made, run


def jaccard(left: str, right: str, size: int) -> float:
    """The oracle: sets, counted."""
    a, b = shingles(left, size), shingles(right, size)
    return len(a & b) / len(a | b)


def with_changes(text: str, changes: int, seed: int = 0) -> str:
    """Replace words at `changes` places far from each other."""
    words = text.split()
    for place in range(changes):
        words[(2 * place + 1) * len(words) // (2 * changes)] = f"new{seed}x{place}"
    return " ".join(words)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_signatures_estimate_the_jaccard_index(size: int) -> None:
    stage = made("fuzzy", {"shingle": size, "permutations": 256})
    text = babble(1, 120)
    for changes in (0, 1, 3, 6, 12):
        other = with_changes(text, changes) if changes else text
        exact = jaccard(text, other, size)
        estimate = stage.signature(text).jaccard(stage.signature(other))
        assert abs(estimate - exact) <= 4 * math.sqrt(exact * (1 - exact) / 256) + 1e-9


def test_near_duplicates_go_and_distinct_documents_stay() -> None:
    originals = [babble(seed, 150) for seed in range(40)]
    near = [with_changes(text, 2, seed) for seed, text in enumerate(originals)]  # J = 0.87
    half = [with_changes(text, 10, seed) for seed, text in enumerate(originals)]  # J = 0.49
    assert all(jaccard(a, b, 5) > 0.85 for a, b in zip(originals, near, strict=True))
    assert all(jaccard(a, b, 5) < 0.55 for a, b in zip(originals, half, strict=True))
    everything = [*originals, *near, *half]
    ledger, left = run("fuzzy", {"threshold": 0.7}, everything)
    assert left == [*originals, *half]
    assert counts(ledger) == {"near-duplicate": 40}


def test_decisions_follow_the_exact_index_outside_the_margin_of_error() -> None:
    rng = random.Random(5)
    texts = [babble(seed, 80) for seed in range(12)]
    texts += [with_changes(rng.choice(texts), rng.randrange(1, 12), seed) for seed in range(60)]
    threshold, margin = 0.6, 4 * math.sqrt(0.24 / 512)
    _, left = run("fuzzy", {"threshold": threshold, "permutations": 512, "shingle": 3}, texts)
    kept = set(left)
    for place, text in enumerate(texts):
        best = max((jaccard(text, other, 3) for other in texts[:place] if other in kept), default=0.0)
        if best > threshold + margin:
            assert text not in kept
        if best < threshold - margin:
            assert text in kept


def test_a_chain_keeps_its_far_end() -> None:
    first = babble(1, 150)
    second = with_changes(first, 4, 1)
    third = with_changes(second, 3, 2)
    assert jaccard(first, second, 5) > 0.7 and jaccard(second, third, 5) > 0.7
    assert jaccard(first, third, 5) < 0.68
    _, left = run("fuzzy", {"threshold": 0.72, "permutations": 512}, [first, second, third])
    assert left == [first, third]


@pytest.mark.parametrize("threshold", [0, 1.5, -1, "high", True])
def test_a_threshold_out_of_range_is_refused(threshold: object) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        made("fuzzy", {"threshold": threshold})


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(MissingExtra, match=r"angelslim\[curate\]"):
        made("fuzzy", {})
