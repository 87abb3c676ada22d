"""The kernels of `moments`, `pack`, `unpack` and `update_running`."""

import triton
import triton.language as tl

from .device import (
    from_bits,
    jit_pass,
    load_channels,
    load_moments,
    load_weights,
    or_one,
    place,
    row_pointers,
    store_cast,
    store_pair,
    tile_offsets,
)


@jit_pass
def moments_kernel(
    x, mask, partial, C, S, tiles, per, blocks,
    ALIGN: tl.constexpr, LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of x and mask: partial moments.

    Each thread sums about the first value that it finds. However far that is from the others, it is one of them, so
    it can cost no more digits than the variance of the thread's few values makes up for.
    """
    C, S, block, run = place(C, S, blocks, ALIGN, LAST)
    channels = block * BC + tl.arange(0, BC)
    total_weight = tl.zeros((1, BP), ACC)
    shift = tl.zeros((BC, BP), ACC)
    total = tl.zeros((BC, BP), ACC)
    total_square = tl.zeros((BC, BP), ACC)
    for tile in range(run * per, tl.minimum((run + 1) * per, tiles)):
        offsets, inside, positions, exists = tile_offsets(tile, channels, C, S, BP, LAST)
        value = tl.load(x + offsets, mask=inside, other=0).to(ACC)
        w = load_weights(mask, positions, exists, ACC)
        if mask is not None:
            value = tl.where(w > 0, value, 0.0)
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
    _store_moments(partial + run.to(tl.int64) * (2 * C + 1), mean, m2, count, channels, C, block)


@jit_pass
def merge_moments_kernel(partial, moments, C, runs, RUNS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of partial moments: the moments of all runs."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    shift = load_channels(partial, channels, C, 0.0)[None, :]
    weight = tl.zeros((RUNS,), tl.float64)
    total = tl.zeros((RUNS, CHANNELS), tl.float64)
    total_square = tl.zeros((RUNS, CHANNELS), tl.float64)
    for first in range(0, runs, RUNS):
        rows, inside = row_pointers(partial, first, runs, 2 * C + 1, channels, C, RUNS)
        w = tl.load(rows + 2 * C, mask=first + tl.arange(0, RUNS) < runs, other=0)
        difference = tl.load(rows[:, None] + channels[None, :], mask=inside, other=0) - shift
        m2 = tl.load(rows[:, None] + C + channels[None, :], mask=inside, other=0)
        weight += w
        total += w[:, None] * difference
        total_square += m2 + w[:, None] * difference * difference
    count = tl.sum(weight)
    first_moment = tl.sum(total, 0)
    correction = first_moment / or_one(count)
    m2 = tl.sum(total_square, 0) - correction * first_moment
    _store_moments(moments, tl.sum(shift, 0) + correction, m2, count, channels, C, tl.program_id(0))


@jit_pass
def pack_kernel(values, C, BLOCK: tl.constexpr):
    """Of moments: packed, in place."""
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mean, m2, count = load_moments(values, channels, C)
    store_pair(values, count * mean, m2 + count * mean * mean, channels, C)


@jit_pass
def unpack_kernel(values, C, BLOCK: tl.constexpr):
    """Of packed moments: the moments, in place."""
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total, total_square, count = load_moments(values, channels, C)
    mean = total / or_one(count)
    m2 = total_square - total * mean
    store_pair(values, mean, tl.where(m2 < 0, 0.0, m2), channels, C)


@triton.jit(do_not_specialize=["C", "mean_stride", "var_stride", "momentum_bits"])
def update_running_kernel(
    running_mean,  # (C,) moved, as running_var
    running_var,
    num_batches_tracked,  # () integer, moved; or None
    moments,
    momentum_bits,
    C, mean_stride, var_stride, CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the buffers. One program, since all channels need the counter before it moves."""
    count = tl.load(moments + 2 * C)
    factor = from_bits(momentum_bits)
    if num_batches_tracked is not None:
        batches = tl.load(num_batches_tracked) + (count > 0).to(tl.int64)
        if CUMULATIVE:
            factor = 1 / or_one(batches.to(tl.float64))
        tl.debug_barrier()  # every warp has read it
        tl.store(num_batches_tracked, batches)
    moved = tl.where(count > 0, C, 0)
    for first in range(0, C, BLOCK):
        channels = first + tl.arange(0, BLOCK)
        inside = channels < moved
        mean, m2, _ = load_moments(moments, channels, C)
        _move(running_mean + channels * mean_stride, mean, factor, inside)
        _move(running_var + channels * var_stride, m2 / or_one(count - 1), factor, inside)


@triton.jit
def _store_moments(moments, mean, m2, count, channels, C, block):
    """Store moments, M2 not below 0; the count with the first block of channels."""
    store_pair(moments, mean, tl.where(m2 < 0, 0.0, m2), channels, C)
    tl.store(moments + 2 * C, count, mask=block == 0)


@triton.jit
def _move(running, batch, factor, inside):
    """Store running + factor * (batch - running), in the way of torch.lerp."""
    old = tl.load(running, mask=inside, other=0).to(tl.float64)
    new = tl.where(factor < 0.5, old + factor * (batch - old), batch - (batch - old) * (1 - factor))
    store_cast(running, new, inside)
