"""Read a GGUF file: its fields, and where its tensors lie.

Layout, little-endian: ``GGUF``, version, number of tensors, number of fields; the fields, each a name, a type and a
value (arrays have one type for all items); for each tensor its name, sizes (the fastest first), type and offset;
then, aligned, the tensors. Strings are a length in eight bytes and UTF-8.

It is read here, not by the Python library, because that refuses files with types which it does not know yet, and
takes seconds for a large vocabulary.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...base.errors import ModelError
from ._gguf_types import BY_NUMBER, KINDS

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
MOST = 1 << 28  # items and characters beyond this are damage, not data


@dataclass(frozen=True)
class Stored:
    """One tensor in a file; `shape` as in PyTorch, the slowest first."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a file says before its tensors' data."""

    fields: dict[str, Any]
    tensors: list[Stored]


def read_header(file: Path) -> Header:
    """Read what a file holds; one that is damaged, or shorter than it should be, is a `ModelError`."""
    try:
        with file.open("rb") as stream:
            header = _header(stream)
    except (struct.error, ArithmeticError, ValueError, TypeError, KeyError, OSError) as error:
        raise ModelError(f"{file} is no complete GGUF file ({error}).", fix="Write it again.") from error
    end = max((tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)
    if file.stat().st_size < end:
        raise ModelError(
            f"{file} is no complete GGUF file: it should hold {end} bytes and has {file.stat().st_size}.",
            fix="Write or copy it again.",
        )
    return header


def read_bytes(file: Path, tensor: Stored) -> Tensor:
    """Return a tensor's bytes, uint8 ``[rows, bytes of a row]``."""
    rows = prod(tensor.shape[:-1])
    with file.open("rb") as stream:
        stream.seek(tensor.offset)
        data = bytearray(stream.read(tensor.nbytes))
    return torch.frombuffer(data, dtype=torch.uint8).reshape(rows, -1)


def check_scales(file: Path, tensor: Stored) -> None:
    """Refuse a quantized tensor with a scale that is not finite; its codes are finite whatever they are."""
    kind = KINDS[tensor.kind]
    blocks = read_bytes(file, tensor).reshape(-1, kind.nbytes)
    if tensor.kind == "MXFP4":
        finite = bool((blocks[:, 0] != 0xFF).all())
    else:
        finite = bool(blocks[:, slice(*kind.scales)].contiguous().view(torch.float16).isfinite().all())
    if not finite:
        raise ModelError(
            f"{file}: tensor {tensor.name!r} has a scale that is not finite.", fix="Write it again."
        )


def _header(stream: BinaryIO) -> Header:
    if stream.read(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version, tensors, fields = _number(stream, "<I"), _number(stream, "<Q"), _number(stream, "<Q")
    if version not in VERSIONS:
        raise ValueError(f"version {version} is not known here")
    found = {_text(stream): _value(stream, _number(stream, "<I")) for _ in range(_sane(fields))}
    rows = [_tensor(stream) for _ in range(_sane(tensors))]
    step = int(found.get("general.alignment", ALIGNMENT))
    start = -(-stream.tell() // step) * step
    return Header(
        found,
        [
            Stored(name, kind, shape, start + offset, KINDS[kind].bytes_of(prod(shape)))
            for name, kind, shape, offset in rows
        ],
    )


def _tensor(stream: BinaryIO) -> tuple[str, str, tuple[int, ...], int]:
    name = _text(stream)
    sizes = [_number(stream, "<Q") for _ in range(_number(stream, "<I"))]
    number, offset = _number(stream, "<I"), _number(stream, "<Q")
    if number not in BY_NUMBER:
        raise ValueError(f"tensor {name!r} has the type {number}, which is not known here")
    kind = BY_NUMBER[number]
    if not sizes or sizes[0] % KINDS[kind].block:
        raise ValueError(f"tensor {name!r} has rows that are no whole blocks of {kind}")
    return name, kind, tuple(reversed(sizes)), offset


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(stream)
    if kind == _ARRAY:
        item, count = _number(stream, "<I"), _sane(_number(stream, "<Q"))
        if item in _SCALARS:
            one = _SCALARS[item]
            return list(struct.unpack(f"<{count}{one[1]}", stream.read(count * struct.calcsize(one))))
        if item != _STRING:
            raise ValueError(f"arrays of type {item} are not known here")
        return [_text(stream) for _ in range(count)]
    return _number(stream, _SCALARS[kind])


def _number(stream: BinaryIO, layout: str) -> Any:
    return struct.unpack(layout, stream.read(struct.calcsize(layout)))[0]


def _text(stream: BinaryIO) -> str:
    return stream.read(_sane(_number(stream, "<Q"))).decode()


def _sane(count: int) -> int:
    if count > MOST:
        raise ValueError(f"{count} items")
    return count
