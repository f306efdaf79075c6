from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from angelslim.report.summary import layers_table, markdown_cell, results_table, to_markdown


def shown(table, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_results_fit_80_columns(three):
    text = shown(results_table(three))
    for words in (
        "original",
        "int8_dynamic",
        "10.213",
        "99.5 ±0.5",
        "4.90",
        "2.38x",
        "16.01",
        "↓",
        "(%) ↑",
        "246",
    ):
        assert words in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert len(text.splitlines()) == 8  # title, two heading lines, a rule, four rows: nothing wraps


def test_markdown_holds_the_same_cells(three):
    lines = to_markdown(three).splitlines()
    assert lines[0].startswith("| model | perplexity ↓ | addition (%) ↑ | recall (%) ↑ | size (MB) |")
    assert lines[1].count("---") == lines[0].count("|") - 1
    assert lines[5] == "| int4_gptq | 10.213 | 93.5 ±1.1 | 97.0 ±1.2 | 4.90 | 4.25 | 2.38x | 231 |"


def test_missing_evaluation_says_so(make_record):
    bare = make_record(evaluated=False)
    assert "not evaluated" in to_markdown([bare])
    half = replace(make_record(), before=[])
    assert to_markdown([half]).splitlines()[2].count("not evaluated") == 4


def test_worst_layers(record):
    text = shown(layers_table(record, 3), 120)
    assert "worst 3 of 42 layers" in text
    assert text.count("down_proj") == 3 and "scheme" not in text
    record.layers[0] = replace(record.layers[0], scheme="W int8", sqnr_db=1.0)
    assert "W int8" in shown(layers_table(record, 3), 120)


def test_markup_in_names_is_harmless(record):
    record.method = "[red]x[/red]|`<b>"
    assert "[red]x[/red]|`<b>" in shown(results_table([record]), 200)
    assert markdown_cell(record.method) == "\\[red\\]x\\[/red\\]\\|'&lt;b&gt;"
    assert to_markdown([record]).splitlines()[3].startswith("| \\[red\\]")
