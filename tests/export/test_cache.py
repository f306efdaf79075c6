"""The cache's entry in config.json, there and back, and through the schema of the format's library."""

from __future__ import annotations

import pytest

from angelslim.export._cache import cache_arguments, cache_quant, refuses_cache
from angelslim.export.base import FORMATS
from angelslim.numerics.scheme import FORMATS as GRIDS
from angelslim.numerics.scheme import PER_CHANNEL, PER_HEAD, PER_TENSOR, PRESETS, Quant, Scheme

FP8 = GRIDS["fp8_e4m3"]


@pytest.mark.parametrize("granularity", [PER_TENSOR, PER_HEAD])
def test_the_entry_is_read_back_as_it_was_written(granularity):
    from compressed_tensors.quantization import QuantizationArgs

    quant = Quant(FP8, granularity)
    assert refuses_cache(quant) == ""
    assert cache_quant({"kv_cache_scheme": cache_arguments(quant)}) == quant
    assert (
        cache_quant({"kv_cache_scheme": QuantizationArgs(**cache_arguments(quant)).model_dump(mode="json")})
        == quant
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kv_cache_scheme": None},
        {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True}},
        {"kv_cache_scheme": {"num_bits": 4, "type": "float", "strategy": "tensor", "dynamic": False}},
        {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False}},
    ],
)
def test_other_caches_are_not_simulated(settings):
    assert cache_quant(settings) is None


@pytest.mark.parametrize(
    "quant",
    [Quant(GRIDS["int8"], PER_TENSOR), Quant(FP8, PER_CHANNEL), Quant(FP8, PER_TENSOR, dynamic=True)],
    ids=str,
)
def test_caches_that_engines_cannot_keep_are_refused(quant):
    assert "static FP8 E4M3" in refuses_cache(quant)
    exporter = FORMATS.get("compressed_tensors")
    assert "static FP8 E4M3" in exporter.refuses(Scheme(PRESETS["fp8_dynamic"].weight, kv=quant))


def test_only_one_format_holds_a_cache():
    holders = set()
    for preset in PRESETS.values():
        scheme = Scheme(preset.weight, preset.input, Quant(FP8, PER_TENSOR))
        holders |= {name for name in FORMATS if not FORMATS.get(name).refuses(scheme)}
    assert holders == {"compressed_tensors"}
