"""The Triton programs of `fused`, apart because importing them needs Triton.

Rows and columns are blocks. Lengths are whole blocks, and queries begin at one.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-(2**31))
HIGHEST: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def means(
    x_ptr, out_ptr, factor, heads, blocks, stride_b, stride_h, stride_t,
    BLOCK: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, PHASES: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """The means of one block's PARTS parts: runs of neighbours, or with PHASES every PARTS-th token."""
    block, line = tl.program_id(0), tl.program_id(1)
    b, h = (line // heads).to(tl.int64), (line % heads).to(tl.int64)
    token = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    dims = tl.arange(0, D)
    x = tl.load(x_ptr + b * stride_b + h * stride_h + token[:, None] * stride_t + dims[None, :]).to(
        tl.float32
    )
    SIZE: tl.constexpr = BLOCK // PARTS
    if PHASES:
        mean = tl.sum(tl.reshape(x, [SIZE, PARTS, D]), 0)
    else:
        mean = tl.sum(tl.reshape(x, [PARTS, SIZE, D]), 1)
    part = tl.arange(0, PARTS)
    if FLIP:
        part = PARTS - 1 - part
    row = (line.to(tl.int64) * blocks + block) * PARTS + part
    mean = mean * (factor / SIZE)
    tl.store(out_ptr + row[:, None] * D + dims[None, :], mean.to(out_ptr.dtype.element_ty))


@triton.jit
def value_sizes(
    v_ptr, out_ptr, heads, groups, stride_b, stride_h, stride_t,
    BLOCK: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """The logarithm of the largest norm of each STRIDE values."""
    block, line = tl.program_id(0), tl.program_id(1)
    b, h = (line // heads).to(tl.int64), (line % heads).to(tl.int64)
    token = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    place = v_ptr + b * stride_b + h * stride_h + token[:, None] * stride_t + tl.arange(0, D)[None, :]
    v = tl.load(place).to(tl.float32)
    norm = tl.sqrt(tl.sum(v * v, 1))
    SIZE: tl.constexpr = BLOCK // STRIDE
    size = tl.log(tl.max(tl.reshape(norm, [SIZE, STRIDE]), 1) + 1e-6)
    tl.store(out_ptr + line.to(tl.int64) * groups + block * SIZE + tl.arange(0, SIZE), size)


@triton.jit
def value_bonus(size_ptr, out_ptr, groups, blocks, SIZE: tl.constexpr, AT_ONCE: tl.constexpr):
    """The mean over each block of what its SIZE groups stand above the mean of the head, in standard deviations."""
    line = tl.program_id(0).to(tl.int64)
    size_ptr += line * groups
    total = tl.zeros([AT_ONCE, SIZE], dtype=tl.float32)
    row, column = tl.arange(0, AT_ONCE)[:, None], tl.arange(0, SIZE)[None, :]
    for first in range(0, blocks, AT_ONCE):
        there = first + row + column * 0 < blocks
        total += tl.load(size_ptr + (first + row) * SIZE + column, mask=there, other=0.0)
    mean = tl.sum(tl.sum(total, 1), 0) / groups
    total = tl.zeros([AT_ONCE, SIZE], dtype=tl.float32)
    for first in range(0, blocks, AT_ONCE):
        there = first + row + column * 0 < blocks
        away = tl.load(size_ptr + (first + row) * SIZE + column, mask=there, other=mean) - mean
        total += away * away
    spread = tl.maximum(tl.sqrt(tl.sum(tl.sum(total, 1), 0) / groups), 1e-6)
    for first in range(0, blocks, AT_ONCE):
        there = first + row + column * 0 < blocks
        size = tl.load(size_ptr + (first + row) * SIZE + column, mask=there, other=mean)
        above = tl.sum(tl.maximum((size - mean) / spread, 0.0), 1) / SIZE
        at = first + tl.arange(0, AT_ONCE)
        tl.store(out_ptr + line * blocks + at, above, mask=at < blocks)


@triton.jit
def cell_masses(
    q_ptr, k_ptr, out_ptr, heads, groups, cells_q, cells_k, before, columns,
    D: tl.constexpr, CELLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The softmax of each query cell over the cells it may read, summed in blocks; root mean square over a block's cells."""
    LOG2E: tl.constexpr = 1.4426950408889634
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    line = tl.program_id(1)
    keys = (line // heads) * (heads // groups) + (line % heads) // groups
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D)
    q = tl.load(
        q_ptr + (line.to(tl.int64) * cells_q + row[:, None]) * D + dims[None, :],
        mask=row[:, None] < cells_q,
        other=0.0,
    )
    k_ptr += keys.to(tl.int64) * cells_k * D
    last = before + row
    stop = tl.minimum(before + (tile + 1) * BLOCK_M, cells_k)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for first in range(0, stop, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + column[None, :] * D + dims[:, None], mask=column[None, :] < cells_k, other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * LOG2E
        scores = tl.where(column[None, :] <= last[:, None], scores, float("-inf"))
        highest = tl.maximum(m, tl.max(scores, 1))  # the first cell is always read
        total = total * tl.exp2(m - highest) + tl.sum(tl.exp2(scores - highest[:, None]), 1)
        m = highest
    level = m + tl.log2(total)
    ROWS: tl.constexpr = BLOCK_M // CELLS
    COLUMNS: tl.constexpr = BLOCK_N // CELLS
    block = tile * ROWS + tl.arange(0, ROWS)
    out_ptr += (line.to(tl.int64) * (cells_q // CELLS) + block[:, None]) * columns
    for first in range(0, stop, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + column[None, :] * D + dims[:, None], mask=column[None, :] < cells_k, other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * LOG2E
        mass = tl.where(column[None, :] <= last[:, None], tl.exp2(scores - level[:, None]), 0.0)
        mass = tl.sum(tl.reshape(mass, [BLOCK_M, COLUMNS, CELLS]), 2)
        mass = tl.sum(tl.reshape(mass * mass, [ROWS, CELLS, COLUMNS]), 1) / CELLS
        at = first // CELLS + tl.arange(0, COLUMNS)[None, :]
        tl.store(out_ptr + at, tl.sqrt(mass), mask=(at < columns) & (block[:, None] < cells_q // CELLS))


@triton.jit
def _last_scores(
    q_ptr, k_ptr, h, group, b, block, scale, queries, keys,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    BLOCK: tl.constexpr, D: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The scores of the last queries with one block of keys, in powers of two, -inf where the key comes later."""
    row, dims = tl.arange(0, LAST), tl.arange(0, D)
    token = (queries - LAST + row).to(tl.int64)
    key = block * BLOCK + tl.arange(0, BLOCK)
    q = tl.load(
        q_ptr
        + b.to(tl.int64) * stride_qb
        + h.to(tl.int64) * stride_qh
        + token[:, None] * stride_qt
        + dims[None, :]
    )
    k = tl.load(
        k_ptr + b.to(tl.int64) * stride_kb + group.to(tl.int64) * stride_kh
        + key.to(tl.int64)[None, :] * stride_kt + dims[:, None]
    )  # fmt: skip
    scores = tl.dot(q, k, input_precision="ieee") * scale
    position = keys - LAST + row
    return tl.where(key[None, :] <= position[:, None], scores, float("-inf")), position[:, None] - key[
        None, :
    ]


@triton.jit
def last_levels(
    q_ptr, k_ptr, out_ptr, scale, heads, groups, queries, keys, columns,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    BLOCK: tl.constexpr, D: tl.constexpr, LAST: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The logarithm (of base 2) of the softmax's sum of the last queries, over AT_ONCE blocks of keys."""
    chunk, line = tl.program_id(0), tl.program_id(1)
    b, h = line // heads, line % heads
    m = tl.full([LAST], float("-inf"), dtype=tl.float32)
    total = tl.zeros([LAST], dtype=tl.float32)
    for block in range(chunk * AT_ONCE, tl.minimum((chunk + 1) * AT_ONCE, columns)):
        scores, _ = _last_scores(
            q_ptr, k_ptr, h, h // groups, b, block, scale, queries, keys,
            stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, BLOCK, D, LAST,
        )  # fmt: skip
        highest = tl.maximum(
            m, tl.max(scores, 1)
        )  # even the first of the last queries reads some key of each block
        total = total * tl.exp2(m - highest) + tl.sum(tl.exp2(scores - highest[:, None]), 1)
        m = highest
    place = (line.to(tl.int64) * tl.num_programs(0) + chunk) * LAST + tl.arange(0, LAST)
    tl.store(out_ptr + place, m + tl.log2(total))


@triton.jit
def last_masses(
    q_ptr, k_ptr, level_ptr, mean_ptr, most_ptr, share_ptr, scale, heads, groups, queries, keys, columns,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    BLOCK: tl.constexpr, D: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """What the last queries give one key block: on average, at most, and by the distance in blocks, in three parts."""
    block, line = tl.program_id(0), tl.program_id(1)
    b, h = line // heads, line % heads
    scores, distance = _last_scores(
        q_ptr, k_ptr, h, h // groups, b, block, scale, queries, keys,
        stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, BLOCK, D, LAST,
    )  # fmt: skip
    level = tl.load(level_ptr + line * LAST + tl.arange(0, LAST))
    mass = tl.exp2(scores - level[:, None])
    column = tl.sum(mass, 1)
    place = line.to(tl.int64) * columns + block
    tl.store(mean_ptr + place, tl.sum(column, 0) / LAST)
    tl.store(most_ptr + place, tl.max(column, 0))
    for part in tl.static_range(
        3
    ):  # a diagonal's weight is split between the two nearest diagonals of blocks
        centre = (columns - block - 2 + part) * BLOCK
        near = 1.0 - tl.abs(distance - centre).to(tl.float32) / BLOCK
        tl.store(share_ptr + place * 3 + part, tl.sum(tl.sum(mass * tl.maximum(near, 0.0), 1), 0) / LAST)


@triton.jit
def choose(
    score_ptr, bonus_ptr, mean_ptr, most_ptr, share_ptr, count_ptr, num_ptr, idx_ptr,
    factor, weight, heads, groups, rows, columns, before, width, stride_cb, stride_ch,
    INITIAL: tl.constexpr, WINDOW: tl.constexpr, MORE_INITIAL: tl.constexpr, MORE_WINDOW: tl.constexpr,
    DENSE_ROWS, BONUS: tl.constexpr, LINES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The list of one row: forced blocks and the best others, as many as the row's count.

    Scores become integers of the same order; bit after bit, the largest one that enough blocks reach is found.
    """
    row, line = tl.program_id(0), tl.program_id(1)
    b, h = line // heads, line % heads
    own = before + row
    j = tl.arange(0, SIZE)
    allowed = j <= own
    at = (line.to(tl.int64) * rows + row) * columns
    score = tl.load(score_ptr + at + j, mask=allowed, other=0.0) * factor
    if BONUS:
        key_line = b * (heads // groups) + h // groups
        score += weight * tl.load(bonus_ptr + key_line.to(tl.int64) * columns + j, mask=allowed, other=0.0)
    if LINES:
        place = line.to(tl.int64) * columns
        if own == columns - 1:
            score += tl.load(most_ptr + place + j, mask=allowed, other=0.0)
        else:
            score += weight * tl.load(mean_ptr + place + j, mask=allowed, other=0.0)
        for part in tl.static_range(3):
            source = columns - 2 + part - (own - j)
            there = allowed & (source >= 0) & (source < columns)
            score += weight * tl.load(share_ptr + (place + source) * 3 + part, mask=there, other=0.0)
    bits = score.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ HIGHEST, bits)
    dense = row >= rows - DENSE_ROWS
    forced = (j < INITIAL) | (j > own - WINDOW) | dense
    order = tl.where(forced, HIGHEST, order)
    order = tl.where(allowed, order, LOWEST)
    count = tl.minimum(tl.load(count_ptr + b * stride_cb + h * stride_ch + row), own + 1)
    level = tl.where(tl.sum((order >= 0).to(tl.int32), 0) >= count, 0, LOWEST)
    for step in range(31):
        higher = level | (1 << (30 - step))
        level = tl.where(tl.sum((order >= higher).to(tl.int32), 0) >= count, higher, level)
    above = order > level
    level_ones = (order == level) & allowed
    room = count - tl.sum(above.to(tl.int32), 0)
    kept = above | (level_ones & (tl.cumsum(level_ones.to(tl.int32), 0) <= room))
    kept = (kept | forced | (j < MORE_INITIAL) | (j > own - MORE_WINDOW)) & allowed
    ranks = tl.cumsum(kept.to(tl.int32), 0)
    found = tl.sum(kept.to(tl.int32), 0)
    out = (line.to(tl.int64) * rows + row) * width
    tl.store(idx_ptr + out + ranks - 1, j, mask=kept)
    tl.store(idx_ptr + out + j, tl.zeros([SIZE], dtype=tl.int32), mask=(j >= found) & (j < width))
    tl.store(num_ptr + line.to(tl.int64) * rows + row, found)
