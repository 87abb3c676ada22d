"""The compiled library, loaded by ctypes."""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path

__all__ = ["LIBRARY", "OTHER_VERSION", "check_layouts", "load", "load_with_lock"]

LIBRARY = Path(__file__).with_name("libsyncnorm_cpu.so")
OTHER_VERSION = (
    "the library belongs to another version. Reinstall syncnorm, or in a checkout run "
    "python -m syncnorm.kernels.cpu.build"
)


@functools.cache
def load() -> ctypes.CDLL:
    """Return the library.

    Raises:
        ImportError: it is not there.
        RuntimeError: in a checkout, it was compiled from other sources than those beside it.
    """
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise ImportError(f"expected compiled kernels, got {error}; there was no compiler at installation?") from None
    if LIBRARY.with_name("exports.cpp").exists():  # in a checkout alone
        from .build import source_version

        library.syncnorm_source.restype = ctypes.c_uint32
        if library.syncnorm_source() != source_version():
            raise RuntimeError(
                f"expected {LIBRARY} to be compiled from the sources beside it: python -m syncnorm.kernels.cpu.build"
            )
    return library


def load_with_lock() -> ctypes.PyDLL:
    """Return the library, for functions that take Python's objects. They are called with the GIL, and release it."""
    load()
    return ctypes.PyDLL(str(LIBRARY))


def check_layouts(layouts: dict[str, str]) -> None:
    """Raise if the library has structs of other sizes: it would read and write beyond what it is passed."""
    library = load()
    for name, layout in layouts.items():
        size_of = getattr(library, f"syncnorm_sizeof_{name}")
        size_of.restype = ctypes.c_int64
        expected, got = struct.calcsize(layout), size_of()
        if got != expected:
            raise RuntimeError(
                f"expected {name} in {LIBRARY} to have {expected} bytes, as Python packs it, got {got} bytes: "
                f"{OTHER_VERSION}"
            )
