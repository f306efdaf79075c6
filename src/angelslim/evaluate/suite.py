"""The default suite: perplexity, the generated tasks, and speed, for any model with any text.

The same call before and after compression gives two lists of scores that differ in the weights only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.console import log
from ..data import builtin
from .base import Score
from .perplexity import perplexity, read_text
from .speed import generation_speed
from .tasks import DEFAULT_NEW_TOKENS, exact_match

DEFAULT_MAX_TOKENS = 16_384
DEFAULT_SAMPLES = 100


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    *,
    text: Path | bool | None = None,
    tasks: Sequence[str] = (),
    samples: int = DEFAULT_SAMPLES,
    speed: bool = False,
    batch_size: int = 16,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> list[Score]:
    """Measure perplexity, then each of `tasks` on `samples` examples, then (if `speed`) generation speed.

    `text` is the file to measure perplexity on; None or True takes the built-in evaluation split, which no
    calibration ever reads, and False measures none. The examples come from that split too, half of them with
    thinking.
    """
    passage = "" if text is False else read_text(text) if isinstance(text, Path) else evaluation_text()
    drawn = {task: builtin.examples(task, "evaluation", samples, seed=seed) for task in tasks}
    scores = []
    if text is not False:
        options = {"window": window, "stride": stride, "max_tokens": max_tokens}
        scores.append(perplexity(model, tokenizer, passage, device=device, **options))
    for items in drawn.values():
        scores.append(
            exact_match(
                model,
                tokenizer,
                items,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                device=device,
            )
        )
    if speed:
        scores += generation_speed(model, device=device, seed=seed)
    for score in scores:
        log.info("%s %.4g %s", score.metric, score.value, score.unit)
    return scores


def evaluation_text() -> str:
    """Return the built-in evaluation documents as one text."""
    return "\n\n".join(builtin.text("evaluation"))
