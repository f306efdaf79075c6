"""Score a small model on the built-in tasks: exact match of greedy answers, and perplexity of held-out text."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..data import builtin
from ..data.chat import render

LONGEST_REPLY = 128  # tokens; the longest completion of the tasks has about 75


@torch.inference_mode()
def replies(
    model: Any,
    tokenizer: Any,
    examples: list[builtin.Example],
    *,
    batch: int = 64,
    longest: int = LONGEST_REPLY,
) -> list[str]:
    """Generate greedily through the chat template, left-padded batches, and return the completions."""
    tokenizer.padding_side = "left"
    found: list[str] = []
    for start in range(0, len(examples), batch):
        prompts = [
            render(tokenizer, example.messages, generate=True, thinking=example.thinking)
            for example in examples[start : start + batch]
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        written = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        new = written[:, inputs["input_ids"].shape[1] :]
        found += tokenizer.batch_decode(new, skip_special_tokens=True)
    return found


def exact_match(model: Any, tokenizer: Any, examples: list[builtin.Example], *, batch: int = 64) -> float:
    """Return the share of examples whose generated answer is exactly right."""
    completions = replies(model, tokenizer, examples, batch=batch)
    right = [
        builtin.extract_answer(completion) == example.answer
        for completion, example in zip(completions, examples, strict=True)
    ]
    return sum(right) / len(right)


@torch.inference_mode()
def perplexity(model: Any, tokenizer: Any, documents: list[str], *, length: int = 512) -> tuple[float, int]:
    """Return the perplexity per token of texts cut into windows of `length` tokens, and the tokens scored."""
    total, count = 0.0, 0
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"]
        for window in ids.split(length, dim=1):
            if window.shape[1] < 2:
                continue
            window = window.to(model.device)
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
            count += window.shape[1] - 1
    return math.exp(total / count), count
