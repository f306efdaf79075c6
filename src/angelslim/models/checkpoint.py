"""Read safetensors folders one tensor at a time, and write them one unit at a time.

Reading goes through plain file reads into fresh memory rather than memory maps, so that what a run keeps
resident is what it holds, not what it once touched. Headers are checked on opening: a truncated shard, a
missing shard or an index that disagrees with the files is refused before any work starts.

Writing is a sequence of *units* (one decoder block, or one tensor outside the blocks). Each unit becomes a
complete safetensors file, synced and renamed into place, so a killed run keeps every finished unit. At the
end the units are joined, by copying bytes, into shards with an index as Hugging Face folders have them.

Safetensors layout: 8 bytes little-endian header length, a JSON header ``name -> {dtype, shape, data_offsets}``
with offsets relative to the end of the header, then the data.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..base.errors import ModelError
from ..base.files import write_atomically as write_atomically
from ..numerics.quantize import Quantized
from ..numerics.scheme import Quant

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` is absolute in `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return (header, offset of the data) of a safetensors file; damage is a `ModelError`."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise ModelError(f"{file} is truncated or not a safetensors file.", fix="Copy it again.")
        try:
            header = _checked_header(json.loads(stream.read(length)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} has a damaged header ({error}).", fix="Copy it again.") from error
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end > size:
        raise ModelError(
            f"{file} is truncated: it should hold {8 + length + end} bytes and has {size}.",
            fix="Copy or download this shard again.",
        )
    return header, 8 + length


def _checked_header(header: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors' entries, or raise what parsing something else raises."""
    header.pop("__metadata__", None)
    for name, entry in header.items():
        low, high = entry["data_offsets"]
        sizes = [*entry["shape"], low, high - low]
        if not all(isinstance(size, int) and size >= 0 for size in sizes) or not isinstance(
            entry["dtype"], str
        ):
            raise ValueError(f"the entry of {name!r} makes no sense")
    return header


