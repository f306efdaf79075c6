import pytest

from angelslim.base.errors import ConfigError
from angelslim.config import load, stages
from angelslim.config.schemes import EXTRA
from angelslim.config.upstream import METHODS
from angelslim.numerics.scheme import PRESETS


def ask(name, _section=None, **method):
    section = {"name": name, "quant_method": method, **(_section or {})}
    (*before, stage) = stages(load({"compression": {"name": "PTQ", "quantization": section}}).config)
    caches = ["kv_cache"] if stage.scheme and stage.scheme.kv else []
    own = METHODS[name].transforms if name in METHODS else ()
    assert [each.method for each in before] == [*own, *caches]
    return stage


@pytest.mark.parametrize(
    ("name", "method", "algorithm", "scheme"),
    [
        ("fp8_static", {}, "rtn", "W fp8_e4m3 per-tensor, A fp8_e4m3 per-tensor static"),
        ("fp8_static", {"weight": "per-channel"}, "rtn", "W fp8_e4m3 per-channel, A fp8_e4m3 per-tensor static"),
        ("fp8_dynamic", {}, "rtn", "W fp8_e4m3 per-channel, A fp8_e4m3 per-token dynamic"),
        ("fp8_dynamic", {"weight": "per-tensor", "activation": "per-tensor"}, "rtn",
         "W fp8_e4m3 per-tensor, A fp8_e4m3 per-tensor dynamic"),
        ("fp8_dynamic", {"weight": "per-block", "activation": "per-block"}, "rtn",
         "W fp8_e4m3 per-block 128x128, A fp8_e4m3 per-group 128 dynamic"),
        ("fp8_dynamic", {"block_size": [64, 32]}, "rtn", "W fp8_e4m3 per-block 64x32, A fp8_e4m3 per-group 32 dynamic"),
        ("fp8_block", {}, "rtn", "W fp8_e4m3 per-block 128x128, A fp8_e4m3 per-group 128 dynamic"),
        ("fp8_blockwise", {"block_size": 64}, "rtn", "W fp8_e4m3 per-block 64x64, A fp8_e4m3 per-group 64 dynamic"),
        ("fp8_lepto", {}, "lepto", "W fp8_e4m3 per-tensor, A fp8_e4m3 per-tensor static"),
        ("int8_dynamic", {"activation": "per_token"}, "rtn", "W int8 per-channel, A int8 per-token dynamic"),
        ("int8_static", {}, "rtn", "W int8 per-channel, A int8 per-tensor static"),
        ("int4_rtn", {}, "rtn", "W int4 per-group 128"),
        ("int4_rtn", {"group_size": 32}, "rtn", "W int4 per-group 32"),
        ("int4_rtn", {"weight": "per-group", "group_size": -1}, "rtn", "W int4 per-channel"),
        ("int4_rtn", {"zero_point": True}, "rtn", "W int4 per-group 128 asymmetric"),
        ("int4_awq", {}, "rtn", "W int4 per-group 128 asymmetric"),
        ("int4_awq", {"zero_point": False, "group_size": 64}, "rtn", "W int4 per-group 64"),
        ("int8_gptq", {}, "gptq", "W int8 per-channel, A int8 per-token dynamic"),
        ("int4_gptq", {"weight": "per-channel"}, "gptq", "W int4 per-channel"),
        ("w4a8_fp8", {"weight": "per-group", "group_size": 128, "activation": "per-tensor"}, "rtn",
         "W int4 per-group 128, A fp8_e4m3 per-tensor static"),
        ("w4a8_fp8", {}, "rtn", "W int4 per-group 128 (fp8_channel scales), A fp8_e4m3 per-token dynamic"),
        ("w4a8_fp8_static", {}, "rtn", "W int4 per-group 128, A fp8_e4m3 per-tensor static"),
        ("nvfp4_weight_only", {"weight": "per-block", "group_size": 16}, "rtn",
         "W fp4_e2m1 per-group 16 (e4m3 scales)"),
        ("nvfp4", {"weight": "per-group", "activation": "per-tensor"}, "rtn",
         "W fp4_e2m1 per-group 16 (e4m3 scales), A fp4_e2m1 per-group 16 dynamic (e4m3 scales)"),
        ("nvfp4_gptq", {"actorder": True}, "gptq", "W fp4_e2m1 per-group 16 (e4m3 scales)"),
        ("mxfp4", {}, "rtn", "W fp4_e2m1 per-group 32 (e8m0 scales), A fp4_e2m1 per-group 32 dynamic (e8m0 scales)"),
        ("mxfp4_weight_only", {"group_size": 32}, "rtn", "W fp4_e2m1 per-group 32 (e8m0 scales)"),
        ("mxfp8", {}, "rtn", "W fp8_e4m3 per-group 32 (e8m0 scales), A fp8_e4m3 per-group 32 dynamic (e8m0 scales)"),
        ("w4a8i8", {}, "rtn", "W int4 per-group 128, A int8 per-token dynamic"),
    ],
)  # fmt: skip
def test_names_and_granularities_become_schemes(name, method, algorithm, scheme):
    stage = ask(name, **method)
    assert (stage.kind, stage.method, str(stage.scheme)) == ("ptq", algorithm, scheme)


