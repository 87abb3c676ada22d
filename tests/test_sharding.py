"""Models that PyTorch shards or wraps: DistributedDataParallel's options, FSDP, meshes with two axes, pipelines.

The oracle is one process with torch.nn's BatchNorm on the whole batch in float64.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.testing import run_ranks

SAMPLES, STEPS = 4, 3  # of each rank
CPU = torch.device("cpu")
SHAPES = [(2, channels, 5) for channels in (2, 4, 2)]  # of a micro-batch before and after each stage


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [
        nn.Conv1d(2, 4, 1),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Conv1d(4, 4, 1),
        nn.BatchNorm1d(4),
        nn.Conv1d(4, 2, 1),
    ]
    return nn.Sequential(*layers).to(dtype)


def batches(world_size, dtype=torch.float64):
    """Return the inputs of all ranks in each step, and the targets. Shards differ, as real ones do."""
    generator = torch.Generator().manual_seed(1)
    shift = torch.arange(world_size, dtype=torch.float64).repeat_interleave(SAMPLES).view(-1, 1, 1)
    shape = (world_size * SAMPLES, 2, 5)
    draws = [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for _ in range(STEPS)]
    return [((x + shift).to(dtype), target.to(dtype)) for x, target in draws]


def shards(rank, world_size, dtype=torch.float64):
    """Return what a rank has of the batches."""
    part = slice(rank * SAMPLES, (rank + 1) * SAMPLES)
    return [(x[part], target[part]) for x, target in batches(world_size, dtype)]


def train(model, data):
    """Train with the mean of the squared errors. Return the model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, target in data:
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    return model


def whole_state(model):
    """Return the state of a model that may be sharded, as one process has it, without the names of wrappers."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    else:
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        state = {name: tensor.clone() for name, tensor in state.items()}
    return {name.replace("_fsdp_wrapped_module.", "").replace("module.", ""): t for name, t in state.items()}


def ddp(**options):
    return functools.partial(DistributedDataParallel, **options)


def fsdp(strategy):
    return functools.partial(FullyShardedDataParallel, device_id=CPU, sharding_strategy=strategy, use_orig_params=True)


def fsdp2(model, *, shape=(2,), by_layer=False):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    if by_layer:
        for layer in model:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS = {
    "DDP": (2, ddp()),
    "DDP, static graph": (2, ddp(static_graph=True)),
    "DDP, gradients as views": (2, ddp(gradient_as_bucket_view=True)),
    "DDP, unused parameters": (2, ddp(find_unused_parameters=True)),
    "DDP, own buffers": (2, ddp(broadcast_buffers=False)),
    "DDP, small buckets": (2, ddp(bucket_cap_mb=1e-4)),
    "FSDP1": (2, fsdp(ShardingStrategy.FULL_SHARD)),
    "FSDP1, gradients alone": (2, fsdp(ShardingStrategy.SHARD_GRAD_OP)),
    "FSDP2": (2, fsdp2),
    "FSDP2, each layer": (2, functools.partial(fsdp2, by_layer=True)),
    "FSDP2, replicated shards": (4, functools.partial(fsdp2, shape=(2, 2))),
}


def states(ways, convert):
    """Train in each way on this rank, and return the state of each."""
    return {way: wrapped(WAYS[way][1], convert) for way in ways}


def wrapped(wrap, convert):
    model = network()
    model = wrap(syncnorm.convert_sync_batchnorm(model) if convert else model)
    return whole_state(train(model, shards(dist.get_rank(), dist.get_world_size())))


@functools.cache
def states_of(world_size, convert=True):
    ways = [way for way, (ranks, _) in WAYS.items() if ranks == world_size]
    return run_ranks(states, world_size, ways, convert)


def expected(world_size):
    return train(network(), batches(world_size)).state_dict()


def assert_same(actual, wanted, bound=1e-12):
    assert actual.keys() == wanted.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(
            tensor, wanted[name], rtol=bound, atol=bound, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("way", WAYS)
def test_a_wrapped_model_trains_as_in_one_process(way):
    world_size, _ = WAYS[way]
    states = [state[way] for state in states_of(world_size)]
    wanted = expected(world_size)
    assert_same(states[0], wanted)  # FSDP gives the whole state to rank 0 alone
    for state in states[1:]:
        assert not state or all(torch.equal(state[name], states[0][name]) for name in state if "running" in name)


@pytest.mark.parametrize("way", [way for way, (ranks, _) in WAYS.items() if ranks == 2])
def test_with_plain_batch_norm_it_does_not(way):
    state = states_of(2, convert=False)[0][way]
    with pytest.raises(AssertionError, match=r"running_mean|weight|bias"):
        assert_same(state, expected(2), bound=1e-3)


def half_precision():
    """Train a model whose layers compute in bfloat16, and return what the norms have."""
    model = syncnorm.convert_sync_batchnorm(network(torch.float32))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=True))
    train(model, shards(dist.get_rank(), 2, torch.float32))
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_mixed_precision_keeps_the_statistics_in_float32():
    first, second = run_ranks(half_precision, 2)
    wanted = expected(2)
    for name, buffer in first.items():
        assert torch.equal(buffer, second[name])
        assert buffer.dtype == (torch.int64 if "tracked" in name else torch.float32)
        torch.testing.assert_close(buffer, wanted[name].to(buffer.dtype), rtol=0.05, atol=0.05)


def one_axis_of_two():
    """Synchronize over the data axis of a mesh whose other axis has copies of the samples."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    model = syncnorm.convert_sync_batchnorm(network(), mesh["data"])
    model = DistributedDataParallel(model, process_group=mesh["data"].get_group())
    train(model, shards(mesh["data"].get_local_rank(), 2))
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def test_a_mesh_is_synchronized_over_one_axis():
    for state in run_ranks(one_axis_of_two, 4):
        assert_same(state, expected(2))


