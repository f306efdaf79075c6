"""Every rule on a document that breaks it and no earlier one; counts by rule; what must not be dropped."""

from __future__ import annotations

import pytest

from angelslim.base.errors import ConfigError
from angelslim.data.curation.stages.heuristics import RULES, Options, Sample, broken_rule

from .planted import babble, counts, made, run

PROSE = ". ".join(babble(seed, 12).capitalize() for seed in range(20))
LOUD = " ".join(f"{word} $$ ## %% && @@" for word in babble(3, 60).split())
BROKEN = {
    "min_characters": "Too short.",
    "max_characters": babble(1, 3000),
    "min_words": "averyveryverylongwordindeed " * 10,
    "max_mean_word": " ".join(word * 8 for word in babble(2, 40).split()),
    "max_symbols": LOUD,
    "max_digits": " ".join(
        f"{word} {n * 7919} {n * 104729}" for n, word in enumerate(babble(4, 60).split(), 9)
    ),
    "max_repeated_lines": "\n".join([babble(5, 8), babble(6, 8)] * 6),
    "max_top_ngram": " ".join(f"buy it now {babble(seed, 4)}" for seed in range(30)),
    "max_repeated_ngrams": " ".join([babble(7, 25)] * 3),
    "min_stop_words": babble(8, 100),
}
LIMITS = {"max_characters": 10_000, "stop_words": ["the", "of"]}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_finds_its_document(rule: str) -> None:
    options = Options.model_validate({**LIMITS, "max_repeated_lines": 0.3})
    broken = broken_rule(BROKEN[rule], options)
    assert broken is not None and broken[0] == rule, broken


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で" * 1
        + "ニャーニャー泣いていた事だけは記憶している。",
        "हिन्दी भाषा में लिखा गया एक छोटा सा अनुच्छेद जो किसी भी नियम को नहीं तोड़ता है और पढ़ने में सरल है क्योंकि इसमें शब्द हैं",
        "def f(x):\n    return x + 1\n\n\nclass A:\n    def g(self, y):\n        if y > 3:\n            return f(y)\n"
        "        for name in self.names:\n            yield name, len(name)\n",
        r"Let $f(x) = \int_0^x t^2 dt$. Then $f'(x) = x^2$ by the fundamental theorem, and $f(3) = 9$. We now show that "
        r"the sum $\sum_{k=1}^n k = n(n+1)/2$ holds for all natural numbers by induction on $n$.",
    ],
    ids=["prose", "japanese", "hindi", "code", "mathematics"],
)
def test_ordinary_documents_of_every_kind_stay(text: str) -> None:
    assert broken_rule(text, Options(min_characters=20)) is None


def test_every_rule_is_named_and_counted_in_the_report() -> None:
    documents = [PROSE, *BROKEN.values(), BROKEN["max_symbols"]]
    ledger, left = run("heuristics", {**LIMITS, "min_stop_words": 0.0001}, documents)
    assert left == [] or left == [PROSE]
    assert list(ledger.dropped) == list(RULES)
    assert counts(ledger)["max_symbols"] == 2 and counts(ledger)["min_characters"] == 1
    ledger, _ = run("heuristics", {}, documents)
    assert "min_stop_words" not in ledger.dropped, "a rule without its list does not exist"


def test_rules_can_be_turned_off() -> None:
    off = {
        rule: 0 if rule.startswith("min") else 1
        for rule in RULES
        if rule not in ("max_characters", "max_mean_word")
    }
    _, left = run("heuristics", {**off, "max_mean_word": 1000}, list(BROKEN.values()))
    assert left == list(BROKEN.values())


def test_measures_on_texts_small_enough_to_count() -> None:
    sample = Sample("ab 12 $$", Options())
    assert (sample.symbols(), sample.digits()) == (2 / 6, 2 / 6)
    assert Sample("aa\nbb\naa\ncc", Options()).repeated_lines() == pytest.approx(2 / 8)
    assert Sample("a b c a b c d", Options(ngram=3)).top_ngram() == pytest.approx(6 / 7)
    assert Sample("a b c d a b c x", Options(long_ngram=3)).repeated_ngrams() == pytest.approx(3 / 8)
    assert Sample("a b a b a b", Options(long_ngram=2)).repeated_ngrams() == pytest.approx(4 / 6)
    assert Sample("The end of it", Options(stop_words=["the", "of"])).stop_words() == 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"max_symbols": 1.2},
        {"min_characters": -1},
        {"min_characters": 10, "max_characters": 5},
        {"max_digits": "many"},
    ],
)
def test_thresholds_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        made("heuristics", options)
