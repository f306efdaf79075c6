from __future__ import annotations

from pathlib import Path

import pytest

from angelslim.base.errors import ConfigError
from angelslim.config.curation import load_curation

ROOT = Path(__file__).resolve().parents[2]


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_stages_come_as_names_or_with_options(tmp_path: Path) -> None:
    text = (
        "sources: [{name: a, path: a.txt}]\nstages:\n  - exact\n  - fuzzy: {threshold: 0.5}\n  - denoise:\n"
    )
    config = load_curation(recipe(tmp_path, text))
    assert config.steps() == [("exact", {}), ("fuzzy", {"threshold": 0.5}), ("denoise", {})]
    assert config.sources[0].path == ["a.txt"]
    assert (config.seed, config.output.shard_size, config.output.shuffle) == (0, 256_000_000, True)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sources: [{nam: a, path: b}]", r"'sources.0.nam'. Did you mean 'name'"),
        ("sources: [{name: a, path: b}]\nsead: 1", "'sead'. Did you mean 'seed'"),
        ("sources: [{name: a, path: b}]\nstages: exact", "a list of stages"),
        ("sources: [{name: a, path: b}]\nstages: [{exact: 3}]", "one name with its options"),
        ("sources: [{name: a, path: b}]\noutput: {shard_size: 0}", "above zero"),
        ("seed: 1", "sources: it is missing"),
        ("", "The file is empty"),
    ],
)
def test_wrong_frames_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_curation(recipe(tmp_path, text))


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_curation(recipe(tmp_path, "sources: [{nam: a, pth: b}]\nsead: 1"))
    assert all(word in str(caught.value) for word in ("'name'", "'path'", "'seed'"))


def test_the_documented_recipe_uses_every_stage_with_known_options() -> None:
    from angelslim.config.curation import checked
    from angelslim.data.curation.base import STAGES

    path = ROOT / "docs" / "curation.yaml"
    steps = load_curation(path).steps()
    assert {name for name, _ in steps} == set(STAGES)
    for name, options in steps:
        checked(STAGES.get(name).section, options, str(path))
