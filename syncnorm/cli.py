"""The command line: `syncnorm TOOL`, or `python -m syncnorm TOOL`."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import __version__, info
from .communicators import communicator
from .job.launcher import detect_launcher
from .report import listing

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
    about = "compare a model on several ranks with one process on the whole batch, layer by layer"
    _add_verify(
        tools.add_parser(
            "verify", help=about, description=f"{about}; exit status 1 if it departs, 2 if it cannot be trained"
        )
    )
    about = "predict what synchronizing BatchNorm costs on a cluster, and recommend which ranks should share statistics"
    _add_plan(tools.add_parser("plan", help=about, description=f"{about}; exit status 2 if the model cannot be run"))
    about = "measure syncnorm beside other implementations and a copy of the same memory; rank 0 prints"
    _add_benchmarks(tools.add_parser("bench", help=about, description=about))
    options = vars(parser.parse_args(arguments))
    del options["tool"]
    options.pop("run")(**options)


def _info(job: bool) -> None:
    joined = info.job(join=job or detect_launcher().launcher != "none")
    if communicator().rank == 0:
        print(listing({**info.machine(), **joined}))


def _integers(given: str) -> tuple[int, ...]:
    words = given.split(",") if given else []
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"expected positive integers with commas between them, got {given}")
    return tuple(map(int, words))


def _splits(given: str) -> tuple[str, ...]:
    from .testing.whole_batch import SPLITS

    if not {*given.split(",")} <= {*SPLITS}:
        raise argparse.ArgumentTypeError(f"expected {', '.join(SPLITS)}, with commas between them, got {given}")
    return tuple(given.split(","))


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODULE:FUNCTION", help="a function that returns the model; MODULE may be the path of a file")
    add("--input-shape", type=_integers, required=True, metavar="C,H,W", help="the shape of one sample")
    add("--integers", type=_positive, metavar="N", help="random integers below N as inputs, for embeddings")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_model(parser)
    add("--batch", type=_positive, default=16, metavar="N", help="samples in the whole batch (default: 16)")
    add("--ranks", type=_integers, default=(2,), metavar="N,N", help="numbers of ranks to try (default: 2)")
    add("--backend", choices=("gloo", "mpi", "nccl"), default="gloo", help="(default: gloo)")
    add("--steps", type=_positive, default=5, metavar="N", help="training steps (default: 5)")
    splits = "how the batch is dealt out: even, random (any sizes), empty (a rank has none) (default: even)"
    add("--splits", type=_splits, default=("even",), metavar="SPLIT,SPLIT", help=splits)
    seeded = "of inputs, weights, upstream gradients and random shards (default: 0)"
    add("--seed", type=int, default=0, metavar="N", help=seeded)
    add("--no-convert", dest="convert", action="store_false", help="leave the model as it is built")
    add("--timeout", type=_positive, default=60, metavar="S", help="seconds for each training (default: 60)")
    add("--json", type=Path, metavar="FILE", help="write all differences there")
    add("--figure", type=Path, metavar="FILE", help="draw each layer's differences there")
    parser.set_defaults(run=_verify)


def _verify(
    model: str,
    input_shape: tuple[int, ...],
    integers: int | None,
    batch: int,
    steps: int,
    ranks: tuple[int, ...],
    seed: int,
    json: Path | None,
    figure: Path | None,
    **options: Any,
) -> None:
    from .testing.whole_batch import random_batches, verify

    if detect_launcher().launcher != "none":
        raise SystemExit("expected verify to be started alone, got it under a launcher: it starts the ranks itself")
    files = _files_or_exit(json=json, figure=figure)
    try:
        batches = random_batches(input_shape, batch, steps, integers=integers, seed=seed)
        report = verify(model, batches, ranks, seed=seed, **options)
    except Exception as error:  # of the model, in one process
        print(error.__cause__ or "", f"verify cannot train the model: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    report.show()
    if files.json is not None:
        report.write(files.json)
    if files.figure is not None:
        report.draw(files.figure)
    raise SystemExit(0 if report.passed else 1)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_model(parser)
    add("--batch-per-rank", type=_positive, required=True, metavar="N", help="samples of each rank")
    add("--nodes", type=_positive, metavar="N", help="of the cluster (default: 1, with --measure those of this job)")
    add("--ranks-per-node", type=_positive, metavar="N", help="(default: 1, with --measure those of this job)")
    add("--measure", action="store_true", help="measure on the ranks of this job, under torchrun or mpirun")
    add("--latency-us", type=_number, metavar="L", help="of a message between two nodes, in microseconds")
    add("--bandwidth-gbps", type=_number, metavar="B", help="between two nodes, in 10^9 bits a second")
    add("--latency-within-us", type=_number, metavar="L", help="within a node (default: as between nodes)")
    add("--bandwidth-within-gbps", type=_number, metavar="B", help="within a node (default: as between nodes)")
    add("--step-ms", type=_number, metavar="T", help="a step of one rank with BatchNorm (default: measured here)")
    noise = "standard deviation of a step's computing, as a fraction of it (default: 0.002, with --measure measured)"
    add("--noise", type=_number, metavar="FRACTION", help=noise)
    add("--json", type=Path, metavar="FILE", help="write all predictions there")
    add("--figure", type=Path, metavar="FILE", help="draw the efficiency over the number of ranks there")
    parser.set_defaults(run=partial(_plan, parser))


def _plan(
    parser: argparse.ArgumentParser,
    *,
    model: str,
    input_shape: tuple[int, ...],
    batch_per_rank: int,
    nodes: int | None,
    ranks_per_node: int | None,
    measure: bool,
    step_ms: float | None,
    json: Path | None,
    figure: Path | None,
    latency_us: float | None,
    bandwidth_gbps: float | None,
    latency_within_us: float | None,
    bandwidth_within_gbps: float | None,
    **options: Any,
) -> None:
    from . import planning

    between = _link(parser, latency_us, bandwidth_gbps, "")
    within = _link(parser, latency_within_us, bandwidth_within_gbps, "-within")
    if measure and not (within is None and step_ms is None):
        parser.error("expected no --step-ms and no link within a node with --measure, which measures them")
    if not measure and between is None:
        parser.error("expected --measure, or --latency-us and --bandwidth-gbps")
    if not measure and nodes is None and ranks_per_node is None:
        parser.error("expected --nodes and --ranks-per-node: the cluster that the prediction is for")
    launched = detect_launcher().launcher != "none"
    if measure and not launched:
        raise SystemExit(
            "expected --measure on several ranks, got this process alone: start it under torchrun or mpirun"
        )
    if launched and not measure:
        raise SystemExit("expected plan without --measure to be started alone, got it under a launcher")
    files = _files_or_exit(json=json, figure=figure)
    try:
        if measure:
            options |= {"nodes": nodes, "ranks_per_node": ranks_per_node, "between": between}
            report = planning.plan_by_measuring(model, input_shape, batch_per_rank, **options)
        else:
            options |= {"nodes": nodes or 1, "ranks_per_node": ranks_per_node or 1, "between": between}
            options |= {"within": within, "step": None if step_ms is None else step_ms / 1e3}
            options["noise"] = planning.NOISE if options["noise"] is None else options["noise"]
            report = planning.plan(model, input_shape, batch_per_rank, **options)
    except Exception as error:  # of the model
        print(f"plan cannot run the model: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if detect_launcher().rank != 0:
        return
    report.show()
    if files.json is not None:
        report.write(files.json)
    if files.figure is not None:
        report.draw(files.figure)


def _link(parser: argparse.ArgumentParser, latency_us: float | None, bandwidth_gbps: float | None, where: str) -> Any:
    """Return the link that two options describe, or None if there are neither."""
    from .planning import Link

    if latency_us is None and bandwidth_gbps is None:
        return None
    if latency_us is None or bandwidth_gbps is None or bandwidth_gbps == 0:
        given = f"got {latency_us} and {bandwidth_gbps}"
        parser.error(f"expected both --latency{where}-us and a positive --bandwidth{where}-gbps, {given}")
    return Link(latency_us / 1e6, bandwidth_gbps * 1e9 / 8)


class _Option(NamedTuple):
    """An option of a benchmark, as `argparse` takes it."""

    flag: str
    settings: dict[str, Any]


class _Benchmark(NamedTuple):
    """A module of `syncnorm.bench`. Its `main` takes the files to write, `quick`, and these options by name."""

    about: str
    options: tuple[_Option, ...] = ()


def _positive(given: str) -> int:
    if not given.isdigit() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {given}")
    return int(given)


def _number(given: str) -> float:
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {given}")
    return number


def _seconds(on_gpu: int) -> _Option:
    about = f"measure for about so long (default: {on_gpu} on a GPU, no limit on a CPU)"
    return _Option("--seconds", {"type": _positive, "metavar": "S", "help": about})


_ALL = (
    _Option("--json", {"type": Path, "metavar": "FILE", "help": "write all numbers there"}),
    _Option("--markdown", {"type": Path, "metavar": "FILE", "help": "write tables there, without disturbed rows"}),
    _Option("--quick", {"action": "store_true", "help": "few rounds: tells whether it runs, not how fast"}),
)
_ONLY = _Option("--only", {"default": "", "metavar": "WORDS", "help": 'cases with these words, as in "fp32 NHWC"'})
_BENCHMARKS = {
    "comm": _Benchmark("all-reduces of all communicators; under mpirun or torchrun"),
    "kernels": _Benchmark(
        "each pass of each implementation over a copy of its memory traffic; on any number of ranks",
        (_ONLY, _seconds(25)),
    ),
    "layer": _Benchmark(
        "forward and backward of one layer beside what others do, with targets; on any number of ranks",
        (
            _ONLY,
            _seconds(90),
            _Option(
                "--figure", {"type": Path, "metavar": "FILE", "help": "draw the times over the copy baseline there"}
            ),
            _Option(
                "--compile",
                {
                    "action": "store_true",
                    "dest": "with_compiled",
                    "help": "torch.compile of the module and of the reference too",
                },
            ),
        ),
    ),
    "train": _Benchmark(
        "steps of a ResNet with BatchNorm, synchronized, and fused with its activations; on any number of ranks",
        (
            _Option("--depth", {"type": int, "default": 50, "choices": (50, 101, 152), "help": "(default: 50)"}),
            _Option(
                "--batch",
                {
                    "type": _positive,
                    "nargs": "+",
                    "metavar": "N",
                    "help": "images per rank, one number or several (default: 4, on a GPU 2 4 8 16)",
                },
            ),
            _Option(
                "--size",
                {"type": _positive, "metavar": "N", "help": "height and width of an image (default: 64, on a GPU 224)"},
            ),
            _seconds(100),
            _Option("--figure", {"type": Path, "metavar": "FILE", "help": "draw time and memory over --batch there"}),
        ),
    ),
}


def _add_benchmarks(bench: argparse.ArgumentParser) -> None:
    names = bench.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for name, benchmark in _BENCHMARKS.items():
        parser = names.add_parser(name, help=benchmark.about, description=benchmark.about)
        for option in (*_ALL, *benchmark.options):
            parser.add_argument(option.flag, **option.settings)
        parser.set_defaults(run=_bench)


def _bench(benchmark: str, **options: Any) -> None:
    module = importlib.import_module(f".bench.{benchmark}", __package__)  # needs rich, as all of them
    written = {name: options.pop(name, None) for name in ("json", "markdown", "figure")}
    module.main(_files(**written), **options)


def _files_or_exit(**written: Path | None) -> report.Files:
    """Return what to write. Exit with status 2 if it cannot be written."""
    try:
        return _files(**written)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def _files(**written: Path | None) -> report.Files:
    """Return what to write. Rank 0, which does, raises RuntimeError if it cannot, before anything is measured."""
    from .bench import report

    files = report.Files(**written)
    if detect_launcher().rank == 0:
        files.check()
    return files
