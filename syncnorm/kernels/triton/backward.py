"""The kernels of `Backward`."""

import triton
import triton.language as tl

from ..epilogue import LEAST_NOISE as _LEAST_NOISE
from .device import (
    NEGATIVE_SLOPE,
    affine,
    column,
    from_bits,
    is_last,
    jit_pass,
    load_bits,
    load_channels,
    load_rows,
    load_statistics,
    load_weights,
    matches,
    or_one,
    place,
    store_cast,
    store_pair,
    store_stamp,
    through_activation,
    tile_offsets,
)

SCALE = tl.constexpr(2.0**-60)  # of x - mean: 1e28 becomes 1e10, 1e-16 becomes 1e-34
LEAST_NOISE = tl.constexpr(_LEAST_NOISE)


@jit_pass
def reduce_grad_kernel(
    dy, x, statistics, weight, bias,
    kept,  # signs or residual, or None
    mask,
    grad_weight,
    grad_bias,
    sums,
    partial,  # None if there is one run
    counters,
    number: tl.int64,  # of the stamp
    C, S, tiles, blocks,
    ALIGN: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
    UNROLL: tl.constexpr, ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr, KEPT_SIGNS: tl.constexpr,
    ROUNDING: tl.constexpr, LEAST_ROUNDING: tl.constexpr,  # of y; None: not in place
    STAMPED: tl.constexpr,
):  # fmt: skip
    """Of dy and x: grad_weight, grad_bias and sums."""
    C, S, block, run, runs = place(tl.program_id(0), tl.num_programs(0), C, S, blocks, ALIGN, LAST, WIDE)
    channels = block * BC + tl.arange(0, BC)
    mean, invstd, high, scale, shift, inverse = _maps(
        statistics, weight, bias, channels, C, ACC, ROUNDING, LEAST_ROUNDING
    )
    sum_dz = tl.zeros((BC, BP), ACC)
    sum_dz_x = tl.zeros((BC, BP), ACC)
    for start in range(run, tiles, runs * UNROLL):
        for i in tl.static_range(UNROLL):
            _, _, _, centered, dz = _tile(
                dy, x, kept, mask, start + i * runs, tiles, block, C, S, high, scale, shift, inverse,
                LAST, BC, BP, ACC, ACTIVATION, KEPT_SIGNS, ROUNDING,
            )  # fmt: skip
            sum_dz += dz
            sum_dz_x += dz * centered
    first = tl.sum(sum_dz.to(tl.float64), 1)
    low = mean - mean.to(ACC).to(tl.float64)
    second = (tl.sum(sum_dz_x.to(tl.float64), 1) - low * first) * invstd
    if partial is None:
        _store_sums(grad_weight, grad_bias, sums, first, second, weight, channels, C, block, number, STAMPED)
    else:
        of_block = partial + block.to(tl.int64) * runs * (2 * BC)  # (runs, 2, BC)
        store_pair(of_block + run * (2 * BC), first, second, tl.arange(0, BC), BC)
        if is_last(counters + block, runs):
            first, second = _merge(of_block, runs, BC, ROWS)
            _store_sums(grad_weight, grad_bias, sums, first, second, weight, channels, C, block, number, STAMPED)


@triton.jit
def _merge(partial, runs, BC: tl.constexpr, ROWS: tl.constexpr):
    """Return the sums of all runs, in the order of the runs, whichever program ends last."""
    first = tl.zeros((ROWS, BC), tl.float64)
    second = tl.zeros((ROWS, BC), tl.float64)
    for row in range(0, runs, ROWS):
        one, other = load_rows(partial, row, runs, BC, ROWS)
        first += one
        second += other
    return tl.sum(first, 0), tl.sum(second, 0)


@jit_pass
def grad_input_kernel(
    dy, x, statistics, weight, bias,
    kept,  # signs or residual, or None
    mask,
    sums,  # of all shards; None: the statistics are constants
    dx,
    dz,  # or None
    flag,  # of the device, or None without a stamp
    eps_bits: tl.int64,  # 0 with epsilon inside of the root
    number: tl.int64, ranks: tl.int64,
    C, S, tiles, blocks,
    ALIGN: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
    ACTIVATION: tl.constexpr, KEPT_SIGNS: tl.constexpr,
    ROUNDING: tl.constexpr, LEAST_ROUNDING: tl.constexpr,  # of y; None: not in place
    CENTERED: tl.constexpr,  # not about zero
):  # fmt: skip
    """Of dy and x: dx and dz. It walks backwards, as `normalize_kernel` does."""
    C, S, block, run, runs = place(tl.program_id(0), tl.num_programs(0), C, S, blocks, ALIGN, LAST, WIDE)
    channels = block * BC + tl.arange(0, BC)
    mean, invstd, high, scale, shift, inverse = _maps(
        statistics, weight, bias, channels, C, ACC, ROUNDING, LEAST_ROUNDING
    )
    if flag is not None:
        wrong = not matches(sums + 2 * C, number, ranks)
        tl.store(flag, number + 1, mask=(tl.program_id(0) == 0) & wrong)
    if sums is not None:
        n = or_one(tl.load(statistics + 2 * C))
        inside_root = 1 - from_bits(eps_bits) * invstd  # 0 where all values are, at which x is too
        first, second = load_statistics(sums, channels, C)
        slope = -invstd * invstd * second / (n * tl.where(inside_root > 0, inside_root, 1.0))
        offset = -slope * (mean - mean.to(ACC).to(tl.float64))
        if CENTERED:
            offset -= invstd * first / n
        slope, offset = column(slope / SCALE, ACC), column(offset, ACC)  # a slope itself may have no float32
    for i in range(run, tiles, runs):
        offsets, inside, w, centered, grad = _tile(
            dy, x, kept, mask, tiles - 1 - i, tiles, block, C, S, high, scale, shift, inverse,
            LAST, BC, BP, ACC, ACTIVATION, KEPT_SIGNS, ROUNDING,
        )  # fmt: skip
        result = grad * scale
        if sums is not None:
            through = (centered * SCALE) * slope + offset
            if mask is not None:
                through = tl.where(w == 0, 0.0, through * w)  # where it is 0, x may be no number
            result += through
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=inside)
        if dz is not None:
            tl.store(dz + offsets, grad.to(dz.dtype.element_ty), mask=inside)


