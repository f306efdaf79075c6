"""The Hopper program of `hopper`, apart because importing it needs Triton with its Gluon language.

One program a multiprocessor walks tiles of 128 queries. Three groups of warps share it: a single warp that copies keys
and values into a ring of slots in shared memory, and two groups that compute 64 queries each. They meet only at
barriers: *full* ones say that a slot has come, *empty* ones that both readers are done with it. While the tensor cores
multiply one block's weights by its values, the same warps take the next block's exponentials (FlashAttention-3, arXiv
2407.08608).
"""

# mypy: ignore-errors
# ruff: noqa: SIM113
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)  # queries of one group of warps
SIDE = gl.constexpr(128)  # of a block


@gluon.jit
def _place(program, tiles, heads, GROUPS: gl.constexpr):
    """Batch row, head and query block of a tile: the heads of a group side by side, long rows first."""
    within = program % (tiles * GROUPS)
    line = program // (tiles * GROUPS) * GROUPS + within % GROUPS
    return line // heads, line % heads, tiles - 1 - within // GROUPS


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, num_ptr, idx_ptr, tiles, heads, total, stride_nb, stride_nh, longest,
    q_row_b, q_row_h, q_column_h, k_row_b, k_row_h, k_column_h, v_row_b, v_row_h, v_column_h,
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy each tile's queries, and its keys and values block by block, as soon as there is a free slot."""
    step = 0
    turn = 0
    for program in range(gl.program_id(0), total, gl.num_programs(0)):
        b, h, row = _place(program, tiles, heads, GROUPS)
        group = h // GROUPS
        lists = b.to(gl.int64) * stride_nb + h.to(gl.int64) * stride_nh + row
        count = gl.load(num_ptr + lists)
        place = idx_ptr + lists * longest
        for half in gl.static_range(2):
            mbarrier.wait(q_empty.index(half), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes)
            at = b * q_row_b + h * q_row_h + row * SIDE + half * ROWS
            tma.async_copy_global_to_shared(q_desc, [at, h * q_column_h], q_full.index(half), q_s.index(half))
        k_row = b * k_row_b + group * k_row_h
        v_row = b * v_row_b + group * v_row_h
        for n in range(count):
            block = gl.load(place + count - 1 - n)
            slot = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [k_row + block * SIDE, group * k_column_h], k_full.index(slot), k_s.index(slot)
            )
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                v_desc, [v_row + block * SIDE, group * v_column_h], v_full.index(slot), v_s.index(slot)
            )
            step += 1
        turn += 1


@gluon.jit
def _consume(
    out_ptr, num_ptr, idx_ptr, tiles, heads, total, stride_nb, stride_nh, longest,
    stride_ob, stride_oh, stride_ot, q_len, q_offset, scale,
    q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """The online softmax of 64 queries over their list, from the diagonal back to the first block."""
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weights: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=narrow, k_width=2)
    per_row: gl.constexpr = gl.SliceLayout(1, wide)
    out_row: gl.constexpr = gl.SliceLayout(1, narrow)
    kind: gl.constexpr = q_s.dtype
    nothing = gl.zeros([ROWS, SIDE], gl.float32, wide)
    step = 0
    turn = 0
    for program in range(gl.program_id(0), total, gl.num_programs(0)):
        b, h, row = _place(program, tiles, heads, GROUPS)
        lists = b.to(gl.int64) * stride_nb + h.to(gl.int64) * stride_nh + row
        count = gl.load(num_ptr + lists)  # no row is empty
        last = gl.load(idx_ptr + lists * longest + count - 1)
        token = row * SIDE + HALF * ROWS
        q = q_s.index(HALF)
        mbarrier.wait(q_full.index(HALF), turn & 1)

        slot = step % STAGES
        mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
        running = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [running])
        mbarrier.arrive(k_empty.index(slot))
        keys = last * SIDE + gl.arange(0, SIDE, gl.SliceLayout(0, wide))
        position = q_offset + token + gl.arange(0, ROWS, per_row)
        scores = gl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
        m = gl.max(scores, 1) * scale
        p = gl.exp2(scores * scale - m[:, None])
        sums = gl.sum(p, 1)
        p = gl.convert_layout(p.to(kind), weights)
        acc = gl.zeros([ROWS, D], gl.float32, narrow)
        for n in range(1, count):
            before = slot
            phase_before = ((step + n - 1) // STAGES) & 1
            slot = (step + n) % STAGES
            mbarrier.wait(k_full.index(slot), ((step + n) // STAGES) & 1)
            running = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), phase_before)
            mixing = warpgroup_mma(p, v_s.index(before), acc, is_async=True)
            scores = warpgroup_mma_wait(1, [running])
            mbarrier.arrive(k_empty.index(slot))
            highest = gl.maximum(m, gl.max(scores, 1) * scale)
            coming = gl.exp2(scores * scale - highest[:, None])
            decay = gl.exp2(m - highest)
            sums = sums * decay + gl.sum(coming, 1)
            m = highest
            acc = warpgroup_mma_wait(0, [mixing])
            mbarrier.arrive(v_empty.index(before))
            acc = acc * gl.convert_layout(decay, out_row)[:, None]
            p = gl.convert_layout(coming.to(kind), weights)
        mbarrier.arrive(q_empty.index(HALF))
        mbarrier.wait(v_full.index(slot), ((step + count - 1) // STAGES) & 1)
        mixing = warpgroup_mma(p, v_s.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [mixing])
        mbarrier.arrive(v_empty.index(slot))
        step += count
        turn += 1
        out = (acc * gl.convert_layout(1.0 / sums, out_row)[:, None]).to(kind)
        tokens = token + gl.arange(0, ROWS, out_row)
        place = out_ptr + b.to(gl.int64) * stride_ob + h.to(gl.int64) * stride_oh
        place = (
            place
            + tokens.to(gl.int64)[:, None] * stride_ot
            + gl.arange(0, D, gl.SliceLayout(0, narrow))[None, :]
        )
        gl.store(place, out, mask=tokens[:, None] < q_len)


@gluon.jit(do_not_specialize=["q_len", "q_offset", "longest", "tiles", "total"])
def forward(
    q_desc, k_desc, v_desc, out_ptr, num_ptr, idx_ptr, scale,
    stride_ob, stride_oh, stride_ot, stride_nb, stride_nh,
    q_row_b, q_row_h, q_column_h, k_row_b, k_row_h, k_column_h, v_row_b, v_row_h, v_column_h,
    q_len, q_offset, longest, tiles, heads, total,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Set up slots and barriers, then part the warps."""
    q_s = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, SIDE, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, SIDE, D], v_desc.layout)
    signal: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], signal)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], signal)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], signal)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], signal)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], signal)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], signal)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume, (
                out_ptr, num_ptr, idx_ptr, tiles, heads, total, stride_nb, stride_nh, longest,
                stride_ob, stride_oh, stride_ot, q_len, q_offset, scale,
                q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, GROUPS, STAGES, D, first,
            )),
            (_consume, (
                out_ptr, num_ptr, idx_ptr, tiles, heads, total, stride_nb, stride_nh, longest,
                stride_ob, stride_oh, stride_ot, q_len, q_offset, scale,
                q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, GROUPS, STAGES, D, second,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, num_ptr, idx_ptr, tiles, heads, total, stride_nb, stride_nh, longest,
                q_row_b, q_row_h, q_column_h, k_row_b, k_row_h, k_column_h, v_row_b, v_row_h, v_column_h,
                q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, GROUPS, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
