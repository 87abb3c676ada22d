"""The inputs that layers and kernels are timed on."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["LARGE", "SMALL", "TINY", "Case", "cases"]

LARGE, SMALL, TINY = "large", "small", "tiny"  # beyond the last private cache (12 MB); within it; all overhead
ON_GPU = 8  # times the batch: large is what the cache of a GPU does not hold
QUICK = {LARGE: (2, 8, 8, 8), SMALL: (3, 8, 4, 4)}  # so small that Triton can interpret its kernels


class Case(NamedTuple):
    """A tensor.

    Args:
        kind: LARGE, SMALL or TINY, of the shape as it is listed; --quick takes a smaller one.
        shape: (N, C, *).
        dtype: of the tensor.
        layout: "NCHW" (contiguous) or "NHWC" (channels last); "NC" for two axes.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "NCHW"

    @property
    def name(self) -> str:
        """The case in one word, as rows and figures show it."""
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{'x'.join(map(str, self.shape))} {dtype} {self.layout}"

    @property
    def megabytes(self) -> float:
        """The size of the tensor in MB (10⁶ bytes)."""
        return math.prod(self.shape) * self.dtype.itemsize / 1e6

    def random(self, device: torch.device, generator: torch.Generator, mean: float = 0.0) -> Tensor:
        """Return normally distributed values of this shape, dtype and layout."""
        values = torch.randn(self.shape, generator=generator, device=generator.device).add_(mean)
        values = values.to(device, self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if self.layout == "NHWC" else values

    def numbers(self) -> dict[str, Any]:
        """Return the case as it is written to JSON."""
        return {
            "case": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": self.layout,
        }


CASES = [
    *(Case(LARGE, (32, 64, 56, 56), d, m) for d in (torch.float32, torch.bfloat16) for m in ("NCHW", "NHWC")),
    *(Case(LARGE, (32, 256, 28, 28), layout=layout) for layout in ("NCHW", "NHWC")),
    Case(LARGE, (16, 256, 56, 56)),  # 51 MB: glibc keeps up to 32 MB without being told to
    *(Case(SMALL, (16, 64, 28, 28), d, m) for d in (torch.float32, torch.bfloat16) for m in ("NCHW", "NHWC")),
    *(Case(SMALL, (64, 32, 28, 28), layout=layout) for layout in ("NCHW", "NHWC")),
    *(Case(SMALL, (8, 256, 14, 14), layout=layout) for layout in ("NCHW", "NHWC")),
    Case(SMALL, (256, 512), layout="NC"),
    Case(TINY, (2, 8, 2, 2)),
]


def cases(device: torch.device, quick: bool = False, only: str = "") -> list[Case]:
    """Return the cases whose name holds all words of `only`; on a GPU larger ones, the tiny one first.

    If `quick`, each is cut down to a shape of QUICK, and cases that are then the same are listed once.

    Raises:
        RuntimeError: there is none.
    """
    listed = CASES
    if device.type == "cuda":
        listed = [_on_gpu(case) for case in sorted(listed, key=lambda case: case.kind != TINY)]
    named = [case for case in listed if all(word in case.name for word in only.split())]
    if not named:
        raise RuntimeError(f"expected --only to name some of {', '.join(c.name for c in listed)}, got {only!r}")
    return list(dict.fromkeys(map(_quick, named))) if quick else named


def _on_gpu(case: Case) -> Case:
    return case._replace(shape=(ON_GPU * case.shape[0], *case.shape[1:])) if case.kind == LARGE else case


def _quick(case: Case) -> Case:
    return case._replace(shape=QUICK.get(case.kind, case.shape)[: len(case.shape)])
