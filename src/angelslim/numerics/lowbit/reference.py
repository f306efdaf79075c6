"""The slow twins of this package: one tile at a time, in Python's own floats, with nothing to go wrong.

Each takes the weights of one tile as a list and returns (scale, codes), so that ``scale * code`` (``scale * (code - 1.5)``
for two stretched bits) is the weight. Tests compare the tensor versions with these.
"""

from __future__ import annotations

from collections.abc import Sequence

from .record import CENTRE, LowBit

Tile = Sequence[float]


def threshold_tile(rule: str, tile: Tile) -> tuple[float, list[int]]:
    """Quantize by one of the rules of `ternary`: ``absmean``, ``twn`` or ``minmax``."""
    mean, largest = sum(map(abs, tile)) / len(tile), max(map(abs, tile))
    threshold = {"absmean": mean / 2, "twn": 0.75 * mean, "minmax": largest / 2}[rule]
    large = [abs(w) for w in tile if abs(w) >= threshold]
    scale = {"absmean": mean, "twn": sum(large) / len(large), "minmax": largest}[rule]
    return scale, [0 if w == 0 or abs(w) < threshold else 1 if w > 0 else -1 for w in tile]


def stretched_tile(levels: str, tile: Tile, span: float) -> tuple[float, list[int]]:
    """Quantize to the nearest of the stretched levels of the range `span`."""
    step = span / 2 if levels == "seq2" else span * 2 / 3
    codes = range(4) if levels == "seq2" else range(-1, 2)
    return step, [min(codes, key=lambda code: abs(step * (code - CENTRE[levels]) - w)) for w in tile]


def sparse_tile(tile: Tile) -> tuple[float, list[int]]:
    """Quantize to 3:4 sparse signs."""
    codes, kept = [], []
    for start in range(0, len(tile), 4):
        four = tile[start : start + 4]
        zero = min(range(4), key=lambda lane: abs(four[lane]))
        codes += [0 if lane == zero else -1 if w < 0 else 1 for lane, w in enumerate(four)]
        kept += [abs(w) for lane, w in enumerate(four) if lane != zero]
    return sum(kept) / len(kept), codes


def integer_tile(tile: Tile, scale: float, low: int, high: int, shift: float = 0.0) -> list[int]:
    """Round to the nearest whole number of steps, ties to even, within the limits."""
    return [min(max(round((w - shift) / scale), low), high) for w in tile]


def dequantized(record: LowBit) -> list[list[float]]:
    """Return the weight of a record, element by element."""
    rows, columns = record.codes.shape
    return [
        [
            float(record.scale[row, column // record.group])
            * (int(record.codes[row, column]) - CENTRE[record.levels])
            + (0.0 if record.shift is None else float(record.shift[row, column // record.group]))
            for column in range(columns)
        ]
        for row in range(rows)
    ]
