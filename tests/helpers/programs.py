"""Programs of a rank that tests start under each launcher and each MPI."""

JOIN = """
    import sys, torch, torch.distributed as dist, syncnorm
    group = syncnorm.init()
    assert syncnorm.init() is group
    assert syncnorm.communicator() is group
    layer = syncnorm.SyncBatchNorm(2)
    layer(torch.full((3, 2), float(group.rank)))
    words = [type(group).__name__, f"{group.rank}/{group.size}", f"{layer.running_mean[0]:.3f}"]
    if dist.is_initialized():
        words.append(dist.get_backend())
    for other in ("mpi", "gloo"):
        if other not in words and (other, words[0]) != ("mpi", "MpiCommunicator") and group.size > 1:
            try:
                syncnorm.init(other)
            except RuntimeError as error:
                words.append(str(error).replace(" ", "_"))
    sys.stdout.write(" ".join(words) + "\\n")
"""

FAIL = """
    import torch, syncnorm
    group = syncnorm.init()
    group.barrier()
    if group.rank == 1:
        raise ValueError("rank one has had enough")
    group.all_reduce(torch.zeros(1))
"""

STAY_AWAY = """
    import time, torch, syncnorm
    group = syncnorm.init(timeout=2)
    group.barrier()
    if group.rank == 1:
        time.sleep(30)
    group.all_reduce(torch.zeros(1))
"""
