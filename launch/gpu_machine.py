"""What `launch/gpu` finds out about the machine before it runs anything, and the wheels that it was given."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("torch", "triton", "numpy", "pytest", "xdist", "rich", "mpi4py")
WAIT = 60  # seconds for one look
LOOK = f"""
import importlib.util, json, platform
modules = [name for name in {MODULES} if importlib.util.find_spec(name)]
found = {{"modules": modules, "python": platform.python_version()}}
if "torch" in modules:
    import torch
    found |= {{"torch": torch.__version__, "CUDA": torch.version.cuda, "card": ""}}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["card"] = f"{{torch.cuda.device_count()}} x {{card.name}}, {{card.total_memory / 1e9:.0f}} GB"
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["cuDNN"] = torch.backends.cudnn.version()
if "triton" in modules:
    import importlib.metadata
    found["Triton"] = importlib.metadata.version("triton")
print(json.dumps(found))
"""


class NotReadyError(Exception):
    """The machine, or what was asked for, does not allow a run."""


def look(environment):
    """Return the modules that Python can import here, and the versions and the card, as that Python tells."""
    try:
        told = _output(sys.executable, "-c", LOOK, env=environment)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise NotReadyError(f"expected {sys.executable} to import torch: {error}\n{error.stderr or ''}") from None
    return json.loads(told.splitlines()[-1])


def facts(found):
    """Return what a record says of the machine and of the code, by name."""
    versions = {
        name: str(found[name]) for name in ("python", "torch", "CUDA", "NCCL", "cuDNN", "Triton") if found.get(name)
    }
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "card": found.get("card") or "none",
        "driver": _driver(),
        **versions,
        "machine": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}",
        "commit": _commit(),
        "sources": f"{_checksum()} (SHA-256 of syncnorm/)",
    }


def install(wheels, folder):
    """Install all wheels of a folder into another; return the variables that make Python and mpirun find them."""
    files = sorted(str(file.resolve()) for file in wheels.glob("*.whl"))
    if not files:
        raise NotReadyError(f"--wheels: expected a folder with wheels, got {wheels}")
    options = "--quiet --no-index --no-deps --no-compile --no-cache-dir --ignore-installed --no-warn-script-location"
    try:
        _output(sys.executable, "-m", "pip", "install", *options.split(), "--prefix", folder, *files)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise NotReadyError(f"--wheels: {error}\n{error.stderr or ''}") from None
    return {
        "PYTHONPATH": os.pathsep.join(str(path) for path in sorted(folder.rglob("*-packages")) if path.is_dir()),
        "PATH": str(folder / "bin"),
    }


def _output(*command, **options):
    """Return what a command prints; its errors are in the exception."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=WAIT, **options).stdout


def _try(*command):
    try:
        return _output(*command).strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _driver():
    return _try("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or "none"


def _commit():
    """Return the commit of the checkout, and whether it has changes."""
    commit = _try("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not commit:
        return "unknown: this is no git checkout, or git is missing"
    return commit + " with changes" * bool(_try("git", "-C", str(ROOT), "status", "--porcelain"))


def _checksum():
    """Return a checksum of the package's sources, which tells the code where there is no git."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "syncnorm").rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _cpu():
    """Return the processor's name, which Linux keeps in a file."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
