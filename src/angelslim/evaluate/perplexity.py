"""Perplexity of a causal language model on any local text, with a sliding window.

Perplexity is ``exp(mean negative log-likelihood)`` per token (natural logarithm), the oldest and steadiest
measure of what quantization costs. Three choices make or break its comparability, so they are fixed here:

* **Which tokens count.** Targets are tokens 1 .. T-1, each scored exactly once. A window feeds `window`
  tokens and predicts their successors; the next window starts `stride` tokens later and scores only the
  targets that are new. Every target therefore sees at least ``window - stride`` tokens of context, and
  ``stride = window`` gives the plain disjoint chunks of the GPTQ papers.
* **Beginning of sequence.** If the tokenizer puts a BOS token before every text, each window gets it too
  (it takes one place of the window); models such as Gemma are lost without it.
* **Precision.** The log-softmax is taken in fp32 whatever the model computes in.

The token by token values of `nll_per_token` are what another engine's prompt log-probabilities are compared
with: feed it ``ids[begin : end + 1]`` of the same `Window` and read its last `scored` values.

Shapes: T text tokens, W window, S scored targets, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base.errors import ConfigError, DataError
from .base import Score
from .inference import device_of, inference, last_logits

DEFAULT_WINDOW = 2048
ROWS = 512  # logits rows turned to fp32 at a time: bounds memory at ROWS x V x 4 bytes


@dataclass(frozen=True)
class Window:
    """One forward pass: inputs ``ids[begin:end]``; the last `scored` of their successors are the targets."""

    begin: int
    end: int
    scored: int

    @property
    def targets(self) -> slice:
        """Indices into the text's ids of the tokens that this window scores."""
        return slice(self.end + 1 - self.scored, self.end + 1)


@dataclass(frozen=True)
class TokenNll:
    """The text's token ids [T], the negative log-likelihood of ids 1 .. T-1 [T-1, fp32], the windows used."""

    ids: Tensor
    nll: Tensor
    windows: list[Window]

    @property
    def mean(self) -> float:
        """Mean negative log-likelihood per token, summed in double precision."""
        return self.nll.double().mean().item()

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean, each window one cluster of dependent tokens; None for one window."""
        if len(self.windows) < 2:
            return None
        excess = self.nll.double() - self.nll.double().mean()
        sums = torch.stack(
            [excess[part.targets.start - 1 : part.targets.stop - 1].sum() for part in self.windows]
        )
        count = len(self.windows)
        return math.sqrt(count / (count - 1) * sums.square().sum().item()) / self.nll.numel()


def read_text(path: Path) -> str:
    """Read a local UTF-8 text file; a missing, empty or undecodable file is a `DataError`."""
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"The text file {str(path)!r} {kind}.", fix="Give the path of a UTF-8 text file.")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"The text file is not UTF-8 (byte {error.start} cannot be decoded).",
            where=str(path),
            fix="Convert it, for example with: iconv -f latin1 -t utf-8",
        ) from error
    if not text.strip():
        raise DataError("The text file is empty.", where=str(path), fix="Perplexity needs some text.")
    return text


def plan_windows(tokens: int, window: int, stride: int) -> list[Window]:
    """Cover the targets 1 .. tokens-1 once each; pure arithmetic, so that another engine can follow it.

    >>> plan_windows(8, 4, 2)
    [Window(begin=0, end=4, scored=4), Window(begin=2, end=6, scored=2), Window(begin=4, end=7, scored=1)]
    """
    windows: list[Window] = []
    done = 0  # targets 1 .. done are scored
    while done < tokens - 1:
        begin = len(windows) * stride
        end = min(begin + window, tokens - 1)
        windows.append(Window(begin, end, end - done))
        done = end
    return windows


def nll_per_token(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
) -> TokenNll:
    """Score every token of `text` given its context; see the module docstring for the rules.

    `window` defaults to the model's context but at most 2048, `stride` to half the window, `max_tokens` to
    the whole text.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    if len(ids) < 2:
        raise DataError(
            f"The text is too short: {len(ids)} token(s), and perplexity needs at least 2.",
            fix="Give a longer text or raise max_tokens.",
        )
    window, stride = _checked(model, window, stride)
    prefix = _beginning(tokenizer)
    room = window - len(prefix)
    windows = plan_windows(len(ids), room, min(stride, room))
    where = device_of(model, device)
    ids_T = torch.tensor(ids)
    prefix_P = torch.tensor(prefix, dtype=torch.long)
    parts = []
    with inference(model):
        for part in windows:
            inputs_1W = torch.cat([prefix_P, ids_T[part.begin : part.end]])[None].to(where)
            logits_SV = model(input_ids=inputs_1W, use_cache=False, **last_logits(model, part.scored)).logits[
                0
            ]
            parts.append(_nll(logits_SV[-part.scored :], ids_T[part.targets]))
    return TokenNll(ids_T, torch.cat(parts), windows)


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
) -> Score:
    """Return the perplexity of `text`; the standard error is that of the mean, carried through ``exp``."""
    result = nll_per_token(
        model, tokenizer, text, window=window, stride=stride, max_tokens=max_tokens, device=device
    )
    value = math.exp(result.mean) if result.mean < 700 else math.inf
    stderr = None if result.stderr is None else value * result.stderr
    return Score("perplexity", value, better="lower", samples=result.nll.numel(), stderr=stderr)


def _nll(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
    """Negative log-likelihood of the targets in fp32, on the CPU, a bounded number of rows at a time."""
    targets_S = targets_S.to(logits_SV.device)
    parts = [
        functional.cross_entropy(rows.float(), targets, reduction="none")
        for rows, targets in zip(torch.split(logits_SV, ROWS), torch.split(targets_S, ROWS), strict=True)
    ]
    return torch.cat(parts).cpu()


def _beginning(tokenizer: Any) -> list[int]:
    """Return [BOS] if the tokenizer opens every text with it, else nothing."""
    bos = tokenizer.bos_token_id
    opened = tokenizer("a")["input_ids"]
    return [bos] if bos is not None and opened and opened[0] == bos else []


def _checked(model: nn.Module, window: int | None, stride: int | None) -> tuple[int, int]:
    """Fill in the defaults and refuse windows that the model cannot hold."""
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_WINDOW
    window = min(limit, DEFAULT_WINDOW) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= limit:
        raise ConfigError(
            f"The perplexity window of {window} tokens is outside 2 .. {limit}, the model's context.",
            fix=f"Use a window of at most {limit}.",
        )
    if not 1 <= stride <= window:
        raise ConfigError(
            f"The perplexity stride of {stride} tokens is outside 1 .. {window}, the window.",
            fix=f"Use a stride of at most {window}.",
        )
    return window, stride
