"""Recovery curves: what is lost against full precision, over the share of the training tokens, as one SVG file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .study import TITLES


def draw(curves: dict[str, dict[str, Any]], path: Path) -> bool:
    """Write the figure; False where matplotlib is not installed or there is nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not curves:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        points = sorted((int(part), found) for part, found in curve.items())
        spread = [found["sd"] or 0.0 for _, found in points]
        shares = [part for part, _ in points]
        axes.errorbar(
            shares, [f["mean"] for _, f in points], yerr=spread, marker="o", capsize=3, label=TITLES[name]
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("share of the training tokens, %")
    axes.set_ylabel("test nats a token over full precision")
    axes.set_xscale("log")
    ticks = [10, 25, 50, 100]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    text = re.sub(
        r"\s*<metadata>.*?</metadata>|<!DOCTYPE.*?>\s*|<!--.*?-->\s*", "", path.read_text("utf-8"), flags=re.S
    )
    path.write_text(text, "utf-8")  # the data alone: no links to the programs that drew it
    return True
