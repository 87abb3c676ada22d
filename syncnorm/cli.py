"""The command line: `python -m syncnorm TOOL`."""

from __future__ import annotations

import argparse

from . import info
from .communicators import communicator

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the tool that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m syncnorm", description="Tools of syncnorm.")
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    about = "print what this machine and this job have; also under torchrun and mpirun, where rank 0 prints"
    tools.add_parser("info", help=about, description=about)
    parser.parse_args(arguments)

    joined = info.job()
    if communicator().rank == 0:
        print(info.table({**info.machine(), **joined}))
