"""A sweep as a table for the terminal and as one HTML page: curves, values against loss, volumes against loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from rich.table import Table

from .drawing import AFTER, BEFORE, LINE, MUTED, canvas, place, to_svg
from .html import render
from .summary import plain_table

NONE = "–"


@dataclass(frozen=True)
class Trial:
    """One training of the search: its overrides, how it ended, and its dev losses by step."""

    number: int
    overrides: dict[str, Any]
    outcome: str  # finished, stopped early or diverged
    curve: dict[int, float]

    @property
    def loss(self) -> float:
        """The last dev loss; infinite when there is none."""
        return self.curve[max(self.curve)] if self.curve else float("inf")


@dataclass(frozen=True)
class VolumeRun:
    """One training of the winner on a share of the data; an empty curve says that it diverged."""

    share: float
    seed: int
    curve: dict[int, float]

    @property
    def loss(self) -> float | None:
        """The last dev loss."""
        return self.curve[max(self.curve)] if self.curve else None


@dataclass(frozen=True)
class Sweep:
    """Everything a sweep found; `knobs` are the searched names and their kinds."""

    title: str
    knobs: dict[str, str]
    trials: list[Trial]
    volumes: list[VolumeRun]
    chosen: int  # number of the trial
    share: float  # of the data
    why: str


def sweep_rows(found: Sweep) -> list[list[str]]:
    """Return the trials as cells, the best first, those that did not come to their end last."""
    order = sorted(found.trials, key=lambda trial: (trial.outcome != "finished", trial.loss))
    return [
        [
            str(trial.number),
            *(_written(trial.overrides.get(name)) for name in found.knobs),
            f"{trial.loss:.4f}" if trial.curve else NONE,
            str(max(trial.curve)) if trial.curve else NONE,
            trial.outcome,
        ]
        for trial in order
    ]


def headings(found: Sweep) -> list[str]:
    """Return the heading of each column of `sweep_rows`; names are shortened to their last part."""
    return ["trial", *(name.rpartition(".")[2] for name in found.knobs), "dev loss ↓", "last step", "outcome"]


def _written(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def sweep_table(found: Sweep, count: int = 10) -> Table:
    """Build the terminal table of the best trials."""
    return plain_table(f"{found.title}: the best trials", headings(found), sweep_rows(found)[:count])


def sweep_html(found: Sweep) -> str:
    """Return the page."""
    ends = {
        kind: sum(trial.outcome == kind for trial in found.trials) for kind in ("stopped early", "diverged")
    }
    winner = found.trials[found.chosen]
    figures = [
        (
            "Dev loss of every trial",
            "The chosen one is thick; those stopped early end where they were.",
            _curves(found),
        ),
        ("Share of the data against dev loss", "One dot a run; the line joins the means.", _volumes(found)),
        *(
            (f"{name} against dev loss", "Trials that came to their end, and the chosen one larger.", svg)
            for name, kind in found.knobs.items()
            if (svg := _values(found, name, kind))
        ),
    ]
    tiles = [
        (
            "Trials",
            str(len(found.trials)),
            f"{ends['stopped early']} stopped early, {ends['diverged']} diverged",
        ),
        ("Best dev loss", f"{winner.loss:.4f}", f"trial {winner.number}"),
        ("Share of the data", f"{found.share:.0%}", found.why),
    ]
    shown = {
        "title": found.title,
        "tiles": [{"name": name, "value": value, "note": note} for name, value, note in tiles],
        "chosen": [(name, _written(value)) for name, value in winner.overrides.items()],
        "figures": [{"title": title, "note": note, "svg": svg} for title, note, svg in figures if svg],
        "headings": headings(found),
        "rows": sweep_rows(found),
    }
    return render("sweep", shown)


def _axes(axes: Any, x: str, y: str) -> None:
    place(axes, 70, 16, 12, 46)
    axes.grid(color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(labelcolor=MUTED)
    axes.margins(0.06)
    axes.set_xlabel(x, loc="left")
    axes.set_ylabel(y, loc="bottom", fontsize=11)


def _curves(found: Sweep) -> Markup | str:
    shown = [trial for trial in found.trials if trial.curve]
    with canvas(720, 320) as (figure, axes):
        _axes(axes, "step", "dev loss")
        for trial in sorted(shown, key=lambda trial: trial.number == found.chosen):
            chosen = trial.number == found.chosen
            style = {"color": AFTER, "linewidth": 2.4} if chosen else {"color": BEFORE, "linewidth": 1.0}
            ends = [max(trial.curve)] if trial.outcome != "finished" else []
            axes.plot(list(trial.curve), list(trial.curve.values()), **style)
            axes.plot(ends, [trial.loss] * len(ends), "x", color=MUTED, markersize=5)
        return to_svg(figure, "Dev loss of every trial by step")


def _volumes(found: Sweep) -> Markup | str:
    runs = [(run.share, run.loss) for run in found.volumes if run.loss is not None]
    if not runs:
        return ""
    shares = sorted({share for share, _ in runs})
    with canvas(520, 300) as (figure, axes):
        _axes(axes, "share of the data (%)", "dev loss")
        means = [_mean([loss for other, loss in runs if other == share]) for share in shares]
        axes.plot([100 * share for share in shares], means, color=AFTER, linewidth=1.6)
        axes.plot(
            [100 * share for share, _ in runs], [loss for _, loss in runs], "o", color=AFTER,
            markersize=7, alpha=0.6, markeredgewidth=0,
        )  # fmt: skip
        axes.set_xticks([100 * share for share in shares], [f"{100 * share:g}" for share in shares])
        return to_svg(figure, "Dev loss by share of the data")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _values(found: Sweep, name: str, kind: str) -> Markup | str:
    """One knob against the loss: a scale for numbers, a place for each choice."""
    shown = [trial for trial in found.trials if trial.outcome == "finished"]
    choices = sorted({_written(trial.overrides[name]) for trial in shown})
    with canvas(520, 280) as (figure, axes):
        _axes(axes, name, "dev loss")
        for trial in shown:
            value = trial.overrides[name]
            chosen = trial.number == found.chosen
            axes.plot(
                [choices.index(_written(value)) if kind == "choice" else value], [trial.loss], "o",
                color=AFTER if chosen else BEFORE, markersize=10 if chosen else 7, markeredgewidth=0,
            )  # fmt: skip
        if kind == "choice":
            axes.set_xticks(range(len(choices)), choices)
        elif kind == "log":
            axes.set_xscale("log")
        return to_svg(figure, f"Dev loss against {name}")