def test_presets_stay_presets():
    for name in ("fp8_static", "fp8_dynamic", "fp8_block", "int8_dynamic"):
        assert ask(name).scheme == PRESETS[name]


@pytest.mark.parametrize("name", METHODS)
def test_every_public_method_name_gives_a_stage(name):
    stage = ask(name)
    assert stage.method and stage.scheme is not None


def test_formats_that_the_numerics_lack_keep_every_word():
    stage = ask("mxfp_of_tomorrow", weight="per-group", group_size=16, actorder=True)
    assert stage.scheme is None
    assert stage.options == {"weight": "per-group", "group_size": 16, "actorder": True}


def test_options_hold_what_was_given_and_no_more():
    assert ask("fp8_static").options == {}
    assert ask("int4_gptaq", actorder=False).options == {"gptaq": True, "actorder": False}
    assert ask("int4_awq").options == {"mse_range": True}
    assert ask("int4_awq", mse_range=False).options == {"mse_range": False}
    observer = {"observer": "percentile", "percentile": 99.0}
    assert ask("fp8_static", observer).options == observer
    assert ask("fp8_static", {"observer": "mse", "percentile": 99.0}).options == {"observer": "mse"}
    assert ask("fp8_static", {"observer": "percentile"}).options == {
        "observer": "percentile",
        "percentile": 99.99,
    }


@pytest.mark.parametrize(
    ("section", "ignore"),
    [
        ({}, ("lm_head",)),
        ({"ignore_layers": ["visual", "visual"]}, ("lm_head", "visual")),
        ({"ignore_layers": ["visual", "lm_head"]}, ("visual", "lm_head")),
        ({"ignore_layers": ["lm_head", "visual"], "quantize_lm_head": True}, ("visual",)),
        ({"ignore_layers": ["model.embed_tokens"], "quantize_embeddings": True}, ("lm_head",)),
    ],
)
def test_the_head_is_left_alone_unless_asked_for(section, ignore):
    assert ask("fp8_dynamic", section).ignore == ignore


def test_smoothing_comes_first():
    section = {"name": "int8_dynamic", "quant_helpers": ["smooth"], "smooth_alpha": 0.8}
    first, second = stages(load({"compression": {"quantization": section}}).config)
    assert (first.kind, first.method, first.options) == ("transform", "smooth", {"alpha": 0.8})
    assert second.method == "rtn"
    section |= {"quant_helpers": ["awq", "smooth"], "smooth_alpha": "search", "quant_method": {"duo": False}}
    found = stages(load({"compression": {"quantization": section}}).config)
    assert [(each.method, each.options) for each in found] == [
        ("smooth", {"alpha": "search"}),
        ("awq", {"duo": False}),
        ("rtn", {}),
    ]


def test_awq_is_a_transform_of_any_rounding():
    section = {"name": "int4_gptq", "quant_helpers": ["awq"]}
    assert [each.method for each in stages(load({"compression": {"quantization": section}}).config)] == [
        "awq",
        "gptq",
    ]
    twice = {"name": "int4_awq", "quant_helpers": ["awq"]}
    assert len(stages(load({"compression": {"quantization": twice}}).config)) == 2


def test_caches_are_fp8_whatever_the_weights_are():
    assert str(ask("fp8_static", kv_cache="per-tensor").scheme.kv) == "fp8_e4m3 per-tensor"
    assert str(ask("int8_dynamic", kv_cache="per-head").scheme.kv) == "fp8_e4m3 per-head"
    assert str(ask("nvfp4", kv_cache="per-head").scheme.kv) == "fp8_e4m3 per-head"
    assert ask("fp8_static").scheme.kv is None
    spelled = {"weight": {"format": "int8"}, "kv": {"format": "fp8_e4m3", "granularity": "per-head"}}
    assert (
        ask("fp8_static", {"scheme": spelled}).scheme.kv == ask("int8_dynamic", kv_cache="per-head").scheme.kv
    )


