"""The kernels of `normalize`."""

import triton.language as tl

from .device import (
    activate,
    affine,
    from_bits,
    jit_pass,
    load_moments,
    or_one,
    place_from_the_end,
    store_bits,
    store_pair,
    tile_offsets,
)


@jit_pass
def normalize_kernel(
    x, moments, weight, bias, residual, y, statistics, signs, eps_bits, C, S, tiles, per, blocks,
    ALIGN: tl.constexpr, LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
    EPS_OUTSIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,  # a name or None
    WHOLE_BYTES: tl.constexpr,  # signs are bits; else bytes
):  # fmt: skip
    """Of x and residual: y, statistics and the signs of z.

    It walks backwards: the L2 cache has what `moments` read last.
    """
    C, S, block, run = place_from_the_end(C, S, blocks, ALIGN, LAST)
    channels = block * BC + tl.arange(0, BC)
    mean, m2, count = load_moments(moments, channels, C)
    variance, eps = m2 / or_one(count), from_bits(eps_bits)
    invstd = 1 / (tl.sqrt(variance) + eps) if EPS_OUTSIDE else 1 / tl.sqrt(variance + eps)
    if run == 0:
        store_pair(statistics, mean, invstd, channels, C)
        tl.store(statistics + 2 * C, count, mask=block == 0)
    high, low, scale, shift = affine(mean, invstd, weight, bias, channels, C, ACC)
    last = tl.minimum((run + 1) * per, tiles) - 1
    for i in range(run * per, last + 1):
        tile = run * per + last - i
        offsets, inside, _, _ = tile_offsets(tile, channels, C, S, BP, LAST)
        value = tl.load(x + offsets, mask=inside, other=0).to(ACC)
        z = ((value - high) - low) * scale + shift
        if residual is not None:
            z += tl.load(residual + offsets, mask=inside, other=0).to(ACC)
        if signs is not None:
            if WHOLE_BYTES:
                store_bits(signs, z > 0, tile, block, C, S, BC, BP, LAST)
            else:
                tl.store(signs + offsets, (z > 0).to(tl.uint8), mask=inside)
        tl.store(y + offsets, activate(z, ACTIVATION).to(y.dtype.element_ty), mask=inside)


@jit_pass
def to_bits_kernel(
    positive,  # (values,) uint8, 0 or 1
    bits,  # (⌈values / 8⌉,) uint8
    values, BYTES: tl.constexpr,
):  # fmt: skip
    """Of bytes: bits."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    value = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    bit = tl.load(positive + value, mask=value < values, other=0).to(tl.int32)
    tl.store(bits + byte, tl.sum(bit << tl.arange(0, 8)[None, :], 1).to(tl.uint8), mask=byte * 8 < values)
