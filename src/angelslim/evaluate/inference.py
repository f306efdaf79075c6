"""Small helpers that every measurement shares: evaluation mode, the model's device, its stop tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run without gradients and without dropout; the model gets its training flag back at the end."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def device_of(model: nn.Module, device: torch.device | str | None = None) -> torch.device:
    """Return where the inputs go: `device` if given, else where the model's first tensor lives."""
    if device is not None:
        return torch.device(device)
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def last_logits(model: nn.Module, count: int) -> dict[str, int]:
    """Return the keyword that asks the model for its last `count` logits only, or nothing if it knows none.

    The logits of one long window over a vocabulary of 150 000 take gigabytes; most models can skip those
    that nobody reads.
    """
    return (
        {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    )


def read_so_far(output: Any) -> dict[str, Any]:
    """Return the keyword that hands a model the cache of what it has read; transformers 5.24 gave it a new name."""
    name = "cache" if "cache" in output else "past_key_values"
    return {name: output[name]}


def stop_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Return every token id that ends a reply: the model's own list and the tokenizer's end of sequence."""
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    ids = set(own if isinstance(own, list) else [] if own is None else [own])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)
