from __future__ import annotations

import math
from dataclasses import replace

import pytest

from angelslim.analyze.outliers import FEWEST, flag, ranked
from angelslim.report.findings import LayerFinding

PLAIN = LayerFinding(
    name="", block=0, role="up", scheme="W", shape=(8, 8), amax=0.5, p999=0.3, p9999=0.4, kurtosis=3.0, zeros=0.0
)  # fmt: skip


def layers(**columns):
    """Layers of one role with the values of some columns."""
    count = len(next(iter(columns.values())))
    return [
        replace(PLAIN, name=f"l{i}", block=i, **{key: values[i] for key, values in columns.items()})
        for i in range(count)
    ]


def flags(found, scale_limit=1.5, spread=6.0):
    return {x.name: [f.column for f in x.flags] for x in flag(found, scale_limit, spread) if x.flags}


def test_ordinary_layers_have_no_flags():
    assert (
        flags(layers(amax=[0.5, 0.6, 0.45, 0.55, 0.52, 0.62], sqnr_db=[31, 31.2, 30.8, 31, 30, 31.1])) == {}
    )


@pytest.mark.parametrize("column", ["amax", "kurtosis", "scale", "input_scale", "output_error"])
def test_a_large_figure_is_flagged_and_a_small_one_is_not(column):
    values = [0.1, 0.11, 0.09, 0.1, 0.12, 1.2, 0.001]
    assert flags(layers(**{column: values})) == {"l5": [column]}


def test_a_low_sqnr_is_flagged_and_a_high_one_is_not():
    assert flags(layers(sqnr_db=[19.0, 19.1, 18.9, 19.2, 19.0, 9.0, 40.0, math.inf])) == {"l5": ["sqnr_db"]}


def test_shares_are_compared_as_they_are():
    assert flags(layers(flushed=[0.0, 0.0, 0.001, 0.0, 0.0, 0.3], clipped=[0.0] * 5 + [0.02])) == {
        "l5": ["flushed", "clipped"]
    }


def test_a_scale_above_the_limit_is_flagged_even_alone():
    (found,) = flag(layers(input_scale=[1.6], scale=[1.4]), 1.5, 6.0)
    assert [(f.column, f.value, f.score) for f in found.flags] == [("input_scale", 1.6, None)]
    assert flags(layers(input_scale=[1.6], scale=[1.4]), scale_limit=1.0) == {"l0": ["scale", "input_scale"]}


def test_a_figure_is_flagged_once():
    assert flags(layers(scale=[0.1, 0.1, 0.1, 0.11, 0.12, 9.0])) == {"l5": ["scale"]}


def test_roles_are_compared_with_themselves():
    wide = [
        replace(x, name=f"w{i}", role="down") for i, x in enumerate(layers(amax=[5.0, 5.2, 4.9, 5.1, 5.3]))
    ]
    assert flags([*layers(amax=[0.5, 0.6, 0.45, 0.55, 0.52]), *wide]) == {}


def test_too_few_layers_have_no_ordinary_ones():
    assert flags(layers(amax=[0.1] * (FEWEST - 2) + [9.0])) == {}
    assert flags(layers(amax=[0.1] * (FEWEST - 1) + [9.0])) == {f"l{FEWEST - 1}": ["amax"]}


def test_the_spread_decides():
    found = layers(amax=[0.5, 0.55, 0.45, 0.5, 0.52, 0.9])
    assert flags(found, spread=3) == {"l5": ["amax"]} and flags(found, spread=20) == {}


def test_flagged_layers_come_first_then_the_lowest_sqnr():
    found = flag(layers(sqnr_db=[20.0, 18.0, 19.0, 19.5], scale=[0.1, 0.1, 2.0, 0.1]), 1.5, 6.0)
    assert [layer.name for layer in ranked(found)] == ["l2", "l1", "l3", "l0"]
    assert [layer.name for layer in ranked(layers(kurtosis=[3.0, 9.0, 4.0]))] == ["l1", "l2", "l0"]
