"""The Hopper program of `hopper`, apart because importing it needs Triton with its Gluon language.

One program a multiprocessor walks tiles of 128 queries, taking the next one from a counter that all programs share: rows'
lists differ in length, and who is done first goes on. Three groups of warps share a program: a single warp that takes tiles
and copies keys and values into a ring of slots in shared memory, and two groups that compute 64 queries each. They meet
only at barriers: *full* ones say that a slot has come, *empty* ones that both readers are done with it. While the tensor cores
multiply one block's weights by its values, the same warps take the next block's exponentials (FlashAttention-3, arXiv
2407.08608).
"""

# mypy: ignore-errors
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
def _announce(tile_s, q_empty, turn, program, HALF: gl.constexpr):
    """Tell a group of warps its next tile, once it is done with its queries; what follows at `q_full` publishes it."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(q_empty.index(HALF), (turn & 1) ^ 1)
    tile_s.index(HALF).store(gl.full([1], program, gl.int32, one))


@gluon.jit
def _next(tile_s, q_full, turn, HALF: gl.constexpr):
    """The tile that was announced; its queries have come."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(q_full.index(HALF), turn & 1)
    return gl.max(tile_s.index(HALF).load(one), 0)


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, num_ptr, idx_ptr, counter_ptr, tiles, heads, total, stride_nb, stride_nh, longest,
    q_row_b, q_row_h, q_column_h, k_row_b, k_row_h, k_column_h, v_row_b, v_row_h, v_column_h,
    q_s, k_s, v_s, tile_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy each tile's queries, and its keys and values block by block, as soon as there is a free slot."""
    step = 0
    turn = 0
    program = gl.program_id(0)
    while program < total:
        b, h, row = _place(program, tiles, heads, GROUPS)
        group = h // GROUPS
        lists = b.to(gl.int64) * stride_nb + h.to(gl.int64) * stride_nh + row
        count = gl.maximum(gl.load(num_ptr + lists), 1)
        place = idx_ptr + lists * longest
        for half in gl.static_range(2):
            _announce(tile_s, q_empty, turn, program, half)
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
        program = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
    for half in gl.static_range(2):
        _announce(tile_s, q_empty, turn, program, half)
        mbarrier.arrive(q_full.index(half))


@gluon.jit
def _weigh(scores, m, sums, scale):
    """One step of the online softmax: weights, their row maxima and sums, and what earlier weights shrink by."""
    highest = gl.maximum(m, gl.max(scores, 1) * scale)
    p = gl.exp2(scores * scale - highest[:, None])
    decay = gl.exp2(m - highest)
    return p, highest, sums * decay + gl.sum(p, 1), decay


@gluon.jit
def _write(out_ptr, acc, token, q_len, stride_t, kind: gl.constexpr, layout: gl.constexpr):
    """Store 64 rows of one head."""
    tokens = token + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    dims = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    place = out_ptr + tokens.to(gl.int64)[:, None] * stride_t + dims[None, :]
    gl.store(place, acc.to(kind), mask=tokens[:, None] < q_len)


