"""What is remembered of a model equals what is found, and nothing else is believed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from angelslim import pipeline
from angelslim.base.errors import ModelError
from angelslim.export._checkpoint import open_any
from angelslim.models import loading
from angelslim.models.loading import open_model
from angelslim.models.outline import VARIABLE, Outline, file_of, remembered
from families import save_random
from tiny import fingerprints, job_for, save_qwen3


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "outlines"


@pytest.fixture(autouse=True)
def nothing_ships(monkeypatch):
    """These tests are of what a run finds out; `test_families` has what the package knows before."""
    monkeypatch.setattr(loading, "shipped", lambda *_: None)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3", "qwen2_5_vl", "qwen2_audio"])
def test_what_is_remembered_is_what_was_found(family, cache, tmp_path):
    save_random(family, tmp_path / "model")
    first, second = open_model(tmp_path / "model"), open_model(tmp_path / "model")
    first.check()
    assert len(list(cache.iterdir())) == 1 and first.outline is None
    second.check()
    assert second.outline == Outline(first.structure, first.targets)
    assert second.structure == first.structure
    assert list(second.targets.items()) == list(first.targets.items())
    assert second.rules.keys() == first.rules.keys()


def test_a_run_without_data_builds_no_network(cache, tmp_path):
    """In a process of its own: transformers must not even be imported, and the weights are the same."""
    save_random("qwen3_moe", tmp_path / "model")
    folder = tmp_path / "model"
    words = (str(folder), "evaluation.enabled=false", "--out")
    script = (
        "import sys; from angelslim.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('transformers' in sys.modules)"
    )
    said = []
    for name in ("first", "second"):
        command = [sys.executable, "-c", script, "run", "fp8_dynamic", *words, str(tmp_path / name)]
        said.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert said == ["True", "False"]
    assert fingerprints(tmp_path / "first") == fingerprints(tmp_path / "second")


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3", "qwen2_5_vl", "qwen2_audio"])
def test_a_model_that_was_opened_before_is_opened_without_transformers(family, cache, tmp_path, monkeypatch):
    save_random(family, tmp_path / "model")
    first = open_model(tmp_path / "model")
    first.check()
    with monkeypatch.context() as without:
        without.setattr(loading, "load_config", None)
        second = open_any(tmp_path / "model")
        second.check()
        assert second.structure == first.structure and second.dtype == first.dtype
    assert second.config.to_dict() == first.config.to_dict()


def test_a_shortcut_that_leads_nowhere_is_none(cache, tmp_path):
    folder = save_qwen3(tmp_path / "model")
    open_model(folder).check()
    (shortcut,) = (cache.parent / "shortcuts").iterdir()
    for text in (b"", b"elsewhere.json", b"\xff", b"../../model/config.json"):
        shortcut.write_bytes(text)
        assert open_model(folder).outline is None
    open_model(folder).check()
    assert open_model(folder).outline is not None


def test_another_shape_or_configuration_is_another_model(cache, tmp_path):
    folder = save_qwen3(tmp_path / "model")
    open_model(folder).check()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    with pytest.raises(ModelError, match=r"config\.json asks for"):
        open_model(folder).check()
    assert len(list(cache.iterdir())) == 1  # what failed is not remembered


@pytest.mark.parametrize("text", ["", "{", "[]", '{"structure": {}, "targets": {}}', '{"structure": 1}'])
def test_a_damaged_file_is_as_good_as_none(text, cache, tmp_path):
    folder = save_qwen3(tmp_path / "model")
    open_model(folder).check()
    file = next(cache.iterdir())
    file.write_text(text)
    assert remembered(file) is None
    pipeline.run(job_for(folder, "fp8_dynamic"), tmp_path / "out")
    assert remembered(file) is not None  # written again


def test_it_can_be_turned_off_and_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    source = open_model(save_qwen3(tmp_path / "model"))
    monkeypatch.setenv(VARIABLE, "")
    assert file_of(source.config, source.checkpoint) is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    source.check()
    assert source.outline is None
    source.config.auto_map = {"AutoModelForCausalLM": "own.Model"}
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    assert file_of(source.config, source.checkpoint) is None
