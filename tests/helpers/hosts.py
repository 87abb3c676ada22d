"""Ranks that believe to be on several hosts: each process gets a host name of its own from the kernel."""

import ctypes
import os
import socket

NEW_UTS = 0x04000000  # CLONE_NEWUTS: a host name of this process alone


def move_to(host):
    """Give this process a host name that no other process has or sees."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_UTS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    socket.sethostname(host)
