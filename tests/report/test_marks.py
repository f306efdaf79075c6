from __future__ import annotations

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from angelslim.numerics.error import Histogram
from angelslim.report import heat, plots
from angelslim.report.marks import BASELINE, Marks, stairs


def elements(svg, tag):
    return list(ElementTree.fromstring(svg).iter(tag))


def numbers(element, *names):
    return tuple(float(element.get(name)) for name in names)


def vertices(path):
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML] (\S+) (\S+)", path.get("d"))]


def test_marks_are_where_they_were_put():
    marks = Marks(200.4, 50)
    marks.rect(1.23456, 2, 30, 4.5, "before")
    marks.ring(1, 2, 3, 4, "ink", 2)
    marks.line([(0, 1), (5, -0.00001)], "line", 0.8)
    marks.area([(0, 0), (1, 0), (1, 1)], "after")
    marks.text(7, 20, "12", "muted", size=10, anchor="end")
    svg = marks.svg("all")
    root = ElementTree.fromstring(svg)
    assert root.attrib == {
        "viewBox": "0 0 200 50", "width": "200", "height": "50", "role": "img", "aria-label": "all"
    }  # fmt: skip
    filled, ring = elements(svg, "rect")
    assert numbers(filled, "x", "y", "width", "height") == (1.235, 2, 30, 4.5)
    assert filled.get("style") == "fill: var(--before)"
    assert ring.get("style") == "fill: none; stroke: var(--ink); stroke-width: 2"
    line, area = elements(svg, "path")
    assert line.get("d") == "M 0 1 L 5 0"
    assert area.get("d").endswith("z") and area.get("style") == "fill: var(--after)"
    (text,) = elements(svg, "text")
    assert numbers(text, "x", "y") == (7, 20 + 10 * BASELINE) and text.text == "12"
    assert text.get("style") == "font-size: 10px; text-anchor: end; fill: var(--muted)"


def test_names_are_escaped():
    marks = Marks(10, 10)
    marks.text(0, 0, '</text><script>"&', "ink")
    svg = marks.svg('a "quoted" <label>')
    assert "<script" not in svg and elements(svg, "text")[0].text == '</text><script>"&'
    assert ElementTree.fromstring(svg).get("aria-label") == 'a "quoted" <label>'


def test_stairs_start_and_end_at_the_floor():
    assert stairs([0, 1, 2, 3, 4], [9, 3, 4, 9], 9) == [[(1, 9), (1, 3), (2, 3), (2, 4), (3, 4), (3, 9)]]
    assert stairs([0, 1], [9], 9) == []


def test_a_histogram_is_logarithmic_and_empty_bins_have_no_line():
    data = Histogram(-1.0, 3.0, [1, 10, 0, 100], [0, 100, 0, 1])
    zero, before, last, first, second, _ = elements(plots.histogram(data, "weights"), "path")
    assert vertices(zero) == [(81.5, 108), (81.5, 6)]  # 0 is a quarter of the way from -1 to 3

    def height(count):
        return 108 - 102 * math.log(count / 0.5) / math.log(160 / 0.5)

    assert [y for _, y in vertices(before)][1:5:2] == pytest.approx([height(1), height(10)], abs=2e-3)
    assert vertices(last)[1] == pytest.approx((228.5, height(100)), abs=2e-3)
    assert [x for x, _ in vertices(first)] == [81.5, 81.5, 155, 155]
    assert vertices(second)[1] == pytest.approx((228.5, height(1)), abs=2e-3)


def test_cells_stand_at_their_block_and_row_and_flagged_ones_are_ringed():
    svg = heat.heat({"a": {0: 1.0, 1: 2.0}, "bb": {2: 3.0}}, heat.SQNR, "x", [("a", 1)])
    left = 16 + 2 * heat.CHARACTER
    cells = [e for e in elements(svg, "rect") if e.get("height") == "24"]
    places = [numbers(cell, "x", "y", "width") for cell in cells]
    assert places == [(left, 4, 70), (left + 72, 4, 70), (left + 144, 30, 70)]
    (ring,) = [e for e in elements(svg, "rect") if "stroke: var(--ink)" in e.get("style")]
    assert numbers(ring, "x", "y", "width", "height") == (left + 73, 5, 68, 22)
    blocks = [e for e in elements(svg, "text") if e.text in ("0", "1", "2")]
    assert [numbers(e, "x")[0] for e in blocks] == [left + 36, left + 108, left + 180]


def test_a_bar_ends_at_the_edge_and_its_whisker_too(three):
    from angelslim.report.rows import quality_metrics, rows

    table = rows(three)
    svg = plots.score_bars(table, "addition", quality_metrics(table)["addition"])
    bars, (*whiskers, axis) = elements(svg, "rect"), elements(svg, "path")
    left = vertices(axis)[0][0]
    longest = left + numbers(bars[0], "width")[0] / 0.995  # 99.5 %, of 100 %
    ends = [vertices(whisker) for whisker in whiskers]
    assert all(left <= x <= longest + 0.01 for each in ends for x, _ in each)
    bar = numbers(bars[3], "x", "y", "width", "height")
    assert ends[3][0][1] == pytest.approx(bar[1] + bar[3] / 2)
    assert sum(x for x, _ in ends[3]) / 2 == pytest.approx(bar[0] + bar[2], abs=0.01)


def test_a_report_without_axes_loads_no_plotting_library(tmp_path, make_record):
    run = tmp_path / "run.json"
    run.write_text(make_record(evaluated=False).to_json(), "utf-8")
    program = (
        "import sys; from pathlib import Path; from angelslim.report.record import RunRecord;"
        "from angelslim.report.html import render_html; render_html([RunRecord.load(Path(sys.argv[1]))]);"
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == 0
