"""Do teacher and student mean the same token by the same number? Distillation compares them number by number.

What counts is the map from numbers to tokens. How wide a model's logits are does not: models of one family often pad
the same vocabulary to different widths, and the padding is never compared.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ..base.errors import ConfigError


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's map from numbers to tokens, as a size and a hash."""

    name: str  # whose it is, for messages
    size: int  # the largest number + 1
    digest: str


def vocabulary_of(tokenizer: Any, name: str) -> Vocabulary:
    """Return the vocabulary of a tokenizer, added tokens included."""
    words = sorted((number, word) for word, number in tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps(words, separators=(",", ":")).encode())
    return Vocabulary(name, words[-1][0] + 1, digest.hexdigest())


def require_same(teacher: Vocabulary, student: Vocabulary) -> None:
    """Raise one `ConfigError` that names both models unless their tokenizers agree on every token."""
    if teacher.digest != student.digest:
        raise ConfigError(
            f"The teacher {teacher.name} ({teacher.size} tokens, {teacher.digest[:8]}) and the student "
            f"{student.name} ({student.size} tokens, {student.digest[:8]}) have different vocabularies.",
            fix="Choose a teacher with the student's tokenizer.",
        )
