"""Keep the documents that a text classifier takes for what is wanted: model-based extraction.

Three kinds of classifier, of which a recipe names one:

- ``examples``: label -> file of labelled texts. A linear classifier is trained here (see `_linear`), its accuracy on
  examples left out in turn stands in the report, and it is kept in the result's folder for later runs;
- ``linear``: the folder of such a classifier from an earlier run;
- ``model``: a folder with any Hugging Face sequence classifier.

A document stays when the labels in ``keep`` together have a probability of at least ``threshold``. Only the first
`max_characters` (and `max_tokens`, for a model) are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from ....base.errors import ConfigError, DataError, did_you_mean
from ....config.fields import Count, Section, Share, Word, Words
from ...records import read_records
from ..base import Context, Document, Documents
from ..ledger import Ledger
from ..texts import text_of
from ._linear import CONFIG, WEIGHTS, LinearClassifier, _sklearn, train

_FEWEST = 2  # examples of a label


class Options(Section):
    """Which classifier, and what to keep."""

    examples: dict[str, Words] = Field(default_factory=dict)
    linear: Word | None = None
    model: Word | None = None
    keep: Annotated[Words, Field(min_length=1)]
    threshold: Share = 0.5
    max_characters: Count = 20_000
    max_tokens: Count = 512
    batch_size: Count = 16


class Classify:
    """Keeps what the classifier wants."""

    section: ClassVar[type[Section]] = Options
    changes: ClassVar[bool] = False
    last: ClassVar[bool] = False

    def __init__(self, options: Options, context: Context) -> None:
        self.options, self.context = options, context
        kinds = [name for name in ("examples", "linear", "model") if getattr(options, name)]
        if len(kinds) != 1:
            given = " and ".join(kinds) or "none"
            fix = "Give exactly one of 'examples', 'linear' and 'model'."
            raise ConfigError(f"One classifier is needed, {given} given.", where=context.where, fix=fix)
        self._folder = Path(options.linear or options.model or "").expanduser()
        self._linear: LinearClassifier | None = None
        if options.examples:
            _sklearn()
            self.labels = sorted(options.examples)
            if len(self.labels) < 2:
                fix = "Give examples of what is not wanted too."
                raise ConfigError("A classifier needs two labels or more.", where=context.where, fix=fix)
            self._examples = {label: self._texts(label) for label in self.labels}
        elif options.linear:
            self._linear = LinearClassifier.load(self._folder)
            self.labels = self._linear.labels
        else:
            from ._encoder import labels_of

            self.labels = labels_of(self._folder, context.where)
        for label in options.keep:
            if label not in self.labels:
                raise ConfigError(
                    f"The classifier has no label {label!r}.",
                    where=context.where,
                    fix=did_you_mean(label, self.labels),
                )

    def reads(self) -> Sequence[Path]:
        """Return the files of the examples, or of the classifier."""
        if self.options.examples:
            return [Path(path).expanduser() for label in self.labels for path in self.options.examples[label]]
        if self.options.linear:
            return [self._folder / CONFIG, self._folder / WEIGHTS]
        return sorted([*self._folder.glob("*.json"), *self._folder.glob("*.safetensors")])

    def _texts(self, label: str) -> list[str]:
        texts = [text_of(record) for path in self.options.examples[label] for record in read_records(path)]
        texts = [text[: self.options.max_characters] for text in texts if text.strip()]
        if len(texts) < _FEWEST:
            raise DataError(
                f"The label {label!r} has {len(texts)} examples; at least {_FEWEST} are needed.",
                where=self.context.where,
                fix="Name files with one example a record.",
            )
        return texts

    def _classifier(self, ledger: Ledger) -> Callable[[Sequence[str]], Any]:
        if self.options.model:
            from ._encoder import Encoder

            return Encoder(self._folder, self.context.where, classify=True, tokens=self.options.max_tokens)
        if self._linear is None:
            trained, accuracy = train(self._examples, self.context.seed)
            trained.save(self.context.folder)
            count = sum(map(len, self._examples.values()))
            measured = (
                "too few to measure it" if accuracy is None else f"accuracy {accuracy:.3f} on those left out"
            )
            ledger.notes.append(
                f"Trained on {count} examples of {len(self.labels)} labels: {measured}; "
                f"kept in {self.context.folder.name}."
            )
            self._linear = LinearClassifier.load(self.context.folder)  # what a later run will use
        return self._linear.probabilities

    def run(self, documents: Documents, ledger: Ledger) -> None:
        """Classify batch by batch."""
        classify = self._classifier(ledger)
        wanted = [number for number, label in enumerate(self.labels) if label in self.options.keep]
        ledger.expect(f"classified as {label}" for label in self.labels if label not in self.options.keep)
        stream = iter(documents)
        while batch := list(islice(stream, self.options.batch_size)):
            rows = classify([document.text[: self.options.max_characters] for document in batch])
            for document, row in zip(batch, rows, strict=True):
                self._judge(document, row, wanted, ledger)

    def _judge(self, document: Document, row: Any, wanted: list[int], ledger: Ledger) -> None:
        likely = float(np.sum(row[wanted]))
        if likely >= self.options.threshold:
            return
        best = self.labels[int(np.argmax(row))]
        reason = f"classified as {best}" if best not in self.options.keep else "not certain enough"
        ledger.drop(document, reason, f"{likely:.2f} against {self.options.threshold:g}")


STAGE = Classify
