"""examples/cnn.py with a fault: `faulty_cnn.py FAULT RANK DIRECTORY` and the arguments of the example.

At its fifth step the rank is killed in forward or in backward, raises, or stalls; "slow" slows every rank down from
there and tells, for who cuts the network. Each rank that ends with an exception leaves its text in the directory.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

from torch import nn

import syncnorm
from syncnorm.job import desync

STEP = 5
CNN = Path(__file__).parents[2] / "examples" / "cnn.py"

fault, rank, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
sys.argv = [str(CNN), *sys.argv[4:]]
sys.path.insert(0, str(CNN.parent))  # where the example, run as it is, would find its module
forwards = 0


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def before_forward(module, _):
    """Break the second layer of the fifth step."""
    global forwards
    if not isinstance(module, syncnorm.SyncBatchNorm):
        return
    forwards += module.num_features == 64  # there are three of them in a step
    if forwards <= 3 * STEP:
        return
    if fault == "slow" and forwards % 3 == 0:
        if forwards == 3 * STEP + 3:
            print("training", flush=True)
        time.sleep(0.3)
    if syncnorm.communicator().rank != rank:
        return
    if fault == "killed in forward":
        die()
    if fault == "raises":
        raise ValueError("this rank has had enough")
    if fault == "stalls":
        time.sleep(60)


def after_forward(module, _, output):
    if fault == "killed in backward" and forwards > 3 * STEP and syncnorm.communicator().rank == rank:
        output.register_hook(die)


def report(error):
    """Leave the error in the directory. Unless this rank is at fault, wait for the others to leave theirs.

    The launcher ends the others once this rank has exited, when they may still be collecting where each rank is.
    """
    (directory / f"rank{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")
    if int(os.environ["RANK"]) == rank:
        return
    desync.post_exit_reason(error)  # what this rank replies from now on
    deadline = time.monotonic() + 20
    while not all((directory / f"rank{other}").exists() for other in reporting()) and time.monotonic() < deadline:
        time.sleep(0.05)


def reporting():
    """Return the ranks that no launcher ends: if one fails, torchrun ends those on its host."""
    ranks = range(int(os.environ["WORLD_SIZE"]))
    if fault in ("slow", "stalls"):
        return [other for other in ranks if other != rank]
    per_host = int(os.environ["LOCAL_WORLD_SIZE"])
    return [other for other in ranks if other // per_host != rank // per_host]


nn.modules.module.register_module_forward_pre_hook(before_forward)
nn.modules.module.register_module_forward_hook(after_forward)
try:
    runpy.run_path(str(CNN), run_name="__main__")
except Exception as error:
    report(error)
    raise
