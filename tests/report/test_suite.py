"""Tables and page of a suite show what was measured, and nothing unescaped."""

from typing import Any

from angelslim.report.suite import suite_html, suite_tables, summary_rows, task_headings, task_rows


def found() -> dict[str, Any]:
    def row(task: str, attention: str, scores: list[float], density: float | None) -> dict[str, Any]:
        value = 100 * sum(scores) / len(scores)
        return {
            **{"task": task, "length": 512, "attention": attention, "scores": scores, "value": value},
            **{"low": value - 10, "high": value + 10, "density": density, "ttft": 12.5, "family": ""},
            "selector_ms": [2.0] * len(scores),
            "fallbacks": {"decode": 8, "short prompt": 3},
        }

    rows = [row("vt", "dense", [1.0, 1.0], 1.0), row("vt", "union", [1.0, 0.0], 0.2)]
    means = [
        {
            "task": "average",
            **{key: one[key] for key in ("length", "attention", "value", "low", "high", "density", "ttft")},
        }
        for one in rows
    ]
    return {
        **{"model": "<tiny>", "suite": "ruler", "lengths": [512], "attentions": ["dense", "union"]},
        **{"samples": 2, "seed": 0, "rows": rows, "averages": means},
    }


def test_the_summary_has_density_and_time() -> None:
    assert summary_rows(found())[1] == ["512", "union", "50.0", "40.0…60.0", "0.200", "12.5", "2.0", "3"]


def test_a_task_has_a_column_for_each_attention() -> None:
    assert task_headings(found()) == ["tokens", "task", "dense", "union"]
    assert task_rows(found()) == [["512", "vt", "100.0 (90…110)", "50.0 (40…60)"]]
    assert [table.row_count for table in suite_tables(found())] == [2, 1]


def test_the_page_holds_both_and_escapes_names() -> None:
    page = suite_html(found())
    assert "100.0 (90…110)" in page and "0.200" in page
    assert "&lt;tiny&gt;" in page and "<tiny>" not in page
