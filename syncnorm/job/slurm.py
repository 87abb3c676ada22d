"""Rendezvous under Slurm: the variables of a step, as torchrun's."""

from __future__ import annotations

import os
import re

from .launcher import detect_launcher
from .rendezvous import export
from .store import LOCALHOST

__all__ = ["export_rendezvous", "first_host", "tasks_per_node"]


def export_rendezvous() -> None:
    """Set what torchrun would, from the variables of a step of Slurm's; MASTER_ADDR and MASTER_PORT stay if set."""
    _, rank, size = detect_launcher()
    told = os.environ
    ranks_by_node = tasks_per_node(told["SLURM_STEP_TASKS_PER_NODE"])
    host = first_host(told["SLURM_STEP_NODELIST"]) if len(ranks_by_node) > 1 else LOCALHOST
    step = 101 * int(told["SLURM_JOB_ID"]) + int(told["SLURM_STEP_ID"])
    port = 20000 + step % 12000  # below those that systems give to clients; another job may have the same
    where = told.get("MASTER_ADDR", host), told.get("MASTER_PORT", port)
    export(rank, size, told["SLURM_LOCALID"], ranks_by_node[int(told["SLURM_NODEID"])], *where, is_served=False)


def first_host(nodes: str) -> str:
    """Return the first host of a list as Slurm writes it: node03 of "node[03-05,9],gpu1"."""
    first = re.match(r"([^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else "")


def tasks_per_node(counts: str) -> list[int]:
    """Return how many tasks each node has, as Slurm writes it: [2, 2, 2, 1] of "2(x3),1"."""
    return [int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]
