import os
import subprocess
import sys
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from angelslim.base.errors import ConfigError, UserError
from angelslim.config import load, recipes, stages
from angelslim.config.fields import parse_size
from angelslim.config.training import TRAINING_ARGUMENTS

PTQ = {"compression": {"name": "PTQ", "quantization": {"name": "fp8_static"}}}


def quantization(**keys):
    return {"compression": {"name": "PTQ", "quantization": {"name": "fp8_static", **keys}}}


# ------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", recipes())
def test_each_recipe_loads_asks_for_something_and_says_what_it_is_for(name):
    resolved = load(name)
    assert not resolved.warnings
    assert resolved.config.model.model_path is None
    *before, stage = stages(resolved.config)
    assert {each.kind for each in before} <= {"transform"}
    if resolved.config.compression[0].trains:
        assert stage.kind in ("qat", "distill") and resolved.config.dataset.share == 1.0
    elif resolved.config.compression[0].sparsity:
        assert (stage.kind, stage.method) == ("sparsity", name.removeprefix("sparse_"))
    else:
        rounds = stage.kind == "ptq" and stage.scheme is not None
        assert rounds or name == "rotated"  # which only transforms
    assert stage.kind in ("distill", "sparsity", "transform") or "lm_head" in stage.ignore
    assert recipes()[name].endswith((".", "size.", "time."))
    assert load(name.replace("_", "-")).config == resolved.config


def test_a_share_of_the_data_is_for_training_and_above_zero():
    assert load("seq_2bit", ["dataset.share=0.3"]).config.dataset.share == 0.3
    with pytest.raises(ConfigError, match="share is 0"):
        load("seq_2bit", ["dataset.share=0"])
    assert any("no effect" in warning for warning in load("int4_rtn", ["dataset.share=0.3"]).warnings)


def test_the_base_is_no_recipe_of_its_own():
    assert not {"base", "qat_base"} & set(recipes())
    assert load("qat_base").config.compression[0].trains
    assert load("base").config.dataset.num_samples == 128


