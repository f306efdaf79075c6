from __future__ import annotations

from rich.console import Console

from angelslim.data.curation.results import CurationReport, Example, Flow, Reason, StageResult
from angelslim.report.curation import (
    curation_html,
    lengths,
    reasons_table,
    sources_table,
    stages_table,
    through,
)


def report() -> CurationReport:
    example = Example("web", 3, "<script>alert(1)</script> & more", "0.91 like document 1")
    reason = Reason(2, 50, {"web": 2}, [example])
    first = StageResult(
        "read", {}, Flow(5, 5, 100, 100), {"web": Flow(5, 5, 100, 100)}, {"empty": Reason()}, {}, []
    )
    second = StageResult(
        "fuzzy",
        {"threshold": 0.8},
        Flow(5, 3, 100, 50),
        {"web": Flow(5, 3, 100, 50)},
        {"near [x]": reason},
        {},
        ["A note."],
    )
    return CurationReport("f", {}, [first, second], [0, 2, 3], [0, 1, 2], ["part-00000.jsonl"], 60)


def shown(table: object) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_tables_hold_the_counts_and_leave_out_what_never_happened() -> None:
    assert "50.00 %" in shown(stages_table(report()))
    reasons = shown(reasons_table(report()))
    assert "fuzzy: near [x]" in reasons and "empty" not in reasons
    assert "100.00 %" in shown(sources_table(report()))
    assert through(report()) == {"web": Flow(5, 3, 100, 50)}


def test_the_page_escapes_what_documents_say_and_shows_every_reason() -> None:
    page = curation_html(report())
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    for words in ("near [x]", "empty", "A note.", "0.91 like document 1", "threshold: 0.8"):
        assert words in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_histogram_draws_both_and_survives_nothing() -> None:
    assert lengths([0, 2, 3], [1]).count("<path") == 3
    assert "<svg" in lengths([], [])


def test_the_report_survives_its_json() -> None:
    assert CurationReport.from_json(report().to_json()) == report()
