from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from angelslim.report.heat import OUTPUT_ERROR, SMALL, SQNR, Quantity, compact, heat

PLAIN = Quantity("Figure", "high", compact, compact)


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("text")]


def levels(svg, count):
    return [int(level) for level in re.findall(r"var\(--level-(\d)\)", svg)][:count]


def test_the_worse_the_higher_the_level():
    assert levels(heat({"a": {0: 30.0, 1: 20.0, 2: 10.0}}, SQNR, ""), 3) == [0, 3, 6]
    assert levels(heat({"a": {0: 1.0, 1: 2.0, 2: 3.0}}, PLAIN, ""), 3) == [0, 3, 6]


def test_a_logarithmic_quantity_divides_by_ratios():
    assert levels(heat({"a": {0: 0.001, 1: 0.01, 2: 0.1}}, OUTPUT_ERROR, ""), 3) == [0, 3, 6]
    linear = Quantity("x", "high", compact, compact)
    assert levels(heat({"a": {0: 0.001, 1: 0.01, 2: 0.1}}, linear, ""), 3) == [0, 0, 6]


def test_odd_values_have_a_level():
    span = (10.0, 20.0)
    assert (SQNR.level(math.inf, span), SQNR.level(-math.inf, span), SQNR.level(math.nan, span)) == (0, 6, 6)
    assert (PLAIN.level(math.inf, span), PLAIN.level(-math.inf, span), PLAIN.level(math.nan, span)) == (
        6,
        0,
        6,
    )
    assert OUTPUT_ERROR.level(0.0, (0.0, 0.1)) == 0


def test_equal_values_draw():
    for quantity in (SQNR, PLAIN, OUTPUT_ERROR):
        drawn = heat({"a": {0: 0.5, 1: 0.5 + 1e-9}}, quantity, "")
        assert levels(drawn, 2)
        assert any(text.startswith("the same everywhere") for text in texts(drawn))
    assert heat({"a": {0: math.inf}}, SQNR, "") == heat({}, SQNR, "") == ""


def test_figures_ends_and_blocks_are_written():
    shown = texts(heat({"q_proj": {0: 0.02, 5: 0.5}}, OUTPUT_ERROR, "by block and role"))
    for word in ("2 %", "50 %", "50 %, higher is worse", "q_proj", "0", "5", "decoder block"):
        assert word in shown


def test_flagged_cells_have_a_ring():
    svg = heat({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0}}, PLAIN, "", {("a", 1), ("b", 0)})
    assert svg.count("stroke: var(--ink)") == 2
    assert "stroke: var(--ink)" not in heat({"a": {0: 1.0, 1: 2.0}}, PLAIN, "")


@pytest.mark.parametrize("blocks", [1, 30, 200])
def test_any_number_of_blocks_fits_the_page(blocks):
    root = ElementTree.fromstring(heat({"a": {block: float(block) for block in range(blocks)}}, PLAIN, ""))
    assert float(root.get("width")) <= 1010


def test_the_legend_fits_beside_few_blocks():
    """Four blocks are narrower than the legend; its last word ends inside the picture."""
    svg = heat({"head 0": {block: 0.0142 * (block + 1) for block in range(4)}}, OUTPUT_ERROR, "")
    root = ElementTree.fromstring(svg)
    last = next(item for item in root.iter("text") if (item.text or "").endswith("is worse"))
    assert float(last.get("x")) + SMALL * len(last.text) <= float(root.get("width"))


def test_what_reads_the_same_is_coloured_the_same():
    """Roundings differ in the ninth digit; the figures in the cells do not."""
    svg = heat({"a": {0: 1.0, 1: 1.0 - 1e-7, 2: 1.0 - 3e-7}}, Quantity("x", "low", compact, compact), "")
    assert levels(svg, 3) == [0, 0, 0]
    assert levels(heat({"a": {0: 1e-8, 1: 5e-7}}, OUTPUT_ERROR, ""), 2) == [0, 0]
