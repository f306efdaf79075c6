from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from angelslim.numerics.error import Histogram
from angelslim.report.analysis import ROWS, analysis_html, analysis_table, overlay, verdict
from angelslim.report.columns import LAYER, chosen, flags, known
from angelslim.report.drawing import VARIABLES
from angelslim.report.findings import Analysis, Flag, LayerFinding
from report.test_html import EVIL, Page

ROLES = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
LIMITS = {"scale": 1.5, "spread": 6.0}


def finding(block: int, role: str) -> LayerFinding:
    place = block + 6 * ROLES.index(role)
    return LayerFinding(
        name=f"model.layers.{block}.{role}", block=block, role=role, scheme="W int4 per-group 128", shape=(64, 64),
        amax=0.4 + 0.01 * place, p999=0.3, p9999=0.35, kurtosis=3.0 + 0.1 * place, zeros=0.1, scale=0.05 + 0.001 * place,
        at_limit=0.012, clipped=0.0, flushed=0.14 + 0.001 * place, sqnr_db=19.0 - 0.1 * place, relative_error=0.1,
        max_error=0.05, mean_error=0.01, kl=0.3, wasserstein=0.002, output_error=0.02 + 0.001 * place,
        histogram=Histogram(-0.4, 0.4, [0, 5, 90, 1000, 80, 4], [0, 0, 200, 900, 79, 0]),
    )  # fmt: skip


@pytest.fixture
def pair() -> Analysis:
    layers = [finding(block, role) for block in range(6) for role in ROLES]
    loud = (Flag("kurtosis", 9.0, 7.4), Flag("scale", 2.5, None))
    layers[0] = replace(layers[0], kurtosis=9.0, scale=2.5, flags=loud, note="rounded to nearest")
    return Analysis("copy", "tiny-lm", "compressed-tensors", True, layers, LIMITS, ["a note"])


def shown(table) -> str:
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_the_table_has_the_worst_layers_and_the_figures_of_a_pair(pair):
    text = shown(analysis_table(pair, 3))
    assert "copy against tiny-lm: worst 3 of 18 layers" in text
    assert "model.layers.0.self_attn.q_proj" in text and "model.layers.1.self_attn.q_proj" not in text
    for words in ("SQNR", "KL", "W1", "clipped", "14 %"):
        assert words in text, words


def test_columns_without_a_figure_are_left_out(pair):
    bare = [
        replace(x, sqnr_db=None, output_error=None, scale=None, at_limit=None, input_scale=None)
        for x in pair.layers
    ]
    alone = Analysis("model", None, "full precision", False, bare, LIMITS)
    assert [column.field for column in chosen(alone)] == ["amax", "p999", "p9999", "kurtosis", "zeros"]
    assert all(column.field != "input_scale" for column in known(LAYER, pair.layers))
    assert "input_scale" in [c.field for c in known(LAYER, [replace(pair.layers[0], input_scale=0.1)])]


def test_flags_say_why(pair):
    assert flags(pair.layers[0], LIMITS) == "kurtosis 9 (7σ); max scale 2.5 > 1.5"
    assert verdict(pair) == [
        "1 of 18 layers stand out:",
        "  model.layers.0.self_attn.q_proj: kurtosis 9 (7σ); max scale 2.5 > 1.5",
    ]
    many = replace(pair, layers=[replace(x, flags=pair.layers[0].flags) for x in pair.layers])
    assert verdict(many, 2)[-1] == "  and 16 more" and len(verdict(many, 2)) == 4
    assert verdict(replace(pair, layers=pair.layers[1:])) == ["No layer stands out."]


def test_the_page_is_whole_and_self_contained(pair):
    text = analysis_html(pair)
    page = Page(text)
    for layer in pair.layers:
        assert layer.name in page.text
    for words in ("copy: weights against tiny-lm", "a note", "rounded to nearest", "Largest kurtosis", "1 stand out", "SQNR 19.0 dB"):  # fmt: skip
        assert words in page.text, words
    assert "http" not in text and page.tags.count("script") == 1 and "img" not in page.tags
    assert page.tags.count("svg") == 4 + 2 + 18  # grids that differ, strips of scales and weights, histograms
    assert not any(marker in text for marker in VARIABLES)
    assert analysis_html(pair) == text


def test_everything_is_escaped(pair):
    pair.compressed = pair.original = pair.format = pair.notes[0] = EVIL
    pair.layers[1] = replace(pair.layers[1], name=EVIL, scheme=EVIL, role=EVIL, note=EVIL)
    text = analysis_html(pair)
    assert "<script>alert" not in text
    assert Page(text).tags.count("script") == 1


def test_a_large_model_has_its_worst_layers_on_the_page(pair):
    layers = [replace(pair.layers[1], name=f"m.{i}.x", block=i % 60, histogram=None) for i in range(ROWS + 7)]
    text = analysis_html(replace(pair, layers=layers))
    assert f"m.{ROWS - 1}.x" in text and f"m.{ROWS}.x" not in text and "7 more in the CSV file" in text


def test_odd_figures_are_drawn(pair):
    odd = (("sqnr_db", math.inf), ("kurtosis", 0.0), ("amax", 0.0), ("scale", 0.0), ("output_error", 0.0))
    pair.layers = [replace(x, **dict(odd), flushed=None, clipped=None) for x in pair.layers]
    assert "exact" in Page(analysis_html(pair)).text
    lone = replace(pair, layers=[replace(pair.layers[0], block=None, role="lm_head", name="lm_head")])
    assert "lm_head" in Page(analysis_html(lone)).text


def test_the_overlay_has_two_curves_and_labelled_axes():
    svg = overlay(Histogram(-0.4, 0.4, [0, 5, 90, 1000, 80, 4], [0, 0, 200, 900, 79, 0]), "q_proj")
    shown = [element.text for element in ElementTree.fromstring(svg).iter("text")]
    assert "value of the weight" in shown and "share of weights in a bin" in shown and "10 %" in shown
    assert "fill: var(--before)" in svg and "stroke: var(--after)" in svg
    assert re.search(r'aria-label="Weights of q_proj', svg)
    assert overlay(Histogram(0.0, 1.0, [4] + [0] * 5, [4] + [0] * 5), "constant")
