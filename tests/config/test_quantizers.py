"""From the section of a recipe to a quantizer's options: what only some quantizers have reaches those alone."""

from __future__ import annotations

import pytest

from angelslim.config.quantizers import special
from angelslim.config.recipe import load
from angelslim.config.training import SpecialQuantizer

WORD = "compression.QAT.plugin_config.quant_config.special"


def section(*overrides: str) -> SpecialQuantizer:
    (compression,) = load("seq_2bit", list(overrides)).config.compression
    return compression.qat.plugin_config.quant_config.special


def test_a_recipes_ranges_are_seqs_alone():
    name, options = special(section())
    assert name == "seq" and options["init"] == "fit" and options["bits"] == 2
    name, options = special(section(f"{WORD}.quant_method=tequila"))
    assert name == "tequila" and not {"init", "bits"} & set(options)


@pytest.mark.parametrize("key", ["seq_init", "options.init"])
def test_the_published_start_is_an_override(key):
    assert special(section(f"{WORD}.{key}=max"))[1]["init"] == "max"
