"""Tables and page of a suite show what was measured, and nothing unescaped."""

from typing import Any

from angelslim.report.suite import SUMMARY, parts, suite_html, suite_tables, summary_rows


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
        "families": [],
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
    tasks = next(part for part in parts(found()) if part.heading == "Task by task")
    assert tasks.headings == ["task", "tokens", "dense", "union"]
    assert tasks.rows == [["vt", "512", "100.0 (90…110)", "50.0 (40…60)"]]
    assert [table.row_count for table in suite_tables(found())] == [2, 1, 2]


def test_families_have_a_table_where_there_are_some() -> None:
    whole = found()
    whole["families"] = [
        {"family": "code", "length": 512, "attention": name, "value": 40.0, "low": 30.0, "high": 50.0}
        for name in whole["attentions"]
    ]
    families = next(part for part in parts(whole) if part.heading == "Families")
    assert families.rows == [["code", "512", "40.0 (30…50)", "40.0 (30…50)"]]
    assert "Families" in suite_html(whole) and "Families" not in suite_html(found())


def test_dense_calls_come_with_their_reason() -> None:
    dense = next(part for part in parts(found()) if part.heading == "Dense calls")
    assert ["union", "512", "short prompt", "3"] in dense.rows
    assert "short prompt" in suite_html(found())


def test_many_attentions_make_several_tables_for_the_terminal() -> None:
    whole = found()
    names = [f"kind{number}" for number in range(6)]
    whole["attentions"] = names
    whole["rows"] = [{**whole["rows"][0], "attention": name} for name in names]
    tasks = [table for table in suite_tables(whole) if "task by task" in str(table.title)]
    assert [[column.header for column in table.columns] for table in tasks] == [
        ["task", "tokens", *names[:4]],
        ["task", "tokens", *names[4:]],
    ]


def test_the_page_holds_both_and_escapes_names() -> None:
    page = suite_html(found())
    assert "100.0 (90…110)" in page and "0.200" in page
    assert "&lt;tiny&gt;" in page and "<tiny>" not in page
