"""How strong an addition that must be gone in the end is, from optimizer step to optimizer step.

Over the first `warmup` share of the steps it rises linearly from 0 to its peak, then it falls to exactly 0, which it
reaches at the share `ends` and keeps:

===============  ================================================
``linear``       ``1 - p``
``cosine``       ``(1 + cos(pi p)) / 2``
``exponential``  ``(e^(-5 p) - e^-5) / (1 - e^-5)``
``none``         0 at every step: the addition is off
===============  ================================================

with p the share of the fall that has passed. It is a function of the step alone, so a resumed run goes on where it was, and
neither micro-batches nor recomputed blocks nor evaluations move it.
"""

from __future__ import annotations

import math

KINDS = ("linear", "cosine", "exponential", "none")
DECAY = 5.0


def strength(step: int, steps: int, kind: str, warmup: float, peak: float, ends: float = 1.0) -> float:
    """Return the strength with which the step after `step` finished ones is computed; 0 from `ends * steps` on.

    >>> [strength(step, 4, "linear", 0.0, 1.0) for step in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    assert kind in KINDS and steps > 0 and step >= 0
    done = min(step / steps, 1.0)
    if kind == "none":
        return 0.0
    if done < warmup:
        return peak * done / warmup
    passed = min((done - warmup) / (ends - warmup), 1.0) if warmup < ends else 1.0
    if kind == "linear":
        share = 1 - passed
    elif kind == "cosine":
        share = (1 + math.cos(math.pi * passed)) / 2
    else:
        share = (math.exp(-DECAY * passed) - math.exp(-DECAY)) / (1 - math.exp(-DECAY))
    return peak * share
