"""examples/cnn.py in a job that torchrun starts again: `elastic_cnn.py RANK STEP` and the arguments of the example.

In the first attempt the rank is killed in that step. The ranks share a global batch of 8, however many they are.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

from torch import nn

CNN = Path(__file__).parents[2] / "examples" / "cnn.py"

rank, step = int(sys.argv[1]), int(sys.argv[2])
first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["WORLD_SIZE"] != "1"
sys.argv = [str(CNN), "--batch-per-rank", str(8 // int(os.environ["WORLD_SIZE"])), *sys.argv[3:]]
sys.path.insert(0, str(CNN.parent))
forwards = 0


def kill(module, _):
    global forwards
    forwards += isinstance(module, nn.Linear)  # there is one in a step
    if first_attempt and forwards > step and os.environ["RANK"] == str(rank):
        if "WAITING" in os.environ:  # for who kills it with its agent
            Path(os.environ["WAITING"]).write_text(f"{os.environ['GROUP_RANK']} {os.getpid()}")
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)


nn.modules.module.register_module_forward_pre_hook(kill)
runpy.run_path(str(CNN), run_name="__main__")
