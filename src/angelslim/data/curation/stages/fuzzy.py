"""Drop near-duplicates: documents that share most of their word shingles with one that stays (MinHash LSH).

The likeness of two documents is the Jaccard index of their sets of shingles (Broder 1997): shared ones over all. A
MinHash signature of `permutations` values estimates it with a standard error of ``sqrt(J (1 - J) / permutations)``: 0.035
for 128 values at J = 0.8. Bands of the signature are looked up in hash tables (locality-sensitive hashing), and each
candidate's likeness is then estimated from the whole signature, so the bands may be generous.

A document is dropped when it is at least `threshold` like one that *stays*, the first in the order of reading. So every
dropped document has a near-duplicate in the result, and chains (A like B, B like C, A unlike C) do not swallow C.
Memory: about 6 KB for each document kept (128 values of 4 bytes, and 14 table entries of datasketch's).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from ....base.errors import MissingExtra
from ....config.fields import Int, Section, not_a_truth_value
from ..base import Context, Documents
from ..ledger import Ledger
from ..texts import shingles

REASON = "near-duplicate"
_MISSED, _FALSE = (
    0.9,
    0.1,
)  # how the bands weigh missed pairs against needless candidates, which are checked anyway


class Options(Section):
    """How alike is too alike."""

    threshold: Annotated[float, Field(gt=0, le=1), BeforeValidator(not_a_truth_value)] = 0.8  # Jaccard index
    shingle: Annotated[Int, Field(ge=1, le=50)] = 5  # words in a row
    permutations: Annotated[Int, Field(ge=16, le=1024)] = 128


class Fuzzy:
    """Keeps the first of documents that are nearly equal."""

    section: ClassVar[type[Section]] = Options
    changes: ClassVar[bool] = False
    last: ClassVar[bool] = False

    def __init__(self, options: Options, context: Context) -> None:
        self.options, self.seed = options, context.seed
        _datasketch()

    def reads(self) -> Sequence[Path]:
        """Nothing but the documents."""
        return ()

    def signature(self, text: str) -> Any:
        """Return the MinHash of a text's shingles."""
        sketch = _datasketch().MinHash(num_perm=self.options.permutations, seed=self.seed % 2**31 + 1)
        sketch.update_batch([shingle.encode() for shingle in shingles(text, self.options.shingle)])
        return sketch

    def run(self, documents: Documents, ledger: Ledger) -> None:
        """Look each document up among those that stay."""
        ledger.expect([REASON])
        threshold = self.options.threshold
        tables = _datasketch().MinHashLSH(
            threshold=threshold, num_perm=self.options.permutations, weights=(_FALSE, _MISSED)
        )
        kept: dict[int, NDArray[np.uint32]] = {}
        for document in documents:
            sketch = self.signature(document.text)
            values = sketch.hashvalues.astype(np.uint32)
            likeness = {other: float((values == kept[other]).mean()) for other in tables.query(sketch)}
            best = max(sorted(likeness), key=lambda other: likeness[other], default=None)
            if best is not None and likeness[best] >= threshold:
                ledger.drop(document, REASON, f"{likeness[best]:.2f} like document {best}")
            else:
                tables.insert(document.index, sketch)
                kept[document.index] = values


def _datasketch() -> Any:
    try:
        import datasketch
    except ModuleNotFoundError as error:
        raise MissingExtra("datasketch", "curate", "Finding near-duplicates") from error
    return datasketch


STAGE = Fuzzy
