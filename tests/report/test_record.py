from __future__ import annotations

import math
from dataclasses import replace

import pytest

from angelslim.base.errors import ModelError
from angelslim.report.record import RunRecord


def test_json_round_trip_keeps_everything(record):
    record.layers[0] = replace(record.layers[0], sqnr_db=math.inf, weights=None)
    again = RunRecord.from_json(record.to_json())
    assert again == record
    assert again.to_json() == record.to_json()


def test_load_from_folder_or_file(record, tmp_path):
    (tmp_path / "run.json").write_text(record.to_json())
    assert RunRecord.load(tmp_path) == RunRecord.load(tmp_path / "run.json") == record


def test_missing_and_damaged_records(tmp_path):
    with pytest.raises(ModelError, match=r"no run\.json"):
        RunRecord.load(tmp_path)
    for text in ("{", "[]", "{}", '{"layers": [], "before": [], "after": []}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ModelError, match="cannot be read"):
            RunRecord.load(tmp_path)
