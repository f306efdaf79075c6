"""Every key and value seen in public files is accepted; every mistyped key is refused with the right hint."""

import json
import re
from pathlib import Path

import pytest
import yaml

from angelslim.base.errors import ConfigError
from angelslim.config import load, stages, validate_file

HERE = Path(__file__).parent
KEYS = json.loads((HERE / "public_keys.json").read_text("utf-8"))
CASES = [(dialect, key) for dialect, keys in KEYS.items() for key in keys]
AWQ_ONLY = ("zero_point", "mse_range")


def nest(key: str, value: object, root: dict | None = None) -> dict:
    """A mapping that holds `value` at the dotted key; ``name[]`` makes a list of one."""
    root = {} if root is None else root
    node = root
    parts = key.replace("<layer index>", "7").split(".")
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        name = part.removesuffix("[]")
        if part.endswith("[]") and last:
            node[name] = [value] if value is not None else []
        elif part.endswith("[]"):
            node[name] = [{}]
            node = node[name][0]
        elif last:
            node[name] = value
        else:
            node = node.setdefault(name, {})
    return root


def minimal(dialect: str, key: str) -> dict:
    """The least that a file needs around a key."""
    words = key.split(".")
    if dialect == "pruning":
        place = words[2] if key.startswith("compressor.strategies") else "global"
        return nest(f"compressor.strategies.{place}.strategy", "random")
    if dialect == "flat":
        return {"model_path": "some/model"}
    if key.startswith("compression.sparsity"):
        return {"compression": {"name": "Sparsity", "sparsity": {"name": "stem"}}}
    if words[0] == "compression" and len(words) > 2 and words[1] in ("QAT", "QAD", "Distill", "MCoreQAD"):
        return {"compression": {"name": words[1]}}
    name = "int4_awq" if words[-1] in AWQ_ONLY else "fp8_dynamic"
    return {"compression": {"name": "PTQ", "quantization": {"name": name}}}


def holding(dialect: str, key: str, value: object) -> dict:
    data = nest(key, value, minimal(dialect, key))
    if key == "compression.name":
        section = {"PTQ": {}, "PTQWeightOnly": {}, "Sparsity": {"sparsity": {"name": "stem"}}}
        data["compression"].update(
            section.get(value, {value: {"do_train": True}} if value != "MCoreQAD" else {value: {}})
        )
    if key.endswith("quantization.quant_method.block_size[]"):
        data["compression"]["quantization"]["quant_method"]["block_size"] = [value, value]
    return data


def reach(config: object, key: str, dialect: str) -> object:
    node = config.model_dump(by_alias=True)
    if "compression" in node:
        node["compression"] = node["compression"][0]
    for part in key.replace("<layer index>", "7").split("."):
        node = node[part.removesuffix("[]")]
        if part.endswith("[]"):
            node = node[0] if node else None
    return node


@pytest.mark.parametrize(("dialect", "key"), CASES)
def test_each_key_takes_each_value_seen(dialect, key):
    for value in KEYS[dialect][key] or [None]:
        data = holding(dialect, key, value)
        resolved = load(data)
        assert resolved.dialect == dialect
        assert stages(resolved.config)
        slips = ("model.save_path", "compression.quant_analyse")
        if key in slips:
            assert any(key in warning for warning in resolved.warnings)
            continue
        got = reach(resolved.config, key, dialect)
        if value is None or value == {}:
            continue  # null and {} leave the default
        expected = float(value) if isinstance(got, float) else value
        assert got == expected or str(got).replace("-", "_") == str(value).replace("-", "_")


def test_each_key_may_be_null():
    required = ("sparsity.name", "strategy")
    for dialect, key in CASES:
        if not key.endswith((*required, "[]")) and "<layer index>.params" not in key:
            load(nest(key, None, minimal(dialect, key)))


def test_the_inventory_is_whole():
    assert {dialect: len(keys) for dialect, keys in KEYS.items()} == {
        "sections": 282,
        "pruning": 33,
        "flat": 61,
    }


@pytest.mark.parametrize("path", sorted((HERE / "dialect").glob("*.yaml")), ids=lambda path: path.stem)
def test_whole_files_validate(path):
    report = validate_file(path)
    assert report.ok, report.errors
    assert report.asks_for
    again = load(yaml.safe_load(load(path).to_yaml()))
    assert again.config == load(path).config


