"""The page and the table of a sweep, from plain records."""

from __future__ import annotations

from angelslim.base import console
from angelslim.report.sweep import Sweep, Trial, VolumeRun, headings, sweep_html, sweep_rows, sweep_table

TRIALS = [
    Trial(0, {"a.lr": 1e-3, "b": "<x>"}, "finished", {1: 3.0, 2: 2.0}),
    Trial(1, {"a.lr": 1e-1, "b": "y"}, "diverged", {}),
    Trial(2, {"a.lr": 1e-2, "b": "y"}, "stopped early", {1: 1.5}),
    Trial(3, {"a.lr": 2e-3, "b": "y"}, "finished", {1: 2.5, 2: 1.75}),
]
RUNS = [VolumeRun(0.3, 0, {1: 2.0}), VolumeRun(0.3, 1, {1: 1.9}), VolumeRun(0.7, 0, {})]
FOUND = Sweep("sweep", {"a.lr": "log", "b": "choice"}, TRIALS, RUNS, 3, 0.3, "it is enough")


def test_rows_are_the_best_first() -> None:
    assert headings(FOUND) == ["trial", "lr", "b", "dev loss ↓", "last step", "outcome"]
    assert [row[0] for row in sweep_rows(FOUND)] == ["3", "0", "2", "1"]
    assert sweep_rows(FOUND)[3] == ["1", "0.1", "y", "–", "–", "diverged"]
    with console.err.capture() as captured:
        console.err.print(sweep_table(FOUND, 2))
    assert "1.7500" in captured.get() and "diverged" not in captured.get()


def test_the_page_is_whole_and_escaped() -> None:
    page = sweep_html(FOUND)
    assert page.count("<svg") == 4 and page == sweep_html(FOUND)
    assert "<x>" not in page and "&lt;x&gt;" in page
    assert "1 stopped early, 1 diverged" in page and "it is enough" in page


def test_without_volumes_there_is_no_such_figure() -> None:
    assert sweep_html(Sweep("sweep", {"b": "choice"}, TRIALS, [], 3, 0.3, "")).count("<svg") == 2
