"""What the kernels share: a program's place, loads and stores, the affine map, sign bits and activations."""

import triton
import triton.language as tl

from ..epilogue import NEGATIVE_SLOPE as _NEGATIVE_SLOPE

NEGATIVE_SLOPE = tl.constexpr(_NEGATIVE_SLOPE)

# Sizes change with every batch of images of other sizes, and stamps with every call: no reason to compile again.
jit_pass = triton.jit(do_not_specialize=["C", "S", "tiles", "blocks", "eps_bits", "momentum_bits", "number", "ranks"])


@triton.jit
def place(program, programs, C, S, blocks, ALIGN: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr):
    """Return C, S, the block of channels and the run of tiles that a program has, and the number of runs.

    Run r has the tiles r, r + runs, r + 2 * runs and so on: at any time the programs are at one place of the memory,
    and at the end the L2 cache holds its last part.
    """
    if WIDE:
        S = S.to(tl.int64)
    if LAST:
        C = C * ALIGN
    else:
        S = S * ALIGN
    return C, S, program % blocks, program // blocks, programs // blocks


@triton.jit
def is_last(counter, programs):
    """Return whether this program is the last of `programs` that ask. It then sees all that the others have stored.

    The counter is 0 before the first and after the last. What it sees has to be loaded past the L1 cache, with ".cg".
    """
    tl.debug_barrier()  # all threads of this program have stored
    before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = before == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def tile_offsets(tile, tiles, channels, C, S, BP: tl.constexpr, LAST: tl.constexpr):
    """Return where the values of a tile are, which exist, (BC, BP); their positions and which exist, (1, BP)."""
    blocks = tl.cdiv(S, BP)
    n = (tile // blocks).to(tl.int64)
    s = (tile % blocks).to(tl.int64) * BP + tl.arange(0, BP)
    # With channels innermost n is 0.
    offsets = s[None, :] * C + channels[:, None] if LAST else (n * C + channels)[:, None] * S + s[None, :]
    exists = (s < tl.where(tile < tiles, S, 0))[None, :]
    return offsets, (channels < C)[:, None] & exists, (n * S + s)[None, :], exists


@triton.jit
def load_weights(mask, positions, exists, ACC: tl.constexpr):
    """Return the weights of positions, (1, BP); 0 of those that do not exist."""
    return exists.to(ACC) if mask is None else tl.load(mask + positions, mask=exists, other=0).to(ACC)


@triton.jit
def from_bits(bits):
    """Return the float64 that an integer stands for: Triton passes no floating-point argument but float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def or_one(count):
    """Return a count to divide by: 1 where there is nothing."""
    return tl.where(count > 0, count, 1.0)


@triton.jit
def load_channels(vector, channels, C, default: tl.constexpr):
    """Return a vector (C,) at the channels, in float64; the default for None."""
    if vector is None:
        values = tl.full(channels.shape, default, tl.float64)
    else:
        values = tl.load(vector + channels, mask=channels < C, other=0).to(tl.float64)
    return values


@triton.jit
def load_statistics(statistics, channels, C):
    """Return both rows of statistics or sums at the channels."""
    return load_channels(statistics, channels, C, 0.0), load_channels(statistics + C, channels, C, 0.0)


@triton.jit
def load_moments(moments, channels, C, STAMPED: tl.constexpr):
    """Return mean, M2 and the count, of moments or packed moments, which have a stamp."""
    mean, m2 = load_statistics(moments, channels, C)
    count = tl.load(moments + 2 * C)
    if STAMPED:
        total, total_square = mean, m2
        mean = total / or_one(count)
        m2 = tl.fma(-total, mean, total_square)  # explicit: the same bits in each compiled kernel
        m2 = tl.where(m2 < 0, 0.0, m2)
    return mean, m2, count


@triton.jit
def store_pair(pair, first, second, channels, C):
    """Store two rows, (2, C)."""
    tl.store(pair + channels, first, mask=channels < C)
    tl.store(pair + C + channels, second, mask=channels < C)


@triton.jit
def store_stamp(tail, number, inside):
    """Store the last two values of a message, h and h²."""
    number = number.to(tl.int64)
    tl.store(tail, number.to(tl.float64), mask=inside)
    tl.store(tail + 1, (number * number).to(tl.float64), mask=inside)


@triton.jit
def matches(tail, number, ranks):
    """Return whether the last two values of a sum over the ranks are those of one stamp: see `vectors.Stamp`."""
    number = number.to(tl.int64)
    first = ranks * number
    return (tl.load(tail) == first.to(tl.float64)) & (tl.load(tail + 1) == (first * number).to(tl.float64))


@triton.jit
def store_cast(pointers, values, inside):
    """Store float64 values in what dtype the pointers have."""
    if pointers.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)  # from which all other dtypes can be had
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def load_rows(partial, first, runs, BC: tl.constexpr, ROWS: tl.constexpr):
    """Return both halves of partial results, (runs, 2, BC), from the first row on, (ROWS, BC); 0 after the last."""
    rows = first + tl.arange(0, ROWS)[:, None]
    pointers = partial + rows * (2 * BC) + tl.arange(0, BC)[None, :]
    one = tl.load(pointers, mask=rows < runs, other=0, cache_modifier=".cg")
    other = tl.load(pointers + BC, mask=rows < runs, other=0, cache_modifier=".cg")
    return one, other


@triton.jit
def column(vector, ACC: tl.constexpr):
    """Return a vector of the channels in the dtype of the arithmetic, (BC, 1)."""
    return vector.to(ACC)[:, None]


@triton.jit
def affine(mean, invstd, weight, bias, channels, C, ACC: tl.constexpr):
    """Return high, scale and shift of z = (x - high) * scale + shift, (BC, 1).

    `high` is the mean, rounded to the dtype of the arithmetic. What that leaves of it is in the shift.
    """
    high = mean.to(ACC)
    scale = invstd * load_channels(weight, channels, C, 1.0)
    shift = load_channels(bias, channels, C, 0.0) - (mean - high.to(tl.float64)) * scale
    return high[:, None], column(scale, ACC), column(shift, ACC)


@triton.jit
def _byte_offsets(tile, tiles, block, C, S, BC: tl.constexpr, BP: tl.constexpr, LAST: tl.constexpr):
    """Return where the bytes of a tile's bits are, and which exist. Each run along the memory has whole bytes."""
    if LAST:
        channels = block * (BC // 8) + tl.arange(0, BC // 8)
        offsets, inside, _, _ = tile_offsets(tile, tiles, channels, tl.cdiv(C, 8), S, BP, LAST)
    else:
        channels = block * BC + tl.arange(0, BC)
        offsets, inside, _, _ = tile_offsets(tile, tiles, channels, C, tl.cdiv(S, 8), BP // 8, LAST)
    return offsets, inside


@triton.jit
def store_bits(signs, positive, tile, tiles, block, C, S, BC: tl.constexpr, BP: tl.constexpr, LAST: tl.constexpr):
    """Store the bits of a tile, (BC, BP)."""
    bit = positive.to(tl.int32)
    if LAST:
        bits = tl.sum(tl.reshape(bit, (BC // 8, 8, BP)) << tl.arange(0, 8)[None, :, None], 1)
    else:
        bits = tl.sum(tl.reshape(bit, (BC, BP // 8, 8)) << tl.arange(0, 8)[None, None, :], 2)
    offsets, inside = _byte_offsets(tile, tiles, block, C, S, BC, BP, LAST)
    tl.store(signs + offsets, bits.to(tl.uint8), mask=inside)


@triton.jit
def load_bits(signs, tile, tiles, block, C, S, BC: tl.constexpr, BP: tl.constexpr, LAST: tl.constexpr):
    """Return the bytes of a tile, (BC, BP), shifted so that bit 0 is each value's own."""
    offsets, inside = _byte_offsets(tile, tiles, block, C, S, BC, BP, LAST)
    bits = tl.load(signs + offsets, mask=inside, other=0)
    places = tl.arange(0, 8).to(tl.uint8)
    if LAST:
        bits = tl.reshape(bits[:, None, :] >> places[None, :, None], (BC, BP))
    else:
        bits = tl.reshape(bits[:, :, None] >> places[None, None, :], (BC, BP))
    return bits


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Return activation(z)."""
    y = z
    if ACTIVATION == "relu":
        y = tl.where(z <= 0, 0.0, z)  # NaN stays
    elif ACTIVATION == "leaky_relu":
        y = tl.where(z > 0, z, z * NEGATIVE_SLOPE)
    elif ACTIVATION == "silu":
        y = z * tl.sigmoid(z)
    elif ACTIVATION == "gelu_tanh":
        y = z * tl.sigmoid(_twice_inner(z))
    return y


@triton.jit
def through_activation(grad, z, ACTIVATION: tl.constexpr):
    """Return grad * activation'(z)."""
    if ACTIVATION == "relu":
        grad = tl.where(z > 0, grad, 0.0)  # which may be infinite
    elif ACTIVATION == "leaky_relu":
        grad = tl.where(z > 0, grad, grad * NEGATIVE_SLOPE)
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(z)
        grad *= sigmoid * (1 + z * (1 - sigmoid))
    else:
        z = tl.where(z > 10, 10.0, tl.where(z < -10, -10.0, z))  # beyond, z * z may overflow
        sigmoid = tl.sigmoid(_twice_inner(z))
        grad *= sigmoid + z * sigmoid * (1 - sigmoid) * (1.5957691216057308 * (1 + 3 * 0.044715 * z * z))
    return grad


@triton.jit
def _twice_inner(z):
    """Return u of gelu_tanh(z) = z * (1 + tanh(u / 2)) / 2 = z * sigmoid(u)."""
    return 1.5957691216057308 * (z + 0.044715 * z * z * z)  # 2 * sqrt(2 / π)
