"""Scales of the key-value cache: read off transformers' own cache, written, and applied when a folder is reopened."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from angelslim import load, pipeline
from angelslim.base.errors import ConfigError, ModelError
from angelslim.methods.base import TRANSFORMS
from angelslim.methods.transform.kv_cache import KeyValueCache
from angelslim.numerics.kv_cache import through_cache
from angelslim.numerics.scheme import FORMATS, PER_HEAD, PER_TENSOR, Quant
from families import save_random
from tiny import byte_tokenizer, job_for, save_qwen3

IDS = torch.arange(40, 52)[None]
TEXT = "".join(chr(code) for code in range(33, 45))
GRAINS = {"per-tensor": PER_TENSOR, "per-head": PER_HEAD}
CACHE = "compression.quantization.quant_method.kv_cache"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A float32 model, so that transformers keeps our scales as they are."""
    return save_qwen3(tmp_path_factory.mktemp("kv") / "model", dtype=torch.float32)


def run(model, out, recipe, *words):
    data = out.with_suffix(".jsonl")
    data.write_text(json.dumps({"text": TEXT}) + "\n")
    job = job_for(
        model,
        recipe,
        "dataset.num_samples=1",
        "dataset.max_seq_length=12",
        f"dataset.data_path={data}",
        *words,
    )
    return pipeline.run(job, out)


@pytest.fixture(scope="module")
def compressed(model_folder, tmp_path_factory):
    """FP8 weights and caches with each granularity; inputs keep the model's type, so only the cache differs."""
    out = tmp_path_factory.mktemp("runs")
    for grain in GRAINS:
        run(model_folder, out / grain, "fp8_dynamic", f"{CACHE}={grain}")
    run(model_folder, out / "none", "fp8_dynamic")
    return out


def test_it_is_a_transform():
    assert TRANSFORMS.get("kv_cache") is KeyValueCache
    assert KeyValueCache({"quant": Quant(FORMATS["fp8_e4m3"], PER_TENSOR)}).needs_data(None)


@pytest.mark.parametrize("grain", GRAINS)
def test_scales_are_those_of_the_keys_and_values_that_transformers_caches(grain, compressed, model_folder):
    tensors = load_file(compressed / grain / "model.safetensors")
    ids = pipeline.tokenizer_of(model_folder)(TEXT, return_tensors="pt")["input_ids"][:, :12]
    with torch.no_grad():
        cache = load(model_folder)(input_ids=ids, use_cache=True).past_key_values
    for index, layer in enumerate(cache.layers):
        for role, states in (("k", layer.keys), ("v", layer.values)):
            found = tensors[f"model.layers.{index}.self_attn.{role}_scale"]
            amax = (
                states.abs().amax(dim=(0, 2, 3)).reshape(2, 1, 1)
                if grain == "per-head"
                else states.abs().max().reshape(1)
            )
            assert found.shape == amax.shape and found.dtype == torch.float32
            torch.testing.assert_close(found, amax / 448, rtol=1e-4, atol=0)
        query = tensors[f"model.layers.{index}.self_attn.q_scale"]
        assert query.shape == ((4, 1, 1) if grain == "per-head" else (1,)) and (query > 0).all()


@pytest.mark.parametrize(("grain", "strategy"), [("per-tensor", "tensor"), ("per-head", "attn_head")])
def test_the_config_says_what_engines_check(grain, strategy, compressed):
    settings = json.loads((compressed / grain / "config.json").read_text())["quantization_config"]
    expected = {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, "symmetric": True}
    assert {key: settings["kv_cache_scheme"][key] for key in expected} == expected
    plain = json.loads((compressed / "none" / "config.json").read_text())["quantization_config"]
    assert plain["kv_cache_scheme"] is None and plain["config_groups"] == settings["config_groups"]


def test_weights_are_those_of_a_run_without(compressed):
    plain, kept = (load_file(compressed / name / "model.safetensors") for name in ("none", "per-head"))
    assert {name.rpartition(".")[2] for name in kept.keys() - plain.keys()} == {
        "q_scale",
        "k_scale",
        "v_scale",
    }
    assert all(torch.equal(value.float(), kept[name].float()) for name, value in plain.items())


