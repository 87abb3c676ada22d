"""The kernel of `normalize`."""

import triton.language as tl

from .device import (
    activate,
    affine,
    from_bits,
    jit_pass,
    load_moments,
    matches,
    or_one,
    place,
    store_bits,
    store_pair,
    tile_offsets,
)
from .running import update_running


@jit_pass
def normalize_kernel(
    x, moments, weight, bias, residual, y, statistics,
    signs,  # or None, as all tensors before and after may be but x, moments, y and statistics
    running_mean, running_var, num_batches_tracked,
    flag,  # of the device, or None without a stamp
    eps_bits: tl.int64, momentum_bits: tl.int64, number: tl.int64, ranks: tl.int64,
    C, S, tiles, blocks,
    ALIGN: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
    STAMPED: tl.constexpr,  # the moments, which are packed
    EPS_OUTSIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,  # a name or None
    CUMULATIVE: tl.constexpr, CHANNELS: tl.constexpr,  # of the running statistics
):  # fmt: skip
    """Of x, moments and residual: y, statistics and the signs of z. The first program moves the running statistics.

    A stamp that does not match sets the flag, and the running statistics do not move.

    It walks backwards, since the L2 cache has what `moments` read last.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    if running_mean is not None:
        program -= 1
        programs -= 1
    C, S, block, run, runs = place(program, programs, C, S, blocks, ALIGN, LAST, WIDE)
    right = True
    if STAMPED:
        right = matches(moments + 2 * C + 1, number, ranks)
        tl.store(flag, number + 1, mask=(tl.program_id(0) == 0) & (not right))
    if program < 0:
        if running_mean is not None:
            update_running(
                running_mean, running_var, num_batches_tracked, moments, momentum_bits, right, C,
                STAMPED, CUMULATIVE, CHANNELS,
            )  # fmt: skip
    else:
        channels = block * BC + tl.arange(0, BC)
        mean, m2, count = load_moments(moments, channels, C, STAMPED)
        variance, eps = m2 / or_one(count), from_bits(eps_bits)
        invstd = 1 / (tl.sqrt(variance) + eps) if EPS_OUTSIDE else 1 / tl.sqrt(variance + eps)
        if run == 0:
            store_pair(statistics, mean, invstd, channels, C)
            tl.store(statistics + 2 * C, count, mask=block == 0)
        high, scale, shift = affine(mean, invstd, weight, bias, channels, C, ACC)
        for i in range(run, tiles, runs):
            tile = tiles - 1 - i
            offsets, inside, _, _ = tile_offsets(tile, tiles, channels, C, S, BP, LAST)
            value = tl.load(x + offsets, mask=inside, other=0).to(ACC)
            z = (value - high) * scale + shift
            if residual is not None:
                z += tl.load(residual + offsets, mask=inside, other=0).to(ACC)
            if signs is not None:
                store_bits(signs, z > 0, tile, tiles, block, C, S, BC, BP, LAST)
            tl.store(y + offsets, activate(z, ACTIVATION).to(y.dtype.element_ty), mask=inside)
