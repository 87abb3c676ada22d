"""How a pass is divided among programs, with the constants that decide on it, and how kernels are launched."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import channels_last

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

OPTIONS = {"num_warps": WARPS, "maxnreg": REGISTERS, "enable_fp_fusion": True}


class Plan(NamedTuple):
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


def for_reduction(x: Tensor) -> Plan:
    """Divide a dense tensor for a pass that leaves partial sums."""
    return _divide(x, REDUCING_PROGRAMS, TILES_IN_ONE_RUN)


def for_map(x: Tensor) -> Plan:
    """Divide a dense tensor for a pass that leaves none."""
    return _divide(x, MAPPING_PROGRAMS)


def _divide(x: Tensor, programs: int, in_one_run: int = 0) -> Plan:
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
    return Plan(blocks * runs, runs, sizes, {"ALIGN": align, "LAST": last, "BC": BC, "BP": BP, "ACC": acc})


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


def launch(kernel: Any, plan: Plan, *arguments: Any, **constants: Any) -> None:
    """Launch the kernel of a pass on the device of its first argument."""
    with torch.cuda.device_of(arguments[0]):
        kernel[(plan.programs,)](*arguments, *plan.sizes, **plan.constants, **constants, **OPTIONS)


def merge_runs(kernel: Any, x: Tensor, partial: Tensor, *arguments: Tensor | None) -> None:
    """Merge partial results over the runs, axis 0."""
    runs, channels = FINISHING_BLOCK
    C = x.shape[1]
    with torch.cuda.device_of(x):
        kernel[(max(1, triton.cdiv(C, channels)),)](partial, *arguments, C, len(partial), runs, channels, **OPTIONS)


def launch_per_channel(kernel: Any, values: Tensor) -> Tensor:
    """Launch a kernel that changes moments or packed moments, (2C + 1,), in place."""
    C = len(values) // 2
    with torch.cuda.device_of(values):
        kernel[(max(1, triton.cdiv(C, CHANNEL_BLOCK)),)](values, C, CHANNEL_BLOCK, **OPTIONS)
    return values
