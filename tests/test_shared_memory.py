"""All-reduces in the memory of a host: what they give, who takes part, and what is left of them."""

import atexit
import ctypes
import os
import stat
import subprocess
import textwrap
import threading
import time
import warnings
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from hosts import move_to
from launchers import COMMANDS
from virtual_cluster import need_namespaces

import syncnorm
from syncnorm.communicators import segment
from syncnorm.communicators.label import Label
from syncnorm.communicators.segment import Segment, new_name, unlink
from syncnorm.communicators.shared_memory import MOST_BYTES
from syncnorm.testing import run_ranks

IN_MEMORY = "in shared memory"


def still_named():
    """Return the memory of this process that still has a name in the file system."""
    maps = [
        line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "syncnorm-" in line
    ]
    assert maps
    return [path for path in maps if not path.endswith(" (deleted)")]


def sums_in_rank_order(hosts, elements):
    """Sum random numbers of very different sizes; return the route, and the sums of all ranks."""
    group = syncnorm.communicator()
    if hosts:
        move_to(hosts[group.rank])
    values = [torch.randn(elements, generator=torch.Generator().manual_seed(r)).double() for r in range(group.size)]
    values = [value * 10.0 ** (3 * r) for r, value in enumerate(values)]
    for _ in range(3):  # each slot is used again
        mine = group.all_reduce(values[group.rank].clone())
        names = hosts or ["here"] * group.size
        of_hosts = [
            sum((values[r] for r in range(group.size) if names[r] == host), torch.zeros(elements, dtype=torch.float64))
            for host in dict.fromkeys(names)
        ]
        assert torch.equal(mine, sum(of_hosts[1:], of_hosts[0]))
    return group.route(), still_named()


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
@pytest.mark.parametrize("elements", [1, 1000, MOST_BYTES // 8])
def test_values_are_summed_in_the_order_of_the_ranks(world_size, elements):
    for route, files in run_ranks(sums_in_rank_order, world_size, None, elements):
        assert route == IN_MEMORY
        assert files == []  # the memory has no name


@pytest.mark.parametrize("hosts", ["aabb", "aaab", "abab", "abbb", "abcab"])
def test_values_are_summed_on_each_host_and_then_over_the_hosts(hosts):
    need_namespaces()
    for route, files in run_ranks(sums_in_rank_order, len(hosts), list(hosts), 1000):
        assert route == f"in shared memory of each host, and over gloo between {len(set(hosts))} hosts"
        assert files == []


def test_hosts_of_one_rank_each_have_nothing_to_share():
    need_namespaces()
    assert run_ranks(alone_on_its_host, 2) == [("over gloo (one rank per host)", 2.0)] * 2


def alone_on_its_host():
    group = syncnorm.communicator()
    move_to(f"host{group.rank}")
    return group.route(), group.all_reduce(torch.ones(1)).item()


def groups_of_several_hosts():
    rank = dist.get_rank()
    move_to("aabb"[rank])
    uneven, pair, rest = dist.new_group([0, 1, 2]), dist.new_group([1, 2]), dist.new_group([0, 3])
    found = {}
    for name, group, ranks in [("uneven", uneven, [0, 1, 2]), ("pair", pair, [1, 2]), ("rest", rest, [3, 0])]:
        if rank in ranks:
            made = syncnorm.communicator(group)
            assert made.all_reduce(torch.tensor(float(rank))).item() == sum(ranks)
            found[name] = made.route()
    return found


def test_subgroups_that_span_hosts():
    need_namespaces()
    uneven = "in shared memory of each host, and over gloo between 2 hosts"
    apart = "over gloo (one rank per host)"
    assert run_ranks(groups_of_several_hosts, 4) == [
        {"uneven": uneven, "rest": apart},
        {"uneven": uneven, "pair": apart},
        {"uneven": uneven, "pair": apart},
        {"rest": apart},
    ]


def larger_and_other_tensors():
    group = syncnorm.communicator()
    for tensor in [
        torch.full((MOST_BYTES // 8 + 1,), 1.0, dtype=torch.float64),
        torch.ones(5, dtype=torch.complex64),
        torch.ones(MOST_BYTES, dtype=torch.uint8),
        torch.ones(MOST_BYTES + 1, dtype=torch.uint8),
    ]:
        assert torch.equal(group.all_reduce(tensor.clone()), tensor * group.size)
    with pytest.raises(RuntimeError, match="Invalid scalar type"):
        group.all_reduce(torch.ones(2, dtype=torch.uint16))


def test_larger_tensors_and_other_dtypes_are_summed_by_the_backend():
    run_ranks(larger_and_other_tensors, 2)


def rounding():
    """bfloat16 has 8 digits: summed in it, 256 + 1 + 1 would stay 256."""
    group = syncnorm.communicator()
    mine = torch.tensor([256.0 if group.rank == 0 else 1.0], dtype=torch.bfloat16)
    return group.all_reduce(mine).item()


def test_halves_are_summed_in_single_precision():
    assert run_ranks(rounding, 3) == [258.0] * 3


def differ(kind):
    """Return the DesyncError that this rank gets, after which the ranks are still together."""
    group = syncnorm.communicator()
    odd = group.rank == group.size - 1
    message, label = torch.ones(5, dtype=torch.float64), Label(7, 3, False, b"conv1.bn of Net")
    if kind == "size" and odd:
        message = torch.ones(6, dtype=torch.float64)
    if kind == "dtype" and odd:
        message = torch.ones(10, dtype=torch.float32)
    if kind == "more than fits" and odd:
        message = torch.ones(MOST_BYTES, dtype=torch.float64)
    if kind == "dtype of the backend" and odd:
        message = torch.ones(5, dtype=torch.complex64)
    if kind == "layer" and odd:
        label = Label(8, 3, True, b"conv2.bn of Net")
    if kind == "no layer" and odd:
        label = None
    before = message.clone()
    with pytest.raises(syncnorm.DesyncError) as caught:
        group.all_reduce(message, label)
    assert torch.equal(message, before)
    assert group.all_reduce(torch.ones(1)).item() == group.size
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "odd"),
    [
        ("size", "6 float64 of call 3 of conv1.bn of Net, forward"),
        ("dtype", "10 float32 of call 3 of conv1.bn of Net, forward"),
        ("more than fits", f"{MOST_BYTES} float64 of call 3 of conv1.bn of Net, forward"),
        ("dtype of the backend", "40 bytes of call 3 of conv1.bn of Net, forward"),
        ("layer", "5 float64 of call 3 of conv2.bn of Net, backward"),
        ("no layer", "5 float64, outside of a layer"),
    ],
)
def test_ranks_that_sum_different_things_raise_at_once(kind, odd):
    usual = "5 float64 of call 3 of conv1.bn of Net, forward"
    for rank, error in enumerate(run_ranks(differ, 3, kind)):
        assert error.splitlines()[:4] == [
            f"all_reduce on rank {rank} of 3: expected all ranks to sum the same message, got",
            f"  rank 0: {usual}",
            f"  rank 1: {usual}",
            f"  rank 2: {odd}",
        ]


def differ_over_hosts(hosts, odd):
    group = syncnorm.communicator()
    move_to(hosts[group.rank])
    group.all_reduce(torch.ones(1))
    with pytest.raises(syncnorm.DesyncError, match="expected all ranks to sum the same message, got"):
        group.all_reduce(torch.ones(5 if group.rank in odd else 4))
    return group.all_reduce(torch.ones(1)).item()


@pytest.mark.parametrize("odd", [[0], [1], [2], [3], [2, 3]])
def test_ranks_of_several_hosts_raise_at_once(odd):
    need_namespaces()
    assert run_ranks(differ_over_hosts, 4, "aabb", odd) == [4.0] * 4


def switched_off(off):
    group = syncnorm.communicator()
    os.environ["SYNCNORM_SHARED_MEMORY"] = "0" if group.rank in off else "1"
    assert group.all_reduce(torch.ones(1)).item() == group.size
    return group.route()


@pytest.mark.parametrize(("off", "route"), [([], IN_MEMORY), ([1], "over gloo (SYNCNORM_SHARED_MEMORY=0)")])
def test_a_variable_switches_it_off_on_all_ranks(off, route):
    assert run_ranks(switched_off, 2, off) == [route] * 2


def set_to_something_else():
    os.environ["SYNCNORM_SHARED_MEMORY"] = "yes"
    with pytest.raises(ValueError, match="expected SYNCNORM_SHARED_MEMORY to be 0 or 1, got 'yes'"):
        syncnorm.communicator().route()


def test_another_value_of_the_variable_is_an_error():
    run_ranks(set_to_something_else, 2)


NO_MEMORY = """
    import sys, torch, syncnorm, warnings
    warnings.simplefilter("always")
    group = syncnorm.init("gloo", timeout=20)
    for _ in range(2):
        assert group.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
    sys.stdout.write(f"{group.rank} {group.route()}\\n")
"""
MOUNTS = {  # the options of what is mounted at /dev/shm, and the error
    "full": ("size=64k", "No space left on device"),
    "read-only": ("ro", "Read-only file system"),
}


@pytest.mark.parametrize("state", MOUNTS)
def test_ranks_that_cannot_share_memory_use_the_backend_and_warn_once(state, tmp_path):
    need_namespaces()
    options, error = MOUNTS[state]
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(NO_MEMORY))
    mounted = f'mount -t tmpfs -o {options} none /dev/shm && exec "$@"'
    job = processes.run(
        *("unshare", "--mount", "sh", "-c", mounted, "sh", *COMMANDS["torchrun"](2), script),
        timeout=90,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    assert job.returncode == 0, job.stderr
    assert sorted(job.stdout.splitlines()) == ["0 over gloo", "1 over gloo"]
    assert job.stderr.count("the ranks sum CPU tensors over gloo instead of in shared memory") == 1
    assert error in job.stderr


def without_folder():
    group = syncnorm.communicator()
    if group.rank == 1:
        segment.FOLDER = "/nowhere"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        total = group.all_reduce(torch.ones(1)).item()
    return total, group.route(), [str(warning.message) for warning in caught]


def test_a_machine_without_the_folder():
    (total, route, (warning,)), other = run_ranks(without_folder, 2)
    reason = "[Errno 2] No such file or directory: '/nowhere'"
    assert (total, route) == (2, f"over gloo ({reason})")
    assert f"Rank 1: {reason}" in warning
    assert other == (2, route, [])


def destroyed_and_made_again(address):
    sums = []
    for number in range(3):
        group = syncnorm.communicator()
        sums.append((group.all_reduce(torch.ones(1)).item(), group.route()))
        pair = syncnorm.communicator(dist.new_group([0, 1]))
        sums.append((pair.all_reduce(torch.ones(1)).item(), pair.route()))
        rank, size = group.rank, group.size
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"{address}{number}", rank=rank, world_size=size)
    return sums, still_named()


def test_groups_that_are_destroyed_and_made_again(tmp_path):
    results = run_ranks(destroyed_and_made_again, 2, f"file://{tmp_path}/store")
    assert results == [([(2.0, IN_MEMORY)] * 6, [])] * 2


def in_threads(calls):
    """Two threads of each rank sum on groups of their own, at the same time and at another pace."""
    groups = [syncnorm.communicator(dist.new_group([0, 1, 2])) for _ in range(2)]
    sums = [[], []]

    def run(number):
        for call in range(calls):
            if (call + number + dist.get_rank()) % 50 == 0:
                time.sleep(0.001)
            sums[number].append(groups[number].all_reduce(torch.tensor([float(call)])).item())

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sums == [[3.0 * call for call in range(calls)]] * 2


def test_threads_with_groups_of_their_own():
    assert run_ranks(in_threads, 3, 500) == [True] * 3


def many_calls(calls):
    """Ranks come in any order, so that all ways to wait are taken: spinning, yielding, and sleeping."""
    group = syncnorm.communicator()
    pauses = torch.rand(calls, generator=torch.Generator().manual_seed(group.rank)).tolist()
    for call, pause in enumerate(pauses):
        if pause < 0.02:
            time.sleep(0.004)
        elif pause < 0.2:
            time.sleep(1e-5)
        message = torch.full((100,), float(call * (group.rank + 1)))
        expected = call * group.size * (group.size + 1) / 2
        assert torch.equal(group.all_reduce(message), torch.full((100,), expected)), call


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_that_come_in_any_order(world_size):
    run_ranks(many_calls, world_size, 3000)


def pythons_other_threads():
    """Return how often another thread ran while this one waited for the other rank."""
    group = syncnorm.communicator()
    group.all_reduce(torch.ones(1))
    turns, waiting = 0, True

    def count():
        nonlocal turns
        while waiting:
            turns += 1
            time.sleep(0.01)

    thread = threading.Thread(target=count)
    if group.rank == 1:
        time.sleep(1)
    else:
        thread.start()
    group.all_reduce(torch.ones(1))
    waiting = False
    return turns


def test_other_threads_run_while_a_rank_waits():
    assert run_ranks(pythons_other_threads, 2)[0] > 10


def in_a_forked_child():
    group = syncnorm.communicator()
    group.all_reduce(torch.ones(1))
    child = os.fork()
    if child == 0:  # it leaves as a program does, and runs the handlers of its exit
        try:
            group.all_reduce(torch.ones(1))
        except RuntimeError as error:
            atexit._run_exitfuncs()
            os._exit(3 if "in a forked child" in str(error) else 4)
        os._exit(5)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), group.all_reduce(torch.ones(1)).item()


