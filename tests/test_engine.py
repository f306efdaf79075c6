"""The Python face: one call, or step by step."""

from __future__ import annotations

import json

import pytest
import torch

import angelslim
from angelslim import Engine, compress
from angelslim.base.errors import ConfigError, UserError
from tiny import byte_tokenizer, fingerprints, qwen3

QUIET = {"evaluation.enabled": False}


def test_compress_and_load(tiny_folder):
    result = compress(tiny_folder, "fp8_dynamic", **QUIET)
    assert (result.folder / "model.safetensors").exists()
    assert "fp8_dynamic of" in repr(result) and "bits per weight" in repr(result)
    model = result.load()
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape[0] == 1
    assert result.report.method == "fp8_dynamic" and len(result.report.layers) == 14


def test_overrides_in_both_spellings(tiny_folder):
    dotted = compress(
        tiny_folder, "int4_rtn", **QUIET, **{"compression.quantization.quant_method.group_size": 32}
    )
    scored = compress(
        str(tiny_folder),
        "int4_rtn",
        evaluation__enabled=False,
        compression__quantization__quant_method__group_size=32,
    )
    assert fingerprints(dotted.folder) == fingerprints(scored.folder)
    assert "per-group 32" in dotted.report.scheme


@pytest.mark.parametrize("value", [["down_proj"], ["re:.*[.]q_proj", "mlp.up_proj"], []])
def test_lists_as_overrides(tiny_folder, value):
    result = compress(tiny_folder, "fp8_dynamic", **QUIET, compression__quantization__ignore_layers=value)
    ignored = [
        name
        for name, reason in result.report.skipped.items()
        if reason.startswith("ignore_layers: ") and "lm_head" not in reason
    ]
    assert len(ignored) == 2 * len(value)


def test_a_mapping_is_a_recipe(tiny_folder, tmp_path):
    recipe = {"compression": {"quantization": {"name": "int8_dynamic"}}, "evaluation": {"enabled": False}}
    result = compress(tiny_folder, recipe, out=tmp_path / "out")
    assert result.folder == tmp_path / "out"
    assert result.report.method == "int8_dynamic"


def test_a_loaded_model_with_its_tokenizer(tiny_folder):
    from_folder = compress(
        tiny_folder, "fp8_static", **QUIET, dataset__num_samples=2, dataset__max_seq_length=16
    )
    model = qwen3().to(torch.bfloat16)
    loaded = compress(
        model,
        "fp8_static",
        tokenizer=byte_tokenizer(),
        **QUIET,
        dataset__num_samples=2,
        dataset__max_seq_length=16,
    )
    assert loaded.report.hashes == from_folder.report.hashes


def test_what_is_no_model_is_refused():
    with pytest.raises(ConfigError, match="A dict cannot be compressed"):
        compress({}, "fp8_dynamic")


def test_save_pretrained_copies_everything_once(tiny_folder, tmp_path):
    result = compress(tiny_folder, "fp8_dynamic", **QUIET)
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "new" / "deep", tmp_path / "empty"):
        saved = result.save_pretrained(target)
        assert {file.name for file in saved.iterdir()} == {file.name for file in result.folder.iterdir()}
        assert fingerprints(saved) == fingerprints(result.folder)
        with pytest.raises(UserError, match="already exists and is not empty"):
            result.save_pretrained(target)
    angelslim.load(tmp_path / "empty")


def test_step_by_step(tiny_folder, tmp_path, texts):
    engine = Engine()
    engine.prepare_model(model_name="Qwen", model_path=tiny_folder, device_map="auto", low_cpu_mem_usage=True)
    engine.prepare_data(data_path=texts, data_type="TextDataset", max_length=32, num_samples=4, batch_size=1)
    engine.prepare_compressor(
        compress_name="PTQ",
        compress_config={"quantization": {"name": "fp8_static", "bits": 8, "ignore_layers": ["lm_head"]}},
    )
    result = engine.run()
    folder = engine.save(tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["format"] == "float-quantized"
    assert all(layer.input_scale for layer in result.report.layers)
    assert result.report.config["dataset"]["num_samples"] == 4


def test_step_by_step_with_a_method_name(tiny_folder):
    engine = Engine().prepare_model(model_path=str(tiny_folder)).prepare_compressor(default_method="int4_rtn")
    assert engine.run().report.method == "int4_rtn"


def test_steps_out_of_order_say_what_is_missing(tiny_folder):
    with pytest.raises(ConfigError, match="prepare_model needs model_path or model"):
        Engine().prepare_model()
    with pytest.raises(ConfigError, match="comes after prepare_model"):
        Engine().prepare_compressor(default_method="fp8_dynamic")
    prepared = Engine().prepare_model(model_path=tiny_folder)
    with pytest.raises(ConfigError, match="needs default_method or compress_config"):
        prepared.prepare_compressor()
    with pytest.raises(ConfigError, match="comes after prepare_compressor"):
        prepared.run()
    with pytest.raises(ConfigError, match="save comes after run"):
        prepared.save()


def test_caller_mappings_are_not_changed(tiny_folder):
    recipe = {"compression": {"quantization": {"name": "fp8_dynamic", "ignore_layers": ["lm_head"]}}}
    before = json.dumps(recipe)
    compress(tiny_folder, recipe, **QUIET)
    assert json.dumps(recipe) == before


def test_quant_analyse_leaves_an_analysis_beside_the_model(tiny_folder, tmp_path):
    asked = {"compression__quantization__quant_analyse": True, "evaluation__enabled": False}
    angelslim.compress(tiny_folder, "int4_rtn", out=tmp_path / "out", **asked)
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert len(found["layers"]) == 14 and found["original"]
    assert "<svg" in (tmp_path / "out" / "analysis.html").read_text()
    (tmp_path / "out" / "analysis.html").unlink()  # as if killed before the page was there
    angelslim.compress(tiny_folder, "int4_rtn", out=tmp_path / "out", **asked)
    assert (tmp_path / "out" / "analysis.html").exists()
