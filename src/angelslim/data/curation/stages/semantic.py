"""Drop documents that say what another one says in nearly the same way: duplicates among embeddings.

As SemDeDup does (arXiv 2303.09540): every document becomes a vector of length 1, k-means sorts the vectors into buckets,
and within a bucket a document goes when its cosine with one that stays is at least `threshold`. The first in the order
of reading stays (SemDeDup keeps the one farthest from the bucket's centre). Pairs that k-means parts are not found.

The vectors are mean-pooled hidden states of a model folder (`model`), or, offline and without one, TF-IDF values reduced
to `dimensions` by a truncated SVD, fitted on a seeded sample of `sample` documents. TF-IDF sees words, not meaning: it
finds rewordings that share their content words. Thresholds of the two kinds do not compare; look at the report's
examples. Memory: one float32 vector a document.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from ....base.errors import MissingExtra
from ....config.fields import Count, Int, Section, Word, not_a_truth_value
from ..base import Context, Documents
from ..ledger import Ledger
from ..texts import normalised

REASON = "semantic duplicate"
_ROWS = 1024  # compared at a time
Floats = NDArray[np.float32]


class Options(Section):
    """How vectors are made and how near is too near."""

    model: Word | None = None  # a model folder; none: TF-IDF
    threshold: Annotated[float, Field(gt=0, le=1), BeforeValidator(not_a_truth_value)] = 0.95  # cosine
    dimensions: Annotated[Int, Field(ge=2, le=4096)] = 256  # of TF-IDF vectors
    sample: Annotated[Int, Field(ge=2)] = 50_000  # documents that TF-IDF is fitted on
    bucket: Annotated[Int, Field(ge=2, le=20_000)] = 2000  # documents of one bucket, on average
    max_characters: Count = 20_000
    max_tokens: Count = 512
    batch_size: Count = 16


class Semantic:
    """Keeps the first of documents with nearly the same vector."""

    section: ClassVar[type[Section]] = Options
    changes: ClassVar[bool] = False
    last: ClassVar[bool] = False

    def __init__(self, options: Options, context: Context) -> None:
        self.options, self.context = options, context
        self._folder = Path(options.model).expanduser() if options.model else None
        _sklearn()
        if self._folder is not None:
            from ._encoder import read_config

            read_config(self._folder, context.where)

    def reads(self) -> Sequence[Path]:
        """Return the model's files."""
        return (
            sorted([*self._folder.glob("*.json"), *self._folder.glob("*.safetensors")])
            if self._folder
            else ()
        )

    def run(self, documents: Documents, ledger: Ledger) -> None:
        """Embed, sort into buckets, compare within each, name what goes."""
        ledger.expect([REASON])
        index, vectors = self.embed(documents)
        twins: dict[int, tuple[int, float]] = {}
        labels = buckets(vectors, self.options.bucket, self.context.seed)
        for label in range(int(labels.max(initial=0)) + 1):
            members = np.flatnonzero(labels == label)
            for place, (other, cosine) in near_ones(vectors[members], self.options.threshold).items():
                twins[int(index[members[place]])] = (int(index[members[other]]), cosine)
        for document in documents:
            if document.index in twins:
                other, cosine = twins[document.index]
                ledger.drop(document, REASON, f"{cosine:.2f} like document {other}")

    def embed(self, documents: Documents) -> tuple[NDArray[np.int64], Floats]:
        """Return the documents' indices and their vectors ``[documents, dimensions]`` of length 1."""
        vectorize = self._model() if self._folder else self._tfidf(documents)
        index: list[int] = []
        parts: list[Floats] = []
        stream = iter(documents)
        while batch := list(islice(stream, self.options.batch_size)):
            index += [document.index for document in batch]
            parts.append(
                _unit(vectorize([document.text[: self.options.max_characters] for document in batch]))
            )
        return np.array(index, dtype=np.int64), np.concatenate(parts)

    def _model(self) -> Any:
        from ._encoder import Encoder

        assert self._folder is not None
        return Encoder(self._folder, self.context.where, classify=False, tokens=self.options.max_tokens)

    def _tfidf(self, documents: Documents) -> Any:
        decomposition, text, _ = _sklearn()
        texts = _sample(documents, self.options.sample, self.options.max_characters, self.context.seed)
        vectorizer = text.TfidfVectorizer(analyzer=_words, sublinear_tf=True, max_features=100_000)
        table = vectorizer.fit_transform(texts)
        width = min(self.options.dimensions, min(table.shape) - 1)
        if width < 2:  # too little to reduce; the values themselves are few enough
            return lambda batch: vectorizer.transform(batch).toarray().astype(np.float32)
        svd = decomposition.TruncatedSVD(width, random_state=self.context.seed % 2**31).fit(table)
        return lambda batch: svd.transform(vectorizer.transform(batch)).astype(np.float32)


def buckets(vectors: Floats, size: int, seed: int) -> NDArray[np.int64]:
    """Return each vector's bucket; k-means makes about as many as give `size` vectors to each."""
    count = -(-len(vectors) // size)
    if count < 2:
        return np.zeros(len(vectors), dtype=np.int64)
    _, _, cluster = _sklearn()
    means = cluster.MiniBatchKMeans(count, random_state=seed % 2**31, n_init=1, batch_size=4096)
    return np.asarray(means.fit_predict(vectors), dtype=np.int64)


def near_ones(vectors: Floats, threshold: float) -> dict[int, tuple[int, float]]:
    """Return, for each vector that goes, the nearest one that stays and the cosine; the first of a pair stays."""
    kept: list[int] = []
    gone: dict[int, tuple[int, float]] = {}
    for start in range(0, len(vectors), _ROWS):
        cosines = vectors[start : start + _ROWS] @ vectors.T
        for place, row in enumerate(cosines, start=start):
            near = row[kept]
            best = int(near.argmax()) if kept else -1
            if kept and near[best] >= threshold - 1e-6:  # equal texts differ from 1 in the last bits
                gone[place] = (kept[best], float(near[best]))
            else:
                kept.append(place)
    return gone


def _unit(vectors: Any) -> Floats:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-12), dtype=np.float32)


def _words(text: str) -> list[str]:
    return normalised(text).split(" ")


def _sample(documents: Documents, count: int, characters: int, seed: int) -> Iterator[str]:
    """Yield the texts of a random choice of documents, in order; the choice is made before anything is read."""
    total = len(documents)
    places = range(total)
    chosen = set(random.Random(seed).sample(places, count) if total > count else places)  # noqa: S311  not for secrets
    return (document.text[:characters] for place, document in enumerate(documents) if place in chosen)


def _sklearn() -> tuple[Any, Any, Any]:
    try:
        from sklearn import cluster, decomposition
        from sklearn.feature_extraction import text
    except ModuleNotFoundError as error:
        raise MissingExtra("scikit-learn", "curate", "Finding semantic duplicates") from error
    return decomposition, text, cluster


STAGE = Semantic
