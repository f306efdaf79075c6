"""Generation speed of a model in this process: prefill and decode throughput, and the two latencies of serving.

* **TTFT**, time to first token (ms): one forward over the prompt and the choice of the first token.
* **TPOT**, time per output token (ms): the mean of the steps after the first.
* **prefill** (tokens/s): prompt tokens of the batch over TTFT.
* **decode** (tokens/s): generated tokens of the batch over the decoding time; the sum over its sequences.

The loop is written out (forward, argmax, cache) so that only the model is timed: no sampling, no stopping, no
text. Each figure is the median of `repeats` after `warmup` rounds that are thrown away; on a GPU the clock is
read after a synchronisation. The prompt is random token ids from a fixed seed: speed does not depend on them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from ..base.errors import ConfigError
from .base import Score
from .inference import device_of, inference, last_logits, read_so_far


@dataclass(frozen=True)
class Timing:
    """Seconds of one round: the prompt's forward, and all decoding steps together."""

    prefill: float
    decode: float


def generation_speed(
    model: nn.Module,
    *,
    batch_size: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    warmup: int = 1,
    repeats: int = 3,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> list[Score]:
    """Return the scores ``prefill``, ``decode`` (tokens/s), ``ttft`` and ``tpot`` (ms)."""
    for name, value in (("prompt_tokens", prompt_tokens), ("batch_size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise ConfigError(f"The speed test's {name} is {value}.", fix=f"Give a {name} of at least 1.")
    if new_tokens < 2:
        raise ConfigError(
            f"The speed test's new_tokens is {new_tokens}.", fix="Give at least 2: decoding is timed."
        )
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
    generator = torch.Generator().manual_seed(seed)
    prompt_BP = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator)
    prompt_BP = prompt_BP.to(device_of(model, device))
    with inference(model):
        rounds = [time_generation(model, prompt_BP, new_tokens) for _ in range(warmup + repeats)][warmup:]
    prefill, decode = median(item.prefill for item in rounds), median(item.decode for item in rounds)
    steps = new_tokens - 1
    return [
        Score("prefill", batch_size * prompt_tokens / prefill, "tokens/s", samples=repeats),
        Score("decode", batch_size * steps / decode, "tokens/s", samples=repeats),
        Score("ttft", 1000 * prefill, "ms", "lower", samples=repeats),
        Score("tpot", 1000 * decode / steps, "ms", "lower", samples=repeats),
    ]


def time_generation(model: nn.Module, prompt_BP: Tensor, new_tokens: int) -> Timing:
    """Generate greedily from the prompt [batch, tokens] and time both phases."""
    start = _clock(prompt_BP.device)
    output = model(input_ids=prompt_BP, use_cache=True, **last_logits(model, 1))
    token_B1 = output.logits[:, -1:].argmax(-1)
    first = _clock(prompt_BP.device)
    for _ in range(new_tokens - 1):
        output = model(input_ids=token_B1, use_cache=True, **read_so_far(output))
        token_B1 = output.logits[:, -1:].argmax(-1)
    return Timing(first - start, _clock(prompt_BP.device) - first)


def _clock(device: torch.device) -> float:
    """Seconds on a steady clock, once everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
