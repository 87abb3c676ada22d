"""How the package is built: by setuptools, with the kernels of the CPU compiled where there is a compiler.

pyproject.toml names the commands below; this file is in the source alone, not in the wheel. The library knows neither
Python nor torch (cpu.py loads it with ctypes), so that a wheel is for one platform and for every version of both.

Not scikit-build-core: its editable installation finds the package ahead of PYTHONPATH and of the working directory, and
a second checkout would silently test the first one.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import zlib
from pathlib import Path

from setuptools import Command
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_py import build_py

__all__ = ["Build", "BuildKernels", "BuildPython", "BuildWheel"]

SOURCE = Path("syncnorm/kernels/cpu.cpp")
LIBRARY = SOURCE.with_name("libsyncnorm_cpu.so")
# Of what -ffast-math allows, that which neither reorders a sum nor loses a NaN.
FLAGS = (
    "-O3 -std=c++17 -fPIC -fopenmp -fno-exceptions -fno-rtti -fvisibility=hidden "
    "-ffp-contract=fast -fno-math-errno -fno-trapping-math"
)
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


class Build(build):
    """`build`, with the library."""

    sub_commands = [*build.sub_commands, ("build_kernels", None)]


class BuildKernels(Command):
    """Compile the library; without it the package works too, on the reference."""

    description = "compile the kernels of the CPU"
    user_options = []
    editable_mode = False  # setuptools sets it: then the library goes where the imported cpu.py lies, into the source

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        library = self.library()
        try:
            compile_library(library)
        except (OSError, subprocess.CalledProcessError) as error:
            library.unlink(missing_ok=True)  # of an earlier build
            self.warn(f"the kernels of the CPU are NOT compiled, the slower reference is used instead: {error}")

    def library(self) -> Path:
        return LIBRARY if self.editable_mode else Path(self.build_lib, LIBRARY)

    def get_source_files(self) -> list[str]:
        return [str(SOURCE), str(SOURCE.with_name("build.py"))]

    def get_outputs(self) -> list[str]:
        return [str(self.library())] if self.library().exists() and not self.editable_mode else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildPython(build_py):
    """`build_py`, without this file."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] != ("syncnorm.kernels", "build")]


class BuildWheel(bdist_wheel):
    """`bdist_wheel`, whose tag says what the wheel holds: of one platform with the library, else of any."""

    def run(self) -> None:
        self.run_command("build")
        compiled = self.get_finalized_command("build_kernels").library().exists()
        self.distribution.has_ext_modules = lambda: compiled
        self.root_is_pure = not compiled
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return "py3", "none", platform


def compile_library(library: Path) -> None:
    """Compile and link; CXX in the environment chooses another compiler than g++."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    macros = predefined_macros(compiler)
    if not {"__GNUC__", "__linux__"} <= macros or "__clang__" in macros:
        # Clang has an OpenMP runtime of its own: a second pool of threads, which torch.set_num_threads does not reach.
        raise OSError(f"expected GCC on Linux, got {compiler[0]}")
    sets = INSTRUCTION_SETS if "__x86_64__" in macros else ELSEWHERE
    version = f"-DSYNCNORM_SOURCE={zlib.crc32(SOURCE.read_bytes())}u"  # by which cpu.py knows an outdated library
    compile_flags = [*compiler, "-c", *FLAGS.split(), version]
    with tempfile.TemporaryDirectory() as directory:
        objects = {isa: f"{directory}/{isa}.o" for isa in sets}
        compilations = [
            [*compile_flags, *flags.split(), f"-DSYNCNORM_ISA={isa}", str(SOURCE), "-o", objects[isa]]
            for isa, flags in sets.items()
        ]
        run_at_once(compilations)
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(".unfinished")
        run_at_once([[*compiler, *objects.values(), *LINK_FLAGS.split(), "-o", str(unfinished)]])
        unfinished.replace(library)  # a process that has the old one open keeps that


def predefined_macros(compiler: list[str]) -> set[str]:
    """Return the names of what the compiler defines by itself: its make, its target."""
    command = [*compiler, "-dM", "-E", "-x", "c++", os.devnull]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {line.split()[1] for line in output.splitlines()}


def run_at_once(commands: list[list[str]]) -> None:
    """Run the commands beside one another; raise if one fails."""
    processes = [subprocess.Popen(command) for command in commands]
    for process in processes:
        process.wait()
    for process in processes:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
