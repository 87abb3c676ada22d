"""Set the norms side by side, in a CNN and in a Transformer, and answer: do I need SyncBatchNorm?

    python examples/contrast.py --quick                 # within 5 minutes on 2 cores
    python examples/contrast.py                         # the whole matrix
    torchrun --nproc-per-node 4 examples/contrast.py    # the same, on ranks that a launcher of yours started
    mpirun -n 4 python examples/contrast.py

The first two start torchrun themselves. The matrix is {cnn, transformer} x norms x samples per rank x seeds, at 4
ranks. Every run sees equally many samples. The CNN's learning rate is proportional to the global batch, as in Wu and
He, Group Normalization, 2018; the Transformer's to its square root, since its optimizer is Adam (Malladi et al., 2022).
A run whose record is there is not run again. The report, its figures and its data as CSV go to runs/contrast.

Each cell of the matrix has two kinds of runs:

    quality    a whole training. Only `bn` depends on how the batch is split: it trains on the 4 ranks. With the other
               norms the ranks train one by one, each another run, with the whole global batch.
    time       some steps on all 4 ranks, for what a step costs. Their losses are held against those of the quality
               runs, so each report shows that one process did stand for 4 ranks.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cnn
import transformer
from common import check_writable, on_all_ranks, on_rank_0, write
from progress import progress_bar
from training import positive

import syncnorm
from syncnorm.communicators import LocalCommunicator

EXAMPLES = {"cnn": cnn, "transformer": transformer}
NORMS = {"cnn": ["bn", "sync_bn", "gn", "ln", "rms"], "transformer": ["ln", "rms", "sync_bn"]}
LR = {"cnn": (0.05, 1), "transformer": (0.003, 0.5)}  # at a global batch of 64, and the power of the global batch
TIMEOUT = 24 * 3600  # seconds for a rank that still trains when the others have come to the end of their runs


class Run(NamedTuple):
    """One run: which training, and whether for its quality or for its time."""

    kind: str
    model: str
    norm: str
    samples: int  # per rank
    seed: int
    ranks: int  # that share the global batch
    steps: int
    decay: int  # steps of a whole training

    @property
    def split(self):
        """Tell whether the run is one of all the ranks together."""
        return self.kind == "time" or self.norm == "bn"

    @property
    def path(self):
        return (
            Path("records") / f"{self.kind}-{self.model}-{self.norm}-{self.ranks}x{self.samples}-seed{self.seed}.json"
        )

    @property
    def words(self):
        """Return the arguments of the example."""
        base, power = LR[self.model]
        global_batch = self.ranks * self.samples
        options = {
            "--norm": self.norm,
            "--batch-per-rank": self.samples if self.split else global_batch,
            "--steps": self.steps,
            "--decay": self.decay,
            "--lr": f"{base * (global_batch / 64) ** power:.6g}",
            "--seed": self.seed,
        }
        return [str(word) for option in options.items() for word in option]

    @property
    def cost(self):
        """Return about how many seconds of all ranks the run takes, to share runs out and to foretell their end."""
        collectives = 1 + 18 * (self.norm == "sync_bn")
        return self.steps * (0.006 * collectives + 0.01 if self.split else 0.008 + 0.0001 * self.samples * self.ranks)


def matrix(args):
    """Return all runs, those for the time first: they want the machine for themselves."""
    runs = []
    for kind, model in itertools.product(("time", "quality"), args.models):
        for norm, samples, seed in itertools.product(NORMS[model], args.sizes, range(args.seeds)):
            decay = max(1, args.samples[model] // (args.ranks * samples))
            steps = decay if kind == "quality" else min(decay, args.timed_steps)
            runs.append(Run(kind, model, norm, samples, seed, args.ranks, steps, decay))
    return runs


def read(directory, runs):
    """Return the records that are there, by run; a file of the same name but other arguments, or none, is no record."""
    records = {}
    for run in runs:
        try:
            record = json.loads((directory / run.path).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("arguments") == run.words:
            records[run] = record
    return records


def train(runs, args, group):
    """Train the runs, on the ranks of the group, and write their records."""
    on_all_ranks(group, "--ranks", check_ranks, args.ranks, group.size)
    on_all_ranks(group, "--out", check_folder, args.out)  # most ranks write records
    runs = group.all_gather_object(runs)[0]  # one rank's view of what is there
    together = [run for run in runs if run.split]
    apart = sorted((run for run in runs if not run.split), key=lambda run: -run.cost)
    mine = apart[group.rank :: group.size]
    share = sum(run.cost for run in apart) / max(1e-9, sum(run.cost for run in mine))  # all runs' for one of mine
    with progress_bar(disable=group.rank != 0) as progress:
        task = progress.add_task("", total=sum(run.cost for run in runs))

        def go(run, group, weight):
            def track(steps):
                progress.update(task, description=f"{run.kind}: {run.model} {run.norm}, {run.ranks} x {run.samples}")
                for step in steps:
                    yield step
                    progress.advance(task, weight * run.cost / run.steps)

            example = EXAMPLES[run.model]
            arguments = example.arguments(run.words)
            model, record = example.train(arguments, group, track)
            if run.kind == "quality":
                record |= example.evaluate(model, arguments, group)
            record |= {"arguments": run.words, "cores": len(os.sched_getaffinity(0))}
            on_rank_0(group, "--out", write, args.out / run.path, json.dumps(record, indent=1).encode())

        warm = set()
        for run in together:
            if (run.model, run.samples) not in warm:  # what is made at the first use of a shape is no part of its time
                warm.add((run.model, run.samples))
                example = EXAMPLES[run.model]
                example.train(example.arguments(run.words), group, lambda steps: itertools.islice(steps, 3))
            go(run, group, 1)
        for run in mine:
            go(run, LocalCommunicator(), share)
        group.barrier()


def check_ranks(expected, got):
    if got != expected:
        raise ValueError(f"expected {expected} ranks, got {got}")


def check_folder(directory):
    """Raise if the report or the records cannot be written."""
    check_writable(directory / "report.md")
    check_writable(directory / "records" / "record")


def start_ranks(args):
    """Run this program on ranks under torchrun, and return how they ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
    return subprocess.run([*command, __file__, *sys.argv[1:]], env={"OMP_NUM_THREADS": "1"} | os.environ).returncode


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and samples")
    parser.add_argument("--models", nargs="+", choices=EXAMPLES, default=list(EXAMPLES), help="(default: both)")
    parser.add_argument("--sizes", nargs="+", type=positive, metavar="N", help="samples per rank (default: 1 2 4 8 16)")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="trainings of each kind (default: 3)")
    parser.add_argument("--ranks", type=positive, default=4, metavar="N", help="(default: 4)")
    parser.add_argument("--cnn-samples", type=positive, metavar="N", help="seen by each run (default: 15000)")
    parser.add_argument("--transformer-samples", type=positive, metavar="N", help="likewise (default: 24000)")
    parser.add_argument("--timed-steps", type=positive, metavar="N", help="of a run for the time (default: 50)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/contrast"), metavar="FOLDER", help="(default: %(default)s)"
    )
    args = parser.parse_args()
    if args.ranks < 2:
        parser.error("expected at least 2 --ranks: one alone communicates nothing")
    quick = args.quick
    args.sizes = sorted(set(args.sizes or ([1, 4, 16] if quick else [1, 2, 4, 8, 16])))
    args.samples = {
        "cnn": args.cnn_samples or (2400 if quick else 15000),
        "transformer": args.transformer_samples or (1600 if quick else 24000),
    }
    args.timed_steps = args.timed_steps or (10 if quick else 50)
    return args


def main():
    args = arguments()
    runs = matrix(args)
    group = syncnorm.init(timeout=TIMEOUT)
    missing = [run for run in runs if run not in read(args.out, runs)]
    if "RANK" not in os.environ:  # which `init` sets under every launcher
        on_all_ranks(LocalCommunicator(), "--out", check_folder, args.out)
        if missing:
            sys.exit(start_ranks(args))
    else:
        train(missing, args, group)
    if group.rank == 0:
        from contrast_report import write_report  # needs scipy

        try:
            write_report(args.out, read(args.out, runs))
        except OSError as error:
            raise SystemExit(f"--out: {error}") from error


if __name__ == "__main__":
    main()
