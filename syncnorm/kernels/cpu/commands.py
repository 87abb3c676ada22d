"""How setuptools builds the package: with the kernels of the CPU compiled where there is a compiler.

pyproject.toml names the commands below. This file and build.py are in the source alone, not in the wheel.

Not scikit-build-core: its editable installation finds the package ahead of PYTHONPATH and of the working directory, and
a second checkout would silently test the first one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setuptools import Command
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_py import build_py

__all__ = ["Build", "BuildKernels", "BuildPython", "BuildWheel"]

FOLDER = Path("syncnorm/kernels/cpu")
LIBRARY = FOLDER / "libsyncnorm_cpu.so"
NOT_INSTALLED = ("build", "commands")


class Build(build):
    """`build`, with the library."""

    sub_commands = [*build.sub_commands, ("build_kernels", None)]


class BuildKernels(Command):
    """Compile the library; without it the package works too, on the reference."""

    description = "compile the kernels of the CPU"
    user_options = []
    editable_mode = False  # setuptools sets it: then the library goes where the package is imported from, the source

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        library = self.library()
        # As a program: setuptools imports this file alone, and there need not be a torch to import the package with.
        if subprocess.run([sys.executable, str(FOLDER / "build.py"), str(library)]).returncode:
            library.unlink(missing_ok=True)  # of an earlier build
            self.warn("the kernels of the CPU are NOT compiled, the slower reference is used instead")

    def library(self) -> Path:
        return LIBRARY if self.editable_mode else Path(self.build_lib, LIBRARY)

    def get_source_files(self) -> list[str]:
        compiled = [*sorted(FOLDER.glob("*.cpp")), *sorted(FOLDER.glob("*.h"))]
        return [*map(str, compiled), *(str(FOLDER / f"{name}.py") for name in NOT_INSTALLED)]

    def get_outputs(self) -> list[str]:
        return [str(self.library())] if self.library().exists() and not self.editable_mode else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildPython(build_py):
    """`build_py`, without the files that build."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[0] != "syncnorm.kernels.cpu" or module[1] not in NOT_INSTALLED]


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
