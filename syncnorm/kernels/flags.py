"""Whether the ranks have summed messages with different stamps on a GPU, which the host learns without waiting for it.

Each device has a flag in pinned memory of the host, (2,) int64, 0 as long as all stamps have matched. Kernels write
h + 1 of the stamp to its first element, and torch's operations to the second one. The host reads the memory when it
issues the next pass, with whatever the device has written by then.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .vectors import Stamp

__all__ = ["in_use", "of_device", "set_unless", "take"]


class _Flag:
    """The flag of a device. -1 is the CPU, in Triton's interpreter."""

    def __init__(self, device: int):
        with torch.inference_mode(False):  # later steps may use it outside of inference mode
            self.host = torch.zeros(2, dtype=torch.int64, device="cpu", pin_memory=device >= 0)
            self.on_device = torch.zeros(1, dtype=torch.int64, device="cpu" if device < 0 else f"cuda:{device}")
        self.memory = (ctypes.c_int64 * 2).from_address(self.host.data_ptr())


in_use: dict[int, _Flag] = {}  # by device. Empty: no kernel has checked a stamp without the host


def of_device(device: int) -> Tensor:
    """Return the flag of a device, (2,) int64. The first call allocates it, which no capture of a CUDA graph allows."""
    return _of_device(device).host


def set_unless(matches: Tensor, stamp: Stamp, device: int) -> None:
    """Set the flag of a CUDA device by torch's operations, unless `matches`, () bool on that device, is true."""
    flag = _of_device(device)
    with torch._C._DisableFuncTorch():  # the transforms have nothing to do with it
        torch.maximum(flag.on_device, torch.where(matches, 0, stamp.number + 1), out=flag.on_device)
        flag.host[1:].copy_(flag.on_device, non_blocking=True)


def take(device: int) -> int | None:
    """Return the number of a stamp that has not matched on a device so far, and reset the flag. None: all matched."""
    flag = in_use.get(device)
    if flag is None:
        return None
    number = flag.memory[0] or flag.memory[1]
    if not number:
        return None
    flag.on_device.zero_()
    flag.memory[0] = flag.memory[1] = 0
    return number - 1


def _of_device(device: int) -> _Flag:
    flag = in_use.get(device)
    if flag is None:
        flag = in_use[device] = _Flag(device)
    return flag
