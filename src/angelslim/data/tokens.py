"""Calibration samples that are token ids already, so that several tools can read the very same ones.

The file is a safetensors file with one tensor ``input_ids``, ``[samples, tokens]`` of any integer type. Rows of one
length need no padding, and none is looked for: every id is a token that the model reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..base.errors import DataError

SUFFIX = ".safetensors"
NAME = "input_ids"


def read_token_rows(path: Path) -> Iterator[list[int]]:
    """Yield the rows of a file of token ids; anything but one integer matrix is a `DataError`."""
    fix = f"Save an integer tensor {NAME!r} of shape [samples, tokens]."
    if not path.is_file():
        raise DataError("There is no such file of token ids.", where=str(path), fix=fix)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            ids = file.get_tensor(NAME) if NAME in names else None
    except SafetensorError as error:
        raise DataError("This is no safetensors file.", where=str(path), fix=fix) from error
    if ids is None:
        raise DataError(f"The file has no tensor {NAME!r}, only {names[:3]}.", where=str(path), fix=fix)
    if ids.dim() != 2 or ids.is_floating_point():
        raise DataError(f"{NAME!r} is {ids.dtype} of shape {list(ids.shape)}.", where=str(path), fix=fix)
    yield from ids.tolist()