class Checkpoint:
    """The tensors of a model folder, read lazily."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._ahead: dict[str, Future[Tensor]] = {}
        self._reader: ThreadPoolExecutor | None = None
        for file in self._files():
            header, start = read_header(file)
            for name, entry in header.items():
                self.tensors[name] = _tensor_info(name, entry, file, start)
        self._check_index()

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if index.exists():
            names = sorted(set(_weight_map(index).values()))
            missing = [name for name in names if not (self.folder / name).exists()]
            if missing:
                raise ModelError(
                    f"{index} lists {len(missing)} shard(s) that do not exist: {', '.join(missing[:3])}.",
                    fix="Copy the missing files into the folder.",
                )
            return [self.folder / name for name in names]
        files = sorted(self.folder.glob("*.safetensors"))
        if files:
            return files
        unsafe = sorted([*self.folder.glob("*.bin"), *self.folder.glob("*.pt"), *self.folder.glob("*.pth")])
        if unsafe:
            raise ModelError(
                f"{self.folder} holds weights as pickle ({unsafe[0].name}), which can run code when opened.",
                fix="Convert them to safetensors first (save_pretrained in a sandbox does it).",
            )
        raise ModelError(
            f"{self.folder} holds no *.safetensors file.", fix="Point to a complete model folder."
        )

    def _check_index(self) -> None:
        index = self.folder / INDEX
        if index.exists():
            absent = sorted(set(_weight_map(index)) - set(self.tensors))
            if absent:
                raise ModelError(
                    f"{index} lists tensors that no shard holds, such as {absent[0]!r}.",
                    fix="Copy the folder again; index and shards disagree.",
                )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Numbers in all tensors, those in codes decoded."""
        return sum(prod(info.shape) for info in self.tensors.values())

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read one whole tensor into new memory."""
        return self.fetch(self.tensors[name]).to(device)

    def published(self, name: str, quant: Quant, device: torch.device | str = "cpu") -> Quantized | None:
        """Return a tensor as it is stored where that is quantized just so; a plain checkpoint has none."""
        return None

    @property
    def decoded(self) -> bool:
        """Whether some tensors are stored as codes and decoded when they are read."""
        return False

    def sources(self, name: str) -> list[TensorInfo]:
        """Return the stored tensors that `read` needs for a name."""
        return [self.tensors[name]]

    def ahead(self, names: Iterable[str]) -> None:
        """Start reading tensors in the background; `read` then waits for them instead of the disk.

        A GPU computes with one block while the next one is read. What was asked for stays in memory until it
        is read.
        """
        self.ahead_of(info for name in names for info in self.sources(name))

    def ahead_of(self, stretches: Iterable[TensorInfo]) -> None:
        """The same for stretches of the files that have names."""
        for info in stretches:
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, "read-ahead")
            if info.name not in self._ahead:
                self._ahead[info.name] = self._reader.submit(read_tensor, info)

    def fetch(self, info: TensorInfo) -> Tensor:
        """Return a stored tensor: read ahead, or now."""
        coming = self._ahead.pop(info.name, None)
        return read_tensor(info) if coming is None else coming.result()


def read_tensor(info: TensorInfo) -> Tensor:
    """Read the bytes of one tensor from its file into new memory."""
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    with info.file.open("rb", buffering=0) as stream:
        stream.seek(info.offset)
        view, filled = memoryview(raw.numpy()), 0  # type: ignore[arg-type]
        while filled < info.nbytes:
            count = stream.readinto(view[filled:])  # type: ignore[attr-defined]
            if not count:
                raise ModelError(f"{info.file} ended inside tensor {info.name!r}.", fix="Copy it again.")
            filled += count
    return raw.view(info.dtype).view(info.shape)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = [str(shard) for shard in weight_map.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged ({error!r}).", fix="Copy it again.") from error
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(
                f"{index} names a shard that is no safetensors file of its folder: {shard!r}.",
                fix="Do not trust this folder.",
            )
    return weight_map


def _tensor_info(name: str, entry: dict[str, Any], file: Path, start: int) -> TensorInfo:
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ModelError(
            f"{file}: tensor {name!r} has the unknown dtype {entry['dtype']}.", fix="Convert it to bfloat16."
        )
    low, high = entry["data_offsets"]
    if prod(entry["shape"]) * dtype.itemsize != high - low:
        raise ModelError(
            f"{file}: tensor {name!r} has a shape that does not match its bytes.", fix="Copy it again."
        )
    return TensorInfo(name, dtype, tuple(entry["shape"]), file, start + low, high - low)


class UnitWriter:
    """Writes units of tensors and joins them into shards.

    `folder` is the working folder; `finish` moves the shards into `target`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, unit: str) -> Path:
        """Return the file of a unit."""
        return self.folder / f"{unit}.safetensors"

    def has(self, unit: str) -> bool:
        """Say whether a unit is already complete on disk."""
        return self.path(unit).exists()

    def write(self, unit: str, tensors: dict[str, Tensor]) -> None:
        """Write one unit; it appears under its name only when complete."""
        temporary = self.path(unit).with_suffix(".tmp")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(self.path(unit))

    def finish(self, units: list[str], target: Path, max_shard_size: int) -> None:
        """Join the units, in order, into shards of at most `max_shard_size` bytes, and write the index."""
        groups: list[list[Path]] = [[]]
        filled = 0
        for file in (self.path(unit) for unit in units):
            size = file.stat().st_size
            if groups[-1] and filled + size > max_shard_size:
                groups.append([])
                filled = 0
            groups[-1].append(file)
            filled += size
        weight_map: dict[str, str] = {}
        total = 0
        for number, files in enumerate(groups, 1):
            name = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            header = join_files(files, target / name)
            weight_map |= dict.fromkeys(header, name)
            total += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
        if len(groups) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_atomically(target / INDEX, json.dumps(index, indent=2).encode())


def join_files(files: list[Path], target: Path) -> dict[str, Any]:
    """Concatenate safetensors files into one by copying bytes; memory stays constant. Returns the header."""
    merged: dict[str, Any] = {}
    sources: list[tuple[Path, int]] = []
    shift = 0
    for file in files:
        header, start = read_header(file)
        for name, entry in header.items():
            low, high = entry["data_offsets"]
            merged[name] = {**entry, "data_offsets": [low + shift, high + shift]}
        sources.append((file, start))
        shift += file.stat().st_size - start
    text = json.dumps({"__metadata__": {"format": "pt"}, **merged}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = target.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for file, start in sources:
            with file.open("rb") as source:
                source.seek(start)
                shutil.copyfileobj(source, stream, 16 * 2**20)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(target)
    return merged
