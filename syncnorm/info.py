"""What this machine and this job have: the table of `python -m syncnorm info`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import socket
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from . import __version__, bootstrap, kernels
from .communicators import communicator
from .launchers import launched

__all__ = ["job", "machine", "table"]


def machine() -> dict[str, str]:
    """Return what is installed here, by name."""
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


def job(*, join: bool = True) -> dict[str, str]:
    """Return who is in the job, which this process joins first if `join`. Collective on all ranks of the job."""
    group = bootstrap.init() if join else communicator()
    hosts = Counter(group.all_gather_object(socket.gethostname()))
    return {
        "launcher": launched().launcher,
        "communicator": type(group).__name__,
        "torch.distributed": dist.get_backend() if dist.is_available() and dist.is_initialized() else "not initialized",
        "rank": f"{group.rank} of {group.size}",
        "local rank": f"{os.environ.get('LOCAL_RANK', 0)} on {socket.gethostname()}",
        "hosts": ", ".join(f"{host} ({ranks} rank{'s' * (ranks > 1)})" for host, ranks in hosts.items()),
    }


def table(rows: dict[str, str]) -> str:
    """Return the rows as lines of two aligned columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _has(backend: str) -> bool:
    return dist.is_available() and bool(getattr(dist, f"is_{backend}_available")())


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device" if torch.version.cuda else "torch is built without it"
    names = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{torch.version.cuda}, " + ", ".join(f"{count} x {name}" for name, count in names.items())


def _mpi() -> str:
    if importlib.util.find_spec("mpi4py") is None:
        return "no mpi4py to reach it"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # which of them depends on how mpi4py was built
        return f"mpi4py finds none: {str(error).splitlines()[0]}"
    from .communicators.messages import cuda_aware

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
