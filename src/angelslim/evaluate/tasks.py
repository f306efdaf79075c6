"""Exact match on the generated tasks: the model answers greedily, and the answer is right or wrong.

A prompt is the chat template with a generation prompt, in the example's own thinking mode. Prompts of a batch
are padded on the left, so that every sequence goes on right behind its last token; the attention mask and the
position ids that follow from it make a batch equal to its prompts run one by one (tested in fp32).

The accuracy is in percent; its standard error is the binomial one, ``sqrt(p (1 - p) / n)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..base.errors import DataError
from ..data.builtin import Example, extract_answer
from .base import Score
from .inference import device_of, inference, stop_tokens

OPEN, CLOSE = "<think>", "</think>"
DEFAULT_NEW_TOKENS = 192


def exact_match(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    device: torch.device | str | None = None,
) -> Score:
    """Return the share of examples answered exactly, named after their task."""
    if not examples:
        raise DataError("There is no example to evaluate on.", fix="Ask for at least one sample.")
    prompts = [chat_prompt(tokenizer, example) for example in examples]
    replies = generate(
        model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens, device=device
    )
    right = sum(
        extract_answer(still_thinking(prompt) + reply) == example.answer
        for prompt, reply, example in zip(prompts, replies, examples, strict=True)
    )
    share, count = right / len(examples), len(examples)
    tasks = sorted({example.task for example in examples})
    stderr = math.sqrt(share * (1 - share) / count)
    return Score("+".join(tasks), 100 * share, "%", samples=count, stderr=100 * stderr)


def chat_prompt(tokenizer: Any, example: Example) -> str:
    """Write the example's messages as the model's own chat format, up to where the reply begins."""
    if not tokenizer.chat_template:
        raise DataError(
            "The tokenizer has no chat template, which the generated tasks need.",
            fix="Evaluate perplexity only, or add a chat_template to the tokenizer.",
        )
    prompt: str = tokenizer.apply_chat_template(
        example.messages, tokenize=False, add_generation_prompt=True, enable_thinking=example.thinking
    )
    return prompt


def still_thinking(prompt: str) -> str:
    """Return the tag that a prompt left open, as templates of thinking-only models do, else nothing."""
    return OPEN if prompt.rfind(OPEN) > prompt.rfind(CLOSE) else ""


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    batch_size: int = 16,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    device: torch.device | str | None = None,
) -> list[str]:
    """Continue each prompt greedily up to a stop token; the text keeps special tokens other than that one."""
    rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # alike lengths waste less padding
    replies = [""] * len(rows)
    stops, where = stop_tokens(model, tokenizer), device_of(model, device)
    with inference(model):
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            new = _generate_batch(model, [rows[index] for index in chosen], stops, max_new_tokens, where)
            for index, ids in zip(chosen, new, strict=True):
                replies[index] = tokenizer.decode(ids, skip_special_tokens=False)
    return replies


def _generate_batch(
    model: Any, rows: list[list[int]], stops: list[int], max_new_tokens: int, where: torch.device
) -> list[list[int]]:
    """Return each row's new ids, cut before its first stop token."""
    from transformers import GenerationConfig

    width = max(map(len, rows))
    padding = stops[0] if stops else 0
    ids_BT = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=where)
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=where)
    # A fresh configuration: the checkpoint's own may ask for sampling or for a repetition penalty.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops or None, pad_token_id=padding
    )
    output_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=config)
    return [_before_stop(row, stops) for row in output_BT[:, width:].tolist()]


def _before_stop(ids: list[int], stops: list[int]) -> list[int]:
    return next((ids[:index] for index, token in enumerate(ids) if token in stops), ids)