def test_a_quantized_cache_is_a_stage_of_its_own():
    section = {"name": "fp8_static", "quant_method": {"kv_cache": "per-head"}}
    first, second = stages(load({"compression": {"quantization": section}}).config)
    assert (first.kind, first.method, first.options) == ("transform", "kv_cache", {"quant": second.scheme.kv})
    assert second.method == "rtn"


def test_explicit_schemes():
    spec = {"weight": {"format": "int4", "granularity": "per-group", "group_size": 64, "symmetric": False},
            "input": {"format": "fp8_e4m3", "granularity": "per-token", "dynamic": True}}  # fmt: skip
    stage = stages(load({"compression": {"quantization": {"scheme": spec}}}).config)[0]
    assert stage.method == "rtn"
    assert str(stage.scheme) == "W int4 per-group 64 asymmetric, A fp8_e4m3 per-token dynamic"
    named = ask("int4_gptq", {"scheme": "int8_dynamic"})
    assert (named.method, named.scheme) == ("gptq", PRESETS["int8_dynamic"])
    assert str(ask("int4_gptq", {"scheme": "int4"}, group_size=32).scheme) == "W int4 per-group 32"


def test_every_named_scheme_can_be_asked_for():
    for name, scheme in {**PRESETS, **EXTRA}.items():
        assert ask("int4_gptq", {"scheme": name}).scheme == scheme
        assert ask("int4_gptq", {"scheme": name.replace("_", "-")}).scheme == scheme


def test_small_scales_can_be_spelled_out():
    tensor = {"format": "fp4_e2m1", "granularity": "per-group", "group_size": 16, "scale": "e4m3"}
    spec = {"weight": tensor, "input": {**tensor, "dynamic": True}}
    assert (
        stages(load({"compression": {"quantization": {"scheme": spec}}}).config)[0].scheme == PRESETS["nvfp4"]
    )


def test_overrides_keep_their_order():
    section = {
        "overrides": [
            {"match": ["o_proj", r"re:.*\.experts\."], "scheme": "w4a8_fp8"},
            {"match": "router", "scheme": "none"},
            {"match": "down_proj", "scheme": {"weight": {"format": "int8", "granularity": "per-channel"}}},
            {"match": "mlp", "quant_method": {"block_size": [64, 64]}},
        ]
    }
    stage = ask("fp8_block", section)
    assert stage.scheme == PRESETS["fp8_block"]
    w4a8 = PRESETS["w4a8_fp8"]
    assert stage.overrides[:3] == (("o_proj", w4a8), (r"re:.*\.experts\.", w4a8), ("router", None))
    assert [(entry, str(scheme)) for entry, scheme in stage.overrides[3:]] == [
        ("down_proj", "W int8 per-channel"),
        ("mlp", "W fp8_e4m3 per-block 64x64, A fp8_e4m3 per-group 64 dynamic"),
    ]
    assert "; router: full precision; down_proj: W int8 per-channel; " in str(stage)


def test_an_override_that_is_no_pattern_is_refused():
    with pytest.raises(ConfigError, match=r"'re:\*' is not a regular expression"):
        ask("fp8_block", {"overrides": [{"match": "re:*", "scheme": "int4"}]})


def test_training_schemes_come_from_the_plugin_or_else_from_the_quantization():
    plugin = {
        "quant_config": {
            "use_weight_quant": True,
            "weight": {"qtype": "int4", "granularity": "per_group", "group_size": 128},
        }
    }
    section = {"name": "QAT", "quantization": {"name": "fp8_static"}, "QAT": {"plugin_config": plugin}}
    assert str(stages(load({"compression": section}).config)[0].scheme) == "W int4 per-group 128"
    section["QAT"] = {"training_mode": "end2end"}
    stage = stages(load({"compression": section}).config)[0]
    assert (stage.kind, stage.method, stage.scheme) == ("qat", "end2end", PRESETS["fp8_static"])


