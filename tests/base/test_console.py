from __future__ import annotations

import io

import pytest

from angelslim.base import console


@pytest.fixture
def terminal(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(console.err, "file", text)
    console.setup()
    return text


def test_without_a_terminal_a_bar_is_a_line_at_each_quarter(terminal):
    with console.bar("working", 40) as bar:
        for _ in range(40):
            bar.advance()
    lines = terminal.getvalue().split("\n")
    assert [line.split()[1] for line in lines if line.startswith("working")] == [
        "10/40",
        "20/40",
        "30/40",
        "40/40",
    ]


def test_short_and_empty_bars(terminal):
    with console.bar("empty", 0):
        pass
    with console.bar("one", 1) as bar:
        bar.advance("note")
    assert terminal.getvalue().split() == ["one", "1/1", "note"]


def test_choices_come_with_their_reason(terminal):
    console.chose("device cpu", "no GPU is visible")
    assert "device cpu: no GPU is visible" in terminal.getvalue()


def test_levels(terminal):
    console.setup(quiet=True)
    console.log.info("hidden")
    console.log.warning("shown")
    console.setup(verbose=True)
    console.log.debug("details")
    console.setup()
    assert "hidden" not in terminal.getvalue()
    assert "shown" in terminal.getvalue() and "details" in terminal.getvalue()


def test_brackets_in_messages_are_text(terminal):
    console.log.warning("%s", "layers [0, 1] and [bold]x[/bold]")
    assert "[0, 1] and [bold]x[/bold]" in terminal.getvalue()


def test_tables_align_figures_to_the_right():
    grid = console.table("t", ["name", "size"], [("a", 1), ("b", 2.5)])
    assert [column.justify for column in grid.columns] == ["left", "right"]
    assert grid.row_count == 2
