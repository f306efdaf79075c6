from __future__ import annotations

import json
import shlex
import sys

import pytest

from angelslim import serve
from angelslim.base.errors import ConfigError, ModelError, ResourceError
from angelslim.serve import launch, plan_launch, with_attention
from tiny import copy_model, edit_json


@pytest.fixture
def gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(serve, "installed", lambda _engine: False)


def test_a_folder_goes_to_vllm(tiny_folder, nothing_installed):
    plan = plan_launch(tiny_folder, port=9000)
    assert plan.command == ("vllm", "serve", str(tiny_folder), "--port", "9000")
    assert plan.because
    assert shlex.split(str(plan)) == list(plan.command)


def test_sglang_when_only_it_is_there(tiny_folder, monkeypatch):
    monkeypatch.setattr(serve, "installed", lambda engine: engine == "sglang")
    plan = plan_launch(tiny_folder)
    assert plan.engine == "sglang" and plan.command[1:3] == ("-m", "sglang.launch_server")


def test_gguf_goes_to_llama_cpp_as_file_or_folder(gguf):
    for path in (gguf, gguf / "model.gguf"):
        plan = plan_launch(path)
        assert plan.command[:3] == ("llama-server", "-m", str(gguf / "model.gguf"))


def test_a_format_that_vllm_does_not_read_goes_to_sglang(tiny_folder, tmp_path, nothing_installed):
    folder = copy_model(tiny_folder, tmp_path / "folder")
    edit_json(folder / "config.json", quantization_config={"quant_method": "w4afp8"})
    plan = plan_launch(folder)
    assert plan.engine == "sglang" and "w4afp8" in plan.because
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is damaged"):
        plan_launch(folder)


def test_the_request_is_valid_json(tiny_folder):
    request = shlex.split(plan_launch(tiny_folder, port=1234).request)
    body = json.loads(request[request.index("-d") + 1])
    assert body["model"] == str(tiny_folder) and body["messages"][0]["role"] == "user"
    assert "http://127.0.0.1:1234/v1/chat/completions" in request


def test_refusals(tiny_folder, tmp_path, gguf):
    with pytest.raises(ModelError, match="no model folder"):
        plan_launch(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="Did you mean 'vllm'"):
        plan_launch(tiny_folder, "vlm")
    with pytest.raises(ModelError, match="reads GGUF"):
        plan_launch(tiny_folder, "llama.cpp")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_other_engines_do_not_get_a_gguf_as_if_it_were_a_folder(engine, gguf):
    with pytest.raises(ModelError, match="GGUF"):
        plan_launch(gguf, engine)


def test_a_missing_engine_says_how_to_get_it(tiny_folder, nothing_installed):
    with pytest.raises(ResourceError, match=r"vllm is not installed here. Run: pip install vllm"):
        launch(plan_launch(tiny_folder))


def test_launch_returns_the_engines_status(tiny_folder, monkeypatch):
    monkeypatch.setattr(serve, "installed", lambda _engine: True)
    plan = plan_launch(tiny_folder)
    program = (sys.executable, "-c", "import sys; sys.exit(7)")
    assert launch(serve.Launch(plan.engine, program, plan.because, plan.port, plan.model)) == 7


def test_sparse_prefill_goes_to_vllm_alone(tmp_path):
    from angelslim.methods.sparse.metadata import HeadRule, Metadata

    (tmp_path / "config.json").write_text("{}")
    plan = plan_launch(tmp_path, "vllm")
    assert with_attention(plan, None) == plan, "nothing says so"
    sparse = with_attention(plan, "stem")
    assert sparse.environment == (("ANGELSLIM_SPARSE_ATTENTION", "stem"),)
    assert str(sparse).startswith("ANGELSLIM_SPARSE_ATTENTION=stem vllm serve ")
    assert "--no-enable-chunked-prefill" in sparse.command
    Metadata((HeadRule("union", {"density": 0.1}),)).write(tmp_path)
    assert with_attention(plan, None).environment == (("ANGELSLIM_SPARSE_ATTENTION", str(tmp_path)),)
    assert with_attention(plan, "dense") == plan
    other = plan_launch(tmp_path, "sglang")
    assert with_attention(other, None) == other
    with pytest.raises(ConfigError, match="sglang has no place"):
        with_attention(other, "stem")
    with pytest.raises(ConfigError, match="Did you mean 'stem'"):
        with_attention(plan, "stm")
