from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from angelslim.base.errors import DataError, ModelError
from angelslim.evaluate.size import count_parameters, size_scores, weight_bytes


@pytest.fixture
def folder(tmp_path):
    save_file(
        {"a": torch.zeros(10, 20, dtype=torch.bfloat16), "b": torch.zeros(())}, tmp_path / "1.safetensors"
    )
    save_file({"c": torch.zeros(7, dtype=torch.bfloat16)}, tmp_path / "2.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_size_of_a_folder(folder):
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert weight_bytes(folder) == stored
    assert count_parameters(folder) == 208
    size, parameters, bits = size_scores(folder)
    assert (size.value, size.unit, size.better) == (stored / 1e6, "MB", "lower")
    assert parameters.value == 208
    assert bits.value == pytest.approx(8 * stored / 208)
    assert size_scores(folder, parameters=416)[2].value == pytest.approx(4 * stored / 208)


def test_a_single_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(96))
    assert weight_bytes(tmp_path / "model.gguf") == weight_bytes(tmp_path) == 100


def test_what_cannot_be_measured_is_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="No weight files"):
        weight_bytes(tmp_path / "none")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {}}))
    with pytest.raises(DataError, match="quantized checkpoint"):
        count_parameters(folder)
    with pytest.raises(DataError, match="is 0"):
        size_scores(folder, parameters=0)
    (folder / "config.json").unlink()
    (folder / "1.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(ModelError, match="truncated or not a safetensors file"):
        count_parameters(folder)
