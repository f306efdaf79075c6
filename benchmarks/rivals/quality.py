"""One judge for every tool: what a compressed folder computes, compared with the original.

The folder is opened by `angelslim.load`, which decodes the codes and quantizes the inputs as an engine does. Decoding
and computing are in float32 on both sides, so that nothing but the compression differs: in bfloat16 the forward pass
alone would move the divergence by as much as eight bits do.

- KL: mean over held-out tokens of ``KL(original || compressed)`` in nats, the first figure to compare;
- top-1: share of tokens whose most likely successor stays the same;
- perplexity on the same tokens;
- accuracy of the two tasks, answered at once (no thinking), in percent.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

import angelslim
from angelslim.data import builtin
from angelslim.evaluate.tasks import exact_match

TASK_SEED = 30_000


def in_float32(folder: Path, shadow: Path) -> Path:
    """Make `shadow`: the same folder by links, with a config that asks for float32; returns it."""
    shutil.rmtree(shadow, ignore_errors=True)
    shadow.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name != "config.json":
            (shadow / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("torch_dtype", None)
    (shadow / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), "utf-8")
    return shadow


def log_probabilities(model: Any, ids: Tensor) -> Iterator[Tensor]:
    """Yield the log-probabilities ``[tokens, vocabulary]`` of one window after another."""
    with torch.inference_mode():
        for window in ids:
            yield model(input_ids=window[None], use_cache=False).logits[0].float().log_softmax(-1)


class Judge:
    """Compares folders with one original on windows of ids, and on `examples` questions of each task if not 0.

    The original's log-probabilities are kept in a file of `work` and read window by window.
    """

    def __init__(
        self, original: Path, tokenizer: Any, ids: Tensor, examples: int, work: Path, name: str
    ) -> None:
        self.tokenizer, self.ids, self.examples, self.shadow = tokenizer, ids, examples, work / "shadow"
        cache = work / "originals" / f"{name}.safetensors"
        if not cache.is_file():
            model = angelslim.load(in_float32(original, self.shadow))
            found = {str(index): rows for index, rows in enumerate(log_probabilities(model, ids))}
            cache.parent.mkdir(parents=True, exist_ok=True)
            save_file(found, cache)
            measured = {"perplexity": self._perplexity(found), **self.accuracies(model)}
            cache.with_suffix(".json").write_text(json.dumps(measured), "utf-8")
        self.original = load_file(cache)  # mapped, not read
        self.scores: dict[str, float] = json.loads(cache.with_suffix(".json").read_text("utf-8"))

    def _perplexity(self, found: dict[str, Tensor]) -> float:
        losses = [
            functional.nll_loss(found[str(index)][:-1], window[1:]).item()
            for index, window in enumerate(self.ids)
        ]
        return math.exp(sum(losses) / len(losses))

    def judge(self, folder: Path) -> dict[str, float]:
        """Return KL, top-1, perplexity and the tasks' accuracies of a compressed folder."""
        model = angelslim.load(in_float32(folder, self.shadow))
        divergence = same = loss = 0.0
        for index, (window, after) in enumerate(
            zip(self.ids, log_probabilities(model, self.ids), strict=True)
        ):
            before = self.original[str(index)]
            divergence += (before.exp() * (before - after)).sum(-1).mean().item()
            same += (before.argmax(-1) == after.argmax(-1)).float().mean().item()
            loss += functional.nll_loss(after[:-1], window[1:]).item()
        count = len(self.ids)
        found = {"kl": divergence / count, "top1": same / count, "perplexity": math.exp(loss / count)}
        return {**found, **self.accuracies(model)}

    def accuracies(self, model: Any) -> dict[str, float]:
        """Return the accuracy of each task, in percent."""
        found: dict[str, float] = {}
        for task in builtin.TASKS if self.examples else ():
            asked = builtin.examples(task, "evaluation", self.examples, TASK_SEED, thinking=False)
            found[task] = exact_match(
                model, self.tokenizer, asked, batch_size=self.examples, max_new_tokens=16
            ).value
        return found
