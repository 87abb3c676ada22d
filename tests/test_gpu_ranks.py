"""Several ranks on a device: shards against one process on the whole batch in float64, for each backend.

NCCL refuses two ranks on one device, so it has one rank here. Ranks on Gloo and MPI share a device.
"""

import functools
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from accelerator import BACKEND, CUDA, DEVICE, KERNELS_OF_EXAMPLES, needs_device, runtime, size
from launchers import BIN, launch
from oracle import CHANNELS, Case, Plain, assert_matches, in_one_process, on_shard, tolerance
from processes import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from worst import check, error

import syncnorm
from syncnorm.testing import CountingCommunicator, mpirun_environment, run_ranks

pytestmark = needs_device
CNN = Path(__file__).parent.parent / "examples" / "cnn.py"
TIMEOUT = 60  # seconds for the ranks of one call
OFFLINE = {
    "PET_LOCAL_ADDR": "127.0.0.1",
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
}  # no name is looked up


SPACE = size((24, 20), (5, 4))


def shapes(*samples, trailing=SPACE):
    return tuple((n, CHANNELS, *trailing) for n in samples)


MANY = size(16, 8)
CASES = [
    Case(shapes(5, 3)),
    Case(shapes(5, 0), torch.float64, layer={"activation": "silu"}, residual=True),
    Case(shapes(MANY, 3), torch.bfloat16, torch.channels_last, layer={"activation": "relu"}, residual=True),
    Case(shapes(4, 3), torch.float16, layer={"momentum": None}, steps=2),
    Case(shapes(MANY, 5, trailing=())),
    Case(shapes(4, 3), valid=(0.5, 0.7), mask_dtype=torch.float32),
    Case(shapes(4, 3), layer={"activation": "leaky_relu", "inplace": True}),
    Case(shapes(4, 3), layer={"reproducible": True}),
    Case(shapes(4, 3), torch.bfloat16, valid=(0.5, 0.7), layer={"reproducible": True, "activation": "relu"}),
    *[Case(shapes(MANY, 5, trailing=(4, 4)), mean=mean) for mean in (1e3, 1e4, 1e6)],
    Case(shapes(3, 2, 4, 2)),
    Case(shapes(3, 0, 1, 2)),
    Case(shapes(1, 1, 1, 1, trailing=()), torch.float64, steps=2),
    Case(shapes(MANY, 2, 0, 3), torch.bfloat16, torch.channels_last, layer={"activation": "relu"}, residual=True),
]
CONTROLS = [case for case in CASES if not case.valid and min(samples for samples, *_ in case.shapes) > 1]
ON_MPI = CASES[:3] + [case for case in CASES if case.valid or case.mean == 1e6]


def on_each(cases, kind):
    """Return the results of the cases on this rank, and how MPI would get a tensor of the device."""
    return [on_shard(case, kind, device=DEVICE) for case in cases], staging()


def staging():
    """Return whether MPI takes the device's memory itself, and whether what it gets instead is pinned."""
    if importlib.util.find_spec("mpi4py") is None or dist.get_backend() != "mpi4py":
        return None
    from syncnorm.mpi.buffers import cuda_aware, stage

    return cuda_aware(), stage(torch.ones(3, device=DEVICE)).is_pinned()


@functools.cache
def outcome(world_size, kind, backend):
    """Return the results of all ranks by the case's name, and the staging of each; or the error, which is kept too.

    One group of ranks runs all cases.
    """
    cases = ON_MPI if backend == "mpi" else CASES if kind is syncnorm.SyncBatchNorm else CONTROLS
    cases = [case for case in cases if case.world_size == world_size]
    try:
        results = run_ranks(on_each, world_size, cases, kind, backend=backend, timeout=TIMEOUT)
    except Exception as error:
        return error
    ranks, stagings = zip(*results, strict=True)
    return dict(zip(map(str, cases), zip(*ranks, strict=True), strict=True)), stagings


def on_ranks(world_size, kind=syncnorm.SyncBatchNorm, backend="gloo"):
    """Return what `outcome` does, or raise its error."""
    result = outcome(world_size, kind, backend)
    if isinstance(result, Exception):
        raise result
    return result


