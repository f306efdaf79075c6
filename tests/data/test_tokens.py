"""Token ids from a file are the samples, as they stand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from angelslim.base.errors import DataError
from angelslim.data.text import calibration_batches
from angelslim.data.tokens import read_token_rows


def saved(folder: Path, **tensors: torch.Tensor) -> Path:
    path = folder / "ids.safetensors"
    save_file(tensors, path)
    return path


def test_rows_come_back_in_their_order_and_are_cut_to_the_length(tmp_path: Path) -> None:
    ids = torch.arange(24, dtype=torch.int32).view(4, 6)
    path = saved(tmp_path, input_ids=ids)
    assert list(read_token_rows(path)) == ids.tolist()
    batches = calibration_batches(None, path, samples=4, max_length=5)
    assert torch.equal(torch.cat(batches), ids[:, :5].long())


def test_fewer_samples_than_rows_are_drawn_by_the_seed(tmp_path: Path) -> None:
    path = saved(tmp_path, input_ids=torch.arange(40).view(20, 2))
    drawn = [calibration_batches(None, path, samples=5, max_length=2, seed=seed) for seed in (0, 0, 1)]
    rows = [torch.cat(batches)[:, 0].tolist() for batches in drawn]
    assert rows[0] == rows[1] != rows[2] and rows[0] == sorted(set(rows[0]))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"tokens": torch.zeros(2, 2, dtype=torch.int64)}, "no tensor 'input_ids'"),
        ({"input_ids": torch.zeros(2, 2)}, "float32"),
        ({"input_ids": torch.zeros(4, dtype=torch.int64)}, r"shape \[4\]"),
    ],
)
def test_another_file_is_refused(tensors: dict[str, torch.Tensor], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        list(read_token_rows(saved(tmp_path, **tensors)))


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        list(read_token_rows(tmp_path / "none.safetensors"))
    (tmp_path / "bad.safetensors").write_bytes(b"not this")
    with pytest.raises(DataError, match="no safetensors"):
        list(read_token_rows(tmp_path / "bad.safetensors"))
