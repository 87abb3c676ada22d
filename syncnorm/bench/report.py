"""What every benchmark tells: where it ran, a table on the terminal, all numbers as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import info

try:
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise RuntimeError(
        "python -m syncnorm bench draws its tables with rich, which cannot be imported: pip install 'syncnorm[bench]'"
    ) from error

__all__ = ["header", "save", "show"]

WIDTH = 120  # characters; mpirun gives ranks a terminal of 80 whatever the real one is


def header(job: Mapping[str, str]) -> dict[str, str]:
    """Return where and when this runs, by name; `job` is what `syncnorm.info.job` told."""
    machine = info.machine()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{_cpu()}, {os.cpu_count()} cores, of which rank 0 may use {len(os.sched_getaffinity(0))}",
        **{name: machine[name] for name in ("syncnorm", "python", "torch", "mpi4py", "mpi")},
        **{name: job[name] for name in ("launcher", "communicator", "torch.distributed", "hosts")},
    }


def show(
    facts: Mapping[str, str], title: str, columns: Sequence[str], sections: Sequence[Sequence[Sequence[str]]]
) -> None:
    """Print the header, then a table of sections of rows. The first two columns are names, the others numbers."""
    drawn = Table(title=title)
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i < 2 else "right")
    for section in sections:
        for row in section:
            drawn.add_row(*row, end_section=row is section[-1])
    print(info.table(dict(facts)))
    Console(width=WIDTH, force_terminal=False).print(drawn)


def save(path: Path, facts: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the header and all numbers as JSON."""
    path.write_text(json.dumps({"header": facts, "rows": rows}, indent=2) + "\n")


def _cpu() -> str:
    """Return the processor's name, which Linux keeps in a file."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()
