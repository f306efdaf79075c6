from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import angelslim.numerics
from angelslim.base.errors import SchemeError
from angelslim.numerics.scheme import (
    FORMATS,
    PER_CHANNEL,
    PRESETS,
    Quant,
    format_named,
    per_group,
    with_group,
)


@pytest.mark.parametrize(
    "name", [module.name for module in pkgutil.iter_modules(angelslim.numerics.__path__)]
)
def test_examples_in_docstrings(name):
    assert doctest.testmod(importlib.import_module(f"angelslim.numerics.{name}")).failed == 0


def test_schemes_are_readable():
    assert str(PRESETS["fp8_static"]) == "W fp8_e4m3 per-tensor, A fp8_e4m3 per-tensor static"
    assert str(PRESETS["fp8_block"]) == "W fp8_e4m3 per-block 128x128, A fp8_e4m3 per-group 128 dynamic"
    assert str(PRESETS["int4"]) == "W int4 per-group 128"
    assert str(PRESETS["mxfp4_weight_only"]) == "W fp4_e2m1 per-group 32 (e8m0 scales)"


def test_only_static_inputs_need_data():
    assert {name for name, scheme in PRESETS.items() if scheme.needs_data} == {"fp8_static", "nvfp4"}


def test_group_of_minus_one_is_per_channel():
    assert with_group(PRESETS["int4"], -1).weight.granularity == PER_CHANNEL
    assert with_group(PRESETS["int4"], 64).weight.granularity == per_group(64)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("fp4_e2m1", per_group(64), True, False, "e8m0"), "e8m0 scales are for symmetric groups of 32"),
        (("fp4_e2m1", PER_CHANNEL, True, False, "e4m3"), "e4m3 scales are for symmetric groups of 16"),
        (("fp8_e4m3", per_group(16), True, False, "e4m3"), "groups of 16 of fp4_e2m1 values"),
        (("int4", per_group(64), False, False, "fp8_channel"), "symmetric groups of int4"),
    ],
)
def test_small_scales_belong_to_their_number_formats(words, reason):
    name, *rest = words
    with pytest.raises(SchemeError, match=reason):
        Quant(FORMATS[name], *rest)


def test_unknown_format_names_the_nearest():
    with pytest.raises(SchemeError, match="Did you mean 'fp8_e4m3'"):
        format_named("fp8_e4m4")


def test_schemes_load_without_torch():
    code = "import sys, angelslim.numerics.scheme; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