@gluon.jit
def _attend(
    q, k_s, v_s, k_full, k_empty, v_full, v_empty, step, count, last, first_position, scale,
    kind: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, wide: gl.constexpr, narrow: gl.constexpr,
):  # fmt: skip
    """The online softmax of 64 queries over `count` blocks; the sums of values before they are divided, and of weights."""
    weights: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=narrow, k_width=2)
    out_row: gl.constexpr = gl.SliceLayout(1, narrow)
    nothing = gl.zeros([ROWS, SIDE], gl.float32, wide)
    slot = step % STAGES
    mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
    running = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [running])
    mbarrier.arrive(k_empty.index(slot))
    keys = last * SIDE + gl.arange(0, SIDE, gl.SliceLayout(0, wide))
    position = first_position + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
    scores = gl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, wide))
    coming, m, sums, decay = _weigh(scores, m, gl.zeros_like(m), scale)
    p = gl.convert_layout(coming.to(kind), weights)
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
        coming, m, sums, decay = _weigh(scores, m, sums, scale)
        acc = warpgroup_mma_wait(0, [mixing])
        mbarrier.arrive(v_empty.index(before))
        acc = acc * gl.convert_layout(decay, out_row)[:, None]
        p = gl.convert_layout(coming.to(kind), weights)
    mbarrier.wait(v_full.index(slot), ((step + count - 1) // STAGES) & 1)
    mixing = warpgroup_mma(p, v_s.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [mixing])
    mbarrier.arrive(v_empty.index(slot))
    return acc, gl.convert_layout(sums, out_row)


@gluon.jit
def _consume(
    out_ptr, num_ptr, idx_ptr, tiles, heads, total, stride_nb, stride_nh, longest,
    stride_ob, stride_oh, stride_ot, q_len, q_offset, scale,
    q_s, k_s, v_s, tile_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """64 queries of each tile, from the diagonal back to the first block."""
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    step = 0
    turn = 0
    program = _next(tile_s, q_full, turn, HALF)
    while program < total:
        b, h, row = _place(program, tiles, heads, GROUPS)
        lists = b.to(gl.int64) * stride_nb + h.to(gl.int64) * stride_nh + row
        listed = gl.load(num_ptr + lists)
        count = gl.maximum(listed, 1)  # a row without blocks reads block 0 and writes zeros
        last = gl.load(idx_ptr + lists * longest + count - 1)
        token = row * SIDE + HALF * ROWS
        acc, sums = _attend(
            q_s.index(HALF), k_s, v_s, k_full, k_empty, v_full, v_empty, step, count, last, q_offset + token, scale,
            q_s.dtype, STAGES, D, wide, narrow,
        )  # fmt: skip
        mbarrier.arrive(q_empty.index(HALF))
        share = gl.where(listed > 0, 1.0 / sums, 0.0)
        place = out_ptr + b.to(gl.int64) * stride_ob + h.to(gl.int64) * stride_oh
        _write(place, acc * share[:, None], token, q_len, stride_ot, q_s.dtype, narrow)
        step += count
        turn += 1
        program = _next(tile_s, q_full, turn, HALF)


@gluon.jit
def _barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """`count` barriers that open after as many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(made.index(i), count=arrivals)
    return made


@gluon.jit(do_not_specialize=["q_len", "q_offset", "longest", "tiles", "total"])
def forward(
    q_desc, k_desc, v_desc, out_ptr, num_ptr, idx_ptr, counter_ptr, scale,
    stride_ob, stride_oh, stride_ot, stride_nb, stride_nh,
    q_row_b, q_row_h, q_column_h, k_row_b, k_row_h, k_column_h, v_row_b, v_row_h, v_column_h,
    q_len, q_offset, longest, tiles, heads, total,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Set up slots and barriers, then part the warps."""
    q_s = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, SIDE, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(v_desc.dtype, [STAGES, SIDE, D], v_desc.layout)
    tile_s = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full, q_empty = _barriers(2, 1), _barriers(2, 1)
    k_full, k_empty = _barriers(STAGES, 1), _barriers(STAGES, 2)
    v_full, v_empty = _barriers(STAGES, 1), _barriers(STAGES, 2)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume, (
                out_ptr, num_ptr, idx_ptr, tiles, heads, total, stride_nb, stride_nh, longest,
                stride_ob, stride_oh, stride_ot, q_len, q_offset, scale,
                q_s, k_s, v_s, tile_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, GROUPS, STAGES, D, first,
            )),
            (_consume, (
                out_ptr, num_ptr, idx_ptr, tiles, heads, total, stride_nb, stride_nh, longest,
                stride_ob, stride_oh, stride_ot, q_len, q_offset, scale,
                q_s, k_s, v_s, tile_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, GROUPS, STAGES, D, second,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, num_ptr, idx_ptr, counter_ptr, tiles, heads, total, stride_nb, stride_nh, longest,
                q_row_b, q_row_h, q_column_h, k_row_b, k_row_h, k_column_h, v_row_b, v_row_h, v_column_h,
                q_s, k_s, v_s, tile_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, GROUPS, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
