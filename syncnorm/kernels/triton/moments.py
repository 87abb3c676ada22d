"""The kernel of `moments`."""

import triton
import triton.language as tl

from .device import (
    is_last,
    jit_pass,
    load_rows,
    load_weights,
    or_one,
    place,
    store_pair,
    store_stamp,
    tile_offsets,
)

SCALE = tl.constexpr(2.0**-100)


@jit_pass
def moments_kernel(
    x, mask, moments,
    partial,  # None if there is one run
    counters,
    number: tl.int64,  # of the stamp
    C, S, tiles, blocks,
    ALIGN: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
    UNROLL: tl.constexpr, ROWS: tl.constexpr,
    STAMPED: tl.constexpr,
):  # fmt: skip
    """Of x and mask: moments, or packed."""
    C, S, block, run, runs = place(tl.program_id(0), tl.num_programs(0), C, S, blocks, ALIGN, LAST, WIDE)
    channels = block * BC + tl.arange(0, BC)
    mean, m2, count = _sum(
        x, mask, channels, run, runs, tiles, C, S, LAST, BC, BP, ACC, UNROLL, SCALED=False
    )  # fmt: skip
    if tl.sum((m2 - m2 != 0).to(tl.int32)) > 0:  # squares that have no float32, or values that are no numbers
        mean, m2, count = _sum(
            x, mask, channels, run, runs, tiles, C, S, LAST, BC, BP, ACC, UNROLL, SCALED=True
        )  # fmt: skip
    if partial is None:
        _store_moments(moments, mean, m2, count, channels, C, block, number, STAMPED)
    else:
        of_block = partial + block.to(tl.int64) * runs * (2 * BC + 1)  # (runs, 2, BC), then the counts (runs,)
        counts = of_block + runs * (2 * BC)
        store_pair(of_block + run * (2 * BC), mean, m2, tl.arange(0, BC), BC)
        tl.store(counts + run, count)
        if is_last(counters + block, runs):
            mean, m2, count = _merge(of_block, counts, runs, BC, ROWS)
            _store_moments(moments, mean, m2, count, channels, C, block, number, STAMPED)


@triton.jit
def _sum(
    x, mask, channels, run, runs, tiles, C, S,
    LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Return mean, M2 and count of the tiles of a run. `SCALED`: by values so small that their squares have a float32.

    Each thread sums about the first value that it finds. However far that is from the others, it is one of them, so
    it can cost no more digits than the variance of the thread's few values makes up for. With weights, it goes on about
    a value that weighs more than all before.
    """
    total_weight = tl.zeros((1, BP), ACC)
    shift = tl.zeros((BC, BP), ACC)
    total = tl.zeros((BC, BP), ACC)
    total_square = tl.zeros((BC, BP), ACC)
    for start in range(run, tiles, runs * UNROLL):
        for i in tl.static_range(UNROLL):
            offsets, inside, positions, exists = tile_offsets(start + i * runs, tiles, channels, C, S, BP, LAST)
            value = tl.load(x + offsets, mask=inside, other=0).to(ACC)
            if SCALED:
                value *= SCALE
            w = load_weights(mask, positions, exists, ACC)
            if mask is not None:
                value = tl.where(w > 0, value, 0.0)
                way = tl.where(w > total_weight, shift - value, 0.0)
                total_square += way * (2 * total + total_weight * way)
                total += total_weight * way
                shift -= way
            else:
                shift = tl.where(total_weight > 0, shift, value)
            value -= shift
            total_weight += w
            total += w * value
            total_square += w * value * value
    found = (total_weight > 0).to(ACC)
    middle = tl.sum(shift * found, 1) / or_one(tl.sum(found))  # about which the threads' means keep their digits
    correction = total / or_one(total_weight)
    mean = shift - middle[:, None] + correction
    count = tl.sum(total_weight.to(tl.float64))
    center = tl.sum(total_weight * mean, 1).to(tl.float64) / or_one(count)
    difference = mean - center.to(ACC)[:, None]
    m2 = tl.sum(total_square - correction * total + total_weight * difference * difference, 1)
    mean, m2 = middle.to(tl.float64) + center, m2.to(tl.float64)
    if SCALED:
        mean, m2 = mean / SCALE, m2 / (SCALE * SCALE)
    return mean, m2, count


@triton.jit
def _merge(partial, counts, runs, BC: tl.constexpr, ROWS: tl.constexpr):
    """Return the moments of all runs, in the order of the runs, whichever program ends last."""
    shift, _ = load_rows(partial, 0, 1, BC, 1)
    weight = tl.zeros((ROWS,), tl.float64)
    total = tl.zeros((ROWS, BC), tl.float64)
    total_square = tl.zeros((ROWS, BC), tl.float64)
    for first in range(0, runs, ROWS):
        rows = first + tl.arange(0, ROWS)
        w = tl.load(counts + rows, mask=rows < runs, other=0, cache_modifier=".cg")
        mean, m2 = load_rows(partial, first, runs, BC, ROWS)
        difference = mean - shift
        weight += w
        total += w[:, None] * difference
        total_square += m2 + w[:, None] * difference * difference
    count = tl.sum(weight)
    first_moment = tl.sum(total, 0)
    correction = first_moment / or_one(count)
    return tl.sum(shift, 0) + correction, tl.sum(total_square, 0) - correction * first_moment, count


@triton.jit
def _store_moments(moments, mean, m2, count, channels, C, block, number, STAMPED: tl.constexpr):
    """Store moments, M2 not below 0, or packed with a stamp; the count with the first block of channels."""
    m2 = tl.where(m2 < 0, 0.0, m2)
    if STAMPED:
        store_pair(moments, count * mean, m2 + count * mean * mean, channels, C)
        store_stamp(moments + 2 * C + 1, number, block == 0)
    else:
        store_pair(moments, mean, m2, channels, C)
    tl.store(moments + 2 * C, count, mask=block == 0)
