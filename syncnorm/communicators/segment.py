"""A file in /dev/shm that the ranks of one host map, and that has no name as soon as all have.

The head of the file identifies it, so that no rank maps another file by chance or by design of another user: a magic
number, the version of the layout, the sizes, and a secret that only the ranks of the group know.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
import struct

__all__ = ["FOLDER", "Segment", "new_name", "unlink"]

FOLDER = "/dev/shm"
HEAD = struct.Struct("8sqqq32s")  # magic number, version, bytes, ranks, secret
MAGIC, VERSION = b"syncnorm", 1


class Segment:
    """Memory that the ranks of one host share.

    Attributes:
        address: of the memory, which begins with the head.
    """

    def __init__(self, file: int, size: int):
        self._memory = mmap.mmap(file, size)  # stays mapped as long as this object is there
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    @classmethod
    def create(cls, name: str, size: int, ranks: int) -> Segment:
        """Return a new segment, which this user alone may open: the head, and zeros.

        Raises:
            OSError: there is no /dev/shm, or not enough memory in it.
        """
        path, secret = name.split()
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(file, 0, size)  # a full /dev/shm fails here, not at the first write
            segment = cls(file, size)
        finally:
            os.close(file)
        HEAD.pack_into(segment._memory, 0, MAGIC, VERSION, size, ranks, secret.encode())
        return segment

    @classmethod
    def open(cls, name: str, size: int, ranks: int) -> Segment:
        """Return the segment that another process has created.

        Raises:
            OSError: it cannot be opened, or is not that segment.
        """
        path, secret = name.split()
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if (found := os.fstat(file).st_size) != size:
                raise OSError(f"expected {path} to have {size} bytes, got {found}: the ranks use different versions")
            segment = cls(file, size)
        finally:
            os.close(file)
        if HEAD.unpack_from(segment._memory) != (MAGIC, VERSION, size, ranks, secret.encode()):
            raise OSError(f"expected {path} to be the shared memory of this group, got another file")
        return segment


def new_name() -> str:
    """Return a path that no file has, and a secret, which stands in the head of the file."""
    return f"{FOLDER}/syncnorm-{secrets.token_hex(8)} {secrets.token_hex(16)}"


def unlink(name: str) -> None:
    """Remove the path, if it is there. The memory stays until the last process has unmapped it, or has ended."""
    with contextlib.suppress(OSError):
        os.unlink(name.split()[0])
