"""A rank that forks, as DataLoader does and by hand, and trains on: writes how each child ended."""

import os
import sys
import time

import torch
from torch.utils.data import DataLoader, Dataset

import syncnorm

LIMIT = 40  # seconds for a child


def train():
    layer.train()(torch.full((3, 2), float(group.rank)))


def attempt():
    """Return what a training layer says, having seen that eval works."""
    layer.eval()(torch.ones(3, 2))
    try:
        train()
    except RuntimeError as error:
        return str(error).partition(",")[0]
    return "trained"


class Attempts(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return attempt()


def status_of(end):
    """Return the exit status of a forked child that calls `end`, "hung" if it has none in time."""
    child = os.fork()
    if child == 0:
        end()
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hung"


def fail():
    raise ValueError(f"in a child of rank {group.rank}")


def exit_after_training():
    sys.exit(0 if attempt().startswith("expected a collective in the process that joined the job") else 9)


group = syncnorm.init(timeout=60)
layer = syncnorm.SyncBatchNorm(2)
train()
ends = [lambda: sys.exit(3), fail, exit_after_training]
if sys.argv[1:] == ["raise SystemExit"]:
    ends.append(lambda: exec("raise SystemExit(4)"))
statuses = []
for end in ends:
    statuses.append(status_of(end))
    train()
said = {words for batch in DataLoader(Attempts(), num_workers=2, multiprocessing_context="fork") for words in batch}
train()
time.sleep(1.5)  # for the roll call's thread, which would see it ended
attended = syncnorm.job.desync.collect([0, 1]) if group.rank == 0 else ""
group.barrier()
expected = 0.5 * (1 - 0.9 ** (len(ends) + 2))
torch.testing.assert_close(layer.running_mean, torch.full((2,), expected))
sys.stdout.write(f"rank {group.rank}: {statuses} {said} {attended.count('MISSING')}\n")
