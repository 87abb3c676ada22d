"""What `launch/gpu` runs: the steps, in their order, each with its time limit.

A GPU is lent by the minute, so the limits sum to less than eight minutes, and what tells most comes first. What a step
leaves of its time the later ones may use.
"""

import contextlib
import ctypes
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS, BENCH = "tests", "bench"
RESULTS = "{results}"  # in a command: the path, without suffix, of the files that it writes for the record
KERNELS = "tests/test_triton_kernels.py"
FILES = [f"tests/{path.name}" for name in ("triton", "gpu") for path in sorted(ROOT.glob(f"tests/test_{name}_*.py"))]
BUILD = "syncnorm/kernels/cpu/build.py"
RANKS = "tests/test_gpu_ranks.py"
SECONDS = "{seconds}"  # in a command: half of the seconds until its limit
FIRST = "test_passes and (odd or whole)"  # every pass of the kernels, on shapes of each kind
LARGE = "31_bits"  # those that take half of the memory of a device run after the others, one at a time
INSTALL = {name: f"python3 -m pip install {name}, or --wheels" for name in ("pytest", "rich", "triton")}
REHEARSED = 4  # times the limits of a rehearsal: its machine may have few cores, and others use them too
INTERPRETED = {"TRITON_INTERPRET": "1", "SYNCNORM_KERNELS": "triton"}


class Step(NamedTuple):
    """A command.

    Args:
        name: in the record.
        command: its words, with RESULTS and SECONDS where what they stand for is to be put.
        limit: seconds after which it is killed.
        kind: TESTS or BENCH, for `--only`; empty for what runs in any case.
        needs: modules without which it is skipped.
        environment: variables beside the usual ones.
        skip: a reason not to run it.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    kind: str = ""
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = {}  # noqa: RUF012 (nobody writes into it)
    skip: str = ""


def steps(rehearse, modules, cores):
    """Return all steps.

    Args:
        rehearse: whether to run on the CPU, in Triton's interpreter and with tiny sizes.
        modules: the names of those that can be imported.
        cores: how many this process may use.
    """
    workers = min(cores, 2 if rehearse else 8) if "xdist" in modules else 1  # they compile some 600 kernels
    threads = str(1 if rehearse else max(1, cores // workers))
    alone = [file for file in FILES if file != RANKS]

    def tests(name, limit, files, *words, workers=workers, threads=threads):
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
        command += ["-o", "junit_family=xunit1"]  # which takes the properties that tests record
        command += ["-n", str(workers), "--dist", "loadgroup"] if workers > 1 else []
        environment = {"OMP_NUM_THREADS": threads, **(INTERPRETED if rehearse else {})}
        words = (*command, f"--junitxml={RESULTS}.xml", "-m", "gpu", *words, *files)
        return Step(name, words, limit, TESTS, ("pytest", "triton"), environment)

    def bench(name, limit, *words, tiny=()):
        command = (sys.executable, "-m", "syncnorm", "bench", name, *words, *(("--quick", *tiny) if rehearse else ()))
        files = (f"--json={RESULTS}.json", f"--markdown={RESULTS}.md")
        needs, environment = ("rich", "triton"), INTERPRETED if rehearse else {}
        return Step(f"bench {name}", command + files, limit, BENCH, needs, environment)

    listed = [
        Step("kernels of the CPU", (sys.executable, BUILD), 25, skip=_reason_not_to_build()),
        Step("info", (sys.executable, "-m", "syncnorm", "info"), 15),
        tests("first tests", 35, [KERNELS], "-k", FIRST),
        tests("tests", 110, alone, "-k", f"not ({FIRST}) and not {LARGE}"),
        tests("large tests", 20, alone, "-k", LARGE, workers=1),
        tests("tests on ranks", 50, [RANKS], workers=min(workers, 4), threads="1"),
        bench("kernels", 35, "--seconds", "20"),
        bench("layer", 75, "--seconds", SECONDS, "--compile", tiny=("--only", "bf16 NHWC")),
        bench("train", 60, "--seconds", SECONDS),
    ]
    return [step._replace(limit=step.limit * REHEARSED) for step in listed] if rehearse else listed


def _reason_not_to_build():
    """Return why not to compile the kernels of the CPU. It is empty if they are to be compiled."""
    build = runpy.run_path(str(ROOT / BUILD))
    with contextlib.suppress(OSError, AttributeError):  # there is no library, or one of another machine
        library = ctypes.CDLL(str(build["LIBRARY"]))
        library.syncnorm_source.restype = ctypes.c_uint32
        if library.syncnorm_source() == build["source_version"]():
            return "they are compiled"
    compiler = os.environ.get("CXX") or "g++"
    return "" if shutil.which(compiler.split()[0]) else f"there is no {compiler}; set CXX, or install g++"
