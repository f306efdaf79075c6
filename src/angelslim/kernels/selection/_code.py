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
    SIZE: tl.constexpr = BLOCK // PARTS
    place, dims = tl.arange(0, BLOCK), tl.arange(0, D)
    if not PHASES:  # loaded in an order in which every PARTS-th is a neighbour: summing neighbours takes five times as long
        place = place % PARTS * SIZE + place // PARTS
    token = (block * BLOCK + place).to(tl.int64)
    x = tl.load(x_ptr + b * stride_b + h * stride_h + token[:, None] * stride_t + dims[None, :])
    mean = tl.sum(tl.reshape(x.to(tl.float32), [SIZE, PARTS, D]), 0)
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
def _cell_scores(
    q, k_ptr, first, last, cells_k, D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr
):
    """The scores of a tile of query cells with the key cells from `first` on; MASKED where some come later."""
    column, dims = first + tl.arange(0, BLOCK_N), tl.arange(0, D)
    place = k_ptr + column[None, :] * D + dims[:, None]
    if MASKED:
        k = tl.load(place, mask=column[None, :] < cells_k, other=0.0)
        scores = tl.dot(q, k, input_precision="ieee")
        scores = tl.where(column[None, :] <= last[:, None], scores, float("-inf"))
    else:
        scores = tl.dot(q, tl.load(place), input_precision="ieee")
    return scores


@triton.jit
def cell_masses(
    q_ptr, k_ptr, out_ptr, heads, groups, cells_q, cells_k, before, columns,
    D: tl.constexpr, CELLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The softmax of each query cell over the cells it may read, summed in blocks; root mean square over a block's cells.

    Scores come in powers of two. Both passes read whole tiles first, and mask only those on the diagonal.
    """
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
    whole = (before + tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for masked in tl.static_range(2):
        for first in range(whole * masked, stop if masked else whole, BLOCK_N):
            scores = _cell_scores(q, k_ptr, first, last, cells_k, D, BLOCK_N, masked)
            highest = tl.maximum(m, tl.max(scores, 1))  # the first cell is always read
            total = total * tl.exp2(m - highest) + tl.sum(tl.exp2(scores - highest[:, None]), 1)
            m = highest
    level = m + tl.log2(total)
    ROWS: tl.constexpr = BLOCK_M // CELLS
    COLUMNS: tl.constexpr = BLOCK_N // CELLS
    block = tile * ROWS + tl.arange(0, ROWS)
    out_ptr += (line.to(tl.int64) * (cells_q // CELLS) + block[:, None]) * columns
    for masked in tl.static_range(2):
        for first in range(whole * masked, stop if masked else whole, BLOCK_N):
            scores = _cell_scores(q, k_ptr, first, last, cells_k, D, BLOCK_N, masked)
            mass = tl.exp2(scores - level[:, None])
            mass = tl.sum(tl.reshape(mass, [BLOCK_M, COLUMNS, CELLS]), 2)
            mass = tl.sum(tl.reshape(mass * mass, [ROWS, CELLS, COLUMNS]), 1) / CELLS
            at = first // CELLS + tl.arange(0, COLUMNS)[None, :]
            tl.store(out_ptr + at, tl.sqrt(mass), mask=(at < columns) & (block[:, None] < cells_q // CELLS))


@triton.jit
def last_parts(
    q_ptr, k_ptr, out_ptr, scale, heads, queries, columns, part,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    BLOCK: tl.constexpr, D: tl.constexpr, LAST: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One key block, read by the last queries of all heads of its group.

    For each query the logarithm (of base 2) of its softmax's sum over the block, and the mean over the block of u, which is how
    far a key lies before the query's own place in a block, in blocks, and of u where it is positive. `last_lines` joins
    the blocks. `heads` are those of the keys.
    """
    block, line = tl.program_id(0), tl.program_id(1)
    b, group = (line // heads).to(tl.int64), (line % heads).to(tl.int64)
    row, column, dims = tl.arange(0, LAST), tl.arange(0, BLOCK), tl.arange(0, D)
    token, key = (queries - LAST + row).to(tl.int64), (block * BLOCK + column).to(tl.int64)
    k = tl.load(k_ptr + b * stride_kb + group * stride_kh + key[None, :] * stride_kt + dims[:, None])
    apart = BLOCK - LAST + row[:, None] - column[None, :]
    u = apart.to(tl.float32) / BLOCK
    place = q_ptr + b * stride_qb + token[:, None] * stride_qt + dims[None, :]
    for member in range(GROUPS):
        q = tl.load(place + (group * GROUPS + member) * stride_qh)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where((apart >= 0) | (block < columns - 1), scores, float("-inf"))
        highest = tl.max(scores, 1)  # even the first of the last queries reads some key of each block
        weights = tl.exp2(scores - highest[:, None])
        total = tl.sum(weights, 1)
        out = out_ptr + ((line.to(tl.int64) * GROUPS + member) * columns + block) * LAST + row
        tl.store(out, highest + tl.log2(total))
        tl.store(out + part, tl.sum(weights * u, 1) / total)
        tl.store(out + 2 * part, tl.sum(weights * tl.maximum(u, 0.0), 1) / total)


@triton.jit
def last_lines(
    parts_ptr, mean_ptr, most_ptr, share_ptr, columns, part, tiles,
    LAST: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """What the last queries give each key block: on average, at most, and by the distance in blocks, in three parts.

    A diagonal's weight is split between the two nearest diagonals of blocks: the farther one gets u where that is positive,
    the nearer one -u where it is negative, and the middle one the rest.
    """
    line, row = tl.program_id(1).to(tl.int64), tl.arange(0, LAST)[None, :]
    parts_ptr += line * columns * LAST
    m = tl.full([LAST], float("-inf"), dtype=tl.float32)
    total = tl.zeros([LAST], dtype=tl.float32)
    for first in range(0, columns, AT_ONCE):
        block = first + tl.arange(0, AT_ONCE)[:, None]
        found = tl.load(parts_ptr + block * LAST + row, mask=block < columns, other=float("-inf"))
        highest = tl.maximum(m, tl.max(found, 0))
        total = total * tl.exp2(m - highest) + tl.sum(tl.exp2(found - highest[None, :]), 0)
        m = highest
    level = m + tl.log2(total)
    for tile in range(tl.program_id(0) * tiles, (tl.program_id(0) + 1) * tiles):
        block = tile * AT_ONCE + tl.arange(0, AT_ONCE)
        there = block < columns
        at = parts_ptr + block[:, None] * LAST + row
        found = tl.load(at, mask=there[:, None], other=float("-inf"))
        mass = tl.exp2(found - level[None, :])
        mean = tl.sum(mass, 1) / LAST
        signed = tl.sum(mass * tl.load(at + part, mask=there[:, None], other=0.0), 1) / LAST
        before = tl.sum(mass * tl.load(at + 2 * part, mask=there[:, None], other=0.0), 1) / LAST
        place = line * columns + block
        tl.store(mean_ptr + place, mean, mask=there)
        tl.store(most_ptr + place, tl.max(mass, 1), mask=there)
        tl.store(share_ptr + place * 3, before - signed, mask=there)
        tl.store(share_ptr + place * 3 + 1, mean + signed - 2 * before, mask=there)
        tl.store(share_ptr + place * 3 + 2, before, mask=there)


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
