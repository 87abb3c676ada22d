"""The implementation of the kernels that layers use."""

import os
from contextlib import contextmanager
from unittest import mock

import syncnorm


@contextmanager
def chosen(implementation):
    """Let `select` choose an implementation, as if SYNCNORM_KERNELS had asked for it from the beginning."""
    with mock.patch.dict(os.environ, SYNCNORM_KERNELS=implementation):
        syncnorm.kernels._implementation.cache_clear()
        yield
    syncnorm.kernels._implementation.cache_clear()
