"""How a model was trained: its losses, the learning rate, and how the weights moved towards the levels.

Master weights of a low-bit model gather around the levels that they are rounded to, or stay trapped between them; the
histograms show which, from the first step at the back to the last in front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import words
from .drawing import AFTER, BEFORE, LINE, MUTED, canvas, place, shorten, to_svg
from .marks import Marks

SMOOTH = 0.05  # share of the steps that a point of the thick curve averages
HEIGHT = 34.0  # of one histogram
STEP = 15.0  # between two


def section(training: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the page shows about the training; empty when there was none."""
    if not training:
        return {}
    steps, looks = training["steps"], training["looks"]
    figures = [
        {"title": "Loss of each step", "svg": _losses(steps)},
        {"title": "Cross entropy on rows that were held back", "svg": _held_back(looks)},
        {"title": "Learning rate", "svg": _curve(steps, "lr", "learning rate")},
    ]
    for name in looks[0]["histograms"] if looks else ():
        figures.append({"title": f"Weights of {shorten(name, 48)} by step", "svg": _ridges(looks, name)})
    return {
        "summary": _summary(training),
        "facts": _facts(training),
        "figures": [figure for figure in figures if figure["svg"]],
    }


def _summary(training: Mapping[str, Any]) -> str:
    first, last = training["looks"][0]["dev_loss"], training["looks"][-1]["dev_loss"]
    return (
        f"{training['settings']['steps']:,} steps, {training['tokens']:,} tokens in "
        f"{words.duration(training['seconds'])}. Cross entropy on held-back rows: {first:.3f} before the first step "
        f"(already quantized), {last:.3f} after the last."
    )


def _facts(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = training["settings"]
    options = ", ".join(f"{key} {value}" for key, value in training["options"].items())
    return [
        ("Quantizer", f"{training['quantizer']}{f' ({options})' if options else ''}"),
        ("Trained", training["trainable"]),
        ("Loss", training["loss"]),
        ("Teacher", training["teacher"]),
        (
            "Learning rate",
            f"{settings['lr']:g}, {settings['schedule']}, warm-up {_steps(settings['warmup'])}",
        ),
        (
            "Data",
            f"{training['tokens_once']:,} tokens, read {training['tokens'] / training['tokens_once']:.2f} times",
        ),
    ]


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _axes(axes: Any, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    place(axes, 62, 14, 10, 40)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(labelcolor=MUTED)
    axes.set_xlabel("step", loc="left")
    axes.set_ylabel(label, loc="bottom", fontsize=11)


def _losses(steps: Sequence[Mapping[str, Any]]) -> str:
    if len(steps) < 2:
        return ""
    at, values = [step["step"] for step in steps], [step["loss"] for step in steps]
    width = max(round(SMOOTH * len(values)), 1)
    smooth = [
        sum(part) / len(part)
        for part in (values[max(i - width, 0) : i + width + 1] for i in range(len(values)))
    ]
    with canvas(520, 260) as (figure, axes):
        _axes(axes, "loss")
        axes.plot(at, values, color=BEFORE, linewidth=1, label="each step")
        axes.plot(at, smooth, color=AFTER, linewidth=2, label="running mean")
        axes.legend(frameon=False, labelcolor=MUTED, fontsize=11, loc="upper right", ncols=2)
        return to_svg(figure, "Loss by step")


def _held_back(looks: Sequence[Mapping[str, Any]]) -> str:
    if len(looks) < 2:
        return ""
    with canvas(520, 260) as (figure, axes):
        _axes(axes, "nats a token")
        axes.plot(
            [look["step"] for look in looks],
            [look["dev_loss"] for look in looks],
            "o-",
            color=AFTER,
            markersize=5,
        )
        return to_svg(figure, "Held-back loss by step")


def _curve(steps: Sequence[Mapping[str, Any]], key: str, label: str) -> str:
    if len(steps) < 2:
        return ""
    with canvas(520, 200) as (figure, axes):
        _axes(axes, label)
        axes.plot([step["step"] for step in steps], [step[key] for step in steps], color=AFTER, linewidth=1.6)
        return to_svg(figure, f"{label} by step")


def _ridges(looks: Sequence[Mapping[str, Any]], name: str) -> str:
    """Draw one histogram a look, the last in front."""
    shown = [look for look in looks if name in look["histograms"]]
    if not shown:
        return ""
    left, right = 66.0, 512.0
    height = HEIGHT + STEP * len(shown) + 44
    marks = Marks(520, height)
    most = max(max(look["histograms"][name]) for look in shown) or 1.0
    for place_, look in enumerate(shown):
        floor = HEIGHT + STEP * (place_ + 1)
        shares = look["histograms"][name]
        xs = [left + (right - left) * (index + 0.5) / len(shares) for index in range(len(shares))]
        line = [(x, floor - HEIGHT * share / most) for x, share in zip(xs, shares, strict=True)]
        marks.area([(xs[0], floor), *line, (xs[-1], floor)], "surface")
        marks.line(line, "after" if place_ == len(shown) - 1 else "before", 1.4)
        marks.text(left - 8, floor, f"{look['step']:,}", "muted", size=11, anchor="end")
    edge = shown[0]["edges"][name]
    for x, value, anchor in (
        (left, -edge, "start"),
        ((left + right) / 2, 0.0, "middle"),
        (right, edge, "end"),
    ):
        marks.text(x, height - 26, f"{value:.3g}", "muted", size=11, anchor=anchor)
    marks.text(left - 8, HEIGHT, "step", "muted", size=11, anchor="end")
    marks.text(left, height - 10, "weight before rounding, all curves to one scale", "muted", size=11)
    return marks.svg(f"Weights of {name} by step")