def test_pruning_stages_keep_place_and_arguments():
    dart = {"strategy": "dart", "params": {"ratio": 0.5}}
    data = {
        "compressor": {
            "requirements": {"inputs_embeds": True},
            "strategies": {10: dart, 2: dart, "global": dart},
        }
    }
    found = stages(load(data).config)
    assert [stage.options["layer"] for stage in found] == [None, 2, 10]
    assert found[0].options["ratio"] == 0.5
    assert found[0].options["requirements"] == {"inputs_embeds": True}


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"name": "fp8_static", "quant_method": {"weight": "per-token"}}, r"quant_method.weight: Weights cannot be per-token"),
        ({"name": "fp8_static", "quant_method": {"activation": "per-token"}}, r"Static activation scales cannot be per-token"),
        ({"name": "fp8_dynamic", "quant_method": {"activation": "per-channel"}}, r"Activations cannot be per-channel"),
        ({"name": "int4_rtn", "quant_method": {"group_size": 0}}, r"group_size 0 is impossible"),
        ({"name": "int4_rtn", "quant_method": {"weight": "per-group", "group_size": -2}}, r"group_size -2 is impossible"),
        ({"name": "fp8_block", "quant_method": {"block_size": [128, 0]}}, r"block_size \[128, 0\] is impossible"),
        ({"name": "fp8_block", "quant_method": {"block_size": [1, 2, 3]}}, r"block_size \[1, 2, 3\] is impossible"),
        ({"name": "fp8_static", "quant_method": {"zero_point": True}}, r"zero point on fp8_e4m3"),
        ({"name": "fp8_static", "quant_method": {"kv_cache": "per-token"}}, r"KV cache cannot be per-token"),
        ({}, r"names neither a method nor a scheme"),
        ({"name": "nvfp4", "quant_method": {"group_size": 32}}, r"quant_method: .* symmetric groups of 16, and no others"),
        ({"name": "mxfp4", "quant_method": {"weight": "per-channel"}}, r"symmetric groups of 32"),
        ({"name": "mxfp8", "quant_method": {"activation": "per-token"}}, r"symmetric groups of 32"),
        ({"scheme": {"weight": {"format": "int8", "granularity": "per-group", "scale": "e8m0"}}},
         r"scheme.weight: e8m0 scales are for symmetric groups of 32 of fp4_e2m1 or fp8_e4m3 values"),
        ({"scheme": "int4", "overrides": [{"match": "down_proj"}]}, r"overrides.0: The override changes nothing"),
        ({"scheme": "int4", "overrides": [{"match": "down_proj", "scheme": "int9"}]},
         r"overrides.0.scheme: Unknown scheme 'int9'"),
        ({"scheme": "int4_x"}, r"Unknown scheme 'int4_x'. Did you mean 'int4'"),
        ({"scheme": {"weight": {"format": "int5"}}}, r"scheme.weight: Unknown number format 'int5'"),
        ({"scheme": {"weight": {"format": "int8", "dynamic": True}}}, r"Weights cannot be dynamic"),
        ({"scheme": {"weight": {"format": "int8", "granularity": "per-token"}}}, r"Weights cannot be per-token"),
        ({"scheme": {"weight": {"format": "fp8_e4m3", "symmetric": False}}}, r"symmetric by nature"),
        ({"scheme": {"weight": {"format": "int8"}, "input": {"format": "int8", "granularity": "per-token"}}}, r"Static activation"),
        ({"scheme": {"weight": {"format": "int8"}}, "quant_method": {"weight": "per-channel"}}, r"both say the granularity"),
    ],
)  # fmt: skip
def test_impossible_combinations(quantization, message):
    config = load({"compression": {"name": "PTQ", "quantization": quantization}}).config
    with pytest.raises(ConfigError, match=message):
        stages(config)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model": {"model_path": "x"}}, "asks for nothing"),
        ({"compression": {"name": "Sparsity"}}, "name is Sparsity, but its section is missing"),
        ({"compression": {"name": "PTQ"}}, "name is PTQ, but its section is missing"),
        ({"compression": [{"calibrate": {"backend": "vllm"}}]}, "The stage has no method"),
        ({"compressor": {"strategies": {}}}, "strategies is empty"),
    ],
)
def test_nothing_to_do_is_an_error(data, message):
    with pytest.raises(ConfigError, match=message):
        stages(load(data).config)


def test_a_transform_alone_is_a_run():
    (stage,) = stages(load({"transform": {"name": "SpinQuant"}, "compression": {"name": "PTQ"}}).config)
    assert (stage.kind, stage.method) == ("transform", "spin")
