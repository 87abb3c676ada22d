"""Measure what texts claim about BatchNorm, LayerNorm, RMSNorm and GroupNorm, and say what holds here.

    python examples/claims.py --quick              # within 6 minutes on 2 cores
    python examples/claims.py                      # within an hour
    python examples/claims.py --only convergence   # one claim, or several

Each claim is an experiment in examples/experiments: small trainings with several seeds. Its verdict, "holds here",
"holds only if ..." or "does not hold here", is computed from the numbers. --quick trains for less time, so some of its
verdicts differ. All cores are used, one by each run. The claim `cost` measures time, also on a GPU if there is one, and
wants an idle machine. Nothing is downloaded.

Each finished run is stored in a folder `records`. Repeat the same command to resume, or with another --only to add
claims to the report. Runs of another version of syncnorm or of the experiment are measured again. The report, its
figures and its data as CSV are written to the folder --out.
"""

import argparse
import itertools
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from common import check_writable, write
from experiments import CLAIMS
from experiments.run import Run, measured, read, record_of
from progress import progress_bar
from training import positive
from words import plural

from syncnorm.testing import run_ranks

SLOW = 20  # times the estimated seconds, and a minute, after which runs on ranks are given up


def runs_of(claim, quick, seeds):
    return [
        Run(claim.name, tuple(settings.items()), seed, seconds)
        for settings, seconds in claim.cases(quick)
        for seed in range(seeds)
    ]


def stages(runs, cores):
    """Return (processes, [runs that are started together]) of each stage, in order.

    What measures time has the machine for itself. Runs on ranks are started with all their seeds. Of the others there
    are as many at a time as there are cores, the longest first.
    """
    undisturbed = [[run] for run in runs if CLAIMS[run.claim].undisturbed]
    rest = [run for run in runs if not CLAIMS[run.claim].undisturbed]
    on_ranks = [run for run in rest if run.ranks > 1]
    together = [list(group) for _, group in itertools.groupby(on_ranks, lambda run: (run.claim, run.settings))]
    alone = [[run] for run in sorted(rest, key=lambda run: -run.seconds) if run.ranks == 1]
    return [(1, undisturbed), (1, together), (cores, alone)]


def results(runs):
    """Measure runs of one case, in this process or on ranks; return the metrics and seconds of each."""
    ranks = runs[0].ranks
    if ranks == 1:
        return measured(runs)
    return run_ranks(measured, ranks, runs, timeout=60 + SLOW * sum(run.seconds for run in runs))[0]


def finished(batches, processes):
    """Yield (runs, their results) of each batch when it is done, so many at a time.

    Raises:
        RuntimeError: a run failed, or its process was killed; the run is named.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(batches)), context, _leave_interrupts_to_the_parent)
    try:
        pending = {pool.submit(results, batch): batch for batch in batches}
        for future in as_completed(pending):
            batch = pending[future]
            try:
                found = future.result()
            except Exception as error:
                raise RuntimeError(f"failed: {batch[0].title}") from error
            yield batch, found
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_the_parent():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def train(runs, directory, jobs):
    """Run what is missing and write the records."""
    if not runs:
        return
    with progress_bar() as progress:
        task = progress.add_task("", total=sum(run.seconds for run in runs))
        for processes, batches in stages(runs, jobs):
            for batch, found in finished(batches, processes) if batches else ():
                progress.update(task, description=batch[0].claim)
                for run, (metrics, seconds) in zip(batch, found, strict=True):
                    write(directory / run.path, record_of(CLAIMS[run.claim], run, metrics, seconds))
                    progress.advance(task, run.seconds)


def complete(directory, quick, seeds):
    """Return {claim: [(run, record)]} of the claims of which all records are there."""
    found = {}
    for claim in CLAIMS.values():
        records = [(run, read(directory, claim, run)) for run in runs_of(claim, quick, seeds)]
        if all(isinstance(record, dict) for _, record in records):
            found[claim.name] = records
    return found


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases, and shorter trainings")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of these claims: {', '.join(CLAIMS)}")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs of each case (default: 3)")
    parser.add_argument(
        "--jobs",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="runs at a time (default: one a core)",
    )
    parser.add_argument(
        "--redraw", action="store_true", help="write the report and figures in --out again, from the CSV files there"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/claims"), metavar="FOLDER", help="(default: %(default)s)"
    )
    args = parser.parse_args()
    unknown = [name for name in args.only or [] if name not in CLAIMS]
    if unknown:
        parser.error(f"expected --only of {', '.join(CLAIMS)}, got {', '.join(unknown)}")
    return args


def main():
    args = arguments()
    try:
        check_writable(args.out / "report.md")
        if not args.redraw:
            train(missing_runs(args), args.out, args.jobs)
        import claims_report  # needs what draws

        if args.redraw:
            data, header = claims_report.read_report(args.out)
        else:
            data = claims_report.write_data(args.out, complete(args.out, args.quick, args.seeds))
            header = claims_report.header(args.quick, args.seeds)
        verdicts = claims_report.write_report(args.out, data, header)
    except OSError as error:
        raise SystemExit(f"--out: {error}") from error
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict.held}")
    print(f"report: {args.out / 'report.md'}")


def missing_runs(args):
    """Return the runs without a record, or with one of another version, which is said."""
    claims = [CLAIMS[name] for name in args.only or CLAIMS]
    runs = [run for claim in claims for run in runs_of(claim, args.quick, args.seeds)]
    found = [read(args.out, CLAIMS[run.claim], run) for run in runs]
    others = [record for record in found if isinstance(record, str)]
    if others:
        versions = ", ".join(sorted(set(others)))
        print(f"{args.out}: {plural(len(others), 'record')} of another version ({versions}), measured again")
    return [run for run, record in zip(runs, found, strict=True) if not isinstance(record, dict)]


if __name__ == "__main__":
    main()
