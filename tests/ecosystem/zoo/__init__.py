"""The models of other packages that are converted, with random weights, and what they take.

Each module is for one package. Its `MODELS` are a function that builds a model, and the shape of one sample, or of
each keyword argument, by name.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from same import SAMPLES, WORLD_SIZE
from torch import nn

PACKAGES = (
    "timm",
    "torchvision",
    "transformers",
    "segmentation_models_pytorch",
    "monai",
    "ultralytics",
    "lightly",
    "kornia",
)


class Model(NamedTuple):
    """A model of a package."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] | dict[str, tuple[int, ...]]

    def batch(self) -> Any:
        """Return a batch for all ranks."""
        generator = torch.Generator().manual_seed(0)

        def draw(shape):
            return torch.randn(SAMPLES * WORLD_SIZE, *shape, generator=generator, dtype=torch.float64)

        if isinstance(self.shape, dict):
            return {name: draw(shape) for name, shape in self.shape.items()}
        return draw(self.shape)


def models_of(package: str) -> dict[str, Model]:
    """Return the models of a package by name."""
    return {name: Model(*model) for name, model in import_module(f"{__name__}.{package}").MODELS.items()}
