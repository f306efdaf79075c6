"""The command: what it says and its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = [{"text": f"Document {number} speaks about the number {number}. " * 5} for number in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, rows[3]]))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"sources:\n  - {{name: notes, path: {tmp_path / 'a.jsonl'}}}\nstages: [exact]\n")
    return path


def test_the_command_shows_what_was_dropped_and_where_the_set_is(cli, recipe: Path, tmp_path: Path) -> None:
    outcome = cli("curate", recipe, "--out", tmp_path / "set")
    assert outcome.code == 0, outcome.err
    assert "exact duplicate" in outcome.out and "notes" in outcome.out
    assert f"Report: {tmp_path / 'set' / 'report.html'}" in outcome.out
    files = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert files == ["part-00000.jsonl", "recipe.yaml", "report.html", "report.json"]
    assert len((tmp_path / "set" / "part-00000.jsonl").read_text().splitlines()) == 12
    again = cli("curate", recipe, "--out", tmp_path / "set")
    assert again.code == 0 and "nothing to do" in again.err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sources: [{name: a, path: no.jsonl}]", "There is no such data file."),
        ("sources: [{name: a, path: A}]\nstages: [exakt]", "Did you mean 'exact'?"),
        ("sources: [{name: a, path: A}]\nstages: [{exact: {normalize: true}}]", "Did you mean 'normalise'?"),
        ("sources: [{name: a, path: A}]\nstages: [{heuristics: {min_words: 1000}}]", "Nothing is left"),
    ],
)
def test_mistakes_are_one_line_and_status_two(
    cli, recipe: Path, tmp_path: Path, text: str, complaint: str
) -> None:
    recipe.write_text(text.replace("path: A", f"path: {tmp_path / 'a.jsonl'}"))
    outcome = cli("curate", recipe, "--out", tmp_path / "set")
    assert outcome.code == 2 and complaint in outcome.err and "Traceback" not in outcome.err
    assert not (tmp_path / "set").exists()


def test_a_missing_recipe_is_told(cli, tmp_path: Path) -> None:
    outcome = cli("curate", tmp_path / "none.yaml", "--out", tmp_path / "set")
    assert outcome.code == 2 and "There is no such file" in outcome.err


def test_validate_knows_curation_recipes(cli, recipe: Path) -> None:
    good = cli("validate", recipe)
    assert good.code == 0 and "(curation: exact)" in good.out
    recipe.write_text(recipe.read_text().replace("[exact]", "[{fuzzy: {threshold: 7}}]"))
    wrong = cli("validate", recipe)
    assert wrong.code == 2 and "threshold is 7" in wrong.out
