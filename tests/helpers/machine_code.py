"""What Triton compiles the kernels to for a GPU that need not be here: registers, spills and the widths of loads.

Run in a process of its own: it replaces Triton's driver.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from unittest import mock

__all__ = ["Code", "compiled"]


class Code(NamedTuple):
    """A kernel in machine code.

    Attributes:
        kernel: its name.
        registers: of a thread.
        spilled: bytes of a thread's registers that go through local memory, stack included.
        shared: bytes of shared memory of a program.
        loads: by their width in bytes, how many instructions load from global memory; of a thread.
        stores: likewise.
        local: instructions that access local memory.
        memory: the accesses to global memory, and the barriers, in the order of the PTX.
    """

    kernel: str
    registers: int
    spilled: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    local: int
    memory: list[str]


def compiled(call, arch=90):
    """Return the machine code of each kernel that a function would launch, in order; nothing is launched.

    Args:
        call: a function that calls the kernels with tensors on the CPU.
        arch: the compute capability, as 90 for sm_90.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", arch, 32)
    answers = {"get_current_target": lambda: target, "get_current_device": lambda: 0, "get_current_stream": lambda _: 0}
    triton.runtime.driver.set_active(mock.Mock(**answers))
    found, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append(_read(self.__name__, kernel.asm["cubin"], kernel.asm["ptx"]))

    with mock.patch.object(JITFunction, "run", compile_only):
        call()
    return found


def _read(kernel, cubin, ptx):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        code = _tool("nvdisasm", "--print-code", str(path))
    resources = {name: int(value) for name, value in re.findall(r"\b([A-Z]+)(?:\[\d+\])?:(\d+)", usage)}
    instructions = re.findall(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*)", code)
    widths = {
        name: Counter(_width(modifiers) for kind, modifiers in instructions if kind == name) for name in ("LDG", "STG")
    }
    local = sum(kind in ("LDL", "STL") for kind, _ in instructions)
    spilled = resources["STACK"] + resources["LOCAL"]
    memory = re.findall(r"^\s*(?:@\S+ )?((?:st|ld|atom)\.global\S*|bar\.sync|barrier\.sync)", ptx, re.MULTILINE)
    return Code(kernel, resources["REG"], spilled, resources["SHARED"], widths["LDG"], widths["STG"], local, memory)


def _width(modifiers):
    """Return the bytes of a load or store from its modifiers, as `.E.128.CONSTANT`; 4 without one."""
    for name, width in {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}.items():
        if name in modifiers.split("."):
            return width
    return 4


def _tool(name, *arguments):
    """Return what one of the CUDA tools that come with Triton prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True, timeout=60).stdout
