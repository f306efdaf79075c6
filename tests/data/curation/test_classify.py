from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from angelslim.base.errors import ConfigError, DataError, ModelError
from angelslim.data.curation.stages._linear import LinearClassifier, features, train

from .planted import VOCABULARY, babble, context, counts, made, run

MATHS, SPORT = VOCABULARY[:60], VOCABULARY[50:110]  # two topics that share ten words


def examples(folder: Path, count: int = 20) -> dict[str, str]:
    """Files of labelled texts of the two topics."""
    for label, words, start in (("maths", MATHS, 0), ("sport", SPORT, 1000)):
        lines = [json.dumps({"text": babble(start + seed, 30, words)}) for seed in range(count)]
        (folder / f"{label}.jsonl").write_text("\n".join(lines))
    return {label: str(folder / f"{label}.jsonl") for label in ("maths", "sport")}


def test_a_trained_classifier_separates_two_topics(tmp_path: Path) -> None:
    maths = [babble(5000 + seed, 60, MATHS) for seed in range(30)]
    sport = [babble(6000 + seed, 60, SPORT) for seed in range(30)]
    mixed = [text for pair in zip(maths, sport, strict=True) for text in pair]
    where = context(tmp_path / "kept")
    ledger, left = run("classify", {"examples": examples(tmp_path), "keep": "maths"}, mixed, where=where)
    assert left == maths
    assert counts(ledger) == {"classified as sport": 30}
    assert "accuracy 1.000" in ledger.notes[0]
    files = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert files == ["classifier.json", "weights.safetensors"]


def test_a_stored_classifier_decides_as_when_it_was_trained(tmp_path: Path) -> None:
    where = context(tmp_path / "kept")
    texts = [babble(seed, 40, MATHS[:55] + SPORT) for seed in range(30)]
    first, left = run("classify", {"examples": examples(tmp_path), "keep": "sport"}, texts, where=where)
    stored = {"linear": str(tmp_path / "kept"), "keep": "sport"}
    second, again = run("classify", stored, texts)
    assert left == again and first.dropped == second.dropped


@pytest.mark.parametrize("count", [2, 3])
def test_our_arithmetic_is_scikit_learns(count: int) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    groups = {
        f"l{n}": [babble(100 * n + s, 20, VOCABULARY[40 * n : 40 * n + 60]) for s in range(8)]
        for n in range(count)
    }
    ours, accuracy = train(groups, 0)
    assert accuracy is not None and accuracy > 0.8
    texts = [text for label in sorted(groups) for text in groups[label]]
    vectorizer = TfidfVectorizer(analyzer=features, sublinear_tf=True)
    table = vectorizer.fit_transform(texts)
    targets = [label for label in sorted(groups) for _ in range(8)]
    theirs = LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced", random_state=0).fit(
        table, targets
    )
    asked = [babble(9000 + seed, 25) for seed in range(20)] + ["", "unknownword"]
    expected = theirs.predict_proba(vectorizer.transform(asked))
    np.testing.assert_allclose(ours.probabilities(asked), expected, atol=1e-6)


def test_a_classifier_survives_its_files(tmp_path: Path) -> None:
    trained, _ = train({"a": ["one two", "one three"], "b": ["four five", "four six"]}, 0)
    trained.save(tmp_path)
    loaded = LinearClassifier.load(tmp_path)
    assert loaded.labels == trained.labels and loaded.vocabulary == trained.vocabulary
    for name in ("idf", "weight", "bias"):
        assert np.array_equal(getattr(loaded, name), getattr(trained, name))


def test_a_damaged_classifier_is_refused(tmp_path: Path) -> None:
    trained, _ = train({"a": ["one two", "one three"], "b": ["four five", "four six"]}, 0)
    trained.save(tmp_path)
    config = json.loads((tmp_path / "classifier.json").read_text())
    (tmp_path / "classifier.json").write_text(json.dumps({**config, "vocabulary": ["one"]}))
    with pytest.raises(DataError, match="do not fit"):
        LinearClassifier.load(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match="no stored classifier"):
        LinearClassifier.load(tmp_path)


@pytest.fixture(scope="module")
def hub_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with a head of two classes."""
    import torch
    from transformers import Qwen3ForSequenceClassification

    from tiny import byte_tokenizer, qwen3

    folder = tmp_path_factory.mktemp("models") / "classifier"
    config = qwen3().config
    config.num_labels, config.id2label, config.label2id = 2, {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    config.pad_token_id = 0
    torch.manual_seed(3)
    model = Qwen3ForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_hub_classifiers_decisions_are_its_own_softmax(hub_classifier: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = [babble(seed, 3 + seed) for seed in range(24)]
    model = AutoModelForSequenceClassification.from_pretrained(hub_classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(hub_classifier)
    with torch.no_grad():
        good = [
            model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, 1].item() for text in texts
        ]
    limit = sorted(good)[12] - 1e-4
    _, left = run(
        "classify", {"model": str(hub_classifier), "keep": "good", "threshold": limit, "batch_size": 5}, texts
    )
    assert left == [text for text, value in zip(texts, good, strict=True) if value >= limit]
    assert len(left) == 12


def test_wrong_choices_are_refused(tmp_path: Path, hub_classifier: Path, tiny_folder: Path) -> None:
    both = examples(tmp_path)
    for options, complaint in (
        ({"keep": "x"}, "none given"),
        ({"examples": both, "model": "x", "keep": "maths"}, "examples and model given"),
        ({"examples": both, "keep": "math"}, "Did you mean 'maths'"),
        ({"examples": {"maths": both["maths"]}, "keep": "maths"}, "two labels"),
        ({"examples": both, "keep": "maths", "threshold": 1.5}, "threshold"),
        ({"examples": both}, "keep: it is missing"),
        ({"model": str(hub_classifier), "keep": "goood"}, "Did you mean 'good'"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            made("classify", options)
    with pytest.raises(ModelError, match="no text classifier"):
        made("classify", {"model": str(tiny_folder), "keep": "good"})
    with pytest.raises(ModelError, match="no model folder"):
        made("classify", {"model": str(tmp_path), "keep": "good"})
    (tmp_path / "few.jsonl").write_text('{"text": "one"}')
    with pytest.raises(DataError, match="has 1 examples"):
        made("classify", {"examples": {**both, "maths": str(tmp_path / "few.jsonl")}, "keep": "maths"})
