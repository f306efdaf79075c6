"""What ships of a family is what discovery finds, and it is believed of nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from angelslim.models import families, loading
from angelslim.models.checkpoint import Checkpoint
from angelslim.models.families import known, shipped
from angelslim.models.loading import open_model, raw_config
from angelslim.models.outline import Outline
from families import TEXT
from tiny import edit_json, fingerprints, save_qwen3

SMALL = {key: value for key, value in TEXT.items() if key not in ("head_dim", "num_hidden_layers")}


def save(family: str, folder: Path, **settings: object) -> Path:
    """Save a model of the family without drawing its weights."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **{**SMALL, **settings})
    loading.model_class(config)._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def of(folder: Path) -> Outline | None:
    return shipped(raw_config(folder), Checkpoint(folder))


def variants(family: str) -> list[dict[str, object]]:
    """Settings with every option off, on, and the other way round; numbers of blocks and heads' sizes differ."""
    options = list(known()[1][family].options)
    flips = [{name: name == chosen for name in options} for chosen in options]
    found = [{}, dict.fromkeys(options, False), dict.fromkeys(options, True), *flips]
    return [
        {"num_hidden_layers": 1 + place % 3, "head_dim": (16, 24)[place % 2]} | settings
        for place, settings in enumerate(found)
    ]


@pytest.mark.parametrize("family", sorted(known()[1]))
@pytest.mark.parametrize("tied", [False, True])
def test_what_ships_is_what_is_found(family, tied, tmp_path, monkeypatch):
    for place, settings in enumerate(variants(family)):
        folder = save(family, tmp_path / str(place), tie_word_embeddings=tied, **settings)
        outline = of(folder)
        assert outline is not None, settings
        with monkeypatch.context() as without:
            without.setattr(loading, "shipped", lambda *_: None)
            found = open_model(folder)
        found.check()
        assert outline == Outline(found.structure, found.targets)
        assert list(outline.structure.linears.items()) == list(found.structure.linears.items())
        assert list(outline.structure.groups) == list(found.structure.groups)


@pytest.mark.parametrize("family", sorted(known()[1]))
def test_what_config_json_leaves_out_is_the_familys_own(family, tmp_path):
    """Files of older tools name neither a head's size nor options."""
    defaults = known()[1][family]
    head = defaults.head_dim or SMALL["hidden_size"] // SMALL["num_attention_heads"]
    folder = save(family, tmp_path / "model", num_hidden_layers=2, head_dim=head)
    edit_json(folder / "config.json", head_dim=None)
    edit_json(folder / "config.json", tie_word_embeddings=None, **dict.fromkeys(defaults.options))
    assert of(folder) is not None


@pytest.fixture
def folder(tmp_path):
    found = save_qwen3(tmp_path / "model")
    assert of(found) is not None
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["Qwen3ForSequenceClassification"]},
        {"architectures": None},
        {"model_type": "qwen4"},
        {"auto_map": {"AutoModelForCausalLM": "own.Model"}},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": "2"},
        {"num_attention_heads": 0},
        {"intermediate_size": 512},
        {"hidden_size": None},
        {"attention_bias": True},
        {"attention_bias": "no"},
        {"tie_word_embeddings": None, "vocab_size": 11},
    ],
)
def test_another_configuration_is_not_believed(changes, folder):
    edit_json(folder / "config.json", **changes)
    assert of(folder) is None


def test_another_tensor_is_not_believed(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    norm = "model.layers.1.input_layernorm.weight"
    without = {name: value for name, value in tensors.items() if name != norm}
    more = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    for changed in (without, tensors | more, tensors | {norm: tensors[norm][:-1].clone()}):
        save_file(changed, file)
        assert of(folder) is None
    save_file({name: value for name, value in tensors.items() if name != "lm_head.weight"}, file)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert of(folder) is None


def test_another_major_version_of_transformers_is_not_believed(folder, monkeypatch):
    monkeypatch.setattr(families, "version", lambda _: "6.0.0")
    assert of(folder) is None


def test_the_first_run_builds_no_network(folder, tmp_path, monkeypatch):
    """In a process of its own and with nothing remembered; the weights are those of a run that asks transformers."""
    script = (
        "import sys; from angelslim.models import loading\n"
        "if sys.argv.pop(1) == 'ask': loading.shipped = lambda *_: None\n"
        "from angelslim.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('transformers' in sys.modules)"
    )
    said = []
    for name in ("ask", "know"):
        words = ("run", "fp8_dynamic", str(folder), "evaluation.enabled=false", "--out", str(tmp_path / name))
        command = [sys.executable, "-c", script, name, *words]
        said.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert said == ["True", "False"]
    assert fingerprints(tmp_path / "ask") == fingerprints(tmp_path / "know")


def test_the_file_is_what_transformers_says(tmp_path, monkeypatch):
    from angelslim.lab import families as lab

    monkeypatch.setattr(lab, "FILE", tmp_path / "families.json")
    lab.write()
    assert (
        json.loads((tmp_path / "families.json").read_text())["families"]
        == json.loads(families.FILE.read_text())["families"]
    )