ASKED = {
    "analyse_slip": ["ptq rtn: W fp8_e4m3 per-tensor, A fp8_e4m3 per-tensor static"],
    "distill": ["distill distill"],
    "flat_fp8": ["calibrate activations", "ptq rtn: W fp8_e4m3 per-tensor, A fp8_e4m3 per-tensor static"],
    "flat_smooth": ["calibrate smooth"],
    "megatron_qad": ["mcore_qad w4afp8"],
    "pruning_global": ["pruning vision_selector"],
    "pruning_layer": ["pruning dart", "pruning dart"],
    "ptq_blockwise": ["ptq rtn: W fp8_e4m3 per-block 128x128, A fp8_e4m3 per-group 128 dynamic"],
    "ptq_daq": ["ptq daq: W fp8_e4m3 per-block 128x128, A fp8_e4m3 per-group 128 dynamic"],
    "ptq_fp8_static": [
        "transform kv_cache",
        "ptq rtn: W fp8_e4m3 per-tensor, A fp8_e4m3 per-tensor static, KV fp8_e4m3 per-tensor",
    ],
    "ptq_int4_awq": ["transform awq", "ptq rtn: W int4 per-group 128 asymmetric"],
    "ptq_int8_smooth": ["transform smooth", "ptq rtn: W int8 per-channel, A int8 per-token dynamic"],
    "ptq_w4a8_engine": ["calibrate vllm", "ptq rtn: W int4 per-group 128, A fp8_e4m3 per-tensor static"],
    "qad_ternary": ["qat sherry"],
    "qat_blockwise": ["ptq blockwise_qat: W seq2 per-channel (float16 scales)"],
    "qat_fp4": ["qat end2end"],
    "sparsity_slips": ["sparsity a_shape"],
    "transform_spin": ["transform spin", "ptq gptq: W int4 per-group 128"],
}


@pytest.mark.parametrize("name", ASKED)
def test_files_ask_for_what_they_mean(name):
    assert validate_file(HERE / "dialect" / f"{name}.yaml").asks_for == ASKED[name]


DOCUMENTED = """
model: {model_path: some/model}
compression:
  name: [QAT]
  QAT:
    training_mode: blockwise
    resume_ckpt_dir: ""
    block_wise_config: {train_size: 64, val_size: 8}
    plugin_config: {enable_scale: true, enable_rotation: %s}
    hf_args:
      # a section of comments only
"""


@pytest.mark.parametrize("rotates", ["false", "true"])
def test_keys_that_public_pages_describe_and_no_public_file_holds(tmp_path, rotates):
    path = tmp_path / "documented.yaml"
    path.write_text(DOCUMENTED % rotates, "utf-8")
    report = validate_file(path)
    assert (report.errors, report.asks_for) == (
        [],
        ["ptq blockwise_qat: W seq2 per-channel (float16 scales)"],
    )
    assert any("enable_rotation is not used" in warning for warning in report.warnings) is (rotates == "true")
    (stage,) = stages(load(path).config)
    assert stage.options["val_size"] == 8
    assert load(path).config.dataset.num_samples == 64


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (
            {"compression": {"name": ["Cache", "PTQ"], "quantization": {"name": "fp8_static"}}},
            "compression.name",
        ),
        ({"compression": {"name": "PTQ", "cache": {"name": "step"}}}, "'compression.cache'"),
        ({"compression": {"name": "QAT"}, "training": {"do_train": True}}, "'training'"),
        (
            {"compressor": {"strategies": {"global": {"strategy": "random", "params": {"ratio": 9}}}}},
            "ratio is 9",
        ),
    ],
)
def test_layouts_that_public_files_have_left_behind_are_refused_by_name(data, named):
    with pytest.raises(ConfigError) as caught:
        load(data)
    assert named in str(caught.value)


def slips(word: str) -> list[str]:
    """The word with a middle letter dropped, and with two middle letters swapped."""
    middle = len(word) // 2
    dropped = word[:middle] + word[middle + 1 :]
    swapped = word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :]
    return [slip for slip in (dropped, swapped) if slip and slip != word]


def test_mistyped_keys_are_refused_and_the_right_one_is_suggested():
    tried, right, wrong = 0, 0, []
    for dialect, key in CASES:
        head, dot, last = key.rpartition(".")
        name = last.removesuffix("[]")
        if len(name) < 2 or name == "<layer index>" or head.endswith("selector_path"):
            continue
        for slip in slips(name):
            mistyped = f"{head}{dot}{slip}" + ("[]" if last.endswith("[]") else "")
            with pytest.raises(ConfigError) as caught:
                load(nest(mistyped, 1, minimal(dialect, key)))
            assert f"{slip}'" in str(caught.value), "the unknown key is named"
            hints = re.findall(r"Did you mean '(?:[^']*\.)?([^'.]*)'", str(caught.value))
            tried += 1
            right += hints == [name]
            wrong += [] if hints == [name] else [(mistyped, hints)]
    assert tried > 600
    assert right / tried >= 0.95, wrong
