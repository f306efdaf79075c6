"""How figures are written: the same number looks the same in the terminal, on the page and on the card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..evaluate.base import Score

NOT_EVALUATED = "not evaluated"
MEGABYTE = 1_000_000
NAMES = {
    "perplexity": "Perplexity",
    "prefill": "Prefill",
    "decode": "Decode",
    "ttft": "Time to first token",
    "tpot": "Time per output token",
}


def number(value: float, unit: str = "") -> str:
    """Write a figure with as many digits as it deserves.

    >>> number(8.12345), number(97.5, "%"), number(1234.5, "tokens/s"), number(float("inf"))
    ('8.123', '97.5', '1,234', 'infinite')
    """
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    size = abs(value)
    if unit in ("%", "ms"):
        return f"{value:.1f}" if size >= 1 or value == 0 else f"{value:.2g}"
    if size >= 1000 or (unit and size >= 100):
        return f"{value:,.0f}"
    if unit == "" and size < 100:
        return f"{value:.3f}"
    return f"{value:.1f}"


def figure(score: Score | None, *, unit: bool = False) -> str:
    """Write a score with its standard error in two digits, such as ``97.5 ±0.84``, or that there is none."""
    if score is None:
        return NOT_EVALUATED
    text = number(score.value, score.unit)
    error = spread(score)
    if error is not None:
        text += f" ±{error:.2g}"
    return f"{text} {score.unit}" if unit and score.unit else text


def spread(score: Score) -> float | None:
    """Return the standard error that a reader may compare two models with, if there is one.

    That of perplexity is left out: it tells how much the texts differ from each other, which is a lot, while
    all models read the same text and their difference is known far better.
    """
    return None if score.metric == "perplexity" else score.stderr


def arrow(score: Score) -> str:
    """Return the arrow that says which way is better."""
    return "↓" if score.better == "lower" else "↑"


def metric_name(metric: str) -> str:
    """Return a metric's name as a person would write it: ``perplexity`` becomes ``Perplexity``."""
    return NAMES.get(metric, metric[:1].upper() + metric[1:])


def counted(count: int, thing: str) -> str:
    """Write a number of things: ``1 part file``, ``2 part files``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def megabytes(count: int) -> str:
    """Write bytes as MB (one million bytes), or GB from a thousand of them on."""
    size = count / MEGABYTE
    if size >= 1000:
        return f"{size / 1000:,.2f} GB"
    return f"{size:.2f} MB" if size < 100 else f"{size:.0f} MB"


def factor(ratio: float) -> str:
    """Write bytes before over bytes after: ``1.58x smaller``, or ``1.18x larger`` where the copy grew."""
    return f"{1 / ratio:.2f}x larger" if 0 < ratio < 1 else f"{ratio:.2f}x smaller"


def decibels(value: float) -> str:
    """Write a signal to noise ratio; a layer that lost nothing is ``exact``."""
    return "exact" if value == math.inf else number(value, "dB")


def percent(share: float) -> str:
    """Write a share of one in percent with two significant decimals."""
    return f"{100 * share:.2f} %"


def duration(seconds: float) -> str:
    """Write seconds as people say them.

    >>> duration(3.21), duration(75), duration(7322)
    ('3.2 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def parameters(count: int) -> str:
    """Write a number of parameters: ``5.8 M``, ``7.62 B``."""
    for limit, suffix in ((10**9, " B"), (10**6, " M"), (10**3, " K")):
        if count >= limit:
            return f"{count / limit:.3g}{suffix}"
    return str(count)


def change(before: Score, after: Score) -> str:
    """Write how a score moved: points for percentages, percent for everything else."""
    if before.unit == "%":
        return f"{after.value - before.value:+.1f} points"
    if not before.value or not math.isfinite(before.value) or not math.isfinite(after.value):
        return ""
    return f"{100 * (after.value / before.value - 1):+.1f} %"


def verdict(before: Score, after: Score) -> str:
    """Judge a change: ``better``, ``worse``, or ``same`` when it is within the noise.

    The noise is ``hypot`` of the two standard errors (see `spread`), or a tenth of a percent without them.
    """
    errors = [error for error in (spread(before), spread(after)) if error is not None]
    noise = math.hypot(*errors) if errors else 1e-3 * abs(before.value)
    gain = after.value - before.value if before.better == "higher" else before.value - after.value
    if abs(gain) <= noise:
        return "same"
    return "better" if gain > 0 else "worse"


def trial(found: Mapping[str, Any] | None) -> str:
    """Say which input scales were written and why; nothing where none had to prove themselves.

    >>> trial({"searched_kl": 0.0011, "plain_kl": 0.001, "accepted": False})
    'the plain ones: calibration KL 0.001, with the searched ones 0.0011'
    >>> trial({"searched_kl": 0.0011, "plain_kl": 0.001, "seen": 0.125, "accepted": False})
    'the plain ones: calibration KL 0.001, with the searched ones 0.0011 on 12% of the samples'
    """
    if found is None:
        return ""
    searched, plain = f"{found['searched_kl']:.4g}", f"{found['plain_kl']:.4g}"
    if found["accepted"]:
        return f"the searched ones: calibration KL {searched}, with the plain ones {plain}"
    part = f" on {found['seen']:.0%} of the samples" if found.get("seen", 1.0) < 1 else ""
    return f"the plain ones: calibration KL {plain}, with the searched ones {searched}{part}"
