from __future__ import annotations

import numpy as np
import pytest

from angelslim.base.errors import ConfigError, DataError
from angelslim.data.curation.stages.mixture import draw, share_out

from .planted import babble, context, counts, made, run

WEB = [babble(seed, 100) for seed in range(100)]
SCIENCE = [babble(seed, 100) for seed in range(100, 120)]
TEXTS, SOURCES = [*WEB, *SCIENCE], [0] * 100 + [1] * 20


def shares(options: dict[str, object], texts: list[str] = TEXTS, sources: list[int] = SOURCES):
    ledger, _ = run("mixture", options, texts, sources)
    times, sizes, source = ledger.times, ledger.sizes, np.array(sources)
    return ledger, times, [int((times * sizes)[source == s].sum()) for s in (0, 1)]


def test_sources_get_their_weights_within_one_document() -> None:
    budget = sum(map(len, SCIENCE)) * 4
    _, times, (web, science) = shares({"weights": {"web": 3, "science": 1}, "budget": budget})
    longest = max(map(len, TEXTS))
    assert budget * 0.75 - longest < web <= budget * 0.75
    assert budget * 0.25 - longest <= science <= budget * 0.25
    assert times.max() == 1


def test_a_small_source_is_repeated_up_to_the_limit_and_the_rest_goes_to_others() -> None:
    total = sum(map(len, TEXTS))
    ledger, times, (web, science) = shares(
        {"weights": {"web": 1, "science": 1}, "budget": total, "max_repeats": 2}
    )
    assert times[100:].tolist() == [2] * 20
    assert science == 2 * sum(map(len, SCIENCE))
    assert total - web - science < max(map(len, WEB))
    assert "science would need 3" in ledger.notes[0]


def test_a_source_of_which_nothing_is_left_is_said_in_words() -> None:
    ledger, _, _ = shares({"weights": {"web": 1, "science": 1}}, WEB, [0] * 100)
    assert ledger.notes[0].startswith("Of science the earlier stages left nothing")


def test_no_document_exceeds_the_limit_and_a_budget_beyond_it_is_told() -> None:
    ledger, times, _ = shares({"budget": "10G", "max_repeats": 3})
    assert times.tolist() == [3] * 120
    assert any("cannot be filled" in note for note in ledger.notes)


def test_without_a_budget_equal_natural_weights_take_everything_once() -> None:
    natural = {"web": sum(map(len, WEB)), "science": sum(map(len, SCIENCE))}
    _, times, _ = shares({"weights": natural})
    assert times.tolist() == [1] * 120


def test_weight_zero_leaves_a_source_out() -> None:
    ledger, times, (web, _) = shares({"weights": {"web": 0}})
    assert web == 0 and times[100:].tolist() == [1] * 20
    assert counts(ledger) == {"not drawn": 100}


def test_long_documents_get_their_share() -> None:
    long = [babble(seed, 1000) for seed in range(200, 206)]
    texts, sources = [*WEB, *long], [0] * 106
    budget = 60_000
    options = {"budget": budget, "long_documents": {"share": 0.4, "length": 3000}}
    ledger, times, _ = shares(options, texts, sources)
    assert sum(map(len, long)) / sum(map(len, texts)) < 0.4
    got = int((times * ledger.sizes)[100:].sum())
    assert 0.4 * budget - max(map(len, long)) < got <= 0.4 * budget + 1
    _, plain, _ = shares({"budget": budget}, texts, sources)
    assert int((plain * ledger.sizes)[100:].sum()) < got


def test_too_few_long_documents_are_told_and_never_over_repeated() -> None:
    texts, sources = [*WEB, babble(200, 1000)], [0] * 101
    options = {"budget": 40_000, "max_repeats": 2, "long_documents": {"share": 0.9, "length": 3000}}
    ledger, times, _ = shares(options, texts, sources)
    assert times[100] == 2 and times.max() == 2
    assert any("less than the asked 90" in note for note in ledger.notes)


def test_documents_and_tokens_are_units_too(tiny_folder) -> None:
    _, times, _ = shares({"unit": "documents", "budget": 30, "weights": {"web": 2, "science": 1}})
    assert (times[:100].sum(), times[100:].sum()) == (20, 10)
    tokens = {"unit": "tokens", "tokenizer": str(tiny_folder), "budget": 10_000}  # one token a byte
    _, times, (web, science) = shares(tokens)
    assert 10_000 - 2 * max(map(len, TEXTS)) < web + science <= 10_000


def test_water_filling_against_a_search() -> None:
    weights, caps = np.array([5.0, 3.0, 2.0, 0.0]), np.array([10.0, 100.0, 7.0, 50.0])
    given = share_out(60, weights, caps)
    low, high = 0.0, 1e6  # the level: everyone gets level * weight, at most the cap
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(level * weights, caps).sum() < 60 else (low, level)
    np.testing.assert_allclose(given, np.minimum(low * weights, caps), rtol=1e-9)
    np.testing.assert_allclose(share_out(1e9, weights, caps), [10, 100, 7, 0])


@pytest.mark.parametrize("target", [0, 7, 55, 110, 123.4])
def test_drawing_comes_up_to_the_target_and_not_above(target: float) -> None:
    sizes = np.arange(1, 11, dtype=np.int64)
    times = draw(sizes, target, np.random.default_rng(0))
    assert target - 10 < (times * sizes).sum() <= target
    assert times.max() - times.min() <= 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"weights": {"sience": 1}}, "Did you mean 'science'"),
        ({"weights": {"web": -1}}, "weights.web"),
        ({"weights": {"web": 0, "science": 0}}, "Every weight is 0"),
        ({"unit": "tokens"}, "belong together"),
        ({"tokenizer": "x"}, "belong together"),
        ({"unit": "tokens", "tokenizer": "nowhere"}, "does not exist"),
        ({"max_repeats": 0}, "max_repeats"),
        ({"long_documents": {"share": 2}}, "share"),
        ({"unit": "documents", "long_documents": {"share": 0.5}}, "no length"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        made("mixture", options, context())


def test_a_budget_below_every_document_is_refused() -> None:
    with pytest.raises(DataError, match="smaller than any document"):
        run("mixture", {"budget": 3}, TEXTS, SOURCES)
