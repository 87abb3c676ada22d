"""The package as pip installs it, in fresh virtual environments: with a compiler, without, and editable."""

import os
import re
import shutil
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import output_of

ROOT = Path(__file__).parent.parent
LIBRARY = "libsyncnorm_cpu.so"
KERNELS = "syncnorm/kernels/cpu"
pytestmark = pytest.mark.timeout(400)  # compiling takes its time where other processes share the cores
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="COMPILED KERNELS NOT TESTED: there is no g++; without it they are not built"
)

STEP = """
import torch, syncnorm
layer = syncnorm.SyncBatchNorm(3)
x = torch.randn(8, 3, 5, requires_grad=True)
y = layer(x)
y.square().sum().backward()
expected = torch.nn.functional.batch_norm(x, None, None, training=True)
torch.testing.assert_close(y, expected)
print(syncnorm.__file__)
"""

LOAD = """
import ctypes, pathlib, re, syncnorm
library = ctypes.CDLL(pathlib.Path(syncnorm.__file__).parent / "kernels" / "cpu" / "libsyncnorm_cpu.so")
library.syncnorm_isa.restype = ctypes.c_char_p
print(library.syncnorm_isa().decode())
print(len(set(re.findall(r"/lib[gi]?omp\\b.*", open("/proc/self/maps").read()))))
"""


class Installed(NamedTuple):
    """A virtual environment with the package in it, and what pip said."""

    directory: Path
    log: str

    @property
    def site_packages(self):
        return self.directory / sysconfig.get_path("purelib", vars={"base": ""}).lstrip("/")

    @property
    def tag(self):
        (wheel,) = self.site_packages.glob("syncnorm-*.dist-info/WHEEL")
        return re.search("^Tag: (.*)$", wheel.read_text(), re.MULTILINE)[1]

    def python(self, *arguments):
        return run(self.directory / "bin" / "python", *arguments, cwd=self.directory)

    def info(self):
        return dict(re.split("  +", line, maxsplit=1) for line in self.python("-m", "syncnorm", "info").splitlines())


def run(*command, cwd, **environment):
    """Run the command as in a new shell, with nothing of the source tree on Python's path; return what it printed."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC", "CXX", "CXXFLAGS")}
    return output_of(*command, cwd=cwd, env=own | environment, timeout=300)


def copy_source(directory):
    """Copy what the build reads. The library lies there, outdated, as it may where the installation is editable."""
    tree = directory / "source"
    shutil.copytree(ROOT / "syncnorm", tree / "syncnorm", ignore=shutil.ignore_patterns("__pycache__", LIBRARY))
    shutil.copytree(ROOT / "launch", tree / "launch")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / KERNELS / LIBRARY).write_text("outdated")
    return tree


def install(source, *options, **environment):
    """Install the source, or a wheel, into a virtual environment of its own, beside this one's torch."""
    directory = source.parent / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=source.parent)
    pip = [sys.executable, "-m", "pip", "--python", directory / "bin" / "python"]
    log = run(*pip, "install", "--verbose", "--no-deps", *options, source, cwd=source.parent, **environment)
    installed = Installed(directory, log)
    # After its own packages. Path files of this environment are not read, so its editable syncnorm stays unseen.
    (installed.site_packages / "torch.pth").write_text(sysconfig.get_path("purelib"))
    return installed


@pytest.fixture
def source(tmp_path):
    return copy_source(tmp_path)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    source = copy_source(tmp_path_factory.mktemp("compiled"))
    return install(source, CXXFLAGS="-march=native")  # which would end on older CPUs, where the wheel may run


@pytest.fixture
def no_compiler(tmp_path):
    """Return an environment in which no compiler is found."""
    empty = tmp_path / "empty"
    empty.mkdir()
    return {"PATH": str(empty)}


@needs_compiler
def test_with_a_compiler(compiled):
    assert "NOT compiled" not in compiled.log
    assert "-march=native" not in compiled.log
    platform = sysconfig.get_platform().replace("-", "_")
    assert compiled.tag == f"py3-none-{platform}"
    package = compiled.site_packages / "syncnorm"
    assert (compiled.site_packages / KERNELS / LIBRARY).exists()
    assert (package / "py.typed").exists()
    sources = [file.name for file in package.rglob("*") if file.suffix in (".cpp", ".h", ".o")]
    assert not sources
    assert not {"build.py", "commands.py"} & {file.name for file in package.rglob("*.py")}

    isa, openmp_libraries = compiled.python("-c", LOAD).split()
    assert openmp_libraries == "1"  # torch's
    assert isa in ("avx512", "avx2", "base")
    assert compiled.info()["kernels on cpu"] == f"cpu ({isa})"
    assert str(compiled.site_packages) in compiled.python("-c", STEP)
    script = run(compiled.directory / "bin" / "syncnorm", "--version", cwd=compiled.directory)
    assert script == compiled.python("-m", "syncnorm", "--version")
    assert script.startswith("syncnorm ")


