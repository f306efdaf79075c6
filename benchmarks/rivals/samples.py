"""What every tool is shown and judged on: calibration ids in a file, held-out ids, all from the package's own data.

A calibration set is `samples` rows of `tokens` ids, none padded: three quarters windows of the calibration split's text,
the rest conversations of the two tasks, packed. The held-out windows are text of the evaluation split; no file is in
both. Everything is a pure function of tokenizer and seed.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from angelslim.data import builtin
from angelslim.data.chat import render

ALL = 10**9  # characters


def calibration(tokenizer: Any, samples: int, tokens: int, seed: int) -> Tensor:
    """Return the ids ``[samples, tokens]`` of one calibration set."""
    rng = random.Random(f"calibration/{seed}")
    text = _ids(tokenizer, "\n".join(builtin.text("calibration", ALL)))
    starts = [rng.randrange(len(text) - tokens) for _ in range(samples - samples // 4)]
    rows = [text[start : start + tokens] for start in starts]
    for index in range(samples // 4):
        task = builtin.TASKS[index % len(builtin.TASKS)]
        row: list[int] = []
        for example in builtin.examples(task, "calibration", tokens, seed * 1000 + index):
            turns = [*example.messages, {"role": "assistant", "content": example.completion}]
            row += _ids(tokenizer, render(tokenizer, turns))
            if len(row) >= tokens:
                break
        rows.append(row[:tokens])
    rng.shuffle(rows)
    return torch.tensor(rows)


def write_calibration(path: Path, tokenizer: Any, samples: int, tokens: int, seed: int) -> Path:
    """Write a calibration set once, as ``input_ids``, and return its file."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"input_ids": calibration(tokenizer, samples, tokens, seed)}, path)
    return path


def held_out(tokenizer: Any, windows: int, tokens: int) -> Tensor:
    """Return ids ``[windows, tokens]`` of text that no calibration sample contains, spread over the split."""
    ids = _ids(tokenizer, "\n".join(builtin.text("evaluation", ALL)))
    assert len(ids) >= windows * tokens, f"the evaluation split has only {len(ids)} tokens"
    step = (len(ids) - tokens) // max(windows - 1, 1)
    return torch.tensor([ids[index * step : index * step + tokens] for index in range(windows)])


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
