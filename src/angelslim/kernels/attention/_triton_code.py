"""The Triton program of `triton_flash`, apart because importing it needs Triton."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _keys(source, block, part, b, h, stride_b, stride_h, stride_t, row_b, row_h, column_h, stop,
          BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """BLOCK_N tokens of one head of keys or values, [BLOCK_N, D]."""
    begin = block * BLOCK_K + part * BLOCK_N
    if TMA:
        x = source.load([b * row_b + h * row_h + begin, h * column_h])
    else:
        at = begin + tl.arange(0, BLOCK_N)
        place = source + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        place += begin.to(tl.int64) * stride_t
        place = place + tl.arange(0, BLOCK_N)[:, None] * stride_t + tl.arange(0, D)[None, :]
        if MASKED:  # noqa: SIM108
            x = tl.load(place, mask=at[:, None] < stop, other=0.0)
        else:
            x = tl.load(place)
    return x


@triton.jit
def _take(acc, m, total, scores, v, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax: the scores of some keys and their values enter the sums."""
    highest = tl.maximum(m, tl.max(scores, 1) * scale)
    base = highest
    if MASKED:  # a query that has read nothing yet: -inf minus -inf is no number
        base = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp2(scores * scale - base[:, None])
    decay = tl.exp2(m - base)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, highest, total


@triton.jit(do_not_specialize=["q_len", "q_offset", "longest", "tiles"])
def forward(
    q_ptr, k_source, v_source, out_ptr, num_ptr, idx_ptr, bounds_ptr,
    scale,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot, stride_nb, stride_nh,
    k_row_b, k_row_h, k_column_h, v_row_b, v_row_h, v_column_h,
    q_len, q_offset, longest, tiles, heads,
    GROUPS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DIAGONAL: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, AHEAD: tl.constexpr, HEADS_FIRST: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head over the key blocks of their row's list."""
    PARTS: tl.constexpr = BLOCK_Q // BLOCK_M
    SPLIT: tl.constexpr = BLOCK_K // BLOCK_N
    program = tl.program_id(0)
    if HEADS_FIRST:  # the heads of a group at one row, then the next row, then the next group
        within = program % (tiles * GROUPS)
        tile, line = within // GROUPS, program // (tiles * GROUPS) * GROUPS + within % GROUPS
    else:
        tile, line = program % tiles, program // tiles
    tile = tiles - 1 - tile  # long rows first
    b, h = line // heads, line % heads
    group = h // GROUPS
    row = tile // PARTS
    lists = b.to(tl.int64) * stride_nb + h.to(tl.int64) * stride_nh + row
    num = tl.load(num_ptr + lists)
    idx_ptr += lists * longest

    tokens = row * BLOCK_Q + (tile % PARTS) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = tokens[:, None] < q_len
    token = tokens.to(tl.int64)[:, None]
    q_ptr += b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    q = tl.load(q_ptr + token * stride_qt + tl.arange(0, D)[None, :], mask=there, other=0.0)
    position = tokens + q_offset

    start, stop = 0, q_len + q_offset
    if PADDED:
        start = tl.load(bounds_ptr + 2 * b).to(tl.int32)
        stop = tl.minimum(stop, tl.load(bounds_ptr + 2 * b + 1).to(tl.int32))
        whole = 0
    else:
        whole = num
        first = (q_offset + row * BLOCK_Q) // BLOCK_K
        for back in tl.static_range(DIAGONAL):
            last = tl.load(idx_ptr + num - 1 - back, mask=num > back, other=-1)
            whole -= (last >= first).to(tl.int32)

    acc = tl.zeros([BLOCK_M, DV], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    # The number of the next block is read one step early, so that no load of keys waits for it.
    block = tl.load(idx_ptr)
    if AHEAD:
        if whole > 0:
            k = _keys(k_source, block, 0, b, group, stride_kb, stride_kh, stride_kt, k_row_b, k_row_h, k_column_h,
                      stop, BLOCK_K, BLOCK_N, D, TMA, False)  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            following = tl.load(idx_ptr + 1 // SPLIT, mask=num > 1 // SPLIT, other=0)
            for n in tl.range(0, whole * SPLIT - 1):
                k = _keys(k_source, following, (n + 1) % SPLIT, b, group, stride_kb, stride_kh, stride_kt,
                          k_row_b, k_row_h, k_column_h, stop, BLOCK_K, BLOCK_N, D, TMA, False)  # fmt: skip
                coming = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                v = _keys(v_source, block, n % SPLIT, b, group, stride_vb, stride_vh, stride_vt,
                          v_row_b, v_row_h, v_column_h, stop, BLOCK_K, BLOCK_N, DV, TMA, False)  # fmt: skip
                block = tl.load(
                    idx_ptr + (n + 1) // SPLIT
                )  # not carried over twice: such loops are not pipelined
                following = tl.load(idx_ptr + (n + 2) // SPLIT, mask=(n + 2) // SPLIT < num, other=0)
                acc, m, total = _take(acc, m, total, scores, v, scale, False, PRECISION)
                scores = coming
            v = _keys(v_source, block, SPLIT - 1, b, group, stride_vb, stride_vh, stride_vt,
                      v_row_b, v_row_h, v_column_h, stop, BLOCK_K, BLOCK_N, DV, TMA, False)  # fmt: skip
            acc, m, total = _take(acc, m, total, scores, v, scale, False, PRECISION)
    else:
        for n in tl.range(0, whole * SPLIT, warp_specialize=SPECIALIZE):
            k = _keys(k_source, block, n % SPLIT, b, group, stride_kb, stride_kh, stride_kt,
                      k_row_b, k_row_h, k_column_h, stop, BLOCK_K, BLOCK_N, D, TMA, False)  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            v = _keys(v_source, block, n % SPLIT, b, group, stride_vb, stride_vh, stride_vt,
                      v_row_b, v_row_h, v_column_h, stop, BLOCK_K, BLOCK_N, DV, TMA, False)  # fmt: skip
            block = tl.load(idx_ptr + (n + 1) // SPLIT, mask=(n + 1) // SPLIT < num, other=0)
            acc, m, total = _take(acc, m, total, scores, v, scale, False, PRECISION)
    for n in range(whole * SPLIT, num * SPLIT):
        block = tl.load(idx_ptr + n // SPLIT)
        k = _keys(k_source, block, n % SPLIT, b, group, stride_kb, stride_kh, stride_kt,
                  k_row_b, k_row_h, k_column_h, stop, BLOCK_K, BLOCK_N, D, TMA, True)  # fmt: skip
        v = _keys(v_source, block, n % SPLIT, b, group, stride_vb, stride_vh, stride_vt,
                  v_row_b, v_row_h, v_column_h, stop, BLOCK_K, BLOCK_N, DV, TMA, True)  # fmt: skip
        keys = block * BLOCK_K + (n % SPLIT) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (keys >= start) & (keys < stop)
        if TMA:  # what lies behind the last key may be anything, and zero times that may be no number
            v = tl.where(keys[:, None] < stop, v, 0.0).to(v.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where((keys[None, :] <= position[:, None]) & inside[None, :], scores, float("-inf"))
        acc, m, total = _take(acc, m, total, scores, v, scale, True, PRECISION)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_ptr += b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
    tl.store(
        out_ptr + token * stride_ot + tl.arange(0, DV)[None, :], out.to(out_ptr.dtype.element_ty), mask=there
    )
