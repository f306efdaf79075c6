"""What selectors do between a model's tensors and a plan's lists, in a few GPU programs instead of dozens.

PyTorch's operators read long maps many times and each launch costs some microseconds, more than a selector may take at
32k tokens. Here tokens are pooled in one pass, and one program a row adds up its scores, finds the value that `count`
of them reach, and writes its list: no sort, no mask, and nothing waits for the host. The selectors' PyTorch code does the
same for every case and is what these programs are compared with.

Shapes: q [B, H, Lq, D], k and v [B, Hkv, Lk, D], n and m blocks of queries and keys.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention.blocks import BlockPlan

LOG2E = math.log2(math.e)
MOST_COLUMNS = 8192  # blocks of keys that one program ranks
JOINED, JOINERS = 16, 16  # blocks that are joined at once, programs that share a head's


class Cut(NamedTuple):
    """How `cell_masses` is cut: cells of queries and of keys at once, warps, and loads that are under way."""

    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 3


SLIM = Cut(32, 32)  # of float32


@functools.cache
def _code() -> Any:
    from . import _code

    return _code


def refuses(q: Tensor, k: Tensor, v: Tensor, block: int, q_offset: int) -> str:
    """Why these programs cannot serve a call without padding, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "it is no GPU"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "compute capability 8.0 is needed"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"they do not compute in {q.dtype}"
    if q.shape[2] % block or k.shape[2] % block or q_offset % block:
        return "lengths are no whole blocks"
    sizes = (block, q.shape[3], v.shape[3])
    if any(size & (size - 1) or size < 16 or size > 256 for size in sizes):
        return f"blocks and heads are no powers of two from 16 to 256: {sizes}"
    if k.shape[2] // block > MOST_COLUMNS:
        return f"there are more than {MOST_COLUMNS} blocks"
    return "" if all(x.stride(-1) == 1 for x in (q, k, v)) else "dimensions are not contiguous"


class Lines(NamedTuple):
    """What the last queries give each block of keys: on average, at most, and by distance in blocks, in three parts."""

    mean: Tensor
    most: Tensor
    shares: Tensor


class Forced(NamedTuple):
    """The first and the last blocks that rows read in any case, those on top of the count, and how many rows are dense."""

    initial: int = 1
    window: int = 1
    more_initial: int = 0
    more_window: int = 0
    dense_rows: int = 0


