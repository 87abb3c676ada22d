"""What the environment of each launcher tells."""

import os

import pytest

from syncnorm.job.launcher import detect_launcher

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
ENVIRONMENTS = {
    "torchrun": {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
    "mpirun": {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
    "mpirun of MPICH": {"PMI_RANK": "3", "PMI_SIZE": "4"},
    "srun": {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", **STEP},
}


@pytest.fixture
def told(monkeypatch):
    """Return what an environment tells."""

    def tell(environment):
        monkeypatch.setattr(os, "environ", environment)
        return detect_launcher.__wrapped__()

    return tell


@pytest.mark.parametrize("launcher", ENVIRONMENTS)
def test_each_launcher(told, launcher):
    assert told(ENVIRONMENTS[launcher]) == (launcher.split()[0], 3, 4)


def test_none(told):
    assert told({}) == ("none", 0, 1)
    assert told({"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}) == ("none", 0, 1)


def test_the_innermost_launcher_counts(told):
    everything = {name: value for environment in ENVIRONMENTS.values() for name, value in environment.items()}
    assert told(everything).launcher == "torchrun"
    del everything["RANK"]  # which leaves a variable that users set by hand
    assert told(everything).launcher == "mpirun"
    of_srun = {name: value for name, value in everything.items() if not name.startswith(("OMPI_", "PMI_"))}
    assert told(of_srun).launcher == "srun"


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("launcher", ["mpirun", "mpirun of MPICH", "srun"])
@pytest.mark.parametrize("left", [ALONE, {"RANK": "0", "WORLD_SIZE": "1"}, ALONE | {"TORCHELASTIC_RUN_ID": "none"}])
def test_a_rank_of_one_does_not_hide_a_job(told, launcher, left):
    inner = ENVIRONMENTS[launcher]
    (rank, three), (size, _) = list(inner.items())[:2]
    with pytest.raises(RuntimeError) as raised:
        told(inner | left)
    assert str(raised.value) == (
        "expected one launcher, got two that contradict each other: RANK=0, WORLD_SIZE=1 of torchrun, and "
        f"{rank}={three}, {size}=4 of {launcher.split()[0]}. Unset RANK and WORLD_SIZE to join the 4 ranks of "
        f"{launcher.split()[0]}, or {rank} and {size} to run a single process"
    )


def test_nor_does_one_mpi_hide_another(told):
    left = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    with pytest.raises(RuntimeError, match="OMPI_COMM_WORLD_SIZE=1 of mpirun, and PMI_RANK=3, PMI_SIZE=4 of mpirun"):
        told(ENVIRONMENTS["mpirun of MPICH"] | left)


ONE = {
    "mpirun": {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    "srun": STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
}


@pytest.mark.parametrize(
    ("outer", "inner", "counts"),
    [
        (ONE["mpirun"], ALONE, ("torchrun", 0, 1)),
        (ONE["srun"], ALONE, ("torchrun", 0, 1)),
        (ONE["srun"], ONE["mpirun"], ("mpirun", 0, 1)),
        (ENVIRONMENTS["srun"], ONE["mpirun"], ("mpirun", 0, 1)),  # whose daemons are a step of srun
        (ENVIRONMENTS["srun"], ENVIRONMENTS["mpirun"], ("mpirun", 3, 4)),
        (ENVIRONMENTS["mpirun"], ENVIRONMENTS["torchrun"] | {"WORLD_SIZE": "16"}, ("torchrun", 3, 16)),
        (ENVIRONMENTS["srun"], ENVIRONMENTS["torchrun"] | {"WORLD_SIZE": "16"}, ("torchrun", 3, 16)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, ALONE, ("torchrun", 0, 1)),
    ],
)
def test_launchers_inside_one_another(told, outer, inner, counts):
    assert told(outer | inner) == counts


def test_the_shell_of_an_allocation_is_no_rank(told):
    assert told({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}).launcher == "none"


HALVES = [
    ("torchrun", "WORLD_SIZE", "torchrun", "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
    ("torchrun", "MASTER_PORT", "torchrun", "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "mpirun", "OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE"),
    ("mpirun of MPICH", "PMI_SIZE", "mpirun", "PMI_RANK, PMI_SIZE"),
    ("srun", "SLURM_LOCALID", "srun", "SLURM_PROCID, SLURM_STEP_NUM_TASKS, .*"),
]


@pytest.mark.parametrize(("launcher", "missing", "name", "all_of_them"), HALVES)
def test_a_half_set_environment_is_refused(told, launcher, missing, name, all_of_them):
    half = {variable: value for variable, value in ENVIRONMENTS[launcher].items() if variable != missing}
    text = f"expected {all_of_them} in the environment, as {name} sets them; not set: {missing}$"
    with pytest.raises(RuntimeError, match=text):
        told(half)


@pytest.mark.parametrize(("rank", "size"), [("4", "4"), ("-1", "4"), ("one", "4"), ("0", ""), ("\xb2", "4")])
def test_what_is_no_rank_is_refused(told, rank, size):
    text = f"expected RANK to be a rank below WORLD_SIZE, as torchrun sets them; got {rank} and {size}"
    with pytest.raises(RuntimeError, match=text):
        told(ENVIRONMENTS["torchrun"] | {"RANK": rank, "WORLD_SIZE": size})
