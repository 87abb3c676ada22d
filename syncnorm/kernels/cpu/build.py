"""Compile the kernels of the CPU: `python -m syncnorm.kernels.cpu.build` puts the library beside this file.

It needs GCC on Linux. CXX in the environment chooses another compiler than g++. This file imports nothing but the
standard library, so `python syncnorm/kernels/cpu/build.py [LIBRARY]` does the same where there is no torch.

Each of the two sources is compiled once per instruction set, with the headers that it includes. The
library is compiled without Python and torch, and uses Python's stable ABI, so a wheel is for one platform and for every
version of both.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

__all__ = ["LIBRARY", "compile_library", "source_version", "sources"]

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "libsyncnorm_cpu.so"
# Of what -ffast-math allows, that which neither reorders a sum nor loses a NaN.
FLAGS = "-O3 -std=c++17 -fPIC -fopenmp -fno-exceptions -fno-rtti -fvisibility=hidden -fno-math-errno -fno-trapping-math"
SOURCES = {"exports.cpp": "-ffp-contract=fast", "fixed_point.cpp": "-ffp-contract=off"}
# As needed: no libstdc++ where the source uses nothing of it.
LINK_FLAGS = "-shared -fopenmp -Wl,--as-needed -Wl,--no-undefined"
# An object for each; syncnorm_isa(), in `base`, names the best for the CPU that it runs on. -march=x86-64 keeps out
# what a compiler may take by default. `base` is linked first: of a function that objects share, the first is taken.
X86_64 = "-march=x86-64 -mtune=generic"
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
INSTRUCTION_SETS = {
    "base": f"{X86_64} -DSYNCNORM_DISPATCH",
    "avx2": f"{X86_64} -mavx2 -mfma -mf16c",
    "avx512": f"{X86_64} {AVX512}",
}
ELSEWHERE = {"base": "-DSYNCNORM_DISPATCH"}


def main() -> None:
    """Compile the library to the path that the command line names, or beside this file."""
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY
    try:
        compile_library(library)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"cannot compile the kernels of the CPU: {error}")


def sources() -> list[Path]:
    """Return the sources and all headers, in a fixed order."""
    return [*(FOLDER / name for name in SOURCES), *sorted(FOLDER.glob("*.h"))]


def source_version() -> int:
    """Return a checksum of the sources, which the library carries: a library of other sources is outdated."""
    version = 0
    for path in sources():
        version = zlib.crc32(path.read_bytes(), zlib.crc32(path.name.encode(), version))
    return version


def compile_library(library: Path) -> None:
    """Compile and link."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    macros = predefined_macros(compiler)
    if not {"__GNUC__", "__linux__"} <= macros or "__clang__" in macros:
        # Clang has an OpenMP runtime of its own: a second pool of threads, which torch.set_num_threads does not reach.
        raise OSError(f"expected GCC on Linux, got {compiler[0]}")
    sets = INSTRUCTION_SETS if "__x86_64__" in macros else ELSEWHERE
    compile_flags = [*compiler, "-c", *FLAGS.split(), f"-DSYNCNORM_SOURCE={source_version()}u"]
    with tempfile.TemporaryDirectory() as directory:
        compilations = {
            f"{directory}/{isa}-{name}.o": [*flags.split(), own, f"-DSYNCNORM_ISA={isa}", str(FOLDER / name)]
            for isa, flags in sets.items()
            for name, own in SOURCES.items()
        }
        run_at_once([[*compile_flags, *arguments, "-o", to] for to, arguments in compilations.items()])
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(".unfinished")
        run_at_once([[*compiler, *compilations, *LINK_FLAGS.split(), "-o", str(unfinished)]])
        unfinished.replace(library)  # a process that has the old one open keeps that


def predefined_macros(compiler: list[str]) -> set[str]:
    """Return the names of what the compiler defines by itself: its make, its target."""
    command = [*compiler, "-dM", "-E", "-x", "c++", os.devnull]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {line.split()[1] for line in output.splitlines()}


def run_at_once(commands: list[list[str]]) -> None:
    """Run the commands in parallel; raise if one fails."""
    processes = [subprocess.Popen(command) for command in commands]
    for process in processes:
        process.wait()
    for process in processes:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)


if __name__ == "__main__":
    main()
