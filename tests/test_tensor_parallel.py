"""Norms over sharded features in a tensor-parallel plan, against the model that is not parallel."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import syncnorm
from syncnorm.tensor_parallel import ShardedNorm
from syncnorm.testing import run_ranks

WIDTH = 12


class QKNorm(nn.Module):
    """Project, normalize over all heads, and project back."""

    def __init__(self, norm):
        super().__init__()
        self.q = nn.Linear(8, WIDTH, bias=False)
        self.q_norm = norm
        self.out = nn.Linear(WIDTH, 8, bias=False)

    def forward(self, x):
        return self.out(self.q_norm(self.q(x)).sin())


NORMS = {
    "torch.nn.LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "torch.nn.RMSNorm": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
    "syncnorm.LayerNorm": lambda: syncnorm.LayerNorm(WIDTH),
    "syncnorm.RMSNorm with a bias": lambda: syncnorm.RMSNorm(WIDTH, bias=True),
    "without parameters": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
}


def model(name):
    torch.manual_seed(0)
    made = QKNorm(NORMS[name]()).double()
    for parameter in made.q_norm.parameters():
        nn.init.normal_(parameter)
    return made


def train(name, parallel, style=ShardedNorm):
    """Return the output, the input gradient and the parameters after a step of SGD."""
    net = model(name)
    if parallel:
        mesh = init_device_mesh("cpu", (syncnorm.communicator().size,))
        plan = {"q": ColwiseParallel(), "q_norm": style(), "out": RowwiseParallel()}
        parallelize_module(net, mesh, plan)
        assert all(isinstance(parameter, DTensor) for parameter in net.parameters())
    torch.manual_seed(1)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    y = net(x)
    y.backward(torch.randn_like(y))
    torch.optim.SGD(net.parameters(), lr=0.1, foreach=True).step()
    state = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in net.state_dict().items()}
    return [y.detach(), x.grad, *state.values()], list(state)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NORMS)
def test_a_plan_with_sharded_norms_is_the_same_model(name, world_size):
    expected, keys = train(name, parallel=False)
    for actual, their_keys in run_ranks(train, world_size, name, True):
        assert their_keys == keys
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


class PerRank(ShardedNorm):
    """The negative control: the norm of each rank's own features."""

    def _apply(self, module, device_mesh):
        module = super()._apply(module, device_mesh)
        module.process_group = None
        return module


@pytest.mark.parametrize("name", ["torch.nn.LayerNorm", "torch.nn.RMSNorm"])
def test_norms_of_each_ranks_features_are_not(name):
    expected, _ = train(name, parallel=False)
    for actual, _ in run_ranks(train, 2, name, True, PerRank):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def norms_of(features):
    """Return norms of torch's and ours, in float64 and with random parameters, some of them frozen."""
    torch.manual_seed(0)
    norms = nn.LayerNorm(features), nn.RMSNorm(features), syncnorm.RMSNorm(features, bias=True, eps_outside=True)
    for norm in norms:
        for parameter in norm.double().parameters():
            nn.init.normal_(parameter)
        norm.weight.requires_grad_(isinstance(norm, nn.LayerNorm))
    return norms


def normalized_alone(features):
    """Return the unsplit x and, of each norm on this rank, its sizes, the parameters that learn, and y."""
    group = syncnorm.communicator()
    mesh = init_device_mesh("cpu", (group.size,))
    x = 1e-4 * torch.randn(3, features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = [*x.chunk(group.size, -1), *group.size * [x[:, :0]]]  # as Shard has them
    results = []
    for norm in norms_of(features):
        sharded = parallelize_module(norm, mesh, ShardedNorm())
        learn = [name for name, parameter in sharded.named_parameters() if parameter.requires_grad]
        sizes = {*sharded.normalized_shape, *(len(p.to_local()) for p in sharded.parameters())}
        results.append((sizes, learn, sharded(parts[group.rank]).detach()))
    return x, results


@pytest.mark.parametrize(
    ("features", "sizes"), [(13, (7, 6)), (13, (5, 5, 3)), (13, (4, 4, 4, 1)), (5, (2, 2, 1, 0)), (2, (1, 1, 0))]
)
def test_norms_over_features_that_the_ranks_do_not_divide(features, sizes):
    """Alone, since torch's own RowwiseParallel takes equal shares only."""
    ranks = run_ranks(normalized_alone, len(sizes), features)
    x = ranks[0][0]
    for i, norm in enumerate(norms_of(features)):
        assert [results[i][0] for _, results in ranks] == [{size} for size in sizes]
        y = torch.cat([results[i][2] for _, results in ranks], -1)
        torch.testing.assert_close(y, norm(x).detach(), rtol=1e-9, atol=1e-9)


def test_frozen_parameters_stay_frozen():
    for _, results in run_ranks(normalized_alone, 2, 4):
        assert [learn for _, learn, _ in results] == [["weight", "bias"], [], ["bias"]]


def feed_a_dtensor(norm):
    group = syncnorm.communicator()
    net = nn.Sequential(nn.Linear(8, WIDTH), norm)
    mesh = init_device_mesh("cpu", (group.size,))
    parallelize_module(net, mesh, {"0": ColwiseParallel(use_local_output=False), "1": ShardedNorm()})
    with pytest.raises(TypeError) as raised:
        net(torch.randn(3, 8))
    return str(raised.value)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("norm", [nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)], ids=str)
def test_a_dtensor_as_input_is_refused(norm, world_size):
    for text in run_ranks(feed_a_dtensor, world_size, norm):
        assert "got a DTensor of shape (3, 12): pass its to_local(), or use ColwiseParallel without" in text


def in_sequence_parallel(norms):
    mesh = init_device_mesh("cpu", (syncnorm.communicator().size,))
    torch.manual_seed(1)
    x = torch.randn(2, 6, 8)
    part = x.chunk(mesh.size(), 1)[mesh.get_local_rank()]
    return x, [parallelize_module(copy.deepcopy(norm), mesh, SequenceParallel())(part).to_local() for norm in norms]


def test_unsplit_norms_stand_in_torchs_sequence_parallel_plans():
    norms = [syncnorm.LayerNorm(8), syncnorm.RMSNorm(8, bias=True)]
    ranks = run_ranks(in_sequence_parallel, 2, norms)
    for i, norm in enumerate(norms):
        torch.testing.assert_close(torch.cat([y[i] for _, y in ranks], 1), norm(ranks[0][0]))


def refuse(module):
    mesh = init_device_mesh("cpu", (syncnorm.communicator().size,))
    with pytest.raises((TypeError, ValueError)) as raised:
        parallelize_module(module, mesh, ShardedNorm())
    return str(raised.value)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.BatchNorm1d(4), "expected a LayerNorm or an RMSNorm, got BatchNorm1d"),
        (nn.LayerNorm((2, 4)), "expected a norm over one axis, got one over (2, 4)"),
    ],
)
def test_other_modules_are_refused(module, text):
    assert run_ranks(refuse, 1, module) == [text]
