"""Random batches for a model that takes one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["random_batches"]


def random_batches(
    shape: Sequence[int], samples: int, steps: int, *, integers: int | None = None, seed: int = 0
) -> list[Tensor]:
    """Return a batch of (samples, *shape) float64 for each step, or of int64 below `integers`.

    Values are normal. Their mean rises from -1 for the first sample to 1 for the last one, so that the statistics of
    shards differ from those of the batch.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    size = (samples, *shape)
    if integers is not None:
        return [torch.randint(integers, size, generator=generator, device="cpu") for _ in range(steps)]
    mean = torch.linspace(-1, 1, samples, dtype=torch.float64, device="cpu").view(-1, *[1] * len(shape))
    return [torch.randn(size, generator=generator, dtype=torch.float64, device="cpu") + mean for _ in range(steps)]
