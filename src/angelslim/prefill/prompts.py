"""The prompts of a run: real text of exactly the length that is measured, and one that asks for something far away.

Random token ids would say nothing about selectors whose density follows the attention, so prompts are text: the recipe's
data, or the built-in text, of which times are measured on the calibration split and losses on the evaluation split.
"""

from __future__ import annotations

import random
from typing import Any, Literal

import torch
from torch import Tensor

from ..data import builtin
from ..data.text import calibration_batches, windows
from .job import PrefillJob

PAIR_TOKENS = 8  # the fewest tokens that one line of the retrieval prompt takes


def text_prompt(
    job: PrefillJob, tokenizer: Any, length: int, split: Literal["calibration", "evaluation"]
) -> Tensor:
    """Token ids [1, length] of running text; a text that is too short is repeated."""
    data = job.config.dataset
    if data.data_path:
        rows = calibration_batches(
            tokenizer,
            data.data_path,
            samples=data.num_samples,
            max_length=length,
            seed=job.config.global_.seed + (split == "evaluation"),
        )
        ids = torch.cat([row[0] for row in rows])
    else:
        text = "\n\n".join(builtin.text(split, max_chars=12 * length))
        ids = torch.tensor(next(windows(tokenizer, text, length)))
    return _exactly(ids, length)


def retrieval_prompt(tokenizer: Any, length: int, seed: int) -> Tensor:
    """Token ids [1, length]: a long list of keys with values, and at the end the question for an early one."""
    rng = random.Random(seed)  # noqa: S311  not for secrets
    pairs = [
        (f"key-{rng.randrange(10**6):06d}", f"{rng.randrange(10**6):06d}")
        for _ in range(length // PAIR_TOKENS)
    ]
    asked = pairs[len(pairs) // 20][0]
    question = torch.tensor(
        tokenizer(f"\nWhich value has {asked}? It is ", add_special_tokens=False)["input_ids"]
    )
    listed = "\n".join(f"{key} has the value {value}." for key, value in pairs)
    ids = torch.tensor(next(windows(tokenizer, listed, length)))
    return torch.cat([_exactly(ids, length)[:, : max(length - len(question), 1)], question[None]], 1)[
        :, -length:
    ]


def _exactly(ids: Tensor, length: int) -> Tensor:
    return ids.repeat(-(-length // len(ids)))[None, :length]
