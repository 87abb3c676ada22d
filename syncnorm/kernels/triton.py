"""The kernels in Triton, for CUDA tensors: `reference` has the formulas and defines every result.

Shapes: input x, grad_output, residual and results (N, C, *), which lie in memory as (N, C, S), or with the channels
innermost as (N * S, C): both are read as they lie. What is per channel is float64, as in `reference`. Of the kernels'
arguments, each a pointer into contiguous memory:

    x, y, dx         (N, C, S) or (N * S, C), in the dtype of the input; y, dx written
    dy, dz           the same, in the dtype of the upstream gradient; dz written
    residual         the same
    signs            (⌈numel / 8⌉,) uint8, one bit for each value, in the order of memory; or one byte for each
    mask             (N * S,) uint8 or floating point, the weight of each position; None: ones
    weight, bias     (C,) of any floating dtype, or None
    moments          (2C + 1,) = [mean, M2, count]; partial moments (W, 2C + 1)
    packed           (2C + 1,) = [n·mean, M2 + n·mean², n]
    statistics       (2C + 1,) = [mean, invstd, count]
    grad_weight      (C,) = Σ dz * x̂ in float64 or float32; grad_bias = Σ dz
    sums             (2, C) = [Σ weight * dz, Σ weight * dz * x̂]; partial sums (W, 2, C) = [Σ dz, Σ dz * x̂]

A pass walks over tiles of BC channels by BP positions. A program has one block of channels and a run of `per` tiles
along N and S, and there are W runs. Reductions are deterministic: each thread sums its own values in float32 (float64
for float64 inputs), their sums are merged in float64, within the program and then over the W runs by a second kernel.
Nothing asks the device: grids follow from shapes, so a CUDA graph can hold all of it.
"""

# ruff: noqa: N803, N806  (sizes and compile-time constants in capitals, as Triton's own kernels have them)

import math
import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import LEAST_NOISE as _LEAST_NOISE
from .epilogue import NEGATIVE_SLOPE as _NEGATIVE_SLOPE
from .epilogue import PLAIN, Epilogue, channels_last, dense, rounding

__all__ = ["Backward", "moments", "normalize", "pack", "unpack", "update_running"]

# For an H100: 132 multiprocessors with 65536 registers each. Four programs of 256 threads with up to 64 registers are
# there at once, each thread with two loads of 16 bytes in flight: 32 KB, where 3.35 TB/s and 0.8 µs of latency ask for
# 20 KB.
WARPS = 8
REGISTERS = 128  # a thread, at most: left free, the compiler takes up to 188 for halves, and one program would be there
TILE_BYTES = 8192  # of x that a program takes at a time: 32 for each thread
REDUCING_PROGRAMS = 132 * 4  # of a pass that leaves partial sums: all at once
MAPPING_PROGRAMS = 132 * 8  # of a pass that does not
TILES_IN_ONE_RUN = 4  # at most, of a reduction that does without its second kernel
CHANNELS_LAST_BYTES = (64, 128)  # of the channels in a tile where they are innermost: few channels, few partial sums
CONTIGUOUS_BYTES = 512  # at least, of the positions in a tile where they are innermost
PADDING = 1 / 8  # of a size that is tolerated for larger blocks
FINISHING_BLOCK = (256, 8)  # runs and channels that a finishing kernel takes at a time
CHANNEL_BLOCK = 256  # channels that pack and unpack take in a program
RUNNING_BLOCK = 1024  # channels that update_running takes at a time, in its only program
BITS_BLOCK = 512  # bytes that a program packs of signs that were a byte each

NEGATIVE_SLOPE = tl.constexpr(_NEGATIVE_SLOPE)
LEAST_NOISE = tl.constexpr(_LEAST_NOISE)
OPTIONS = {"num_warps": WARPS, "maxnreg": REGISTERS, "enable_fp_fusion": True}

# Sizes change with every batch of images of other sizes: they are no reason to compile again.
_pass = triton.jit(do_not_specialize=["C", "S", "tiles", "per", "blocks", "runs", "eps_bits"])


