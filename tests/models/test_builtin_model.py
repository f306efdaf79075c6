from pathlib import Path

import pytest

from angelslim.base.errors import ModelError
from angelslim.models import builtin
from angelslim.models.builtin import BUILTIN, builtin_model


@pytest.mark.parametrize("name", BUILTIN)
def test_each_builtin_model_is_a_small_complete_folder(name: str) -> None:
    folder = builtin_model(name)
    for file in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    ):
        assert (folder / file).is_file()
    assert (folder / "model.safetensors").stat().st_size <= 13e6


def test_an_unknown_name_gets_a_proposal() -> None:
    with pytest.raises(ModelError, match="Did you mean 'tiny-lm'"):
        builtin_model("tinylm")


def test_a_broken_installation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_ASSETS", tmp_path)
    with pytest.raises(ModelError, match="missing from this installation"):
        builtin_model("tiny-lm")
