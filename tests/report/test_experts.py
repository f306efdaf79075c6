from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

from angelslim.report.experts import section
from angelslim.report.html import render_html
from angelslim.report.record import ExpertUse, RunRecord

NOTE = "too few tokens of its own"


def uses(counts, module="model.layers.0.mlp.experts", of=1000):
    return [
        ExpertUse(module, index, tokens, of, NOTE if tokens < 5 else "")
        for index, tokens in enumerate(counts)
    ]


def test_no_experts_no_section():
    assert section([]) == {}


def test_a_layer_is_a_row_with_its_extremes():
    found = section(uses([10, 0, 300, 90, 2, 0, 80, 70]))
    (line,) = found["lines"]
    assert line == [
        "model.layers.0.mlp.experts",
        "8",
        "1,000",
        "0",
        "40",
        "300",
        "4 (2), 0 (10), 7 (70)",
        "1, 5",
    ]
    assert found["summary"].startswith("8 experts in 1 layer. 2 never saw a calibration token; 1 saw less")
    assert found["notes"] == [f"3 experts: {NOTE}"]


def test_every_expert_reached():
    found = section([*uses([10, 12]), *uses([9, 11], "model.layers.1.mlp.experts")])
    assert "None never saw a calibration token: every one was reached; 0 saw" in found["summary"]
    assert "4 experts in 2 layers" in found["summary"] and found["lines"][0][-1] == "–"


def test_many_unrouted_experts_are_counted():
    assert section(uses([5] + [0] * 20))["lines"][0][-1] == "1, 2, 3, 4, 5, 6, 7, 8 and 12 more"


def test_the_chart_tells_layers_apart():
    found = section([*uses([10, 0, 12]), *uses([9, 11, 40], "model.layers.11.mlp.experts")])
    shown = [element.text for element in ElementTree.fromstring(found["chart"]).iter("text")]
    assert "layer 0" in shown and "layer 11" in shown and "1 without any" in shown


def test_layers_without_any_token_do_not_break_the_page(record):
    record.experts = uses([0, 0, 0], of=0)
    text = render_html([record])
    assert "3 never saw" in text


def test_the_record_keeps_experts_and_old_records_have_none(record):
    record.experts = uses([10, 0])
    assert RunRecord.from_json(record.to_json()).experts == record.experts
    raw = json.loads(record.to_json())
    del raw["experts"]
    assert RunRecord.from_json(json.dumps(raw)).experts == []


def test_the_page_shows_experts_output_errors_and_notes(record):
    plain = render_html([record])
    for words in ("Calibration tokens of each expert", "Output error", ">Note<"):
        assert words not in plain
    record.experts = uses([10, 0, 12])
    record.layers = [
        replace(x, output_error=0.01 + 0.001 * i, note="rounded <plainly>" if i == 3 else "", choice="alpha 0.5" if i == 3 else "")
        for i, x in enumerate(record.layers)
    ]  # fmt: skip
    text = render_html([record])
    for words in (
        "Calibration tokens of each expert",
        "1 never saw",
        "Output error",
        "1.3 %",
        "rounded &lt;plainly&gt;; alpha 0.5",
    ):
        assert words in text, words
