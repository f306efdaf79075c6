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
    perplexity_text: Path | None = None,
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

    Without `perplexity_text` the text is the built-in evaluation split, which no calibration ever reads. The
    examples come from the evaluation split too, half of them with thinking.
    """
    text = evaluation_text() if perplexity_text is None else read_text(perplexity_text)
    drawn = {task: builtin.examples(task, "evaluation", samples, seed=seed) for task in tasks}
    scores = [
        perplexity(model, tokenizer, text, window=window, stride=stride, max_tokens=max_tokens, device=device)
    ]
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
