"""The update of the running statistics, by one program of `normalize`."""

import triton
import triton.language as tl

from .device import from_bits, load_moments, or_one, store_cast


@triton.jit
def update_running(
    running_mean,  # (C,) moved, as running_var
    running_var,
    num_batches_tracked,  # () integer, moved; or None
    moments,
    momentum_bits,
    moves,  # bool: false where the moments are a wrong sum
    C,
    STAMPED: tl.constexpr, CUMULATIVE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Move the buffers, all channels by one program: each needs the counter before it moves.

    On ranks whose inputs have different sizes, differently compiled kernels compute this from the same moments. So each
    operation is rounded on its own or is an explicit fma, and the result has the same bits on all ranks.
    """
    count = tl.load(moments + 2 * C)
    factor = from_bits(momentum_bits)
    if num_batches_tracked is not None:
        batches = tl.load(num_batches_tracked) + (moves & (count > 0)).to(tl.int64)
        if CUMULATIVE:
            factor = 1 / or_one(batches.to(tl.float64))
        tl.debug_barrier()  # every warp has read it
        tl.store(num_batches_tracked, batches)
    moved = tl.where(moves & (count > 0), C, 0)
    for first in range(0, C, CHANNELS):
        channels = first + tl.arange(0, CHANNELS)
        inside = channels < moved
        mean, m2, _ = load_moments(moments, channels, C, STAMPED)
        _move(running_mean + channels, mean, factor, inside)
        _move(running_var + channels, m2 / or_one(count - 1), factor, inside)


@triton.jit
def _move(running, batch, factor, inside):
    """Store running + factor * (batch - running), in the way of torch.lerp."""
    old = tl.load(running, mask=inside, other=0).to(tl.float64)
    way = batch - old
    new = tl.where(factor < 0.5, tl.fma(factor, way, old), tl.fma(factor - 1, way, batch))
    store_cast(running, new, inside)
