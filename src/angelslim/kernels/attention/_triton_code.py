"""The Triton program of `triton_flash`, apart because importing it needs Triton."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _step(
    acc, m, total, q, k_ptr, v_ptr, key, stride_kt, stride_vt, scale, position, start, stop,
    BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take in the keys ``key .. key + BLOCK_N``; with MASKED, causality and the bounds of the row hold."""
    keys = key + tl.arange(0, BLOCK_N)
    at = keys.to(tl.int64)
    dims, vdims = tl.arange(0, D), tl.arange(0, DV)
    if MASKED:
        inside = keys < stop
        k = tl.load(k_ptr + at[None, :] * stride_kt + dims[:, None], mask=inside[None, :], other=0.0)
        v = tl.load(v_ptr + at[:, None] * stride_vt + vdims[None, :], mask=inside[:, None], other=0.0)
    else:
        k = tl.load(k_ptr + at[None, :] * stride_kt + dims[:, None])
        v = tl.load(v_ptr + at[:, None] * stride_vt + vdims[None, :])
    scores = tl.dot(q, k, input_precision=PRECISION)
    if MASKED:
        allowed = (keys[None, :] <= position[:, None]) & (keys[None, :] >= start) & inside[None, :]
        scores = tl.where(allowed, scores, float("-inf"))
    highest = tl.maximum(m, tl.max(scores, 1) * scale)
    base = highest
    if MASKED:  # a query that has read nothing yet: -inf minus -inf is no number
        base = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp2(scores * scale - base[:, None])
    decay = tl.exp2(m - base)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, highest, total


@triton.jit(do_not_specialize=["q_len", "q_offset", "longest"])
def forward(
    q_ptr, k_ptr, v_ptr, out_ptr, num_ptr, idx_ptr, bounds_ptr,
    scale,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_ob, stride_oh, stride_ot, stride_nb, stride_nh,
    q_len, q_offset, longest, heads, groups,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DIAGONAL: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head over the key blocks of their row's list."""
    PARTS: tl.constexpr = BLOCK_Q // BLOCK_M
    SPLIT: tl.constexpr = BLOCK_K // BLOCK_N
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # long rows first
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    row = tile // PARTS
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + (h // groups) * stride_kh
    v_ptr += b * stride_vb + (h // groups) * stride_vh
    out_ptr += b * stride_ob + h * stride_oh
    line = b * stride_nb + h * stride_nh + row
    num = tl.load(num_ptr + line)
    idx_ptr += line * longest

    tokens = row * BLOCK_Q + (tile % PARTS) * BLOCK_M + tl.arange(0, BLOCK_M)
    there, token = tokens[:, None] < q_len, tokens.to(tl.int64)[:, None]
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
    m, total = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32), tl.zeros([BLOCK_M], dtype=tl.float32)
    # The number of the next block is read one step early, so that no load of keys waits for it.
    block = tl.load(idx_ptr)
    for n in range(0, whole * SPLIT):
        key = block * BLOCK_K + (n % SPLIT) * BLOCK_N
        block = tl.load(idx_ptr + (n + 1) // SPLIT, mask=(n + 1) // SPLIT < num, other=0)
        acc, m, total = _step(
            acc, m, total, q, k_ptr, v_ptr, key, stride_kt, stride_vt, scale, position, start, stop,
            BLOCK_N, D, DV, False, PRECISION,
        )  # fmt: skip
    for n in range(whole * SPLIT, num * SPLIT):
        key = tl.load(idx_ptr + n // SPLIT) * BLOCK_K + (n % SPLIT) * BLOCK_N
        acc, m, total = _step(
            acc, m, total, q, k_ptr, v_ptr, key, stride_kt, stride_vt, scale, position, start, stop,
            BLOCK_N, D, DV, True, PRECISION,
        )  # fmt: skip
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    dims = tl.arange(0, DV)[None, :]
    tl.store(out_ptr + token * stride_ot + dims, out.to(out_ptr.dtype.element_ty), mask=there)
