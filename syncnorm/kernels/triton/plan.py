"""How a pass is divided among programs, with the constants that decide on it."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# For an H100: 132 multiprocessors with 65536 registers each. Each has to have 20 KB of loads in flight: its share of
# 3.35 TB/s times 0.8 µs of latency. At least two programs of 256 threads fit there at once, of up to 128 registers a
# thread. With four loads of 16 bytes for each thread they have 32 KB in flight.
MULTIPROCESSORS = 132  # of a device that is not CUDA's
WARPS = 8
REGISTERS = 128  # a thread, at most: left free, the compiler takes up to 188 for halves, and one program would be there
SUM_PROGRAMS = 2  # for each multiprocessor, at most, of a pass that sums: all run at once
MAP_PROGRAMS = 8  # the same of a pass that maps each value; no more than have TILES_OF_MAP tiles each, if all are busy
TILES_OF_MAP = 4
MAP_TILE_BYTES = 8192  # of x that a program takes at a time: two loads of 16 bytes for each thread
SUM_TILE_BYTES = 4096  # the same of a pass that sums: one load, since each value of a tile has its own sums
UNROLL = 4  # tiles whose loads such a pass has in flight
TILES_IN_ONE_RUN = 8  # at most, of a reduction that does without partial sums
MAP_CHANNELS_BYTES = 128  # of the channels in a tile where they are innermost, at most
SUM_CHANNELS_BYTES = 64  # the same of a pass that sums: the fewer they are, the less has the last program to merge
CONTIGUOUS_BYTES = 512  # at least, of the positions in a tile where they are innermost
PADDING = 1 / 8  # of a size that is tolerated for larger blocks
WIDEST = 2**31 - 2**13  # S of which int32 holds all positions of the last tile
MERGED_VALUES = 2048  # partial sums that the last program merges at a time: 8 for each thread
RUNNING_CHANNELS = 1024  # that the program which updates the running statistics takes at a time

OPTIONS = {"num_warps": WARPS, "maxnreg": REGISTERS, "enable_fp_fusion": True}


class Division(NamedTuple):
    """How a pass over a tensor is divided among programs.

    Attributes:
        blocks: of channels.
        runs: of tiles, each of a program for each block of channels.
        sizes: the kernels' (C, S, tiles, blocks); of C and S the innermost is divided by ALIGN.
        constants: the kernels' (ALIGN, LAST, WIDE, BC, BP, ACC). ALIGN divides the innermost size, so that the compiler
            knows which loads it can join; LAST: whether channels are innermost; WIDE: whether an int32 is too small for
            S; BC and BP: the sizes of a tile; ACC: the dtype of what is computed.
        rows: how many partial results, of BC channels each, the last program merges at a time.
        lines: the runs of contiguous values, of which each has its own bytes of signs.
        bytes: of such a run's signs.
    """

    blocks: int
    runs: int
    sizes: tuple[int, int, int, int]
    constants: tuple[int, bool, bool, int, int, Any]
    rows: int
    lines: int
    bytes: int

    @property
    def programs(self) -> int:
        """One for each run of each block."""
        return self.blocks * self.runs


def for_reduction(x: Tensor) -> Division:
    """Divide a dense tensor for a pass that leaves partial sums."""
    return _divide(x.shape, not x.is_contiguous(), x.dtype, True, _multiprocessors(x.get_device()))


def for_map(x: Tensor) -> Division:
    """Divide a dense tensor for a pass that leaves none."""
    return _divide(x.shape, not x.is_contiguous(), x.dtype, False, _multiprocessors(x.get_device()))


@functools.lru_cache(maxsize=4096)
def _divide(shape: torch.Size, last: bool, dtype: torch.dtype, reduces: bool, multiprocessors: int) -> Division:
    """Divide a tensor of a memory format. A reduction has one run if its tiles are few."""
    N, C, S, last = _sizes(shape, last)
    size, align = dtype.itemsize, math.gcd(C if last else S, 16)
    tile = (SUM_TILE_BYTES if reduces else MAP_TILE_BYTES) // size
    if align < 4:  # loads of single values take more registers
        tile = min(tile // 2, 1024)
    if last:
        most = SUM_CHANNELS_BYTES if reduces else MAP_CHANNELS_BYTES
        BC = _block(C, SUM_CHANNELS_BYTES // size, most // size)
        BP = min(tile // BC, triton.next_power_of_2(max(S, 1)))
    else:
        BP = _block(S, CONTIGUOUS_BYTES // size, tile)
        BC = min(tile // BP, triton.next_power_of_2(max(C, 1)))
    blocks, tiles = max(1, triton.cdiv(C, BC)), N * triton.cdiv(S, BP)
    at_once = max(1, multiprocessors * SUM_PROGRAMS // blocks)  # runs
    if reduces:
        runs = 1 if tiles <= TILES_IN_ONE_RUN else min(tiles, at_once)
    else:
        most = max(1, multiprocessors * MAP_PROGRAMS // blocks)
        runs = min(most, max(min(tiles, at_once), tiles // TILES_OF_MAP))
    runs = max(1, runs)
    sizes = (C // align if last else C, S if last else S // align, tiles, blocks)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    lines, line = (S, C) if last else (N * C, S)
    constants = align, last, S > WIDEST, BC, BP, acc
    return Division(blocks, runs, sizes, constants, max(1, MERGED_VALUES // BC), lines, triton.cdiv(line, 8))


@functools.cache
def _multiprocessors(device: int) -> int:
    return MULTIPROCESSORS if device < 0 else int(torch.cuda.get_device_properties(device).multi_processor_count)


def _sizes(shape: torch.Size, last: bool) -> tuple[int, int, int, bool]:
    """Return N, C, S and whether the channels are innermost, in which case N is 1 and S all positions."""
    N, C = shape[:2]
    S = shape[2:].numel()
    if C == 1:
        return 1, 1, N * S, False
    return (1, C, N * S, True) if S == 1 or last else (N, C, S, False)


def _block(size: int, least: int, most: int) -> int:
    """Return the largest power of two whose multiples pad `size` by no more than PADDING, else what pads it least.

    It is no less than 8, the values of a byte of signs.
    """
    if size <= least:
        return max(8, int(triton.next_power_of_2(max(size, 1))))
    blocks = [1 << i for i in range(most.bit_length() - 1, least.bit_length() - 2, -1)]
    padded = {block: triton.cdiv(size, block) * block for block in blocks}
    fitting = (block for block in blocks if padded[block] <= size * (1 + PADDING))
    return next(fitting, min(blocks, key=padded.__getitem__))
