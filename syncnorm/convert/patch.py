"""Let torch's own conversion give this package's layers, for code that one cannot edit."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal

from torch import nn

from ..communicators import ProcessGroupLike
from . import convert_sync_batchnorm

__all__ = ["patch_torch"]

NAME = "convert_sync_batchnorm"


class patch_torch:  # noqa: N801 (used as a function)
    """Let `torch.nn.SyncBatchNorm.convert_sync_batchnorm` call `syncnorm.convert_sync_batchnorm`.

    This is for code that one cannot edit and that calls torch's conversion, as Lightning's Trainer does with
    sync_batchnorm=True. It holds from the call until `undo`, or in a `with` block::

        with syncnorm.patch_torch():
            trainer.fit(model)

    Only the conversion changes: torch.nn.SyncBatchNorm(...) still constructs torch's layer.

    Args:
        fuse: as in `syncnorm.convert_sync_batchnorm`.

    Collectives: none.
    """

    def __init__(self, *, fuse: bool | Literal["auto"] = False):
        def convert(cls: Any, module: nn.Module, process_group: ProcessGroupLike = None) -> nn.Module:
            return convert_sync_batchnorm(module, process_group, fuse=fuse)

        self._replaced = vars(nn.SyncBatchNorm)[NAME]
        self._own: Any = classmethod(convert)
        setattr(nn.SyncBatchNorm, NAME, self._own)

    def undo(self) -> None:
        """Restore what torch.nn.SyncBatchNorm had. Does nothing the second time.

        Raises:
            RuntimeError: something else has replaced the method since.
        """
        if self._own is None:
            return
        if vars(nn.SyncBatchNorm)[NAME] is not self._own:
            raise RuntimeError(
                f"expected the torch.nn.SyncBatchNorm.{NAME} of this patch_torch, got another: undo the later one first"
            )
        setattr(nn.SyncBatchNorm, NAME, self._replaced)
        self._own = None

    def __enter__(self) -> patch_torch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()