def pipeline():
    """Train two stages, each on two ranks, by micro-batches. Return the state of this rank's stage."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
    index, rank = mesh["stage"].get_local_rank(), mesh["data"].get_local_rank()
    model = syncnorm.convert_sync_batchnorm(network(), mesh["data"])
    own = nn.Sequential(*list(model)[:3] if index == 0 else list(model)[3:])
    # With these it does not call the stage on zeros first, to learn the shapes, which would move the statistics
    between = [torch.empty(shape, dtype=torch.float64, requires_grad=shape[1] == 4) for shape in SHAPES]
    examples = {"input_args": (between[index],), "output_args": (between[index + 1],)}
    stage = PipelineStage(own, index, 2, CPU, **examples, group=mesh["stage"].get_group())
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda output, target: (output - target).square().mean())
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    for x, target in shards(rank, 2):
        optimizer.zero_grad()
        if index == 0:
            schedule.step(x)
        else:
            schedule.step(target=target)
        for parameter in own.parameters():
            dist.all_reduce(parameter.grad, group=mesh["data"].get_group())
            parameter.grad /= 2
        optimizer.step()
    first = 0 if index == 0 else 3
    state = own.state_dict().items()
    return {f"{first + int(name[0])}{name[1:]}": tensor.clone() for name, tensor in state}


def by_micro_batches():
    """Do in one process what the pipeline does: the batch of a norm is a micro-batch of all ranks."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, target in batches(2):
        optimizer.zero_grad()
        for i in range(2):
            part = [rank * SAMPLES + i * SAMPLES // 2 + j for rank in range(2) for j in range(SAMPLES // 2)]
            ((model(x[part]) - target[part]).square().mean() / 2).backward()
        optimizer.step()
    return model.state_dict()


def test_the_stages_of_a_pipeline_have_groups_of_their_own():
    states = run_ranks(pipeline, 4)
    wanted = by_micro_batches()
    for state in states:
        assert_same(state, {name: tensor for name, tensor in wanted.items() if name in state})
    assert states[0].keys() | states[2].keys() == wanted.keys()