def test_provenance_names_every_origin(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: int4_rtn\nmodel: {model_path: some/model}\ndataset: {num_samples: 16}\n")
    resolved = load(path, ["dataset.max_seq_length=512", "compression.quantization.bits=4"])
    origin = resolved.provenance
    assert origin["dataset.num_samples"] == str(path)
    assert origin["dataset.max_seq_length"] == "override"
    assert origin["dataset.batch_size"] == "recipe base"
    assert origin["compression.quantization.name"] == "recipe int4_rtn"
    assert origin["compression.quantization.bits"] == "override"
    assert origin["compression.quantization.ignore_layers"] == "recipe base"
    assert origin["global.seed"] == "default"
    assert resolved.config.dataset.num_samples == 16
    assert resolved.config.model.model_path == "some/model"


def test_a_scheme_replaces_the_granularity_of_the_layers_below():
    key = "compression.quantization"

    def scheme_of(*overrides: str, recipe: str = "int4_gptq") -> str:
        return str(stages(load(recipe, [f"{key}.{each}" for each in overrides]).config)[-1].scheme)

    assert scheme_of("scheme=int4_g32") == "W int4 per-group 32"
    assert scheme_of("scheme=int8_dynamic") == "W int8 per-channel, A int8 per-token dynamic"
    assert scheme_of("scheme=int4_g32", "quant_method.group_size=64") == "W int4 per-group 64"
    assert (
        scheme_of("quant_method.group_size=64", "scheme=int4_g32") == "W int4 per-group 64"
    )  # both said on top
    assert (
        load("int4_gptq", [f"{key}.scheme=int4_g32"])
        .config.compression[0]
        .quantization.quant_method.mse_range
    )


def test_lists_and_values_replace_while_sections_merge(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("extends: int4_rtn\ncompression: {quantization: {ignore_layers: [visual], bits: null}}\n")
    section = load(path).config.compression[0].quantization
    assert section.ignore_layers == ["visual"]
    assert section.bits is None
    assert section.name == "int4_rtn"


def test_extends_takes_paths_beside_the_file(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "low.yaml").write_text("extends: fp8_dynamic\nglobal: {seed: 7}\n")
    (tmp_path / "top.yaml").write_text("extends: sub/low.yaml\n")
    monkeypatch.chdir("/")
    resolved = load(tmp_path / "top.yaml")
    assert resolved.config.global_.seed == 7
    assert resolved.provenance["global.seed"].endswith("low.yaml")


def test_run_yaml_loads_to_the_same_run(tmp_path):
    source = {
        **quantization(percentile="99.9", observer="percentile"),
        "extends": "fp8_static",
        "dataset": None,
    }
    resolved = load(
        source, ["global.save_path='1e5'", "global.max_shard_size=1.5GB", "evaluation.tasks=[a, b]"]
    )
    path = tmp_path / "run.yaml"
    path.write_text(resolved.to_yaml())
    again = load(path)
    assert again.config == resolved.config
    assert again.config.global_.save_path == "1e5"
    assert again.to_yaml() == resolved.to_yaml()


def test_a_list_of_compressions_is_a_list_of_stages():
    both = {"compression": [PTQ["compression"], {"sparsity": {"name": "stem"}}]}
    resolved = load(
        both, ["compression.1.sparsity.attn_kwargs.stride=16", "compression.0.quantization.name=fp8_dynamic"]
    )
    assert [stage.method for stage in stages(resolved.config)] == ["rtn", "stem"]
    assert resolved.provenance["compression.1.sparsity.attn_kwargs.stride"] == "override"
    assert load(resolved.raw).config == resolved.config
    with pytest.raises(ConfigError, match=r"compression is a list of 2.*compression\.0\.quantization"):
        load(both, ["compression.quantization.name=fp8_dynamic"])
    with pytest.raises(ConfigError, match="has 2 entries"):
        load(both, ["compression.5.name=PTQ"])


def test_loading_leaves_the_given_mapping_alone():
    source = {"model": {"save_path": "x"}, **quantization(), "extends": "base"}
    before = repr(source)
    load(source, ["dataset.num_samples=3"])
    assert repr(source) == before


# ----------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("dataset.num_samples=64", 64),
        ("dataset.num_samples='64'", 64),
        ("global.max_shard_size=2GiB", 2 * 2**30),
        ("global.device=cpu", "cpu"),
        ("global.save_path=a=b", "a=b"),
        ("model.trust_remote_code=true", True),
        ("model.attn_implementation=", None),
        ("evaluation.tasks=arc_easy", ["arc_easy"]),
        ("evaluation.tasks=[a, b]", ["a", "b"]),
        ("evaluation.perplexity=false", False),
        ("evaluation.perplexity=text.txt", "text.txt"),
        ("transform.spin_config.rotation=[R1]", ["R1"]),
    ],
)
def test_overrides_are_yaml_values_of_their_keys(override, value):
    node = load("fp8_static", [override]).config.model_dump(by_alias=True)
    for part in override.partition("=")[0].split("."):
        node = node[part]
    assert node == value


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**6), st.floats(0.5, 100.0), st.booleans())
def test_any_number_survives_an_override(samples, percentile, rtn):
    resolved = load(
        "fp8_static",
        [
            f"dataset.num_samples={samples}",
            f"compression.quantization.percentile={percentile!r}",
            f"evaluation.enabled={rtn}",
        ],
    )
    assert resolved.config.dataset.num_samples == samples
    assert resolved.config.compression[0].quantization.percentile == percentile
    assert resolved.config.evaluation.enabled is rtn
    assert load(resolved.raw).config == resolved.config


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=40)
    | st.builds("{}={}".format, st.sampled_from(["global.save_path", "dataset", "a.b"]), st.text(max_size=20))
)
def test_no_override_ends_in_anything_but_a_config_error(override):
    try:
        load("fp8_static", [override])
    except ConfigError as error:
        assert str(error)


