"""The one voice of the package: progress bars, tables, and the reason of every automatic choice.

Everything meant for people goes to stderr, so that stdout stays clean for results that other programs read.
Without a terminal the bars become plain lines.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)
log = logging.getLogger("angelslim")
_bars: list[Progress] = []  # those on display, the outermost first


def setup(verbose: bool = False, quiet: bool = False) -> None:
    """Send the package's log to the terminal once; `verbose` shows debug lines, `quiet` warnings only."""
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    log.setLevel(level)
    if not log.handlers:
        handler = RichHandler(console=err, show_path=False, show_time=False, show_level=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False


def chose(what: str, because: str) -> None:
    """Log an automatic choice together with its reason."""
    log.info("%s: %s", what, because)


@dataclass
class Bar:
    """One running progress bar; `advance` moves it and may show a short note such as the error so far."""

    _progress: Progress
    _task: int
    _title: str
    _total: int
    _done: int = 0

    def advance(self, note: str = "") -> None:
        """Move the bar one step on."""
        self._done += 1
        self._progress.update(self._task, advance=1, note=note)  # type: ignore[arg-type]
        if not err.is_terminal and (
            self._done == self._total or self._done * 4 // self._total != (self._done - 1) * 4 // self._total
        ):
            log.info("%s %d/%d %s", self._title, self._done, self._total, note)


@contextmanager
def bar(title: str, total: int) -> Iterator[Bar]:
    """Show a progress bar on a terminal, or a line at each quarter elsewhere."""
    if _bars:  # a bar inside another is one more line of the same display
        outer = _bars[-1]
        task = outer.add_task(title, total=total, note="")
        try:
            yield Bar(outer, task, title, max(total, 1))
        finally:
            outer.remove_task(task)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as progress:
        _bars.append(progress)
        try:
            yield Bar(progress, progress.add_task(title, total=total, note=""), title, max(total, 1))
        finally:
            _bars.remove(progress)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Build a table; columns after the first are right-aligned, as figures should be."""
    grid = Table(title=title or None, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*[str(cell) for cell in row])
    return grid