@triton.jit
def _store_sums(grad_weight, grad_bias, sums, first, second, weight, channels, C, block, number, STAMPED: tl.constexpr):
    """Store of Σ dz and Σ dz * x̂ the gradients, in their dtype, and both times weight, with the stamp."""
    store_cast(grad_weight + channels, second, channels < C)
    store_cast(grad_bias + channels, first, channels < C)
    w = load_channels(weight, channels, C, 1.0)
    store_pair(sums, first * w, second * w, channels, C)
    if STAMPED:
        store_stamp(sums + 2 * C, number, block == 0)


@triton.jit
def _maps(
    statistics, weight, bias, channels, C, ACC: tl.constexpr, ROUNDING: tl.constexpr, LEAST_ROUNDING: tl.constexpr
):  # fmt: skip
    """Return mean and invstd of the channels, the affine map of forward as `affine` does, and its inverse if in place.

    In place x - mean is computed from y and takes the place of x, so the mean is 0.
    """
    mean, invstd = load_statistics(statistics, channels, C)
    if ROUNDING is not None:
        mean = tl.zeros_like(mean)
    high, scale, shift = affine(mean, invstd, weight, bias, channels, C, ACC)
    inverse = scale  # not used, unless it is in place
    if ROUNDING is not None:
        inverse = _inverse_scale(invstd, weight, bias, channels, C, ACC, ROUNDING, LEAST_ROUNDING)
    return mean, invstd, high, scale, shift, inverse


@triton.jit
def _inverse_scale(
    invstd, weight, bias, channels, C, ACC: tl.constexpr, ROUNDING: tl.constexpr, LEAST_ROUNDING: tl.constexpr
):  # fmt: skip
    """Return what z - bias is multiplied by to give x - mean, (BC, 1); see `reference`."""
    scale = invstd * load_channels(weight, channels, C, 1.0)
    size = tl.abs(load_channels(bias, channels, C, 0.0))
    noise = tl.maximum(invstd * (ROUNDING * size + LEAST_ROUNDING), LEAST_NOISE)
    return column(scale / (scale * scale + noise * noise), ACC)


@triton.jit
def _tile(
    dy, x, kept, mask, tile, tiles, block, C, S, high, scale, shift, inverse,
    LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
    ACTIVATION: tl.constexpr, KEPT_SIGNS: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Return where the values of a tile are, which exist, their weights, x - high, and dz from dy, (BC, BP).

    dz is what passes through the activation. In place x is y, from which x - mean is computed, and high is 0. Where the
    weight and dy are 0, x and the residual may hold anything.
    """
    channels = block * BC + tl.arange(0, BC)
    offsets, inside, positions, exists = tile_offsets(tile, tiles, channels, C, S, BP, LAST)
    w = load_weights(mask, positions, exists, ACC)
    grad = tl.load(dy + offsets, mask=inside, other=0).to(ACC)
    value = tl.load(x + offsets, mask=inside, other=0).to(ACC)
    if mask is not None:
        void = (w == 0) & (grad == 0)
        value = tl.where(void, high, value)
    if ROUNDING is not None:
        if ACTIVATION == "leaky_relu":
            grad = tl.where(value > 0, grad, grad * NEGATIVE_SLOPE)
            value = tl.where(value > 0, value, value / NEGATIVE_SLOPE)
        centered = (value - shift) * inverse
    else:
        centered = value - high
        if KEPT_SIGNS:
            bit = load_bits(kept, tile, tiles, block, C, S, BC, BP, LAST)
            grad = tl.where((bit & 1) > 0, grad, grad * NEGATIVE_SLOPE if ACTIVATION == "leaky_relu" else 0.0)
        elif ACTIVATION is not None:
            z = centered * scale + shift
            if kept is not None:
                added = tl.load(kept + offsets, mask=inside, other=0).to(ACC)
                z += added if mask is None else tl.where(void, 0.0, added)
            grad = through_activation(grad, z, ACTIVATION)
    return offsets, inside, w, centered, grad
