from __future__ import annotations

import pytest

from angelslim.base.errors import ModelError
from angelslim.report.compare import compare


def test_folders_become_one_page(three, tmp_path):
    folders = []
    for record in three:
        folder = tmp_path / record.method
        folder.mkdir()
        (folder / "run.json").write_text(record.to_json())
        folders.append(folder)
    records = compare(folders, tmp_path / "report.html")
    assert records == three
    assert "3 runs compared" in (tmp_path / "report.html").read_text()


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        compare([tmp_path / "nowhere"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
