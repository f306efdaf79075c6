"""Every choice of a run is made, and every refusal comes, before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from angelslim.base.errors import ConfigError, ResourceError
from angelslim.config.recipe import load, recipes
from angelslim.methods.sparse._patterns import HeadPattern, write_patterns
from angelslim.prefill.job import PrefillJob, prepare_prefill, shape_of
from angelslim.prefill.plan import estimate
from families import config_of, random_model
from public_sparsity import PUBLIC
from tiny import byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job") / "model"
    random_model("qwen3", vocab_size=300).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def prepared(model: Path, **sparsity: Any) -> PrefillJob:
    values = {"name": "stem", "kernel": "dense", "block": 16, **sparsity}
    return prepare_prefill(load({"compression": {"name": "Sparsity", "sparsity": values}}), model)


def test_choices(model: Path) -> None:
    job = prepared(
        model, density=0.3, rules=[{"name": "dense", "layers": "1-"}], measure={"lengths": [256, 64]}
    )
    assert [(rule.selector, rule.layers) for rule in job.metadata.rules] == [("dense", (1,)), ("stem", None)]
    assert job.lengths == (64, 256) and job.metadata.crossover == "auto"
    assert job.metadata.model["num_hidden_layers"] == 2
    plan = estimate(job)
    assert plan.kernel == "dense" and plan.lengths == [64, 256] and plan.heads_length == 256
    assert json.loads(plan.to_json())["method"] == "stem" and ("sparse from", "measured") in plan.rows()
    assert (
        job.fingerprint()
        == prepared(
            model, density=0.3, rules=[{"name": "dense", "layers": "1-"}], measure={"lengths": [256, 64]}
        ).fingerprint()
    )
    assert job.fingerprint() != prepared(model, density=0.4).fingerprint()


def test_lengths_end_where_the_models_positions_do(model: Path) -> None:
    assert prepared(model).lengths == (256,)


@pytest.mark.parametrize(
    "family", ["qwen3", "llama", "hunyuan_v1_dense", "deepseek_v3", "gemma3_text", "glm4"]
)
def test_the_shape_is_what_attention_gets(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from angelslim.methods.sparse.assign import full
    from angelslim.methods.sparse.attach import Settings, attach

    model, seen = random_model(family), []
    with attach(model, full, Settings(block=16, crossover=0, kernel="dense")) as attached:
        attached.observer = lambda q, k, v, plan, ctx: seen.append((q, k, v, ctx))
        with torch.no_grad():
            model(torch.arange(3, 43)[None])
    q, k, v, ctx = seen[0]
    shape = shape_of(config_of(family).get_text_config())
    assert (ctx.layers, q.shape[1], k.shape[1], q.shape[3], v.shape[3]) == (
        shape.layers, shape.heads, shape.kv_heads, shape.width, shape.value_width,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "my_pattern"}, "Unknown selector 'my_pattern'"),
        ({"options": {"strid": 4}}, "no option 'strid'.*stride"),
        ({"options": {"stride": 5}}, "stride 5 does not divide the block of 16"),
        ({"density": [0.1, 0.2, 0.3]}, "lists 3 layers, the model has 2"),
        ({"density": [[0.1, 0.2]]}, "lists 2 heads in layer 0, the model has 4"),
        ({"rules": [{"name": "dense", "layers": "2"}]}, "layer '2'; the model has 2"),
        ({"rules": [{"name": "dense", "heads": "0-7"}]}, "head '0-7'; the model has 4"),
        ({"kernel": "tritn"}, "Unknown attention kernel 'tritn'"),
        ({"measure": {"lengths": [512]}}, "asks for 512 tokens; the model has positions for 256"),
    ],
)
def test_refusals(model: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        prepared(model, **values)


def test_head_patterns_of_another_model(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    write_patterns(path, [[HeadPattern("stream_llm", 8, 16)] * 4] * 3)
    with pytest.raises(ConfigError, match="3 layers"):
        prepared(model, name="minference", attn_kwargs={"pattern_path": str(path)})
    write_patterns(path, [[HeadPattern("stream_llm", 8, 16)] * 4] * 2, {"model_type": "llama"})
    with pytest.raises(ConfigError, match="model_type 'llama'"):
        prepared(model, name="minference", attn_kwargs={"pattern_path": str(path)})


def test_no_kernel_and_other_stages(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from angelslim.kernels.attention import flex, hopper, triton_flash

    def refuses(module: Any) -> Any:
        return module.KERNEL.__class__(
            module.KERNEL.name, module.KERNEL.run, lambda case: "not on this machine"
        )

    from angelslim.kernels.attention import choose

    monkeypatch.setitem(choose.KERNELS, "flex", refuses(flex))
    monkeypatch.setitem(choose.KERNELS, "triton", refuses(triton_flash))
    monkeypatch.setitem(choose.KERNELS, "hopper", refuses(hopper))
    with pytest.raises(ResourceError, match="No sparse kernel runs here: not on this machine"):
        prepared(model, kernel="auto")
    assert prepared(model, kernel="auto", allow_pseudo_sparse=True).metadata.kernel == "dense"
    both = {"compression": [{"quantization": {"name": "fp8_dynamic"}}, {"sparsity": {"name": "stem"}}]}
    with pytest.raises(ConfigError, match="joins no other stage"):
        prepare_prefill(load(both), model)


@pytest.mark.parametrize("name", [name for name in recipes() if name.startswith("sparse_")])
def test_every_recipe_fits_a_model(model: Path, name: str) -> None:
    job = prepare_prefill(load(name, ["compression.sparsity.kernel=dense"]), model)
    assert job.name == job.metadata.rules[-1].selector and job.metadata.block == 128
    assert job.search_heads == (name == "sparse_minference")


@pytest.mark.parametrize("name", PUBLIC)
def test_public_files_run_as_they_are(name: str, model: Path) -> None:
    section = {"name": name, "allow_pseudo_sparse": True, "attn_kwargs": PUBLIC[name][0] or None}
    settings = {"name": "Qwen", "torch_dtype": "auto", "device_map": "auto", "attn_implementation": "eager"}
    public = {
        "global": {"save_path": "./output"},
        "model": {**settings, "model_path": str(model), "trust_remote_code": True},
        "compression": {"name": "Sparsity", "sparsity": section},
    }
    job = prepare_prefill(load(public))
    assert job.name == name and len(job.metadata.rules) == 1