# -------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("fp8_statik", [], r"neither a recipe nor a YAML file. Did you mean 'fp8_static'"),
        ("daq", [], r"'daq' has no recipe"),
        ("none.yaml", [], r"none.yaml: There is no such file"),
        (quantization(bits="x"), [], r"compression.quantization.bits is 'x': a whole number is needed"),
        (quantization(bits=True), [], r"bits is True: a number is needed"),
        (quantization(bits=4.5), [], r"bits is 4.5: a whole number is needed"),
        (quantization(percentile="high"), [], r"percentile is 'high': a number is needed"),
        (quantization(percentile=101), [], r"percentile is 101: it must be less than or equal to 100"),
        (quantization(quant_vit="perhaps"), [], r"quant_vit is 'perhaps': true or false is needed"),
        (quantization(ignore_layers={"a": 1}), [], r"ignore_layers.*text is needed"),
        (quantization(ignore_layers=["re:("]), [], r"'re:\(' is not a regular expression"),
        (quantization(quant_method=[1]), [], r"quant_method.*section .* is needed"),
        (quantization(observer="mean"), [], r"observer is 'mean': not one of the known words"),
        (quantization(format="fp8-blok"), [], r"format.*Did you mean 'fp8_block'"),
        (quantization(quant_method={"weight": "per-tenser"}), [], r"weight is 'per-tenser'.*Did you mean 'per-tensor'"),
        (quantization(name="fp8_statik"), [], r"Unknown quantization method 'fp8_statik'. Did you mean 'fp8_static'"),
        (quantization(scheme={"wieght": {}}), [], r"scheme.wieght'. Did you mean 'weight'"),
        (quantization(scheme={"input": {"format": "int8"}}), [], r"scheme.weight: it is missing"),
        ({"compression": {"name": "Distil"}}, [], r"'Distil': not one of the known words. Did you mean 'Distill'"),
        ({"compression": {"group_size": 3}}, [], r"'compression.quantization.quant_method.group_size'"),
        ({"modle": {"name": "x"}}, [], r"Unknown key 'modle'. Did you mean 'model'"),
        ({"global": 3}, [], r"global is 3: a section"),
        ({"global": {"max_shard_size": "5GX"}}, [], r"'5GX': a size such as 5GB"),
        ({"global": {"activation_budget": 0}}, [], r"a size above zero"),
        ({"dataset": {"num_samples": 0}}, [], r"num_samples is 0: it must be greater than or equal to 1"),
        ({"compressor": {"strategies": {"globl": {"strategy": "dart"}}}}, [], r"Did you mean 'global'"),
        ({"compressor": {"strategies": {"3": {"strategy": "dart", "params": {"ratio": 9}}}}}, [], r"3.params.ratio is 9"),
        ({"compressor": {"strategies": {"3": {"params": {}}}}}, [], r"strategies.3.strategy: it is missing"),
        ({"compression": {"sparsity": {"name": "flexprefil"}}}, [], r"Did you mean 'flexprefill'"),
        ({"compression": {"QAT": {"hf_args": {"learning_rat": 1}}}}, [], r"Did you mean 'learning_rate'"),
        ({"tp_sise": 2}, [], r"Did you mean 'tp_size'"),
        ({"extend": "base"}, [], r"Did you mean 'extends'"),
        ({"extends": 3, **PTQ}, [], r"extends is 3"),
        ({"extends": "fp8_blok", **PTQ}, [], r"given, extends: .*Did you mean 'fp8_block'"),
        ("fp8_static", ["dataset.num_sample=3"], r"override: Unknown key 'dataset.num_sample'. Did you mean 'num_samples'"),
        ("fp8_static", ["dataset.num_samples=many"], r"override: dataset.num_samples is 'many'"),
        ("fp8_static", ["dataset.num_samples.x=3"], r"holds the value 128, not a section. Set dataset.num_samples itself"),
        ("fp8_static", ["dataset=3"], r"dataset is 3: a section"),
        ("fp8_static", ["num_samples"], r"'num_samples' is not an override"),
        ("fp8_static", ["a..b=1"], r"is not an override"),
        ("fp8_static", ["dataset.num_samples=[1"], r"dataset.num_samples=\[1.*Not valid YAML"),
        ("fp8_static", ["compression.quantization.ignore_layers.0=x"], r"ignore_layers is a list.*whole list"),
        ("fp8_static", ["seed=1"], r"Did you mean 'global.seed'"),
    ],
)  # fmt: skip
def test_errors_name_the_thing_and_the_way_out(source, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(source, overrides)


def test_all_unknown_keys_are_reported_at_once_with_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("modle: {}\nglobal: {sed: 1}\ncompression: {quantization: {bit: 4, nam: x}}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: 4 problems.")
    for hint in ("'model'", "'seed'", "'bits'", "'name'"):
        assert f"Did you mean {hint}?" in text


def test_problems_of_several_layers_name_their_layer(tmp_path):
    (tmp_path / "low.yaml").write_text("global: {sed: 1}\n")
    (tmp_path / "top.yaml").write_text("extends: low.yaml\nmodle: {}\n")
    with pytest.raises(ConfigError, match=r"'global.sed'.*\(from .*low.yaml\)") as caught:
        load(tmp_path / "top.yaml")
    assert "top.yaml)" in str(caught.value)


def test_extends_in_a_circle_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: ./a.yaml\n")
    with pytest.raises(ConfigError, match=r"in a circle: a.yaml -> b.yaml -> a.yaml"):
        load(tmp_path / "a.yaml")


# ------------------------------------------------------------------------------------------ warnings


@pytest.mark.parametrize(
    ("source", "warning"),
    [
        ({"model": {"trust_remote_code": True}, **PTQ}, "trust_remote_code is true"),
        ({"compression": {"QAD": {"teacher_trust_remote_code": True}}}, "teacher_trust_remote_code is true"),
        ({"model": {"save_path": "x"}, **PTQ}, "model.save_path was read as global.save_path"),
        ({"model": {"save_path": "x"}, "global": {"save_path": "y"}, **PTQ}, "was ignored"),
        ({"compression": {**PTQ["compression"], "quant_analyse": True}}, "read as compression.quantization.quant_analyse"),
        ({"compression": {"sparsity": {"name": "stem", "attn_kwargs": None}}}, "attn_kwargs is null"),
        ({"compression": {"sparsity": {"name": "my_pattern"}}}, "'my_pattern' is not known here"),
        ({"compression": {"name": "FP8BlockWise", "quantization": {"name": "fp8_dynamic"}}}, "old name of PTQWeightOnly"),
        ({"calibrate": {"backend": "vllm"}, **PTQ}, "calibrate was read as compression.calibrate"),
        ({"compressor": {"strategies": {"global": {"strategy": "divprun"}}}}, "not known here. Did you mean 'divprune'?"),
        (quantization(name="some_scheme"), "'some_scheme' is not known here"),
        (quantization(name="int4_gptq", bits=8), "bits is 8, but int4_gptq has 4"),
        (quantization(name="int4_gptq", quant_method={"weight": "per-group", "group_size": -1}), "group_size -1"),
        (quantization(name="int4_gptq", quant_method={"activation": "per-token"}), "quantizes weights only"),
    ],
)  # fmt: skip
def test_slips_are_understood_and_told(source, warning):
    (told,) = load(source).warnings
    assert warning in told


def test_misplaced_keys_land_where_they_were_meant():
    config = load(
        {"model": {"save_path": "x"}, "compression": {**PTQ["compression"], "quant_analyse": True}}
    ).config
    assert config.global_.save_path == "x"
    assert config.compression[0].quantization.quant_analyse is True
    both = load({"model": {"save_path": "x"}, "global": {"save_path": "y"}, **PTQ}).config
    assert both.global_.save_path == "y"


# -------------------------------------------------------------------------------------------- values


def test_trust_is_off_unless_asked_for():
    assert load(PTQ).config.model.trust_remote_code is False
    assert load({"model": {"trust_remote_code": True}, **PTQ}).config.model.trust_remote_code is True


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("512MiB", 2**29), (17, 17), ("1.5k", 1500), ("2 tb", 2 * 10**12)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", True, "1e3", "five"])
def test_no_sizes(text):
    with pytest.raises(ValueError):
        parse_size(text)


def test_any_training_argument_is_accepted_and_the_list_is_up_to_date():
    from transformers import TrainingArguments

    names = {field.name for field in fields(TrainingArguments)}
    assert names <= TRAINING_ARGUMENTS
    arguments = dict.fromkeys(names) | {
        "weight_decay": "1e-2",
        "adam_beta2": 0.95,
        "save_strategy": False,
    }
    loaded = load({"compression": {"QAT": {"hf_args": arguments}}}).config.compression[0].qat.hf_args
    assert loaded.weight_decay == 0.01
    assert loaded.save_strategy == "no"
    assert loaded.given()["adam_beta2"] == 0.95


def test_importing_the_configuration_loads_nothing_heavy():
    code = "import sys, angelslim.config as c; c.load('int4_rtn'); print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    heavy = {"torch", "transformers", "numpy", "safetensors", "accelerate", "matplotlib"}
    assert not heavy & set(ran.stdout.split())


def test_every_error_is_a_user_error():
    with pytest.raises(UserError):
        load({"compression": object()})


@pytest.mark.parametrize(
    ("source", "overrides", "name"),
    [
        ("int8_smooth", ["dataset.num_samples=3"], "int8_smooth"),
        ("int4_best", ["compression.quantization.quant_method.damp=0.1"], "int4_best"),
        ({"extends": "int8_smooth"}, [], "int8_smooth"),
        ("rotated", [], "rotated"),
        ("int4_rtn", ["compression.quantization.name=int4_gptq"], None),
        ({"extends": "rotated", "compression": {"quantization": {"name": "int4_rtn"}}}, [], None),
        ({"extends": "base", "compression": {"quantization": {"name": "int4_rtn"}}}, [], None),
    ],
)
def test_a_run_bears_its_recipes_name_unless_it_does_something_else(source, overrides, name):
    """Two recipes of one method are two rows of a report and two folders."""
    assert load(source, overrides).recipe == name
