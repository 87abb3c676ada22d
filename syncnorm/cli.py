"""The command line: `python -m syncnorm TOOL`."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import info
from .communicators import communicator

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the tool that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m syncnorm", description="Tools of syncnorm.")
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    about = "print what this machine and this job have; also under torchrun and mpirun, where rank 0 prints"
    tools.add_parser("info", help=about, description=about).set_defaults(run=_info)
    about = "measure syncnorm against what it cannot beat, in one run; rank 0 prints"
    _add_benchmarks(tools.add_parser("bench", help=about, description=about))
    parsed = parser.parse_args(arguments)
    parsed.run(parsed)


def _add_benchmarks(bench: argparse.ArgumentParser) -> None:
    of_all = argparse.ArgumentParser(add_help=False)
    of_all.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    of_all.add_argument("--markdown", type=Path, metavar="FILE", help="write tables there, with machine and versions")
    of_all.add_argument("--quick", action="store_true", help="few rounds: tells whether it runs, not how fast")
    benchmarks = bench.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    about = "all-reduces of all communicators; under mpirun or torchrun"
    benchmarks.add_parser("comm", help=about, description=about, parents=[of_all]).set_defaults(run=_bench_comm)


def _info(_: argparse.Namespace) -> None:
    joined = info.job()
    if communicator().rank == 0:
        print(info.table({**info.machine(), **joined}))


def _bench_comm(options: argparse.Namespace) -> None:
    from .bench import comm, report  # needs rich

    comm.main(report.Files(options.json, options.markdown), options.quick)
