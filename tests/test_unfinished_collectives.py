"""What MPI has not finished when its group or its process ends keeps its memory; each job runs under a real mpirun."""

import pytest
from launchers import launch

START = """
import gc, sys
from datetime import timedelta
import torch, torch.distributed as dist
from mpi4py import MPI
import syncnorm
from syncnorm.mpi.communicator import MpiCommunicator

N = 4096
world = MPI.COMM_WORLD.Dup()
rank = syncnorm.init("mpi").rank

def written_over():
    blocks = [torch.zeros(N) for _ in range(200)]  # in what is freed
    world.Barrier()  # rank 1 sends
    world.Barrier()
    return [i for i, block in enumerate(blocks) if block.any()]
"""

JOBS = {
    "a group that is destroyed": """
if rank == 0:
    dist.broadcast(torch.zeros(N), 1, async_op=True)  # nobody waits for it
    dist.all_gather([torch.zeros(N), torch.zeros(N)], torch.zeros(N), async_op=True)
    dist.irecv(torch.zeros(N), 1)
    dist.destroy_process_group()
    gc.collect()
    assert written_over() == []
else:
    world.Barrier()
    dist.broadcast(torch.ones(N), 1)
    dist.all_gather([torch.zeros(N), torch.zeros(N)], torch.ones(N), async_op=True)
    dist.isend(torch.ones(N), 0)
    world.Barrier()
""",
    "a wait that timed out": """
own = world.Dup()
if rank == 0:
    try:
        MpiCommunicator(own, timedelta(seconds=0.1)).broadcast(torch.zeros(N), 1)
        raise SystemExit("expected a timeout")
    except syncnorm.DesyncError:
        pass
    gc.collect()
    assert written_over() == []
else:
    world.Barrier()
    MpiCommunicator(own, timedelta(seconds=30)).broadcast(torch.ones(N), 1)
    world.Barrier()
""",
    "peers that come while the process ends": """
if rank == 0:
    dist.broadcast(torch.zeros(N), 1, async_op=True)
    dist.destroy_process_group()
else:
    import time
    time.sleep(0.5)
    dist.broadcast(torch.ones(N), 1)
""",
    "peers that never come": """
if rank == 0:
    dist.broadcast(torch.zeros(N), 1, async_op=True)
    dist.all_reduce(torch.zeros(N), async_op=True).get_future()  # watched by a thread
""",
}


@pytest.mark.parametrize("job", JOBS)
def test_memory_outlives_what_mpi_does_with_it(job, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(START + JOBS[job] + '\nprint(f"rank {rank} has ended in order")\n')
    ended = launch("mpirun", 2, script, timeout=60, MALLOC_PERTURB_="165")
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.split("\n"))[1:] == ["rank 0 has ended in order", "rank 1 has ended in order"]