def means(
    x: Tensor, block: int, parts: int, *, phases: bool, flip: bool = False, factor: float = 1.0
) -> Tensor:
    """The means of each block's parts times `factor`, [B, H, n, parts, D] in the dtype of x.

    Parts are runs of neighbours or, with `phases`, every `parts`-th token; `flip` turns their order around.
    """
    batch, heads, length, width = x.shape
    out = x.new_empty(batch, heads, length // block, parts, width)
    _code().means[(length // block, batch * heads)](
        x, out, factor, heads, length // block, *x.stride()[:3],
        BLOCK=block, D=width, PARTS=parts, PHASES=phases, FLIP=flip, num_warps=4,
    )  # fmt: skip
    return out


def value_bonus(v: Tensor, block: int, stride: int) -> Tensor:
    """How far the largest values of each block's groups stand out of their head's, float32 [B, Hkv, m]."""
    batch, heads, length, width = v.shape
    sizes = torch.empty(batch, heads, length // stride, device=v.device)
    blocks = length // block
    _code().value_sizes[(blocks, batch * heads)](
        v, sizes, heads, length // stride, *v.stride()[:3], BLOCK=block, D=width, STRIDE=stride, num_warps=4
    )
    out = torch.empty(batch, heads, blocks, device=v.device)
    at_once = min(1 << (blocks - 1).bit_length(), max(4096 * stride // block, 16))
    _code().value_bonus[(batch * heads,)](
        sizes, out, length // stride, blocks, SIZE=block // stride, AT_ONCE=at_once, num_warps=8
    )
    return out


def products(q: Tensor, k: Tensor) -> Tensor:
    """The products of q [B, H, n, X] with k [B, Hkv, m, X] of each head's group, float32 [B, H, n, m]."""
    batch, heads, rows, width = q.shape
    left = q.reshape(batch * k.shape[1], -1, width)
    right = k.reshape(batch * k.shape[1], -1, width).transpose(1, 2)
    if q.is_cuda and q.dtype != torch.float32:
        found = torch.bmm(left, right, out_dtype=torch.float32)
    else:
        found = left.float() @ right.float()
    return found.view(batch, heads, rows, -1)


def cell_masses(
    q: Tensor, k: Tensor, cells: int, q_offset: int, block: int, scaling: float, cut: Cut | None = None
) -> Tensor:
    """The root mean square over a query block's cells of the mass that their means give each key block, [B, H, n, m].

    What lies after a row's own block is not written.
    """
    batch, heads, q_len, width = q.shape
    mean_q = means(q, block, cells, phases=False, factor=scaling * LOG2E)
    mean_k = means(k, block, cells, phases=False)
    rows, columns = q_len // block, k.shape[2] // block
    out = torch.empty(batch, heads, rows, columns, device=q.device)
    cut = cut or (Cut() if q.dtype != torch.float32 else SLIM)
    high, wide = max(cut.queries, cells), max(cut.keys, cells)
    _code().cell_masses[(-(-rows * cells // high), batch * heads)](
        mean_q, mean_k, out, heads, heads // k.shape[1], rows * cells, columns * cells, q_offset // block * cells, columns,
        D=width, CELLS=cells, BLOCK_M=high, BLOCK_N=wide, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out


def last_lines(q: Tensor, k: Tensor, last: int, block: int, scaling: float) -> Lines:
    """The exact attention of the last queries, by columns of blocks and by diagonals of blocks."""
    batch, heads, q_len, width = q.shape
    columns, line, keys = k.shape[2] // block, q.shape[0] * heads, k.shape[1]
    parts = torch.empty(3, line, columns, last, device=q.device)
    _code().last_parts[(columns, batch * keys)](
        q, k, parts, scaling * LOG2E, keys, q_len, columns, parts.stride(0), *q.stride()[:3], *k.stride()[:3],
        BLOCK=block, D=width, LAST=last, GROUPS=heads // keys, num_warps=4,
    )  # fmt: skip
    mean, most = (torch.empty(batch, heads, columns, device=q.device) for _ in range(2))
    shares = torch.empty(batch, heads, columns, 3, device=q.device)
    tiles = -(-columns // (JOINED * JOINERS))
    _code().last_lines[(-(-columns // (JOINED * tiles)), line)](
        parts, mean, most, shares, columns, parts.stride(0), tiles, LAST=last, AT_ONCE=JOINED, num_warps=4
    )
    return Lines(mean, most, shares)


def choose(
    score: Tensor,
    count: Tensor,
    width: int,
    *,
    block: int,
    q_offset: int,
    forced: Forced,
    factor: float = 1.0,
    bonus: Tensor | None = None,
    lines: Lines | None = None,
    weight: float = 0.0,
) -> BlockPlan:
    """The plan of each row's best blocks by ``factor * score`` and ``weight`` times the bonus or the lines.

    `count` int32 [B or 1, H or 1, n] says how many a row keeps, `width` the most that any does.
    """
    batch, heads, rows, columns = score.shape
    width = min(
        max(width, forced.initial + forced.window) + forced.more_initial + forced.more_window, columns
    )
    num = torch.empty(batch, heads, rows, dtype=torch.int32, device=score.device)
    idx = torch.empty(batch, heads, rows, width, dtype=torch.int32, device=score.device)
    steps = [0 if count.shape[axis] == 1 else count.stride(axis) for axis in (0, 1)]
    size = max(1 << (columns - 1).bit_length(), 16)
    found = lines or Lines(score, score, score)
    groups = heads // bonus.shape[1] if bonus is not None else 1
    _code().choose[(rows, batch * heads)](
        score, score if bonus is None else bonus, *found, count, num, idx,
        factor, weight, heads, groups, rows, columns, q_offset // block, width, *steps,
        INITIAL=forced.initial, WINDOW=forced.window, MORE_INITIAL=forced.more_initial, MORE_WINDOW=forced.more_window,
        DENSE_ROWS=forced.dense_rows, BONUS=bonus is not None, LINES=lines is not None, SIZE=size,
        num_warps=1 if size <= 1024 else 4,
    )  # fmt: skip
    return BlockPlan(block, block, num, idx, q_offset, columns * block)