def check_case(record_property, case, backend="gloo"):
    """Compare all ranks of a case with the oracle, and record the largest error of y and the gradient of x."""
    results = on_ranks(case.world_size, backend=backend)[0][str(case)]
    what = f"{case.world_size} ranks on {backend}, {str(case.dtype)[6:]}" + f", mean/std {case.mean:g}" * bool(
        case.mean
    )
    for result, wanted in zip(results, in_one_process(case), strict=True):
        for actual, expected in zip(result.tensors, wanted.tensors, strict=True):
            record_property(f"error: {what}", error(actual, expected))
    record_property(f"bound: {what}", tolerance(case.dtype, case.mean) * (8 if case.inplace else 1))
    assert_matches(results, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_on_one_device_match_the_whole_batch(record_property, case):
    check_case(record_property, case)


def train_reproducibly(samples, device, dtype, reproducible=True):
    """Return what training on this rank's samples gives: y, dx and the running statistics, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(7, CHANNELS, *SPACE, generator=generator).to(dtype) + 1000 for _ in range(2))
    own = slice(*samples[syncnorm.communicator().rank])
    layer = syncnorm.SyncBatchNorm(CHANNELS, device=device, reproducible=reproducible)
    leaf = x[own].to(device).requires_grad_()
    y = layer(leaf)
    y.backward(dy[own].to(device))
    return [t.detach().cpu() for t in (y, leaf.grad, layer.running_mean, layer.running_var)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reproducible_statistics_have_the_bits_of_one_process_and_of_the_cpu(dtype):
    whole, on_cpu = (train_reproducibly([(0, 7)], device, dtype) for device in (DEVICE, "cpu"))
    parts = run_ranks(train_reproducibly, 2, [(0, 2), (2, 7)], DEVICE, dtype, timeout=TIMEOUT)
    for which in range(2):
        assert torch.equal(torch.cat([part[which] for part in parts]), whole[which])
    for part in (*parts, on_cpu):
        assert all(map(torch.equal, part[2:], whole[2:]))


def test_the_default_mode_does_not():
    """The negative control."""
    whole = train_reproducibly([(0, 7)], DEVICE, torch.float32, reproducible=False)
    parts = run_ranks(train_reproducibly, 2, [(0, 2), (2, 7)], DEVICE, torch.float32, False, timeout=TIMEOUT)
    assert not all(torch.equal(torch.cat([part[which] for part in parts]), whole[which]) for which in range(2))


@pytest.mark.parametrize("case", CONTROLS, ids=str)
def test_plain_batch_norm_on_shards_does_not(case):
    """The negative control."""
    results = on_ranks(case.world_size, Plain)[0][str(case)]
    with pytest.raises(AssertionError, match="not close"):
        assert_matches(results, case)


class Net(nn.Module):
    """A convolution and a norm in float64."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False, dtype=torch.float64)
        self.norm = norm(4, dtype=torch.float64)
        self.head = nn.Conv2d(4, 2, 1, dtype=torch.float64)

    def forward(self, x):
        return self.head(F.silu(self.norm(self.conv(x))))


IMAGES = (8, 3, *size((16, 16), (5, 4)))


def trained(model, device, rank=0, world_size=1, ranks=1):
    """Train three steps, each with two forwards before one backward; return the state on the CPU.

    The loss is a sum over the samples, divided by `ranks`.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        loss = 0.0
        for half in range(2):
            generator = torch.Generator().manual_seed(2 * step + half)
            x = torch.randn(IMAGES, generator=generator, dtype=torch.float64) * (1 + half)
            upstream = torch.randn(8, 2, *IMAGES[2:], generator=generator, dtype=torch.float64) / 100
            mine = slice(0, 5) if rank == 0 else slice(5, 8)  # of two ranks
            mine = mine if world_size > 1 else slice(None)
            loss = loss + (model(x[mine].to(device)) * upstream[mine].to(device)).sum() / ranks
        loss.backward()
        optimizer.step()
    return {name.removeprefix("module."): t.detach().cpu() for name, t in model.state_dict().items()}


def trained_by_ddp(broadcasts):
    """Return the states by broadcast_buffers, and that of plain BatchNorm."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # since torch 2.13
    states = []
    for norm, broadcast in [*((syncnorm.SyncBatchNorm, b) for b in broadcasts), (nn.BatchNorm2d, False)]:
        options = {"forward_sync_buffers" if renamed else "broadcast_buffers": broadcast}
        model = DistributedDataParallel(Net(norm).to(DEVICE), **options)
        states.append(trained(model, DEVICE, dist.get_rank(), dist.get_world_size()))
    return states


def test_ddp_trains_as_one_process(record_property):
    """With broadcast_buffers on and off, and two forwards before one backward. Plain BatchNorm does not."""
    expected = trained(Net(nn.BatchNorm2d), "cpu", ranks=2)  # DDP takes the mean over its two ranks
    broadcasts = [True, False]
    ranks = run_ranks(trained_by_ddp, 2, broadcasts, timeout=TIMEOUT)
    for states in ranks:
        for broadcast, state in zip(broadcasts, states, strict=False):
            assert state.keys() == expected.keys()
            assert state["norm.num_batches_tracked"] == expected["norm.num_batches_tracked"] == 6
            for name, t in expected.items():
                check(record_property, f"DDP, broadcast_buffers={broadcast}, float64", state[name], t, 1e-10)
        plain = states[-1]
        assert max(error(plain[name], expected[name]) for name in expected) > 1e-6
    for ours in zip(*ranks, strict=True):
        assert torch.equal(ours[0]["conv.weight"], ours[1]["conv.weight"])
    for name in ("norm.running_mean", "norm.running_var"):
        assert torch.equal(ranks[0][1][name], ranks[1][1][name])


ONE_RANK = """
    import sys
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    import syncnorm

    device, path = sys.argv[1:]
    group = syncnorm.init()
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(8, 3, 9, 7, generator=generator).to(device) for _ in range(2))
    layer = syncnorm.SyncBatchNorm(3, activation="relu", device=device)
    y = DistributedDataParallel(torch.nn.Sequential(layer))(x)
    y.backward(dy)
    group.barrier()
    sums = group.all_reduce(layer.running_mean.double())
    gathered, = group.all_gather(sums)
    results = [y, layer.weight.grad, layer.bias.grad, gathered, group.broadcast(layer.running_var)]
    torch.save([t.detach().cpu() for t in results], path)
    print(dist.get_backend(), group.size)
"""


def test_one_rank_under_torchrun(record_property, tmp_path):
    """On NCCL, which `init` chooses; DDP and the communicator's collectives use it."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(ONE_RANK))
    job = launch("torchrun", 1, program, DEVICE, tmp_path / "results.pt", **OFFLINE)
    assert job.returncode == 0, job.stderr
    assert job.stdout.split()[-2:] == [BACKEND, "1"]
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(8, 3, 9, 7, generator=generator).double() for _ in range(2))
    layer = nn.BatchNorm2d(3, dtype=torch.float64)
    y = F.relu(layer(x))
    y.backward(dy)
    expected = [y, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
    for actual, wanted in zip(torch.load(tmp_path / "results.pt"), expected, strict=True):
        check(record_property, f"one rank on {BACKEND}, float32", actual, wanted, 2e-6)


@pytest.fixture(scope="module")
def _mpi():
    """Skip where there is no mpi4py, or no mpirun whose ranks it finds."""
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)])
    mpirun = shutil.which("mpirun", path=path)
    for name, found in ("mpi4py", importlib.util.find_spec("mpi4py")), ("mpirun", mpirun):
        if not found:
            pytest.skip(f"NOT TESTED: no {name}")
    code = "from mpi4py import MPI; print('rank of', MPI.COMM_WORLD.size)"
    environment = mpirun_environment() | {"PATH": path}
    try:
        printed = run(mpirun, "-n", "2", sys.executable, "-c", code, timeout=30, env=environment).stdout
    except subprocess.TimeoutExpired:
        printed = "no answer within 30 s"
    if printed.count("rank of 2") != 2:
        pytest.skip(f"NOT TESTED: mpi4py does not run under {mpirun}: {' '.join(printed.split())[-300:]}")


@pytest.mark.usefixtures("_mpi")
@pytest.mark.parametrize("case", ON_MPI, ids=str)
def test_shards_on_mpi_match_the_whole_batch(record_property, case):
    check_case(record_property, case, "mpi")


@pytest.mark.usefixtures("_mpi")
def test_mpi_gets_pinned_memory():
    for aware, pinned in on_ranks(2, backend="mpi")[1]:
        assert pinned == (CUDA and not aware)


STEPS = 3


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder with random images in CIFAR-10's binary form."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, count in ("data_batch_1", 32), ("test_batch", 8):
        pixels = random.integers(0, 256, (count, 3073), dtype=np.uint8)
        pixels[:, 0] = np.arange(count) % 10
        (folder / f"{name}.bin").write_bytes(pixels.tobytes())
    return folder


def losses_of_the_cnn(images, path, norm, ranks):
    """Return the record of the example, whose global batch has 8 images, and the losses."""
    options = {"--norm": norm, "--data": images, "--steps": STEPS, "--batch-per-rank": 8 // ranks, "--out": path}
    words = [word for option in options.items() for word in option]
    environment = {"NO_COLOR": "1"} | OFFLINE | KERNELS_OF_EXAMPLES
    job = launch("torchrun", ranks, CNN, *words, "--dtype", "float64", timeout=60, **environment)
    assert job.returncode == 0, job.stderr
    record = json.loads(path.read_text())
    return record, torch.tensor(record["loss"], dtype=torch.float64)


@pytest.mark.timeout(200)
def test_the_cnn_example_trains_alike_on_one_and_two_ranks(record_property, images, tmp_path):
    """And plain BatchNorm does not, which is the negative control."""
    alone, expected = losses_of_the_cnn(images, tmp_path / "alone.json", "sync_bn", 1)
    assert (alone["backend"], alone["device"].split(":")[0]) == (BACKEND, DEVICE)
    record, losses = losses_of_the_cnn(images, tmp_path / "both.json", "sync_bn", 2)
    assert record["device"].split(":")[0] == DEVICE
    assert record["backend"] == ("nccl" if CUDA and torch.cuda.device_count() > 1 else "gloo")
    check(record_property, "losses of the CNN on 2 ranks, float64", losses, expected, 1e-9)
    assert losses.isfinite().all()
    _, losses = losses_of_the_cnn(images, tmp_path / "plain.json", "bn", 2)
    assert error(losses, expected) > 1e-6


class Unlabelled(CountingCommunicator):
    """A communicator that is not told what a message belongs to, so that the kernels' check is alone."""

    takes_labels = False


def swapped(backward):
    """Rank 1 calls two layers in the other order, or goes back through them so. Return what each rank finds then."""
    group = Unlabelled()
    layers = [syncnorm.SyncBatchNorm(4, process_group=group, device=DEVICE) for _ in range(2)]
    for step in range(6):
        xs = [torch.randn(3, 4, 5, device=DEVICE, requires_grad=True) for _ in layers]
        order = slice(None, None, -1 if group.rank == 1 and step == 3 else 1)
        counts = [layer.num_batches_tracked.item() for layer in layers]
        try:
            ys = [layer(x) for layer, x in list(zip(layers, xs, strict=True))[:: 1 if backward else order.step]]
            runtime.synchronize()
            for y in ys[order] if backward else ys:
                y.sum().backward()
                runtime.synchronize()
        except syncnorm.DesyncError as error:
            return step, str(error), counts, [layer.num_batches_tracked.item() for layer in layers]
    return None


@pytest.mark.parametrize("backward", [False, True])
def test_a_message_of_another_layer_is_found_at_the_next_step(backward):
    """The kernels leave the running statistics as they are, and tell the host, which does not wait for them."""
    for rank, (step, text, before, after) in enumerate(run_ranks(swapped, 2, backward, timeout=TIMEOUT)):
        assert step == 3
        direction = "backward" if backward else "forward"
        assert text.startswith(
            f"expected all ranks to be in the same call of the same layer, got {direction} of call 4"
        )
        assert f"SyncBatchNorm no. {2 if rank else 1}, called outside a model: C = 4, float32, input (3, 4, 5)" in text
        assert f"on rank {rank}, while another rank was elsewhere" in text
        assert after == ([4, 4] if backward else before)


def samples_of(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(2 + rank, 3, 4, generator=generator, dtype=torch.float64) + rank


def hard_situations(counts):
    """Run out of batches, in steps that are checkpointed; then recompute the statistics; then have NaN on one rank."""
    group = CountingCommunicator(syncnorm.communicator())
    layer = syncnorm.SyncBatchNorm(3, process_group=group, device=DEVICE, dtype=torch.float64)
    batches = [samples_of(step, group.rank).to(DEVICE) for step in range(counts[group.rank])]
    grads = []
    with syncnorm.join(layer):
        for x in batches:
            y = checkpoint(lambda x: layer(x).sin(), x.requires_grad_(), use_reentrant=False)
            y.sum().backward()
            grads.append(x.grad.cpu())
    trained = [buffer.cpu().clone() for buffer in layer.buffers()]
    syncnorm.recompute_running_stats(layer, [x.detach() for x in batches])
    recomputed = [buffer.cpu().clone() for buffer in layer.buffers()]
    x = torch.full((2, 3, 4), float("nan") if group.rank == 1 else 0.5, device=DEVICE, dtype=torch.float64)
    with pytest.raises(syncnorm.NonFiniteError) as raised, syncnorm.debug():
        layer(x)
    return grads, trained, recomputed, str(raised.value)


def test_hard_situations_on_a_device():
    counts = (1, 3)
    outcomes = run_ranks(hard_situations, 2, counts, timeout=TIMEOUT)
    layer = nn.BatchNorm1d(3, dtype=torch.float64)
    seen = []
    for step in range(max(counts)):
        present = [rank for rank in (0, 1) if step < counts[rank]]
        x = torch.cat([samples_of(step, rank) for rank in present]).requires_grad_()
        layer(x).sin().sum().backward()
        seen.append(x.detach())
        grads = torch.cat([outcomes[rank][0][step] for rank in present])
        torch.testing.assert_close(grads, x.grad, rtol=1e-9, atol=1e-9)
    values = torch.cat(seen).movedim(1, 0).flatten(1)
    for _, trained, recomputed, text in outcomes:
        for buffer, expected in zip(trained, layer.buffers(), strict=True):
            torch.testing.assert_close(buffer, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(recomputed[0], values.mean(1), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(recomputed[1], values.var(1), rtol=1e-11, atol=1e-11)
        assert "rank 1: forward of " in text
        assert "24 values in channels 0, 1, 2" in text
