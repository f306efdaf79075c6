"""One tiny model in several formats, compressed once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import angelslim


@pytest.fixture(scope="session")
def compressed(tiny_folder, tmp_path_factory) -> Callable[..., Path]:
    """Compress the tiny model with a recipe; equal calls share a folder, which is read only."""
    made: dict[str, Path] = {}

    def make(recipe: str, **settings: object) -> Path:
        key = f"{recipe}{settings}"
        if key not in made:
            out = tmp_path_factory.mktemp("compressed") / recipe
            settings = {
                "evaluation__enabled": False,
                "dataset__num_samples": 2,
                "dataset__max_seq_length": 32,
            } | settings
            angelslim.compress(tiny_folder, recipe, out=out, **settings)
            made[key] = out
        return made[key]

    return make


@pytest.fixture
def altered(tmp_path) -> Callable[..., Path]:
    """Copy a folder and change its tensors: ``altered(folder, lambda tensors: ...)``."""

    def alter(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        target = tmp_path / f"altered-{folder.name}"
        shutil.copytree(folder, target)
        file = target / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
        return target

    return alter
