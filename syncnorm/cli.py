"""The command line: `syncnorm TOOL`, or `python -m syncnorm TOOL`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, info
from .communicators import communicator
from .job.launcher import detect_launcher

if TYPE_CHECKING:
    from .bench import report

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the tool that the command line names."""
    program = "syncnorm" if Path(sys.argv[0]).name == "syncnorm" else "python -m syncnorm"
    parser = argparse.ArgumentParser(prog=program, description="Tools of syncnorm.")
    parser.add_argument("--version", action="version", version=f"syncnorm {__version__}")
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    about = "print what this machine and this job have; rank 0 prints under torchrun, mpirun and srun"
    of_info = tools.add_parser("info", help=about, description=about)
    of_info.add_argument("--job", action="store_true", help="call syncnorm.init() even if no launcher is found")
    of_info.set_defaults(run=_info)
    about = "measure syncnorm against what it cannot beat, in one run; rank 0 prints"
    _add_benchmarks(tools.add_parser("bench", help=about, description=about))
    parsed = parser.parse_args(arguments)
    parsed.run(parsed)


def _add_benchmarks(bench: argparse.ArgumentParser) -> None:
    of_all = argparse.ArgumentParser(add_help=False)
    of_all.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    of_all.add_argument("--markdown", type=Path, metavar="FILE", help="write tables there, with machine and versions")
    of_all.add_argument("--quick", action="store_true", help="few rounds: tells whether it runs, not how fast")
    of_cases = argparse.ArgumentParser(add_help=False)
    of_cases.add_argument("--only", default="", metavar="WORDS", help='cases with these words, as in "fp32 NHWC"')
    benchmarks = bench.add_subparsers(dest="benchmark", required=True, metavar="NAME")

    def add(name: str, run: Callable[[argparse.Namespace], None], about: str, *parents: argparse.ArgumentParser) -> Any:
        made = benchmarks.add_parser(name, help=about, description=about, parents=[of_all, *parents])
        made.set_defaults(run=run)
        return made

    add("comm", _bench_comm, "all-reduces of all communicators; under mpirun or torchrun")
    about = "each pass of each implementation over its memory traffic; on any number of ranks"
    add("kernels", _bench_kernels, about, of_cases)
    about = "forward and backward of one layer beside what others do, with targets; on any number of ranks"
    layer = add("layer", _bench_layer, about, of_cases)
    layer.add_argument("--figure", type=Path, metavar="FILE", help="draw the times over the floor there")
    layer.add_argument("--compile", action="store_true", help="torch.compile of the reference too; slow to start")
    about = "steps of a ResNet with BatchNorm, synchronized, and fused with its activations; on any number of ranks"
    train = add("train", _bench_train, about)
    train.add_argument("--depth", type=int, default=50, choices=(50, 101, 152), help="of the ResNet (default: 50)")
    train.add_argument("--batch", type=_positive, metavar="N", help="images per rank (default: 4, on a GPU 32)")
    train.add_argument(
        "--size", type=_positive, metavar="N", help="height and width of an image (default: 64, on a GPU 224)"
    )


def _positive(given: str) -> int:
    if not given.isdigit() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {given}")
    return int(given)


def _info(options: argparse.Namespace) -> None:
    joined = info.job(join=options.job or detect_launcher().launcher != "none")
    if communicator().rank == 0:
        print(info.table({**info.machine(), **joined}))


def _bench_comm(options: argparse.Namespace) -> None:
    from .bench import comm  # needs rich, as all of them

    comm.main(_files(options), options.quick)


def _bench_kernels(options: argparse.Namespace) -> None:
    from .bench import kernels

    kernels.main(_files(options), options.quick, options.only)


def _bench_layer(options: argparse.Namespace) -> None:
    from .bench import layer

    layer.main(_files(options), options.quick, options.only, options.compile)


def _bench_train(options: argparse.Namespace) -> None:
    from .bench import train

    train.main(_files(options), options.quick, options.depth, options.batch, options.size)


def _files(options: argparse.Namespace) -> report.Files:
    """Return what to write. Rank 0, which does, raises RuntimeError if it cannot, before anything is measured."""
    from .bench import report

    files = report.Files(options.json, options.markdown, getattr(options, "figure", None))
    if detect_launcher().rank == 0:
        files.check()
    return files
