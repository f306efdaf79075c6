"""Drop documents whose words were seen before: the same text whatever its case, width, spacing and punctuation.

The first document in the order of reading stays, so sources are listed with the best first. Kept in memory: a 16-byte
BLAKE2b digest a document; two different texts share one with a probability of about ``documents^2 / 2^129``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from ....config.fields import Section
from ..base import Context, Documents
from ..ledger import Ledger
from ..texts import normalised

REASON = "exact duplicate"


class Options(Section):
    """What counts as the same."""

    normalise: bool = True  # false: only texts that are equal character by character


class Exact:
    """Keeps the first of equal documents."""

    section: ClassVar[type[Section]] = Options
    changes: ClassVar[bool] = False
    last: ClassVar[bool] = False

    def __init__(self, options: Options, context: Context) -> None:
        self.options = options

    def reads(self) -> Sequence[Path]:
        """Nothing but the documents."""
        return ()

    def run(self, documents: Documents, ledger: Ledger) -> None:
        """Drop each document whose digest is known."""
        ledger.expect([REASON])
        seen: dict[bytes, int] = {}
        for document in documents:
            text = normalised(document.text) if self.options.normalise else document.text
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            first = seen.setdefault(digest, document.index)
            if first != document.index:
                ledger.drop(document, REASON, f"same as document {first}")


STAGE = Exact