def moments(input: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return [mean, M2, count], (2C + 1,). One kernel, and one to merge its runs if there are several."""
    x = dense(input)
    plan = _plan(x, REDUCING_PROGRAMS, TILES_IN_ONE_RUN)
    partial = _float64(x, plan.runs, 2 * x.shape[1] + 1)
    _launch(_moments_kernel, plan, x, _positions(mask, x), partial)
    if plan.runs == 1:
        return partial[0]
    result = _float64(x, partial.shape[1])
    _finish(_merge_moments_kernel, x, partial, result)
    return result


def pack(moments: Tensor) -> Tensor:
    """Replace moments by [n·mean, M2 + n·mean², n], (2C + 1,)."""
    return _in_place(_pack_kernel, moments)


def unpack(packed: Tensor) -> Tensor:
    """Replace `packed` by the moments, (2C + 1,), that it stands for."""
    return _in_place(_unpack_kernel, packed)


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    moments: Tensor,
    momentum: float | None,
) -> None:
    """Move the buffers in place towards mean and M2 / (n - 1), by momentum or 1 / num_batches_tracked, if n > 0."""
    with torch.cuda.device_of(running_mean):
        _update_running_kernel[(1,)](
            running_mean,
            running_var,
            num_batches_tracked,
            moments,
            _bits(momentum or 0.0),
            running_mean.shape[0],
            running_mean.stride(0),
            running_var.stride(0),
            CUMULATIVE=momentum is None,
            BLOCK=RUNNING_BLOCK,
            **OPTIONS,
        )


def normalize(
    input: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    eps_outside: bool = False,
    epilogue: Epilogue = PLAIN,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y, [mean, invstd, count] and the signs of z if the epilogue keeps them. One kernel.

    Where the innermost size is no multiple of 8, the signs go through a byte each and a second kernel.
    """
    x = dense(input)
    plan = _plan(x, MAPPING_PROGRAMS)
    y = x if epilogue.inplace else torch.empty_like(x)
    statistics = torch.empty_like(moments)
    whole_bytes = plan.constants["ALIGN"] >= 8
    values = x.numel() // 8 if whole_bytes else x.numel()
    signs = torch.empty(values, dtype=torch.uint8, device=x.device) if epilogue.keeps_signs else None
    pointers = (x, moments, *_contiguous(weight, bias), _like(epilogue.residual, x), y, statistics, signs)
    _launch(
        _normalize_kernel,
        plan,
        *pointers,
        _bits(eps),
        EPS_OUTSIDE=eps_outside,
        ACTIVATION=epilogue.activation,
        WHOLE_BYTES=whole_bytes,
    )
    if signs is not None and not whole_bytes:
        signs = _to_bits(signs)
    if epilogue.inplace:
        y = input if y is input else input.copy_(y)
    return y, statistics, signs


class Backward:
    """See `reference.Backward`."""

    def __init__(
        self,
        grad_output: Tensor,
        input: Tensor,
        statistics: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        mask: Tensor | None = None,
        epilogue: Epilogue = PLAIN,
    ):
        self.x = x = dense(input)
        self.weight, bias = _contiguous(weight, bias)
        self.dtype_of_dz = None if epilogue.residual is None else grad_output.dtype
        kept = epilogue.residual if epilogue.keeps_signs else _like(epilogue.residual, x)
        self.read = (_like(grad_output, x), x, statistics, self.weight, bias, kept, _positions(mask, x))
        relative, least = rounding(x.dtype, epilogue.activation) if epilogue.inplace else (None, None)
        self.constants = {
            "ACTIVATION": epilogue.activation,
            "KEPT_SIGNS": epilogue.keeps_signs,
            "ROUNDING": relative,
            "LEAST_ROUNDING": least,
        }

    def reduce_grad(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """See `reference.Backward.reduce_grad`. One kernel, or two as in `moments`, and casts to half precision."""
        x = self.x
        plan = _plan(x, REDUCING_PROGRAMS, TILES_IN_ONE_RUN)
        sums = _float64(x, 2, x.shape[1])
        wide = dtype if dtype == torch.float32 else torch.float64
        grad_weight, grad_bias = torch.empty_like(sums[0], dtype=wide), torch.empty_like(sums[0], dtype=wide)
        results = (grad_weight, grad_bias, sums)
        if plan.runs == 1:
            _launch(_reduce_grad_kernel, plan, *self.read, None, *results, **self.constants)
        else:
            partial = _float64(x, plan.runs, 2, x.shape[1])
            _launch(_reduce_grad_kernel, plan, *self.read, partial, None, None, None, **self.constants)
            _finish(_merge_sums_kernel, x, partial, self.weight, *results)
        return grad_weight.to(dtype), grad_bias.to(dtype), sums

    def grad_input(
        self, sums: Tensor | None, *, centered: bool = True, eps_outside: float = 0.0
    ) -> tuple[Tensor, Tensor | None]:
        """See `reference.Backward.grad_input`. One kernel."""
        dx = torch.empty_like(self.x)
        dz = None if self.dtype_of_dz is None else torch.empty_like(self.x, dtype=self.dtype_of_dz)
        pointers = (*self.read, *_contiguous(sums), dx, dz)
        plan = _plan(self.x, MAPPING_PROGRAMS)
        _launch(_grad_input_kernel, plan, *pointers, _bits(eps_outside), CENTERED=centered, **self.constants)
        return dx, dz


class _Plan(NamedTuple):
    """How a pass over a tensor is divided among programs.

    Attributes:
        programs: blocks * runs.
        runs: W, the runs of tiles, each of a program for each block of channels.
        sizes: the kernels' (C, S, tiles, per, blocks); of C and S the innermost is divided by ALIGN.
        constants: ALIGN, which divides the innermost size, so that the compiler knows which loads it can join; LAST,
            whether channels are innermost; BC and BP, the sizes of a tile; ACC, the dtype of what is computed.
    """

    programs: int
    runs: int
    sizes: tuple[int, int, int, int, int]
    constants: dict[str, Any]


def _plan(x: Tensor, programs: int, in_one_run: int = 0) -> _Plan:
    """Divide a dense tensor among about so many programs, in one run if its tiles are no more than `in_one_run`."""
    N, C, S, last = _sizes(x)
    size, align = x.element_size(), math.gcd(C if last else S, 16)
    tile = TILE_BYTES // (size if align >= 4 else 2 * size)  # loads of single values take more registers
    if last:
        BC = _block(C, *(most // size for most in CHANNELS_LAST_BYTES))
        BP = min(tile // BC, triton.next_power_of_2(max(S, 1)))
    else:
        BP = _block(S, CONTIGUOUS_BYTES // size, tile)
        BC = min(tile // BP, triton.next_power_of_2(max(C, 1)))
    blocks, tiles = max(1, triton.cdiv(C, BC)), N * triton.cdiv(S, BP)
    per = in_one_run if tiles <= in_one_run else triton.cdiv(tiles, triton.cdiv(programs, blocks))
    runs = max(1, triton.cdiv(tiles, max(per, 1)))
    sizes = (C // align if last else C, S if last else S // align, tiles, per, blocks)
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    return _Plan(blocks * runs, runs, sizes, {"ALIGN": align, "LAST": last, "BC": BC, "BP": BP, "ACC": acc})


def _sizes(x: Tensor) -> tuple[int, int, int, bool]:
    """Return N, C, S and whether the channels are innermost, in which case N is 1 and S all positions."""
    N, C = x.shape[:2]
    S = x.shape[2:].numel()
    if C == 1:
        return 1, 1, N * S, False
    return (1, C, N * S, True) if S == 1 or channels_last(x) else (N, C, S, False)


def _block(size: int, least: int, most: int) -> int:
    """Return the largest power of two whose multiples pad `size` by no more than PADDING, else what pads it least."""
    if size <= least:
        return int(triton.next_power_of_2(max(size, 1)))
    blocks = [1 << i for i in range(most.bit_length() - 1, least.bit_length() - 2, -1)]
    padded = {block: triton.cdiv(size, block) * block for block in blocks}
    fitting = (block for block in blocks if padded[block] <= size * (1 + PADDING))
    return next(fitting, min(blocks, key=padded.__getitem__))


def _launch(kernel: Any, plan: _Plan, *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device_of(arguments[0]):
        kernel[(plan.programs,)](*arguments, *plan.sizes, **plan.constants, **constants, **OPTIONS)


def _finish(kernel: Any, x: Tensor, partial: Tensor, *arguments: Tensor | None) -> None:
    """Merge partial results over the runs, axis 0."""
    runs, channels = FINISHING_BLOCK
    C = x.shape[1]
    with torch.cuda.device_of(x):
        kernel[(max(1, triton.cdiv(C, channels)),)](partial, *arguments, C, len(partial), runs, channels, **OPTIONS)


def _in_place(kernel: Any, values: Tensor) -> Tensor:
    C = len(values) // 2
    with torch.cuda.device_of(values):
        kernel[(max(1, triton.cdiv(C, CHANNEL_BLOCK)),)](values, C, CHANNEL_BLOCK, **OPTIONS)
    return values


def _to_bits(positive: Tensor) -> Tensor:
    bits = torch.empty(triton.cdiv(positive.numel(), 8), dtype=torch.uint8, device=positive.device)
    if len(bits):
        with torch.cuda.device_of(bits):
            programs = triton.cdiv(len(bits), BITS_BLOCK)
            _to_bits_kernel[(programs,)](positive, bits, len(positive), BITS_BLOCK, **OPTIONS)
    return bits


def _bits(value: float) -> int:
    """Return a float64 as an integer: Triton passes no floating-point argument but float32."""
    return int(struct.unpack("q", struct.pack("d", value))[0])


def _float64(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=like.device)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _like(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    return None if tensor is None else dense(tensor, like=x)


def _positions(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the mask for each position, (N * S,): the order is the same in both memory formats."""
    if mask is None:
        return None
    mask = mask.expand(x.shape[0], 1, *x.shape[2:]).contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


@_pass
def _moments_kernel(
    x, mask, partial, C, S, tiles, per, blocks,
    ALIGN: tl.constexpr, LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of x and mask: partial moments.

    Each thread sums about the first value that it finds. However far that is from the others, it is one of them, so
    it can cost no more digits than the variance of the thread's few values makes up for.
    """
    C, S, block, run = _place(C, S, blocks, ALIGN, LAST)
    channels = block * BC + tl.arange(0, BC)
    total_weight = tl.zeros((1, BP), ACC)
    shift = tl.zeros((BC, BP), ACC)
    total = tl.zeros((BC, BP), ACC)
    total_square = tl.zeros((BC, BP), ACC)
    for tile in range(run * per, tl.minimum((run + 1) * per, tiles)):
        offsets, inside, positions, exists = _tile(tile, channels, C, S, BP, LAST)
        value = tl.load(x + offsets, mask=inside, other=0).to(ACC)
        w = _weights(mask, positions, exists, ACC)
        if mask is not None:
            value = tl.where(w > 0, value, 0.0)
        shift = tl.where(total_weight > 0, shift, value)
        value -= shift
        total_weight += w
        total += w * value
        total_square += w * value * value
    found = (total_weight > 0).to(ACC)
    middle = tl.sum(shift * found, 1) / _or_one(tl.sum(found))  # about which the threads' means keep their digits
    correction = total / _or_one(total_weight)
    mean = shift - middle[:, None] + correction
    count = tl.sum(total_weight.to(tl.float64))
    center = tl.sum(total_weight * mean, 1).to(tl.float64) / _or_one(count)
    difference = mean - center.to(ACC)[:, None]
    m2 = tl.sum(total_square - correction * total + total_weight * difference * difference, 1)
    mean, m2 = middle.to(tl.float64) + center, m2.to(tl.float64)
    _store_moments(partial + run.to(tl.int64) * (2 * C + 1), mean, m2, count, channels, C, block)


@_pass
def _merge_moments_kernel(partial, moments, C, runs, RUNS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of partial moments: the moments of all runs."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    shift = _load_channels(partial, channels, C, 0.0)[None, :]
    weight = tl.zeros((RUNS,), tl.float64)
    total = tl.zeros((RUNS, CHANNELS), tl.float64)
    total_square = tl.zeros((RUNS, CHANNELS), tl.float64)
    for first in range(0, runs, RUNS):
        rows, inside = _rows(partial, first, runs, 2 * C + 1, channels, C, RUNS)
        w = tl.load(rows + 2 * C, mask=first + tl.arange(0, RUNS) < runs, other=0)
        difference = tl.load(rows[:, None] + channels[None, :], mask=inside, other=0) - shift
        m2 = tl.load(rows[:, None] + C + channels[None, :], mask=inside, other=0)
        weight += w
        total += w[:, None] * difference
        total_square += m2 + w[:, None] * difference * difference
    count = tl.sum(weight)
    first_moment = tl.sum(total, 0)
    correction = first_moment / _or_one(count)
    m2 = tl.sum(total_square, 0) - correction * first_moment
    _store_moments(moments, tl.sum(shift, 0) + correction, m2, count, channels, C, tl.program_id(0))


@_pass
def _pack_kernel(values, C, BLOCK: tl.constexpr):
    """Of moments: packed, in place."""
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mean, m2, count = _load_moments(values, channels, C)
    _store_pair(values, count * mean, m2 + count * mean * mean, channels, C)


@_pass
def _unpack_kernel(values, C, BLOCK: tl.constexpr):
    """Of packed moments: the moments, in place."""
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total, total_square, count = _load_moments(values, channels, C)
    mean = total / _or_one(count)
    m2 = total_square - total * mean
    _store_pair(values, mean, tl.where(m2 < 0, 0.0, m2), channels, C)


@triton.jit(do_not_specialize=["C", "mean_stride", "var_stride", "momentum_bits"])
def _update_running_kernel(
    running_mean,  # (C,) moved, as running_var
    running_var,
    num_batches_tracked,  # () integer, moved; or None
    moments,
    momentum_bits,
    C, mean_stride, var_stride, CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the buffers. One program, since all channels need the counter before it moves."""
    count = tl.load(moments + 2 * C)
    factor = _from_bits(momentum_bits)
    if num_batches_tracked is not None:
        batches = tl.load(num_batches_tracked) + (count > 0).to(tl.int64)
        if CUMULATIVE:
            factor = 1 / _or_one(batches.to(tl.float64))
        tl.debug_barrier()  # every warp has read it
        tl.store(num_batches_tracked, batches)
    moved = tl.where(count > 0, C, 0)
    for first in range(0, C, BLOCK):
        channels = first + tl.arange(0, BLOCK)
        inside = channels < moved
        mean, m2, _ = _load_moments(moments, channels, C)
        _move(running_mean + channels * mean_stride, mean, factor, inside)
        _move(running_var + channels * var_stride, m2 / _or_one(count - 1), factor, inside)


@_pass
def _normalize_kernel(
    x, moments, weight, bias, residual, y, statistics, signs, eps_bits, C, S, tiles, per, blocks,
    ALIGN: tl.constexpr, LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
    EPS_OUTSIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,  # a name or None
    WHOLE_BYTES: tl.constexpr,  # signs are bits; else bytes
):  # fmt: skip
    """Of x and residual: y, statistics and the signs of z.

    It walks backwards: the L2 cache has what `moments` read last.
    """
    C, S, block, run = _place_from_the_end(C, S, blocks, ALIGN, LAST)
    channels = block * BC + tl.arange(0, BC)
    mean, m2, count = _load_moments(moments, channels, C)
    variance, eps = m2 / _or_one(count), _from_bits(eps_bits)
    invstd = 1 / (tl.sqrt(variance) + eps) if EPS_OUTSIDE else 1 / tl.sqrt(variance + eps)
    if run == 0:
        _store_pair(statistics, mean, invstd, channels, C)
        tl.store(statistics + 2 * C, count, mask=block == 0)
    high, low, scale, shift = _affine(mean, invstd, weight, bias, channels, C, ACC)
    last = tl.minimum((run + 1) * per, tiles) - 1
    for i in range(run * per, last + 1):
        tile = run * per + last - i
        offsets, inside, _, _ = _tile(tile, channels, C, S, BP, LAST)
        value = tl.load(x + offsets, mask=inside, other=0).to(ACC)
        z = ((value - high) - low) * scale + shift
        if residual is not None:
            z += tl.load(residual + offsets, mask=inside, other=0).to(ACC)
        if signs is not None:
            if WHOLE_BYTES:
                _store_bits(signs, z > 0, tile, block, C, S, BC, BP, LAST)
            else:
                tl.store(signs + offsets, (z > 0).to(tl.uint8), mask=inside)
        tl.store(y + offsets, _activate(z, ACTIVATION).to(y.dtype.element_ty), mask=inside)


@_pass
def _to_bits_kernel(
    positive,  # (values,) uint8, 0 or 1
    bits,  # (⌈values / 8⌉,) uint8
    values, BYTES: tl.constexpr,
):  # fmt: skip
    """Of bytes: bits."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    value = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    bit = tl.load(positive + value, mask=value < values, other=0).to(tl.int32)
    tl.store(bits + byte, tl.sum(bit << tl.arange(0, 8)[None, :], 1).to(tl.uint8), mask=byte * 8 < values)


@_pass
def _reduce_grad_kernel(
    dy, x, statistics, weight, bias,
    kept,  # signs or residual, or None
    mask,
    partial,  # None if there is one run, which has the rest
    grad_weight,
    grad_bias,
    sums,
    C, S, tiles, per, blocks,
    ALIGN: tl.constexpr, LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
    ACTIVATION: tl.constexpr, KEPT_SIGNS: tl.constexpr,
    ROUNDING: tl.constexpr, LEAST_ROUNDING: tl.constexpr,  # of y; None: not in place
):  # fmt: skip
    """Of dy and x: partial sums, or if there is one run grad_weight, grad_bias and sums."""
    C, S, block, run = _place(C, S, blocks, ALIGN, LAST)
    channels = block * BC + tl.arange(0, BC)
    mean, invstd = _load_statistics(statistics, channels, C)
    high, low, scale, shift = _affine(mean, invstd, weight, bias, channels, C, ACC)
    inverse = None
    if ROUNDING is not None:
        inverse = _inverse(invstd, weight, bias, channels, C, ACC, ROUNDING, LEAST_ROUNDING)
    sum_dz = tl.zeros((BC, BP), ACC)
    sum_dz_x = tl.zeros((BC, BP), ACC)
    for tile in range(run * per, tl.minimum((run + 1) * per, tiles)):
        offsets, inside, positions, exists = _tile(tile, channels, C, S, BP, LAST)
        centered, dz = _centered_and_grad(
            dy, x, kept, tile, block, C, S, offsets, inside, high, low, scale, shift, inverse,
            ACC, ACTIVATION, KEPT_SIGNS, ALIGN, LAST, BC, BP,
        )  # fmt: skip
        if mask is not None:
            w = _weights(mask, positions, exists, ACC)
            centered = tl.where((w == 0) & (dz == 0), 0.0, centered)  # it may be no number
        sum_dz += dz
        sum_dz_x += dz * centered
    first = tl.sum(sum_dz.to(tl.float64), 1)
    second = tl.sum(sum_dz_x.to(tl.float64), 1) * invstd
    if partial is None:
        _store_sums(grad_weight, grad_bias, sums, first, second, weight, channels, C)
    else:
        _store_pair(partial + run.to(tl.int64) * (2 * C), first, second, channels, C)


@_pass
def _merge_sums_kernel(
    partial, weight, grad_weight, grad_bias, sums, C, runs, RUNS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Of partial sums: grad_weight, grad_bias and sums."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.zeros((RUNS, CHANNELS), tl.float64)
    second = tl.zeros((RUNS, CHANNELS), tl.float64)
    for start in range(0, runs, RUNS):
        rows, inside = _rows(partial, start, runs, 2 * C, channels, C, RUNS)
        first += tl.load(rows[:, None] + channels[None, :], mask=inside, other=0)
        second += tl.load(rows[:, None] + C + channels[None, :], mask=inside, other=0)
    _store_sums(grad_weight, grad_bias, sums, tl.sum(first, 0), tl.sum(second, 0), weight, channels, C)


@_pass
def _grad_input_kernel(
    dy, x, statistics, weight, bias,
    kept,  # signs or residual, or None
    mask,
    sums,  # of all shards; None: the statistics are constants
    dx,
    dz,  # or None
    eps_bits,  # 0 with epsilon inside of the root
    C, S, tiles, per, blocks,
    ALIGN: tl.constexpr, LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACC: tl.constexpr,
    ACTIVATION: tl.constexpr, KEPT_SIGNS: tl.constexpr,
    ROUNDING: tl.constexpr, LEAST_ROUNDING: tl.constexpr,  # of y; None: not in place
    CENTERED: tl.constexpr,  # not about zero
):  # fmt: skip
    """Of dy and x: dx and dz. It walks backwards, as `_normalize_kernel` does."""
    C, S, block, run = _place_from_the_end(C, S, blocks, ALIGN, LAST)
    channels = block * BC + tl.arange(0, BC)
    mean, invstd = _load_statistics(statistics, channels, C)
    high, low, scale, shift = _affine(mean, invstd, weight, bias, channels, C, ACC)
    inverse = None
    if ROUNDING is not None:
        inverse = _inverse(invstd, weight, bias, channels, C, ACC, ROUNDING, LEAST_ROUNDING)
    if sums is not None:
        n = _or_one(tl.load(statistics + 2 * C))
        inside_root = 1 - _from_bits(eps_bits) * invstd  # 0 where all values are, at which x is too
        first, second = _load_statistics(sums, channels, C)
        slope = _column(-invstd * invstd * second / (n * tl.where(inside_root > 0, inside_root, 1.0)), ACC)
        offset = _column(invstd * first / n, ACC)
    last = tl.minimum((run + 1) * per, tiles) - 1
    for i in range(run * per, last + 1):
        tile = run * per + last - i
        offsets, inside, positions, exists = _tile(tile, channels, C, S, BP, LAST)
        centered, grad = _centered_and_grad(
            dy, x, kept, tile, block, C, S, offsets, inside, high, low, scale, shift, inverse,
            ACC, ACTIVATION, KEPT_SIGNS, ALIGN, LAST, BC, BP,
        )  # fmt: skip
        result = grad * scale
        if sums is not None:
            w = _weights(mask, positions, exists, ACC)
            if mask is not None:
                centered = tl.where(w == 0, 0.0, centered)
            through = centered * slope
            if CENTERED:
                through -= offset
            if mask is not None:
                through *= w
            result += through
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=inside)
        if dz is not None:
            tl.store(dz + offsets, grad.to(dz.dtype.element_ty), mask=inside)


@triton.jit
def _place(C, S, blocks, ALIGN: tl.constexpr, LAST: tl.constexpr):
    """Return C, S and the block of channels and the run of tiles that this program has."""
    program = tl.program_id(0)
    if LAST:
        C = C * ALIGN
    else:
        S = S * ALIGN
    return C, S, program % blocks, program // blocks


@triton.jit
def _place_from_the_end(C, S, blocks, ALIGN: tl.constexpr, LAST: tl.constexpr):
    """Return what `_place` returns, with the last run for the first program."""
    C, S, block, run = _place(C, S, blocks, ALIGN, LAST)
    return C, S, block, tl.num_programs(0) // blocks - 1 - run


@triton.jit
def _tile(tile, channels, C, S, BP: tl.constexpr, LAST: tl.constexpr):
    """Return where the values of a tile are, which exist, (BC, BP); their positions and which exist, (1, BP)."""
    blocks = tl.cdiv(S, BP)
    n = (tile // blocks).to(tl.int64)
    s = (tile % blocks).to(tl.int64) * BP + tl.arange(0, BP)
    # With channels innermost n is 0.
    offsets = s[None, :] * C + channels[:, None] if LAST else (n * C + channels)[:, None] * S + s[None, :]
    exists = (s < S)[None, :]
    return offsets, (channels < C)[:, None] & exists, (n * S + s)[None, :], exists


@triton.jit
def _weights(mask, positions, exists, ACC: tl.constexpr):
    """Return the weights of positions, (1, BP); 0 of those that do not exist."""
    return exists.to(ACC) if mask is None else tl.load(mask + positions, mask=exists, other=0).to(ACC)


@triton.jit
def _from_bits(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _or_one(count):
    """Return a count to divide by: 1 where there is nothing."""
    return tl.where(count > 0, count, 1.0)


@triton.jit
def _load_channels(vector, channels, C, default: tl.constexpr):
    """Return a vector (C,) at the channels, in float64; the default for None."""
    if vector is None:
        values = tl.full(channels.shape, default, tl.float64)
    else:
        values = tl.load(vector + channels, mask=channels < C, other=0).to(tl.float64)
    return values


@triton.jit
def _load_statistics(statistics, channels, C):
    return _load_channels(statistics, channels, C, 0.0), _load_channels(statistics + C, channels, C, 0.0)


@triton.jit
def _load_moments(moments, channels, C):
    mean, m2 = _load_statistics(moments, channels, C)
    return mean, m2, tl.load(moments + 2 * C)


@triton.jit
def _store_pair(pair, first, second, channels, C):
    tl.store(pair + channels, first, mask=channels < C)
    tl.store(pair + C + channels, second, mask=channels < C)


@triton.jit
def _store_sums(grad_weight, grad_bias, sums, first, second, weight, channels, C):
    """Store of Σ dz and Σ dz * x̂ the gradients, in their dtype, and both times weight."""
    _store_cast(grad_weight + channels, second, channels < C)
    _store_cast(grad_bias + channels, first, channels < C)
    w = _load_channels(weight, channels, C, 1.0)
    _store_pair(sums, first * w, second * w, channels, C)


@triton.jit
def _store_moments(moments, mean, m2, count, channels, C, block):
    """Store moments, M2 not below 0; the count with the first block of channels."""
    _store_pair(moments, mean, tl.where(m2 < 0, 0.0, m2), channels, C)
    tl.store(moments + 2 * C, count, mask=block == 0)


@triton.jit
def _rows(partial, first, runs, size, channels, C, RUNS: tl.constexpr):
    """Return pointers to rows of `size`, from the `first` on, (RUNS,), and which values exist, (RUNS, CHANNELS)."""
    rows = first + tl.arange(0, RUNS)
    return partial + rows.to(tl.int64) * size, (rows < runs)[:, None] & (channels < C)[None, :]


@triton.jit
def _move(running, batch, factor, inside):
    """Store running + factor * (batch - running), in the way of torch.lerp."""
    old = tl.load(running, mask=inside, other=0).to(tl.float64)
    new = tl.where(factor < 0.5, old + factor * (batch - old), batch - (batch - old) * (1 - factor))
    _store_cast(running, new, inside)


@triton.jit
def _store_cast(pointers, values, inside):
    """Store float64 values in what dtype the pointers have."""
    if pointers.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)  # from which all other dtypes can be had
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def _column(vector, ACC: tl.constexpr):
    return vector.to(ACC)[:, None]


@triton.jit
def _affine(mean, invstd, weight, bias, channels, C, ACC: tl.constexpr):
    """Return the mean's high and low part, scale and bias of z = ((x - high) - low) * scale + bias, (BC, 1)."""
    high = mean.to(ACC)
    scale = invstd * _load_channels(weight, channels, C, 1.0)
    shift = _load_channels(bias, channels, C, 0.0)
    return high[:, None], _column(mean - high.to(tl.float64), ACC), _column(scale, ACC), _column(shift, ACC)


@triton.jit
def _inverse(
    invstd, weight, bias, channels, C, ACC: tl.constexpr, ROUNDING: tl.constexpr, LEAST_ROUNDING: tl.constexpr
):  # fmt: skip
    """Return what z - bias is multiplied by to give x - mean, (BC, 1); see `reference`."""
    scale = invstd * _load_channels(weight, channels, C, 1.0)
    size = tl.abs(_load_channels(bias, channels, C, 0.0))
    noise = tl.maximum(invstd * (ROUNDING * size + LEAST_ROUNDING), LEAST_NOISE)
    return _column(scale / (scale * scale + noise * noise), ACC)


@triton.jit
def _centered_and_grad(
    dy, x, kept, tile, block, C, S, offsets, inside, high, low, scale, shift, inverse,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, KEPT_SIGNS: tl.constexpr,
    ALIGN: tl.constexpr, LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Return x - mean, and dz from dy: what passes through the activation, (BC, BP). In place, x is y."""
    grad = tl.load(dy + offsets, mask=inside, other=0).to(ACC)
    value = tl.load(x + offsets, mask=inside, other=0).to(ACC)
    if inverse is not None:
        if ACTIVATION == "leaky_relu":
            grad = tl.where(value > 0, grad, grad * NEGATIVE_SLOPE)
            value = tl.where(value > 0, value, value / NEGATIVE_SLOPE)
        centered = (value - shift) * inverse
    else:
        centered = (value - high) - low
        if KEPT_SIGNS:
            if ALIGN >= 8:
                bit = _load_bits(kept, tile, block, C, S, BC, BP, LAST)
            else:
                bit = tl.load(kept + (offsets >> 3), mask=inside, other=0) >> (offsets & 7).to(tl.uint8)
            grad = tl.where((bit & 1) > 0, grad, grad * (NEGATIVE_SLOPE if ACTIVATION == "leaky_relu" else 0.0))
        elif ACTIVATION is not None:
            z = centered * scale + shift
            if kept is not None:
                z += tl.load(kept + offsets, mask=inside, other=0).to(ACC)
            grad = _through(grad, z, ACTIVATION)
    return centered, grad


@triton.jit
def _bytes(tile, block, C, S, BC: tl.constexpr, BP: tl.constexpr, LAST: tl.constexpr):
    """Return where the bytes of a tile's bits are, and which exist, if its size along memory is a multiple of 8."""
    if LAST:
        channels = block * (BC // 8) + tl.arange(0, BC // 8)
        offsets, inside, _, _ = _tile(tile, channels, C // 8, S, BP, LAST)
    else:
        channels = block * BC + tl.arange(0, BC)
        offsets, inside, _, _ = _tile(tile, channels, C, S // 8, BP // 8, LAST)
    return offsets, inside


@triton.jit
def _store_bits(signs, positive, tile, block, C, S, BC: tl.constexpr, BP: tl.constexpr, LAST: tl.constexpr):
    """Store the bits of a tile, (BC, BP)."""
    bit = positive.to(tl.int32)
    if LAST:
        bits = tl.sum(tl.reshape(bit, (BC // 8, 8, BP)) << tl.arange(0, 8)[None, :, None], 1)
    else:
        bits = tl.sum(tl.reshape(bit, (BC, BP // 8, 8)) << tl.arange(0, 8)[None, None, :], 2)
    offsets, inside = _bytes(tile, block, C, S, BC, BP, LAST)
    tl.store(signs + offsets, bits.to(tl.uint8), mask=inside)


@triton.jit
def _load_bits(signs, tile, block, C, S, BC: tl.constexpr, BP: tl.constexpr, LAST: tl.constexpr):
    """Return the bytes of a tile, (BC, BP), shifted so that bit 0 is each value's own."""
    offsets, inside = _bytes(tile, block, C, S, BC, BP, LAST)
    bits = tl.load(signs + offsets, mask=inside, other=0)
    places = tl.arange(0, 8).to(tl.uint8)
    if LAST:
        bits = tl.reshape(bits[:, None, :] >> places[None, :, None], (BC, BP))
    else:
        bits = tl.reshape(bits[:, :, None] >> places[None, None, :], (BC, BP))
    return bits


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
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
def _through(grad, z, ACTIVATION: tl.constexpr):
    """Return grad * activation'(z)."""
    if ACTIVATION == "relu":
        grad = tl.where(z > 0, grad, grad * 0.0)
    elif ACTIVATION == "leaky_relu":
        grad = tl.where(z > 0, grad, grad * NEGATIVE_SLOPE)
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(z)
        grad *= sigmoid * (1 + z * (1 - sigmoid))
    else:
        sigmoid = tl.sigmoid(_twice_inner(z))
        grad *= sigmoid + z * sigmoid * (1 - sigmoid) * (1.5957691216057308 * (1 + 3 * 0.044715 * z * z))
    return grad


@triton.jit
def _twice_inner(z):
    """Return u of gelu_tanh(z) = z * (1 + tanh(u / 2)) / 2 = z * sigmoid(u)."""
    return 1.5957691216057308 * (z + 0.044715 * z * z * z)  # 2 * sqrt(2 / π)