TRAIN_WITH_CPU_KERNELS = (
    STEP
    + """
from syncnorm import kernels
print(kernels.select(x.detach()).__name__)
print(len(set(re.findall(r"/lib[gi]?omp\\b.*|/libgomp-.*", open("/proc/self/maps").read()))))
"""
)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Return the folder in which launch/wheel puts the source distribution and the wheel."""
    directory = tmp_path_factory.mktemp("released")
    source = copy_source(directory)
    (source / KERNELS / LIBRARY).unlink()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run(source / "launch" / "wheel", directory / "dist", cwd=directory, PATH=path)
    assert not (source / ".venv").exists()
    return directory / "dist"


@needs_compiler
def test_the_released_wheel_trains_with_torch_s_openmp(released, tmp_path):
    """A second copy of libgomp in the process would be a second pool of threads, which torch does not know of."""
    (wheel,) = released.glob("*.whl")
    assert re.fullmatch(r"syncnorm-[\d.]+-py3-none-manylinux_.*\.whl", wheel.name)
    installed = install(Path(shutil.copy(wheel, tmp_path)))
    assert not list(installed.site_packages.rglob("*libgomp*"))
    file, kernels, openmp_libraries = installed.python("-c", "import re" + TRAIN_WITH_CPU_KERNELS).splitlines()
    assert str(installed.site_packages) in file
    assert kernels == "syncnorm.kernels.cpu"
    assert openmp_libraries == "1"


@needs_compiler
def test_the_source_distribution_has_all_that_the_build_reads(released):
    (archive,) = released.glob("*.tar.gz")
    with tarfile.open(archive) as names:
        packed = {Path(*Path(name).parts[1:]) for name in names.getnames()}
    folder = ROOT / KERNELS
    sources = {path.relative_to(ROOT) for pattern in ("*.h", "*.cpp", "*.py") for path in folder.glob(pattern)}
    assert len(sources) > 12
    assert sources <= packed
    assert not [path for path in packed if path.name == LIBRARY]


def test_launch_wheel_answers_help_without_installing(source):
    assert "./launch/wheel FOLDER" in run(source / "launch" / "wheel", "--help", cwd=source, PYTHON="/no/python")
    assert not (source / ".venv").exists()


@needs_compiler
def test_the_library_asks_for_no_more_than_torch_brings(compiled):
    """Not even a torch whose OpenMP is of version 4.5: symbols of a later one are missing there."""
    library = compiled.site_packages / KERNELS / LIBRARY
    listing = run("readelf", "--dynamic", "--version-info", "--wide", library, cwd=compiled.directory)
    needed = set(re.findall(r"\(NEEDED\).*\[(?!ld-linux)(.*)\]", listing))
    assert "libgomp.so.1" in needed
    assert needed <= {"libgomp.so.1", "libm.so.6", "libc.so.6"}
    versions = re.findall(r"Name: G?OMP_([\d.]+)", listing)
    assert versions
    assert max(tuple(map(int, version.split("."))) for version in versions) <= (4, 5)


def test_without_a_compiler(source, no_compiler):
    installed = install(source, **no_compiler)
    assert "the kernels of the CPU are NOT compiled" in installed.log
    assert "g++" in installed.log
    assert installed.tag == "py3-none-any"
    assert not list(installed.site_packages.rglob(LIBRARY))
    assert installed.info()["kernels on cpu"] == "reference: no compiled library (no compiler at install time?)"
    assert str(installed.site_packages) in installed.python("-c", STEP)


@needs_compiler
def test_editable(source):
    """The library lies where the package that is imported looks for it, and never is an outdated one."""
    kernels = source / KERNELS
    (kernels / "exports.cpp").write_text(
        "#ifdef SYNCNORM_DISPATCH\n"
        'extern "C" __attribute__((visibility("default"))) const char *syncnorm_isa() { return "mine"; }\n'
        "#endif\n"
    )
    installed = install(source, "--editable")
    assert installed.python("-c", LOAD).splitlines()[0] == "mine"
    assert str(source) in installed.python("-c", "import syncnorm; print(syncnorm.__file__)")

    (kernels / "exports.cpp").write_text("not C++")
    assert "the kernels of the CPU are NOT compiled" in install(source, "--editable").log
    assert not list(kernels.glob("libsyncnorm*"))
