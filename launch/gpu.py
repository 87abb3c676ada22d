"""Run everything that needs a GPU, each step with a hard time limit, and keep a record. Called by `launch/gpu`.

It uses the standard library alone, and runs all else in processes of its own.
"""

import argparse
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

import gpu_machine
import gpu_markdown
import gpu_process
import gpu_results
from gpu_steps import BENCH, INSTALL, RESULTS, ROOT, SECONDS, TESTS, steps

BEFORE = 55  # seconds, of the eight minutes, for the wheels and the first look at the machine
MOST = 10  # failures and errors of the summary on the terminal
TAIL = 25  # lines of the output of a step that failed
NO_TORCH = "expected {} to have torch, found none; PYTHON chooses another"
NO_GPU = "expected a CUDA device, found none with torch {}; ./launch/gpu --rehearse needs none"
SETTINGS = {  # Open MPI as root, and with more ranks than cores
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


class Record:
    """What has been found so far, in the files record.json and record.md of a folder."""

    def __init__(self, folder, machine, rehearsal):
        self.folder, self.begin = folder, time.monotonic()
        self.found = {"rehearsal": rehearsal, "finished": False, "status": 0, "seconds": 0.0, "machine": machine}
        self.found |= {"steps": [], "tests": gpu_results.sum_of_tests([]), "headlines": []}

    def add(self, step):
        """Add what a step found, and write, so that nothing is lost if this process is killed."""
        found = self.found
        found["steps"].append(step)
        found["status"] |= step["verdict"] in ("failed", "over its limit")
        found["tests"] = gpu_results.sum_of_tests([s["tests"] for s in found["steps"] if "tests" in s])
        found["headlines"] += step.get("headlines", [])
        self.write()

    def write(self):
        """Write both files."""
        self.found["seconds"] = time.monotonic() - self.begin
        texts = {"record.json": json.dumps(self.found, indent=1) + "\n", "record.md": gpu_markdown.whole(self.found)}
        for name, text in texts.items():
            unfinished = self.folder / f"{name}.unfinished"
            unfinished.write_text(text)
            unfinished.replace(self.folder / name)


def carry_out(listed, folder, machine, modules, environment=None, rehearsal=False, deadline=None):
    """Run the steps, print and record what they find; return the exit status.

    Args:
        listed: the steps. What one leaves of its time the later ones may use.
        folder: for the records and the log.
        machine: the facts for the record, by name.
        modules: the names of those that Python can import.
        environment: variables of all steps; those of this process, unless given.
        rehearsal: what the record calls it.
        deadline: of the first step without its limit, on the monotonic clock; now, unless given.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running step is killed too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs of a shell ignore
    gpu_process.adopt_orphans()
    record = Record(folder, machine, rehearsal)
    deadline = time.monotonic() if deadline is None else deadline
    environment = dict(os.environ) if environment is None else environment
    with (folder / "log.txt").open("w") as log, tempfile.TemporaryDirectory() as scratch:
        for number, step in enumerate(listed):
            deadline += step.limit
            found = run(step, deadline - time.monotonic(), Path(scratch, str(number)), log, modules, environment)
            record.add(found)
            said = f"{found['verdict']:>14}  {step.name:<20} {found['seconds']:4.0f} s  {gpu_markdown.result(found)}"
            print(said.rstrip(), *found["tail"], sep="\n    ", flush=True)
        record.found["finished"] = True
        record.write()
    print("\n" + gpu_markdown.summary(record.found, MOST))
    print(f"records: {folder / 'record.md'}, {folder / 'record.json'}; all output: {folder / 'log.txt'}")
    return record.found["status"]


def run(step, limit, results, log, modules, environment):
    """Run a step, or say why not; return its entry of the record."""
    seconds = str(max(1, int(limit / 2)))
    missing = [f"{name} is missing: {INSTALL.get(name, name)}" for name in step.needs if name not in modules]
    entry = {"name": step.name, "verdict": "skipped", "seconds": 0.0, "limit": limit, "tail": []}
    entry |= {"reason": step.skip or "; ".join(missing), "command": _shown(step, seconds)}
    if entry["reason"]:
        return entry
    print(f"\n===== {step.name}: {entry['command']}", file=log, flush=True)
    begin = log.tell()
    command = [word.replace(RESULTS, str(results)).replace(SECONDS, seconds) for word in step.command]
    ended = gpu_process.run(command, limit, log, cwd=ROOT, env=environment | step.environment)
    entry |= {"seconds": ended.seconds, **judged(step, ended, limit, results)}
    if entry["verdict"] != "passed":
        entry["tail"] = _tail(log.name, begin)
    return entry


def judged(step, ended, limit, results):
    """Return the results of a step that ran, the verdict on it, and the reason for that."""
    try:
        found, unread = gpu_results.of_step(step.name, results), ""
    except Exception as error:  # the other steps go on
        found, unread = {}, f"its results cannot be read: {error!r}"
    if ended.late:
        return found | {"verdict": "over its limit", "reason": f"killed after {limit:.0f} s"}
    if ended.status:
        return found | {"verdict": "failed", "reason": f"exit status {ended.status}"}
    tests = found.get("tests", {})
    if not unread and step.kind == TESTS and not tests.get("passed"):
        if tests.get("skipped"):
            return found | {"verdict": "skipped", "reason": "all tests were skipped"}
        unread = "no test passed"
    return found | {"verdict": "failed" if unread else "passed", "reason": unread}


def _shown(step, seconds):
    """Return the command line as one would type it, with files in the working directory."""
    words = [Path(word).name if word == sys.executable else word for word in step.command]
    words = [word.replace(RESULTS, step.name.replace(" ", "-")).replace(SECONDS, seconds) for word in words]
    return " ".join([*(f"{name}={value}" for name, value in step.environment.items()), shlex.join(words)])


def _tail(path, begin):
    """Return the last lines of a log, after so many bytes of it."""
    with open(path, errors="replace") as output:
        output.seek(begin)
        return [line[:200] for line in output.read().splitlines()[-TAIL:]]


def main():
    """Look at the machine, run."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(prog="launch/gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="FOLDER", help="for the record")
    parser.add_argument("--only", choices=(TESTS, BENCH), help="one of the two")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in Triton's interpreter, with tiny sizes")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="use the wheels in this folder too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            installed = gpu_machine.install(args.wheels, Path(temporary)) if args.wheels else {}
            environment = _environment(installed)
            found = gpu_machine.look(environment)
            if "torch" not in found["modules"]:
                raise gpu_machine.NotReadyError(NO_TORCH.format(sys.executable))
            if not args.rehearse and not found.get("card"):
                raise gpu_machine.NotReadyError(NO_GPU.format(found["torch"]))
            args.out.mkdir(parents=True, exist_ok=True)
        except (OSError, gpu_machine.NotReadyError) as error:
            print(f"launch/gpu: {error}", file=sys.stderr)
            sys.exit(2)
        modules = found["modules"]
        listed = selected(steps(args.rehearse, modules, len(os.sched_getaffinity(0))), args.only)
        facts = gpu_machine.facts(found) | {"options": " ".join(sys.argv[1:]) or "none"}
        sys.exit(carry_out(listed, args.out, facts, modules, environment, args.rehearse, begin + BEFORE))


def selected(listed, only):
    """Return the steps of one kind, and those of none; all of them if `only` is None."""
    return [step for step in listed if only is None or step.kind in ("", only)]


def _environment(installed):
    """Return the variables of all steps, with the checkout and the installed wheels before what is there."""
    environment = os.environ | SETTINGS
    for name, first in (("PATH", ""), ("PYTHONPATH", str(ROOT))):
        parts = [first, installed.get(name, ""), os.environ.get(name, "")]
        environment[name] = os.pathsep.join(filter(None, parts))
    return environment


if __name__ == "__main__":
    main()
