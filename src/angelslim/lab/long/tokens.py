"""The tokens of `tiny-long`: whole words, in ranges, so that rows can be drawn as numbers on the device.

    0 <pad>, 1 <unk>, 2.. markers | keys | values | words of text, the most frequent first

Text is cut into runs of word characters and single signs, without blanks; what the vocabulary lacks is ``<unk>``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.statements import END, MARKERS, PAD, UNKNOWN, key_words, value_words

WORD = r"\w+|[^\w\s]"


@dataclass(frozen=True)
class Tokens:
    """Where each kind of token lies: `size` in all, of them `keys` keys and `values` values."""

    size: int
    keys: int
    values: int

    @property
    def first_key(self) -> int:
        """The number of the first key."""
        return 2 + len(MARKERS)

    @property
    def first_value(self) -> int:
        """The number of the first value."""
        return self.first_key + self.keys

    @property
    def first_word(self) -> int:
        """The number of the most frequent word of text."""
        return self.first_value + self.values

    @staticmethod
    def marker(word: str) -> int:
        """Return the number of a marker."""
        return 2 + MARKERS.index(word)

    def words(self, documents: Iterable[str]) -> list[str]:
        """Return the whole vocabulary in order; the words of text are counted in `documents`."""
        fixed = [PAD, UNKNOWN, *MARKERS, *key_words(self.keys), *value_words(self.values)]
        taken = set(fixed)
        counts: Counter[str] = Counter()
        for document in documents:
            counts.update(re.findall(WORD, document))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        fixed += [word for word in ranked if word not in taken][: self.size - len(fixed)]
        return fixed + [f"<unused{index}>" for index in range(self.size - len(fixed))]


def save_tokenizer(vocabulary: list[str], folder: Path, longest: int) -> None:
    """Write a word tokenizer that every release of transformers reads; `longest` is the model's context."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(WORD), "isolated"),
        ]
    )
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "model_max_length": longest,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def encode(tokenizer: Any, documents: list[str]) -> Any:
    """Return the documents as one int32 tensor of token numbers."""
    import torch

    rows = tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    return torch.tensor([token for row in rows for token in row.ids], dtype=torch.int32)
