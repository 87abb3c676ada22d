"""The kernels on CPUs, compiled: what `reference` computes, at the speed of the memory.

exports.cpp and its headers are the kernels, binding.py calls them, build.py compiles them. Importing this package
raises ImportError where they are not compiled. SYNCNORM_ISA chooses the instruction set: avx512, avx2 or base. The
default is the best that the machine has.
"""

import sys

# `python -m syncnorm.kernels.cpu.build` imports this package first, when there is no library yet.
if f"{__name__}.build" not in sys.orig_argv:
    from . import fixed_point
    from .binding import ISA, Backward, agree, moments, normalize

__all__ = ["ISA", "Backward", "agree", "fixed_point", "moments", "normalize"]
