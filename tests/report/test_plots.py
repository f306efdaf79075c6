from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise

import pytest

from angelslim.report import plots
from angelslim.report.drawing import VARIABLES
from angelslim.report.rows import quality_metrics, rows


def charts(three):
    table = rows(three)
    return {
        "grid": plots.error_grid(three[0].layers),
        "runs": plots.runs_grid({record.method: record for record in three}),
        "histogram": plots.histogram(three[2].layers[0].weights, "weights"),
        "size": plots.size_bars(table),
        "score": plots.score_bars(table, "addition", quality_metrics(table)["addition"]),
        "scatter": plots.quality_against_size(table, "addition", quality_metrics(table)["addition"]),
    }


@pytest.fixture
def drawn(three):
    return charts(three)


def test_each_chart_is_sound_svg_in_the_page_s_colours(drawn):
    for name, svg in drawn.items():
        root = ElementTree.fromstring(svg)
        assert root.tag == "svg" and root.get("role") == "img" and root.get("aria-label"), name
        assert "http" not in svg and "<style" not in svg and "font-family" not in svg, name
        assert not any(marker in svg for marker in VARIABLES), name
        colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) - {"none"}
        assert colours and all(colour.startswith("var(--") for colour in colours), (name, colours)


def test_charts_are_the_same_every_time(three, drawn):
    assert charts(three) == drawn


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("text")]


def test_the_grid_holds_every_layer(record, drawn):
    shown = texts(drawn["grid"])
    for layer in record.layers:
        assert f"{layer.sqnr_db:.1f}" in shown
    for word in ("q_proj", "down_proj", "0", "5", "decoder block"):
        assert word in shown


def test_worse_cells_get_a_higher_level(record):
    layers = [replace(record.layers[0], block=b, name=f"l.{b}.q", sqnr_db=30.0 - 5 * b) for b in range(3)]
    svg = plots.error_grid(layers)
    assert re.findall(r"var\(--level-(\d)\)", svg)[:3] == ["0", "3", "6"]


def test_the_bars_are_as_long_as_their_values(three):
    svg = plots.size_bars(rows(three))
    drawn = ElementTree.fromstring(svg).iter("rect")
    lengths = [float(bar.get("width")) for bar in drawn]
    assert len(lengths) == 4
    for length, stored in zip(lengths, (11.67, 7.39, 7.41, 4.9), strict=True):
        assert length / lengths[0] == pytest.approx(stored / 11.67, rel=1e-3)
    assert "4.90 MB (2.38x)" in texts(svg)


def test_a_missing_score_is_named_in_its_bar(three):
    three[1].after = []
    table = rows(three)
    shown = texts(plots.score_bars(table, "addition", quality_metrics(table)["addition"]))
    assert shown.count("not evaluated") == 1


def test_nothing_to_draw(three, make_record):
    table = rows([make_record(evaluated=False)])
    exact = [replace(layer, sqnr_db=math.inf) for layer in three[0].layers]
    assert plots.error_grid([]) == plots.error_grid(exact) == ""
    assert plots.score_bars(table, "addition", three[0].before[1]) == ""
    assert plots.quality_against_size(rows(three[:1]), "addition", three[0].before[1]) == ""


def test_odd_names_and_values(three):
    three[0].method = "<script>$x$ & $\\frac"
    three[1].after[1] = replace(three[1].after[1], value=math.nan)
    three[2].after[0] = replace(three[2].after[0], value=math.inf)
    layers = three[0].layers
    layers[0] = replace(layers[0], name="model.layers.0.<script>$a", sqnr_db=-math.inf)
    layers[1] = replace(layers[1], sqnr_db=math.nan)
    for name, svg in charts(three).items():
        ElementTree.fromstring(svg)
        assert "<script" not in svg, name
    assert "<script>$x$ & $\\frac" in texts(plots.size_bars(rows(three)))


def test_near_labels_move_apart(make_record):
    records = [
        replace(make_record("fp8_static"), method=f"method{i}", bytes_after=7_000_000 + i) for i in range(3)
    ]
    table = rows(records)
    svg = plots.quality_against_size(table, "addition", quality_metrics(table)["addition"])
    heights = [
        float(e.get("y"))
        for e in ElementTree.fromstring(svg).iter("text")
        if (e.text or "").startswith("method")
    ]
    heights.sort()
    assert len(heights) == 3 and all(b - a >= 13 for a, b in pairwise(heights))
