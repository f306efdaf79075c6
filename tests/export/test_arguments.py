"""The entries of the config against the library's own schema."""

from __future__ import annotations

from dataclasses import replace

import pytest
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig

from angelslim.export._arguments import arguments, quant_of
from angelslim.export.compressed_tensors import FORMAT
from angelslim.numerics.scheme import FORMATS, PER_HEAD, PER_TENSOR, PRESETS, Quant, Scheme, per_group

SCHEMES = {
    **PRESETS,
    "asymmetric": Scheme(Quant(FORMATS["int4"], per_group(32), symmetric=False)),
    "bfloat16 scales": Scheme(Quant(FORMATS["int4"], per_group(64), scale="bfloat16")),
    "static cache": replace(PRESETS["fp8_static"], kv=Quant(FORMATS["fp8_e4m3"], PER_TENSOR)),
    "cache by heads": replace(PRESETS["fp8_dynamic"], kv=Quant(FORMATS["fp8_e4m3"], PER_HEAD)),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_the_library_reads_what_we_write_and_would_write_the_same(name):
    config = FORMAT.config({"model.layers.0.mlp.up_proj": SCHEMES[name]}, ["lm_head"])
    theirs = QuantizationConfig.model_validate(config).model_dump(
        mode="json", exclude={"moe_sparsity_config"}
    )
    assert theirs == config
    assert list(theirs["config_groups"]["group_0"]["weights"]) == list(
        config["config_groups"]["group_0"]["weights"]
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_entries_are_read_back(name):
    scheme = SCHEMES[name]
    for quant in (scheme.weight, scheme.input):
        read = quant_of(arguments(quant))
        expected = replace(quant, scale="free") if quant and quant.scale == "fp8_channel" else quant
        assert read == expected


@pytest.mark.parametrize(
    "given",
    [
        {"group_size": 64},
        {"group_size": -1},
        {},
        {"num_bits": 8, "type": "float"},
        {"num_bits": 4, "symmetric": False},
    ],
)
def test_missing_fields_have_the_librarys_defaults(given):
    if given:
        full = QuantizationArgs(**given).model_dump(mode="json")
        assert quant_of(given) == quant_of(full)
    assert quant_of(None) is None


def test_groups_that_name_a_preset_are_understood():
    config = QuantizationConfig.model_validate({"config_groups": {"W4A16": ["Linear"]}}).model_dump(
        mode="json"
    )
    short = {"config_groups": {"W4A16": ["Linear"]}}
    assert FORMAT.schemes(short, ["a"]) == FORMAT.schemes(config, ["a"]) == {"a": PRESETS["int4"]}
