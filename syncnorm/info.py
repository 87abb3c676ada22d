"""Describe this machine and this job for `python -m syncnorm info`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import socket
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from . import __version__, kernels
from .communicators import Communicator, communicator
from .communicators.process_group import ProcessGroupCommunicator
from .job.init import init
from .job.launcher import detect_launcher

__all__ = ["job", "machine", "processor"]


def machine() -> dict[str, str]:
    """Return the versions and devices of this machine, by name."""
    return {
        "syncnorm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads used by torch",
        "cuda": _cuda(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if _has("nccl") and torch.cuda.is_available() else "no",  # type: ignore[no-untyped-call]
        "gloo": "yes" if _has("gloo") else "no",
        "mpi4py": _version("mpi4py"),
        "mpi": _mpi(),
        "triton": _version("triton"),
        "kernels on cpu": _kernels("cpu"),
        "kernels on cuda": _kernels("cuda") if torch.cuda.is_available() else "no CUDA device",
    }


def processor() -> str:
    """Return the processor's name, which Linux keeps in a file."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def job(*, join: bool = True) -> dict[str, str]:
    """Return the launcher, the group and the hosts of the job. Collective on all ranks of the job.

    Args:
        join: whether to join the job first.
    """
    group = init() if join else communicator()
    hosts = Counter(group.all_gather_object(socket.gethostname()))
    return {
        "launcher": detect_launcher().launcher,
        "communicator": type(group).__name__,
        "torch.distributed": dist.get_backend() if dist.is_available() and dist.is_initialized() else "not initialized",
        "rank": f"{group.rank} of {group.size}",
        "local rank": f"{os.environ.get('LOCAL_RANK', 0)} on {socket.gethostname()}",
        "sums of cpu tensors": _route(group),
        "hosts": ", ".join(f"{host} ({ranks} rank{'s' * (ranks > 1)})" for host, ranks in hosts.items()),
    }


def _route(group: Communicator) -> str:
    """Return how the group sums CPU tensors of at most 64 KB, such as the statistics of a layer."""
    if isinstance(group, ProcessGroupCommunicator):
        return group.route()
    return "none, one rank" if group.size == 1 else "by MPI"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _has(backend: str) -> bool:
    return dist.is_available() and bool(getattr(dist, f"is_{backend}_available")())


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device" if torch.version.cuda else "torch built without CUDA"
    names = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{torch.version.cuda}, " + ", ".join(f"{count} x {name}" for name, count in names.items())


def _mpi() -> str:
    if importlib.util.find_spec("mpi4py") is None:
        return "unknown (mpi4py is not installed)"
    try:
        from .mpi.buffers import cuda_aware
        from .mpi.library import MPI
    except RuntimeError as error:
        return f"not found by mpi4py: {str(error.__cause__).splitlines()[0]}"
    library = MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\0")
    return f"{' '.join(library.split())}, {'CUDA-aware' if cuda_aware() else 'not CUDA-aware'}"


def _kernels(device: str) -> str:
    try:
        implementation = kernels.select(torch.empty(0, device=device))
    except RuntimeError as error:
        return f"none: {error}"
    name = getattr(implementation, "__name__", "unknown").rpartition(".")[2]
    if isa := getattr(implementation, "ISA", None):
        return f"{name} ({isa})"
    if device == "cpu" and not Path(kernels.__file__).with_name("cpu").joinpath("libsyncnorm_cpu.so").exists():
        return f"{name}: no compiled library (no compiler at install time?)"
    return name