@pytest.mark.parametrize("grain", GRAINS)
def test_a_reopened_folder_attends_to_what_the_cache_returns(grain, compressed):
    """Against the model without, whose keys and values are rounded by hand where its own cache hands them out."""
    from transformers import DynamicCache

    tensors = load_file(compressed / grain / "model.safetensors")
    quant = Quant(FORMATS["fp8_e4m3"], GRAINS[grain])

    class Rounding(DynamicCache):
        def update(self, keys, values, layer_idx, *args, **kwargs):
            scales = (tensors[f"model.layers.{layer_idx}.self_attn.{role}_scale"] for role in "kv")
            rounded = (
                through_cache(x, scale, quant) for x, scale in zip((keys, values), scales, strict=True)
            )
            return super().update(*rounded, layer_idx, *args, **kwargs)

    plain, ours = load(compressed / "none"), load(compressed / grain)
    with torch.no_grad():
        expected = plain(input_ids=IDS, past_key_values=Rounding(config=plain.config), use_cache=True).logits
        found, unrounded = ours(input_ids=IDS).logits, plain(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert (found - unrounded).abs().max() > 10 * (found - expected).abs().max()


def test_decoding_step_by_step_agrees_with_one_pass(compressed):
    model = load(compressed / "per-tensor")
    with torch.no_grad():
        whole = model(input_ids=IDS).logits[0, -1]
        start = model(input_ids=IDS[:, :-1], use_cache=True)
        step = model(input_ids=IDS[:, -1:], past_key_values=start.past_key_values).logits[0, -1]
    torch.testing.assert_close(step, whole, atol=1e-4, rtol=1e-3)


@pytest.fixture
def known_cache(monkeypatch):
    """Give attention the argument by which compressed-tensors 0.20 finds caches; transformers 5.24 renamed it."""
    plain = Qwen3Attention.forward
    if "past_key_values" in inspect.signature(plain).parameters:
        return

    def forward(self, hidden_states, past_key_values=None, cache=None, **named):
        return plain(
            self, hidden_states, cache=cache if past_key_values is None else past_key_values, **named
        )

    monkeypatch.setattr(Qwen3Attention, "forward", forward)


@pytest.mark.usefixtures("known_cache")
@pytest.mark.parametrize("grain", GRAINS)
def test_the_formats_own_library_computes_the_same(grain, compressed):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(compressed / grain)
    with torch.no_grad():
        found, expected = load(compressed / grain)(input_ids=IDS).logits, theirs(input_ids=IDS).logits
        without = load(compressed / "none")(input_ids=IDS).logits
    assert (found - expected).abs().mean() < 0.05 * (found - without).abs().mean()


@pytest.mark.parametrize("family", ["llava", "qwen3_moe"])
def test_names_are_the_checkpoints_own_and_static_inputs_stay(family, tmp_path):
    save_random(family, tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "out.jsonl").write_text('{"text": "!!!!!!!"}\n')
    words = (
        "dataset.num_samples=1",
        "dataset.max_seq_length=8",
        f"dataset.data_path={tmp_path / 'out.jsonl'}",
    )
    record = pipeline.run(job_for(tmp_path / "model", "fp8_static_kv", *words), tmp_path / "out")
    assert record.scheme.endswith("KV fp8_e4m3 per-tensor")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    caches = {name for name in tensors if name.endswith("k_scale")}
    assert len(caches) == 2
    assert all(name.replace("k_scale", "k_proj.input_scale") in tensors for name in caches)
    with torch.no_grad():
        assert load(tmp_path / "out")(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()


def test_latent_attention_is_refused(tmp_path):
    save_random("deepseek_v3", tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "out.jsonl").write_text('{"text": "!!!!!!!"}\n')
    words = (
        "dataset.num_samples=1",
        "dataset.max_seq_length=8",
        f"dataset.data_path={tmp_path / 'out.jsonl'}",
    )
    job = job_for(tmp_path / "model", "fp8_dynamic", f"{CACHE}=per-tensor", *words)
    with pytest.raises(ModelError, match=r"latent attention.*Remove kv_cache"):
        pipeline.run(job, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_granularities_that_no_cache_has_are_refused(tiny_folder):
    with pytest.raises(ConfigError, match=r"KV cache cannot be per-token.*per-head"):
        job_for(tiny_folder, "fp8_dynamic", f"{CACHE}=per-token")