def test_forked_children_are_refused_and_leave_the_group_alone():
    assert run_ranks(in_a_forked_child, 2) == [(3, 2.0)] * 2


@pytest.fixture
def name():
    """The name of a segment of 8192 bytes for 2 ranks, which is mapped."""
    name = new_name()
    created = Segment.create(name, 8192, 2)
    yield name
    unlink(name)
    del created


def test_only_this_user_may_open_the_memory(name):
    path, secret = name.split()
    status = os.stat(path)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == 8192
    assert len(secret) == 32
    assert not {path, secret} & set(new_name().split())
    with pytest.raises(FileExistsError):
        Segment.create(name, 8192, 2)


def test_processes_that_know_the_name_share_the_memory(name):
    one, other = (Segment.open(name, 8192, 2) for _ in range(2))
    assert one.address != other.address
    ctypes.memset(one.address + 4096, 7, 1)
    assert ctypes.string_at(other.address + 4096, 1) == b"\7"
    unlink(name)
    assert not Path(name.split()[0]).exists()
    unlink(name)  # as another rank may
    ctypes.memset(one.address + 4096, 8, 1)
    assert ctypes.string_at(other.address + 4096, 1) == b"\10"


def test_another_file_is_not_taken_for_the_memory(name, tmp_path):
    path, secret = name.split()
    with pytest.raises(OSError, match="to have 4096 bytes, got 8192: the ranks use different versions"):
        Segment.open(name, 4096, 2)
    for asked, ranks in [(f"{path} {secret[::-1]}", 2), (name, 3)]:
        with pytest.raises(OSError, match="to be the shared memory of this group, got another file"):
            Segment.open(asked, 8192, ranks)
    opened = Segment.open(name, 8192, 2)
    ctypes.memset(opened.address + 8, 99, 1)  # the version
    with pytest.raises(OSError, match="got another file"):
        Segment.open(name, 8192, 2)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError, match="symbolic link"):
        Segment.open(f"{link} {secret}", 8192, 2)
    with pytest.raises(FileNotFoundError):
        Segment.open(f"{tmp_path}/none {secret}", 8192, 2)
