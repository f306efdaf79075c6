from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import yaml

from angelslim.config.recipe import load
from angelslim.report.findings import LayerSensitivity, Sensitivity
from angelslim.report.sensitivity import (
    _scatter,
    advice,
    recipe_lines,
    remarks,
    sensitivity_html,
    sensitivity_table,
)
from report.test_analysis import shown
from report.test_html import EVIL, Page


def layer(block: int, role: str, error: float, kl: float | None) -> LayerSensitivity:
    name = f"model.layers.{block}.{role}"
    return LayerSensitivity(name, block, role, "W int4", 1000, (name,), 19.0, error, kl, kl and kl / 3)


@pytest.fixture
def found() -> Sensitivity:
    layers = [layer(b, r, 0.01 * (7 - b) * (1 + (r == "up")), 0.001 * (7 - b) * (1 + (r == "up"))) for b in range(6) for r in ("up", "down")]  # fmt: skip
    layers.sort(key=lambda x: -(x.kl or 0))
    return Sensitivity(
        "tiny-lm", "int4_rtn", "W int4 per-group 128", 16, 8000, layers, 0.08, 8,
        ["lm_head", layers[0].name, "re:odd 'one"], [layers[0].name], (4.125, 5.0),
    )  # fmt: skip


def test_the_table_ranks(found):
    text = shown(sensitivity_table(found, 2))
    assert "the 2 most sensitive of 12 layers" in text and "0.014" in text and "14 %" in text
    blank = replace(found, layers=[replace(x, kl=None, kl_stderr=None) for x in found.layers], together=None)
    assert "KL" not in shown(sensitivity_table(blank, 2))


def test_the_remarks_tell_the_sum_and_the_agreement(found):
    lines = " ".join(remarks(found))
    assert "16 calibration samples, 8,000 tokens." in lines
    total = sum(x.kl for x in found.layers)
    assert f"KL 0.08 nats per token (8 samples); the sum over single layers is {total:.3g}" in lines
    assert "with a correlation of 1.00" in lines
    assert advice(found) == (
        f"This layer has {100 * 0.014 / total:.0f} % of the summed KL; keeping them takes 5.00 bits per weight "
        "instead of 4.12."
    )


def test_without_kl_errors_are_squared_and_added(found):
    layers = [replace(x, kl=None, kl_stderr=None) for x in found.layers]
    plain = replace(found, layers=layers, together=None)
    share = 0.14**2 / sum(x.block_error**2 for x in layers)
    assert f"{100 * share:.0f} % of the summed squared block errors" in advice(plain)
    assert len(remarks(plain)) == 1


def test_the_lines_are_a_recipe(found):
    raw = yaml.safe_load(recipe_lines(found))
    assert raw["compression"]["quantization"]["ignore_layers"] == found.suggestion
    assert load(raw).config.compression[0].quantization.ignore_layers == found.suggestion


def test_the_page_is_whole(found):
    text = sensitivity_html(found)
    page = Page(text)
    for words in (
        "tiny-lm: sensitivity to int4_rtn",
        "Largest KL",
        "ignore_layers",
        "5.00 with the suggestion",
    ):
        assert words in page.text, words
    assert page.tags.count("svg") == 4 and sensitivity_html(found) == text
    plain = replace(
        found, layers=[replace(x, kl=None, kl_stderr=None) for x in found.layers], together=None, kept=[]
    )
    page = Page(sensitivity_html(plain))
    assert page.tags.count("svg") == 2 and "ignore_layers" not in page.text


def test_everything_is_escaped(found):
    found.model = found.recipe = found.scheme = EVIL
    found.layers[0] = replace(found.layers[0], name=EVIL, role=EVIL, note=EVIL)
    found.suggestion.append(EVIL)
    text = sensitivity_html(found)
    assert "<script>alert" not in text and Page(text).tags.count("script") == 1


def test_the_scatter_needs_points(found):
    assert _scatter(found.layers[:3]) == ""
    assert _scatter([replace(x, kl=0.0) for x in found.layers]) == ""
    shown = [element.text for element in ElementTree.fromstring(_scatter(found.layers)).iter("text")]
    assert "KL (nats per token)" in shown
