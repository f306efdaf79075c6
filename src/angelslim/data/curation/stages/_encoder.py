"""A Hugging Face folder as something that reads texts: class probabilities, or mean-pooled hidden states.

Only safetensors weights and transformers' own code are loaded, from the folder alone. Texts are cut to `tokens` tokens
and padded on the right within a batch; padding is masked out of attention and of the mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ....base.errors import ModelError

Floats = NDArray[np.float32]
HEAD = "ForSequenceClassification"


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """Return a model folder's configuration; a folder without one is a `ModelError`."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        fix = "Name a folder with config.json, weights (safetensors) and a tokenizer."
        raise ModelError(f"{folder} is no model folder.", where=where, fix=fix) from error
    return dict(config)


def labels_of(folder: Path, where: str) -> list[str]:
    """Return the labels of a sequence classifier, in order; another kind of model is a `ModelError`."""
    config = read_config(folder, where)
    kinds = config.get("architectures") or []
    if not any(str(kind).endswith(HEAD) for kind in kinds):
        kind = ", ".join(map(str, kinds)) or "a model without a named architecture"
        raise ModelError(
            f"{folder} holds {kind}, no text classifier.",
            where=where,
            fix=f"Its architecture has to end in {HEAD}.",
        )
    names = config.get("id2label") or {str(number): f"LABEL_{number}" for number in range(2)}
    return [str(names[key]) for key in sorted(names, key=int)]


class Encoder:
    """A model of the folder; `classify` chooses its head, otherwise the hidden states are used."""

    def __init__(self, folder: Path, where: str, *, classify: bool, tokens: int) -> None:
        from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

        kind = AutoModelForSequenceClassification if classify else AutoModel
        self.tokens, self.classify = tokens, classify
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            self.model: Any = kind.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32
            ).eval()
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            fix = "Name a folder with safetensors weights and a tokenizer that transformers opens."
            raise ModelError(f"{folder} cannot be opened: {reason}", where=where, fix=fix) from error
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.tokenizer.padding_side = "right"
        if self.model.config.pad_token_id is None:  # a classifier on a decoder finds the last token by it
            self.model.config.pad_token_id = self.tokenizer.pad_token_id

    def __call__(self, texts: Sequence[str]) -> Floats:
        """Return ``[texts, labels]`` probabilities, or ``[texts, hidden]`` mean-pooled states."""
        if self.tokenizer.pad_token_id is None:  # nothing to pad with
            return np.concatenate([self._batch([text]) for text in texts])
        return self._batch(texts)

    @torch.inference_mode()
    def _batch(self, texts: Sequence[str]) -> Floats:
        batch = self.tokenizer(
            list(texts), padding=len(texts) > 1, truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(self.model.device)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        output = self.model(**inputs)
        if self.classify:
            return np.asarray(output.logits.float().softmax(-1).cpu().numpy())
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        pooled = (output.last_hidden_state.float() * mask).sum(1) / mask.sum(1).clamp(min=1)
        return np.asarray(pooled.cpu().numpy())
