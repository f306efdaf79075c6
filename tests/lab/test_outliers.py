"""Planted outliers: the same function, bit for bit, and inputs with outlier channels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from angelslim import load
from angelslim.base.errors import ConfigError, ModelError, UserError
from angelslim.lab.outliers import plant_outliers
from families import save_random

IDS = torch.arange(3, 40)[None]


def inputs_of(model, name: str) -> torch.Tensor:
    """The largest magnitude of each input channel of a linear."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    return seen[0].abs().amax(dim=(0, 1)).float()


@pytest.mark.parametrize("factor", [64.0, 8192.0])
def test_the_function_stays_and_the_inputs_get_outliers(factor, tiny_folder, tmp_path):
    out = plant_outliers(tiny_folder, tmp_path / "out", factor=factor, channels=3, seed=1)
    before, after = load(tiny_folder), load(out)
    with torch.no_grad():
        assert torch.equal(before(input_ids=IDS).logits, after(input_ids=IDS).logits)
    for reader in ("self_attn.q_proj", "mlp.up_proj"):
        name = f"model.layers.1.{reader}"
        ratio = inputs_of(after, name) / inputs_of(before, name)
        assert sorted(ratio.tolist())[-3:] == [factor] * 3 and (ratio == 1).sum() == len(ratio) - 3
    same = [f"model.layers.1.{name}" for name in ("self_attn.o_proj", "mlp.down_proj")]
    assert all(torch.equal(inputs_of(before, name), inputs_of(after, name)) for name in same)


def test_the_channels_come_from_the_seed(tiny_folder, tmp_path):
    gains = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        out = plant_outliers(tiny_folder, tmp_path / name, seed=seed)
        gains.append(load_file(out / "model.safetensors")["model.layers.0.input_layernorm.weight"].float())
    assert torch.equal(gains[0], gains[1]) and not torch.equal(gains[0], gains[2])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "glm4"])
def test_other_families_keep_their_function(family, tmp_path):
    """Norms that a router or an addition reads too are left alone."""
    save_random(family, tmp_path / "model")
    out = plant_outliers(tmp_path / "model", tmp_path / "out", factor=64.0)
    with torch.no_grad():
        before, after = (load(folder)(input_ids=IDS).logits for folder in (tmp_path / "model", out))
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_done_is_said(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="powers of two"):
        plant_outliers(tiny_folder, tmp_path / "out", factor=100.0)
    with pytest.raises(UserError, match="already exists"):
        plant_outliers(tiny_folder, tmp_path, factor=64.0)
    save_random("gemma3_text", tmp_path / "gemma")  # its norms multiply by one plus the gain
    with pytest.raises(ModelError, match="no norm whose gain"):
        plant_outliers(tmp_path / "gemma", tmp_path / "out")
    assert not list(Path(tmp_path).glob("out*"))
