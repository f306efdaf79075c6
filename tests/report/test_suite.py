"""Tables and page of a suite show what was measured, and nothing unescaped."""

from typing import Any

from angelslim.report.suite import SUMMARY, suite_html, suite_tables, summary_rows, task_headings, task_rows


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
            **{"times_dense": 12.5 / one["ttft"], "selector_ms": 2.0, "kernel_ms": 3.0},
        }
        for one in rows
    ]
    return {
        **{"model": "<tiny>", "suite": "ruler", "lengths": [512], "attentions": ["dense", "union"]},
        **{"samples": 2, "seed": 0, "density": 0.2, "block": None, "rows": rows, "averages": means},
    }


def test_the_summary_has_density_and_time() -> None:
    assert dict(zip(SUMMARY, summary_rows(found())[1], strict=True)) == {
        **{"attention": "union", "tokens": "512", "average (95 %)": "50.0 (40…60)", "density": "0.200"},
        **{
            "TTFT ms": "12.5",
            "times dense": "1.00",
            "selector + kernel ms": "2.0 + 3.0",
            "dense calls": "3",
        },
    }
    without = found()
    without["averages"][1]["times_dense"] = None
    assert summary_rows(without)[1][SUMMARY.index("times dense")] == "–"


def test_a_task_has_a_column_for_each_attention() -> None:
    assert task_headings(found()) == ["task", "tokens", "dense", "union"]
    assert task_rows(found()) == [["vt", "512", "100.0 (90…110)", "50.0 (40…60)"]]
    assert [table.row_count for table in suite_tables(found())] == [2, 1]


def test_the_page_holds_both_and_escapes_names() -> None:
    page = suite_html(found())
    assert "100.0 (90…110)" in page and "0.200" in page
    assert "&lt;tiny&gt;" in page and "<tiny>" not in page
