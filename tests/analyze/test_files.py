from __future__ import annotations

from pathlib import Path

import pytest

from angelslim.analyze.files import check_target, write_folder
from angelslim.base.errors import ResourceError, UserError

FILES = {"analysis.json": "{}\n", "analysis.csv": "a\n"}


def content(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_the_folder_appears_with_all_files(tmp_path):
    write_folder(tmp_path / "deep" / "out", FILES)
    assert content(tmp_path / "deep" / "out") == FILES
    assert [item.name for item in (tmp_path / "deep").iterdir()] == ["out"]


def test_an_earlier_analysis_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / "out"
    write_folder(out, FILES)
    with pytest.raises(UserError, match="already exists"):
        write_folder(out, FILES)
    write_folder(out, FILES | {"analysis.json": "[]"}, overwrite=True)
    assert content(out)["analysis.json"] == "[]"


def test_other_folders_are_never_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("text")
    for name in ("model", "file"):
        with pytest.raises(UserError, match="holds more than an analysis"):
            check_target(tmp_path / name, True, FILES)
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", FILES)
    assert content(tmp_path / "empty") == FILES


def test_a_failed_write_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    write_folder(tmp_path / "old", FILES)
    monkeypatch.setattr(Path, "rename", full)
    for name in ("new", "other"):
        with pytest.raises(ResourceError, match="No space left"):
            write_folder(tmp_path / name, FILES)
    assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]  # nothing half-written beside it either
