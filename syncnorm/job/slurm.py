"""Rendezvous under Slurm: set torchrun's variables from those of the job step."""

from __future__ import annotations

import os
import re

from .launcher import detect_launcher
from .rendezvous import export
from .store import LOCALHOST

__all__ = ["export_rendezvous", "first_host", "tasks_per_node"]


def export_rendezvous() -> None:
    """Set torchrun's variables from those of Slurm's job step. MASTER_ADDR and MASTER_PORT are kept if set."""
    _, rank, size = detect_launcher()
    environ = os.environ
    ranks_by_node = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    host = first_host(environ["SLURM_STEP_NODELIST"]) if len(ranks_by_node) > 1 else LOCALHOST
    step = 101 * int(environ["SLURM_JOB_ID"]) + int(environ["SLURM_STEP_ID"])
    port = 20000 + step % 12000  # below the ephemeral ports; another job may use the same one
    where = environ.get("MASTER_ADDR", host), environ.get("MASTER_PORT", port)
    export(rank, size, environ["SLURM_LOCALID"], ranks_by_node[int(environ["SLURM_NODEID"])], *where, is_served=False)


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: node03 for "node[03-05,9],gpu1"."""
    first = re.match(r"([^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else "")


def tasks_per_node(counts: str) -> list[int]:
    """Return the number of tasks on each node from Slurm's notation: [2, 2, 2, 1] for "2(x3),1"."""
    return [int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]
