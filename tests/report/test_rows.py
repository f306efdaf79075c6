from __future__ import annotations

from dataclasses import replace

from angelslim.evaluate.base import Score
from angelslim.report.rows import disagreements, labels, quality_metrics, rows, speed_metrics


def test_one_original_then_each_run(three):
    table = rows(three)
    assert [row.name for row in table] == ["original", "fp8_static", "int8_dynamic", "int4_gptq"]
    assert [row.baseline for row in table] == [True, False, False, False]
    assert table[0].stored == 11_670_000 and table[0].ratio == 1
    assert table[0].bits == 8 * 11_670_000 / 5_832_192
    assert table[3].ratio == 11_670_000 / 4_900_000 and table[3].bits == 4.25
    assert table[3].scores["addition"].value == 93.5


def test_the_original_is_taken_from_a_run_that_measured_it(three):
    three[0] = replace(three[0], before=[])
    assert rows(three)[0].scores["perplexity"].value == 9.842


def test_two_models_have_two_originals(make_record):
    table = rows(
        [make_record(model="a"), make_record("int4_gptq", model="b"), make_record("int4_gptq", model="a")]
    )
    assert [row.name for row in table] == [
        "original a",
        "fp8_static",
        f"int4_gptq ({make_record().scheme}) (a)",
        "original b",
        f"int4_gptq ({make_record().scheme}) (b)",
    ]


def test_labels_tell_runs_apart(make_record):
    one, two = make_record(), replace(make_record(), scheme="W int4")
    assert labels([one, make_record("int4_gptq")]) == ["fp8_static", "int4_gptq"]
    assert labels([one, two]) == [f"fp8_static ({one.scheme})", "fp8_static (W int4)"]
    same = labels([one, one])
    assert len(set(same)) == 2 and same[0].endswith("#1") and same[1].endswith("#2")


def test_metrics_are_sorted_into_quality_and_speed(record):
    record.after = [Score("addition", 1.0, "%"), Score("size", 3.0, "MB"), *record.after]
    table = rows([record])
    assert list(quality_metrics(table)) == ["perplexity", "addition", "recall"]
    assert list(speed_metrics(table)) == ["decode", "ttft"]


def test_different_originals_are_reported(three):
    assert disagreements(three) == []
    three[1].before[0] = replace(three[1].before[0], value=8.0, samples=100)
    three[1].before[3] = replace(three[1].before[3], value=1.0)  # speed varies from run to run
    (text,) = disagreements(three)
    assert "9.842 on 16383 samples and 8.000 on 100" in text
