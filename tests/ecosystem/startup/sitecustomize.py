"""What Python does first in the processes of `launch/test --ecosystem`: torchvision imports beside torch for CPUs.

The registry has torchvision for CUDA alone. Its library does not load beside torch for CPUs, and then its import fails,
because it gives operators shapes that the library would have defined. They are defined here, without implementations.
"""

import importlib.abc
import importlib.machinery
import sys

OPERATORS = [
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
]


class Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports torchvision, and a second time with its operators defined if the first one failed."""

    def find_spec(self, name, path=None, target=None):
        """Return the usual way to import torchvision, with this loader around its own."""
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name)
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        """Leave it to Python."""
        return None

    def exec_module(self, module):
        """Run the module."""
        try:
            self.loader.exec_module(module)
        except RuntimeError as error:
            if "does not exist" not in str(error):
                raise
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")  # the definitions end with it
            for schema in OPERATORS:
                self.library.define(schema)
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]
            self.loader.exec_module(module)


sys.meta_path.insert(0, Torchvision())
