"""The reader and writer of safetensors folders, against the safetensors library."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from angelslim.base.errors import ModelError
from angelslim.models.checkpoint import (
    INDEX,
    Checkpoint,
    UnitWriter,
    join_files,
    read_header,
    write_atomically,
)

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def assorted(prefix: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{prefix}{str(dtype).removeprefix('torch.')}": (torch.randn(3, 5, generator=generator) * 3).to(dtype)
        for dtype in DTYPES
    }
    return tensors | {f"{prefix}scalar": torch.tensor(2.5), f"{prefix}empty": torch.empty(0, 4)}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return left.numel() == 0 or torch.equal(
        left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)
    )


def sharded(folder: Path) -> Path:
    folder.mkdir()
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": torch.full((2,), 7.0)}, folder / "model-00002-of-00002.safetensors")
    names = {"a": 1, "b": 1, "c": 2}
    index = {"weight_map": {name: f"model-0000{shard}-of-00002.safetensors" for name, shard in names.items()}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def test_reads_every_dtype_as_the_library_does(tmp_path):
    tensors = assorted()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert same(checkpoint.read(name), tensor), name
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_reads_shards_through_the_index(tmp_path):
    checkpoint = Checkpoint(sharded(tmp_path / "model"))
    assert {name: checkpoint.read(name).sum().item() for name in checkpoint.tensors} == {
        "a": 6,
        "b": 0,
        "c": 14,
    }


def test_read_tensors_are_the_readers_own_memory(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.read("a").zero_()
    assert checkpoint.read("a").sum() == 3


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_a_truncated_shard_is_refused_when_opened(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    save_file(assorted(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors.*truncated"):
        Checkpoint(tmp_path)


def test_a_shard_that_shrinks_after_opening_is_noticed(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, file)
    checkpoint = Checkpoint(tmp_path)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match="ended inside tensor 'a'"):
        checkpoint.read("a")


def header_only(file: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "header, data, message",
    [
        (b"{broken", b"", "damaged header"),
        (b"\xff\xfe\xfd", b"", "damaged header"),
        ([1, 2], b"", "damaged header"),
        ({"a": 3}, b"", "damaged header"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "damaged header"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234", "shape that does not match"),
        ({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}, b"1234", "unknown dtype F4"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"1234", "damaged header"),
        ({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}, b"1234", "damaged header"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path, header, data, message):
    header_only(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ModelError, match=message):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    folder = sharded(tmp_path / "model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 shard\(s\) that do not exist: model-00002-of-00002"):
        Checkpoint(folder)


def test_an_index_that_lists_absent_tensors_is_refused(tmp_path):
    folder = sharded(tmp_path / "model")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="lists tensors that no shard holds, such as 'ghost'"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "model.bin"]
)
def test_an_index_cannot_reach_outside_its_folder(tmp_path, shard):
    save_file({"secret": torch.ones(1)}, tmp_path / "secret.safetensors")
    folder = sharded(tmp_path / "model")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"secret": shard}}))
    with pytest.raises(ModelError, match="no safetensors file of its folder"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}', '{"weight_map": [1]}', "\xff"])
def test_a_damaged_index_is_refused(tmp_path, text):
    folder = sharded(tmp_path / "model")
    (folder / INDEX).write_text(text, "latin-1")
    with pytest.raises(ModelError, match=r"index.json is damaged"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelError, match=f"weights as pickle \\({name}\\)"):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        Checkpoint(tmp_path)


def test_joined_files_equal_their_parts(tmp_path):
    parts = [assorted("x."), {"only": torch.arange(7)}, assorted("y.")]
    files = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for file, tensors in zip(files, parts, strict=True):
        save_file(tensors, file)
    join_files(files, tmp_path / "joined.safetensors")
    joined = load_file(tmp_path / "joined.safetensors")  # the library checks that no byte is left over
    expected = {name: tensor for tensors in parts for name, tensor in tensors.items()}
    assert set(joined) == set(expected)
    assert all(same(joined[name], expected[name]) for name in expected)
    with safe_open(tmp_path / "joined.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert not list(tmp_path.glob("*.tmp"))
    assert read_header(tmp_path / "joined.safetensors")[1] % 8 == 0


def written(folder: Path, sizes: list[int]) -> tuple[UnitWriter, list[str]]:
    writer = UnitWriter(folder / "units")
    names = []
    for index, size in enumerate(sizes):
        names.append(f"unit-{index}")
        writer.write(names[-1], {f"tensor.{index}": torch.full((size,), index, dtype=torch.uint8)})
    return writer, names


def test_one_file_when_everything_fits(tmp_path):
    writer, names = written(tmp_path, [10, 20])
    target = tmp_path / "out"
    target.mkdir()
    writer.finish(names, target, 10**6)
    assert [file.name for file in target.iterdir()] == ["model.safetensors"]


def test_shards_respect_the_limit_and_the_index_is_right(tmp_path):
    writer, names = written(tmp_path, [4000, 3000, 5000, 1000, 9000, 10])
    target = tmp_path / "out"
    target.mkdir()
    writer.finish(names, target, 8000)
    index = json.loads((target / INDEX).read_text())
    assert index["metadata"]["total_size"] == 22010
    shards = sorted(target.glob("*.safetensors"))
    assert [file.name for file in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    for file in shards:
        tensors = load_file(file)
        assert file.stat().st_size <= 8000 or len(tensors) == 1  # one unit is never torn apart
        assert {name for name, shard in index["weight_map"].items() if shard == file.name} == set(tensors)
    checkpoint = Checkpoint(target)
    assert all(checkpoint.read(f"tensor.{i}").eq(i).all() for i in range(6))


def test_a_unit_appears_only_when_complete(tmp_path, monkeypatch):
    writer = UnitWriter(tmp_path)

    def dies(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("angelslim.models.checkpoint.save_file", dies)
    with pytest.raises(OSError, match="No space"):
        writer.write("unit", {"a": torch.ones(1)})
    assert not writer.has("unit")


def test_views_and_transposes_are_written_as_they_look(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    writer = UnitWriter(tmp_path)
    writer.write("unit", {"t": base.T, "row": base[1]})
    loaded = load_file(writer.path("unit"))
    assert torch.equal(loaded["t"], base.T) and torch.equal(loaded["row"], base[1])


def test_write_atomically_replaces_and_leaves_nothing_behind(tmp_path):
    file = tmp_path / "a.json"
    write_atomically(file, b"one")
    write_atomically(file, b"two")
    assert file.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [file]
