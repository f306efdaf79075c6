"""A linear text classifier: TF-IDF of words and word pairs, then logistic regression.

Trained by scikit-learn, stored as numbers: ``classifier.json`` holds the labels and the vocabulary, the safetensors file
``weights.safetensors`` the tensors ``idf`` ``[features]``, ``weight`` ``[labels, features]`` and ``bias`` ``[labels]``,
all float64. Nothing is pickled, so a classifier from somewhere else is safe to use. What it computes is written out here:
``x_f = (1 + log count_f) idf_f``, divided by its length; then the softmax of ``weight x + bias``.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ....base.errors import DataError, MissingExtra
from ....base.files import write_atomically
from ..texts import normalised

Floats = NDArray[np.float64]
CONFIG, WEIGHTS = "classifier.json", "weights.safetensors"
FEATURES = 200_000  # the most frequent words and pairs
FOLDS = 5


def features(text: str) -> list[str]:
    """Return the normalised words of a text and its pairs of neighbours."""
    found = normalised(text).split(" ")
    return [*found, *(f"{left} {right}" for left, right in pairwise(found))]


@dataclass(frozen=True)
class LinearClassifier:
    """Probabilities of labels from a text."""

    labels: list[str]
    vocabulary: dict[str, int]
    idf: Floats
    weight: Floats
    bias: Floats

    def probabilities(self, texts: Sequence[str]) -> Floats:
        """Return ``[texts, labels]``."""
        return np.stack([self._one(text) for text in texts])

    def _one(self, text: str) -> Floats:
        counts = Counter(features(text))
        known = [(self.vocabulary[name], n) for name, n in counts.items() if name in self.vocabulary]
        score = self.bias.copy()
        if known:
            places = np.array([place for place, _ in known])
            values = np.array([1 + math.log(n) for _, n in known]) * self.idf[places]
            score += self.weight[:, places] @ (values / np.linalg.norm(values))
        raised = np.exp(score - score.max())
        return np.asarray(raised / raised.sum(), dtype=np.float64)

    def save(self, folder: Path) -> None:
        """Write the two files."""
        folder.mkdir(parents=True, exist_ok=True)
        words = sorted(self.vocabulary, key=lambda word: self.vocabulary[word])
        text = json.dumps(
            {"kind": "tfidf-linear", "labels": self.labels, "vocabulary": words}, ensure_ascii=False
        )
        write_atomically(folder / CONFIG, text.encode())
        tensors = {"idf": self.idf, "weight": self.weight, "bias": self.bias}
        write_atomically(
            folder / WEIGHTS, save({name: np.ascontiguousarray(t) for name, t in tensors.items()})
        )

    @classmethod
    def load(cls, folder: Path) -> LinearClassifier:
        """Read what `save` wrote; anything else is a `DataError`."""
        try:
            config = json.loads((folder / CONFIG).read_text("utf-8"))
            tensors = load_file(folder / WEIGHTS)
            labels, words = list(config["labels"]), list(config["vocabulary"])
            idf, weight, bias = (tensors[name].astype(np.float64) for name in ("idf", "weight", "bias"))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            fix = f"It needs {CONFIG} and {WEIGHTS} as a curation writes them."
            raise DataError("This is no stored classifier.", where=str(folder), fix=fix) from error
        if (weight.shape, bias.shape, idf.shape) != (
            (len(labels), len(words)),
            (len(labels),),
            (len(words),),
        ):
            raise DataError(
                "The classifier's parts do not fit each other.", where=str(folder), fix="Train it again."
            )
        return cls(labels, {word: place for place, word in enumerate(words)}, idf, weight, bias)


def train(examples: dict[str, list[str]], seed: int) -> tuple[LinearClassifier, float | None]:
    """Train on texts by label; returns the classifier and its accuracy on texts left out in turn, if there are enough."""
    linear, text, selection, pipeline = _sklearn()
    labels = sorted(examples)
    texts = [text for label in labels for text in examples[label]]
    targets = np.array([number for number, label in enumerate(labels) for _ in examples[label]])

    def untrained() -> Any:
        return pipeline.make_pipeline(
            text.TfidfVectorizer(analyzer=features, sublinear_tf=True, max_features=FEATURES),
            linear.LogisticRegression(
                C=10.0, max_iter=1000, class_weight="balanced", random_state=seed % 2**31
            ),
        )

    accuracy = None
    if min(map(len, examples.values())) >= FOLDS:
        folds = selection.StratifiedKFold(FOLDS, shuffle=True, random_state=seed % 2**31)
        accuracy = float(selection.cross_val_score(untrained(), texts, targets, cv=folds).mean())
    fitted = untrained().fit(texts, targets)
    vectorizer, regression = fitted[0], fitted[1]
    weight, bias = regression.coef_, regression.intercept_
    if len(labels) == 2:  # scikit-learn keeps one row then: the logarithm of the odds of the second label
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    vocabulary = {str(word): int(place) for word, place in vectorizer.vocabulary_.items()}
    return LinearClassifier(labels, vocabulary, vectorizer.idf_, weight, bias), accuracy


def _sklearn() -> tuple[Any, Any, Any, Any]:
    try:
        from sklearn import linear_model, model_selection, pipeline
        from sklearn.feature_extraction import text
    except ModuleNotFoundError as error:
        raise MissingExtra("scikit-learn", "curate", "Training a classifier") from error
    return linear_model, text, model_selection, pipeline
