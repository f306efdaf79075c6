from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from angelslim.report.strips import MOST, Dot, _thinned, log_ticks, strips

ROWS = {
    "q_proj": [Dot(0.1, "block 0"), Dot(0.2, "block 1"), Dot(4.0, "block 2", True)],
    "up": [Dot(0.3, "block 0")],
}


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("text")]


def test_rows_axis_and_flagged_members_are_named():
    svg = strips(ROWS, "largest scale", "label", limit=(1.5, "limit"))
    shown = texts(svg)
    for word in ("q_proj", "up", "largest scale", "block 2", "limit"):
        assert word in shown
    assert "block 0" not in shown and "block 1" not in shown
    assert "var(--bad)" in svg and ElementTree.fromstring(svg).get("aria-label") == "label"


def test_a_far_limit_is_left_outside():
    near = {"a": [Dot(0.001, ""), Dot(0.002, "")]}
    assert max(float(t) for t in texts(strips(near, "", "", limit=(1.5, "limit"))) if t[0].isdigit()) < 0.01


def test_nothing_to_draw():
    assert strips({}, "", "") == strips({"a": [Dot(0.0, ""), Dot(math.nan, "")]}, "", "") == ""


@pytest.mark.parametrize("log", [True, False])
def test_odd_values_and_names_are_drawn(log):
    dots = [Dot(0.0, "<none>", True), Dot(math.inf, "inf", True), Dot(1.0, "$x$"), Dot(1.0, "")]
    svg = strips({"<script>": dots}, "a & b", "c", log=log)
    assert "<script" not in svg and "a & b" in texts(svg)
    assert ("<none>" in texts(svg)) and "inf" not in texts(svg)


def test_thousands_of_members_are_thinned_and_the_flagged_stay():
    dots = [Dot(index + 1.0, "") for index in range(20_000)] + [Dot(5.0, "x", True)]
    kept = _thinned(dots, 2)
    assert len(kept) <= MOST / 2 + 2 and sum(dot.flagged for dot in kept) == 1


@pytest.mark.parametrize(("low", "high"), [(0.001, 0.002), (0.5, 7), (1e-6, 1e3), (1, 1.04), (1e-30, 1e30)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = log_ticks(low, high)
    assert 1 <= len(ticks) <= 8 and all(low <= tick <= high for tick in ticks) and ticks == sorted(ticks)
