"""torch.compile(fullgraph=True) in training on several ranks: one collective a layer and direction, in the same order.

The oracle is one process with torch.nn's BatchNorm on the whole batch in float64.
"""

import contextlib
import copy
import gc
import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm import SyncBatchNorm
from syncnorm.testing import CountingCommunicator, run_ranks

needs_2_12 = pytest.mark.skipif(torch.__version__ < (2, 12), reason="torch.compile cannot do it: see docs/compile.md")

SIZES = {  # of the shards of each rank, in each step. The first ones are no other size of the input: C = 4, 5 positions
    1: [(3, 4, 6)],
    2: [(3, 5, 0, 2, 0), (8, 2, 6, 7, 3)],
    3: [(3, 5, 4), (2, 3, 0), (2, 3, 4)],
}
NORMS = 2


class Network(nn.Module):
    """Two norms of equal C side by side, one with a residual and an activation. Without a group: torch.nn's."""

    def __init__(self, group=None, momentum=0.1, activation="relu"):
        super().__init__()
        of_torch = group is None
        options = {"momentum": momentum} | ({} if of_torch else {"process_group": group})
        norm = nn.BatchNorm1d if of_torch else SyncBatchNorm
        self.left, self.conv = norm(4, **options), nn.Conv1d(4, 4, 1)
        self.right = norm(4, **options) if of_torch else norm(4, activation=activation, **options)
        self.activate = getattr(F, activation) if of_torch else None

    def forward(self, x):
        y = self.conv(x)
        return self.left(x) * (self.activate(self.right(y) + x) if self.activate else self.right(y, residual=x))


class Graphs:
    """A backend that keeps the graphs of forward and of backward, and runs their operations."""

    def __init__(self):
        self.forward, self.backward = [], []

    def __call__(self, graph, inputs):
        from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
        from torch._dynamo.backends.common import aot_autograd

        def keeping(graphs):
            def compile_graph(graph, _):
                graphs.append(graph)
                return make_boxed_func(graph.forward)

            return compile_graph

        backend = aot_autograd(
            fw_compiler=keeping(self.forward),
            bw_compiler=keeping(self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )
        return backend(graph, inputs)

    def collectives(self):
        """Return how many all-reduces each graph has, those of forward and those of backward."""
        operator = torch.ops.syncnorm.all_reduce.default
        return tuple(
            [sum(operator in (node.target, *node.args) for node in graph.graph.nodes) for graph in graphs]
            for graphs in (self.forward, self.backward)
        )


def network(*arguments, **options):
    """Return a network with the same parameters on all ranks."""
    torch.manual_seed(7)
    made = Network(*arguments, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.uniform_(0.5, 1.5)
    return made


def batch(step, sizes, *shape):
    """Return the whole batch of a step and the gradient of its output, as the shards of all ranks."""
    generator = torch.Generator().manual_seed(step)
    x, grad = torch.randn(2, sum(sizes), *(shape or (4, 5)), generator=generator, dtype=torch.float64) + 1
    return x.split(sizes), grad.split(sizes)


def step_of(model, x, grad):
    """Return the output of a step, and the gradients of input and parameters."""
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(grad)
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return y.detach(), leaf.grad, grads


def trained(compiled, world_size, steps=None):
    """Train on this rank's shards. Return what each step gives, and the number of graphs after it."""
    from torch._dynamo.utils import counters

    rank, before = syncnorm.communicator().rank, counters["stats"]["unique_graphs"]
    results, graphs = [], []
    for step, sizes in enumerate(list(zip(*SIZES[world_size], strict=True))[:steps]):
        xs, grads = batch(step, sizes)
        results.append(step_of(compiled, xs[rank], grads[rank]))
        graphs.append(counters["stats"]["unique_graphs"] - before)
    return results, graphs


def training(world_size, dynamic, options):
    """Train a compiled network; return its steps, its buffers, its graphs, and the collectives of the group."""
    torch._dynamo.reset()
    group, graphs = CountingCommunicator(), Graphs()
    model = network(group, **options)
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=dynamic)
    results, numbers = trained(compiled, world_size)
    in_training = graphs.collectives(), [call.name for call in group.calls]
    y = compiled.eval()(batch(0, (3,))[0][0])
    in_eval = sum(map(sum, graphs.collectives())), len(group.calls)
    return results, [*model.buffers()], numbers, in_training, in_eval, y.detach()


def oracle(world_size, options, steps=None):
    """Return the steps and buffers of one process, on the whole batches, and its output in eval mode."""
    model = network(**options)
    results = []
    for step, sizes in enumerate(list(zip(*SIZES[world_size], strict=True))[:steps]):
        results.append(step_of(model, *map(torch.cat, batch(step, sizes))))
    return results, [*model.buffers()], model.eval()(batch(0, (3,))[0][0]).detach()


def assert_is_oracle(found, expected):
    """Compare the steps of all ranks with those of one process."""
    for of_ranks, (y, grad_input, grads) in zip(zip(*found, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat([result[0] for result in of_ranks]), y)
        torch.testing.assert_close(torch.cat([result[1] for result in of_ranks]), grad_input)
        for of_parameter, wanted in zip(zip(*[result[2] for result in of_ranks], strict=True), grads, strict=True):
            torch.testing.assert_close(sum(of_parameter), wanted)


@pytest.mark.parametrize(
    ("world_size", "dynamic", "options"),
    [(1, True, {}), (2, None, {}), (3, True, {"momentum": None, "activation": "silu"})],
    ids=["1", "2", "3, cumulative, silu"],
)
def test_training_is_that_of_one_process(run, world_size, dynamic, options):
    """Unequal shards of changing sizes compile two graphs, or one if dynamic. An empty shard compiles one more."""
    found = run(training, world_size, world_size, dynamic, options)
    expected, expected_buffers, expected_in_eval = oracle(world_size, options)
    assert_is_oracle([results for results, *_ in found], expected)
    for rank, (_, buffers, numbers, ((forward, backward), calls), in_eval, y) in enumerate(found):
        torch.testing.assert_close(buffers, expected_buffers)
        torch.testing.assert_close(y, expected_in_eval)
        sizes = SIZES[world_size][rank]
        assert numbers == [min(step, 1 if dynamic else 2) + (0 in sizes[:step]) for step in range(1, 1 + len(sizes))]
        per_graph = [NORMS if world_size > 1 else 0] * numbers[-1]
        assert (forward, backward) == (per_graph, per_graph)
        assert calls == ["all_reduce"] * sum(per_graph[:1]) * 2 * len(sizes)
        assert in_eval == (2 * sum(per_graph), len(calls))  # nothing more


def of_shards():
    torch._dynamo.reset()
    return trained(torch.compile(network(), fullgraph=True, backend="eager"), 2, steps=2)[0]


def test_batch_norm_of_each_shard_is_not():
    """The negative control."""
    found = syncnorm.testing.run_ranks(of_shards, 2)
    with pytest.raises(AssertionError, match="not close"):
        assert_is_oracle(found, oracle(2, {}, steps=2)[0])


def in_ddp(inside, steps):
    """Train with DistributedDataParallel around compiled code, or compiled itself."""
    torch._dynamo.reset()
    group, graphs = CountingCommunicator(), Graphs()
    model = network(group)
    if inside:
        model = DistributedDataParallel(torch.compile(model, fullgraph=True, backend=graphs, dynamic=True))
    else:
        model = torch.compile(DistributedDataParallel(model), backend=graphs)  # which torch does not trace as a whole
    no_backend = contextlib.nullcontext()
    if group.communicator.route() == "in shared memory":  # only messages of norms, here, and DDP does not call this
        no_backend = mock.patch("torch.distributed.all_reduce", side_effect=AssertionError)
    with no_backend:
        results, numbers = trained(model, 2, steps)
    return [(y, dx, [2 * grad for grad in grads]) for y, dx, grads in results], numbers, graphs.collectives()


def in_both_ddps():
    return in_ddp(True, 2), in_ddp(False, 1)


def test_ddp():
    """Which averages the gradients of the ranks, so both have the same."""
    for steps, found in zip((2, 1), zip(*syncnorm.testing.run_ranks(in_both_ddps, 2), strict=True), strict=True):
        shares = [[(y, dx, [grad / 2 for grad in grads]) for y, dx, grads in results] for results, *_ in found]
        assert_is_oracle(shares, oracle(2, {}, steps)[0])
        for _, numbers, collectives in found:
            assert numbers == [1] * steps
            assert collectives == ([NORMS], [NORMS])


class Function(nn.Module):
    """The function, which gets a group of torch's."""

    def forward(self, x):
        group = torch.distributed.group.WORLD
        return syncnorm.functional.sync_batch_norm(x, None, None, training=True, process_group=group)


def in_place(group):
    norm = SyncBatchNorm(4, process_group=group, activation="leaky_relu", inplace=True)
    return nn.Sequential(nn.Conv1d(4, 4, 1), norm)


KINDS = {
    "in place": (in_place, torch.float64),
    "function": (lambda _: Function(), torch.float64),
    "half": (lambda group: SyncBatchNorm(4, process_group=group), torch.bfloat16),
    "layer": (lambda group: syncnorm.LayerNorm(5, process_group=group), torch.float64),
    "rms": (lambda group: syncnorm.RMSNorm(5, process_group=group), torch.float64),
    "group": (lambda group: syncnorm.GroupNorm(2, 4, process_group=group), torch.float64),
}


def as_eager(kind):
    """Compare a compiled norm with itself in eager mode, and return the collectives of its graphs."""
    torch._dynamo.reset()
    group, graphs = syncnorm.communicator(), Graphs()
    make, dtype = KINDS[kind]
    layer = make(group).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    eager = copy.deepcopy(layer)
    for step in range(2):
        x, grad = (tensors[group.rank].to(dtype) for tensors in batch(step, (3, 3)))
        actual = step_of(torch.compile(layer, fullgraph=True, backend=graphs), x, grad)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(actual, step_of(eager, x, grad), **tolerance)
    return graphs.collectives()


def all_as_eager():
    return {kind: as_eager(kind) for kind in KINDS}


def test_further_layers_compute_what_they_do_in_eager_mode():
    for found in syncnorm.testing.run_ranks(all_as_eager, 2):
        assert found == {kind: ([1], [1]) for kind in KINDS}


class Twins:
    """A group of two ranks that have the same data: an object of a user, with the members that a group needs."""

    rank, size = 0, 2

    def __init__(self):
        self.calls, self.lengths = 0, []

    def all_reduce(self, tensor):
        self.calls += 1
        self.lengths.append(len(tensor))
        return tensor.mul_(2)

    def all_gather(self, tensor):
        return [tensor, tensor]

    broadcast = all_gather_object = barrier = all_gather


@pytest.fixture
def x():
    torch._dynamo.reset()
    return torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


def test_a_group_of_a_user(x):
    group, other = Twins(), Twins()
    layer = SyncBatchNorm(3, process_group=group).double()
    call = compiled(layer)
    call(x).square().sum().backward()
    assert group.calls == 2
    layer.process_group = other
    call(x).square().sum().backward()
    assert (group.calls, other.calls) == (2, 2)
    function = compiled(
        lambda x: syncnorm.functional.sync_batch_norm(x, None, None, training=True, process_group=group)
    )
    function(x).square().sum().backward()
    assert group.calls == 4


class Branches(nn.Module):
    """Norms of 3, 2 and 1 channels side by side."""

    def __init__(self, group):
        super().__init__()
        self.norms = nn.ModuleList(SyncBatchNorm(3 - i, process_group=group) for i in range(3)).double()

    def forward(self, x):
        return torch.cat([norm(x[:, i:]) for i, norm in enumerate(self.norms)], 1)


@pytest.mark.timeout(300)  # the C++ compiler may be slow where other tests run
def test_inductor_keeps_the_order_of_parallel_branches(x):
    """It may order independent operations as it suits the shard of a rank."""
    groups = Twins(), Twins()
    models = [Branches(group) for group in groups]
    results = []
    for call in (compiled(models[0], "inductor"), models[1]):
        y = call(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), x)))
    torch.testing.assert_close(*results)
    assert groups[0].lengths == groups[1].lengths == [9, 7, 5, 4, 6, 8]


@pytest.mark.timeout(300)
def test_inductor_waits_with_each_all_reduce_for_the_one_before_it(x):
    """It does so in any case if it happens to sort the operations in this order: here, by PyTorch 2.13."""
    waits = []

    def look(nodes):
        reduces = [node for node in nodes if "syncnorm.all_reduce" in str(getattr(node.node, "op_overload", None))]
        waits.append([before.get_name() in node.ancestors for before, node in itertools.pairwise(reduces)])
        return nodes

    settings = torch._inductor.config.patch(_pre_fusion_custom_pass=look, fx_graph_cache=False)
    model = Branches(Twins())
    with settings, torch._functorch.config.patch(enable_autograd_cache=False):  # which would keep graphs
        compiled(model, "inductor")(x).sin().sum().backward()
    assert waits == [[True, True], [True, True]]  # forward, backward


def test_a_group_that_no_longer_exists(x):
    layer = SyncBatchNorm(3, process_group=Twins()).double()
    loss = compiled(layer)(x).square().sum()
    layer.process_group = None
    gc.collect()
    with pytest.raises(RuntimeError, match="expected the process group that a model was compiled with, got none"):
        loss.backward()


class Slotted:
    """A group that takes no attributes, so it can have no handle."""

    __slots__ = ()
    rank, size = 0, 2
    all_reduce, all_gather = Twins.all_reduce, Twins.all_gather
    broadcast = all_gather_object = barrier = all_gather


@needs_2_12
def test_a_group_that_can_have_no_handle_is_refused(x):
    with pytest.raises(RuntimeError, match="expected a process group that takes attributes and weak references"):
        compiled(SyncBatchNorm(3, process_group=Slotted()).double())(x)


def in_join():
    """Return the error of a compiled call in syncnorm.join, and whether the layer has counted the batch."""
    torch._dynamo.reset()
    layer = SyncBatchNorm(3)
    with syncnorm.join(layer):
        with pytest.raises(RuntimeError) as caught:
            compiled(lambda x: layer(x))(torch.randn(4, 3))
        layer(torch.randn(4, 3))
    return str(caught.value), layer.num_batches_tracked.item()


def test_compiled_calls_in_join_are_refused():
    for text, batches in syncnorm.testing.run_ranks(in_join, 2):
        assert "expected a model that is not compiled in syncnorm.join, got one in torch.compile" in text
        assert batches == 1


@needs_2_12
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_issues_no_further_collective(x, use_reentrant):
    group = Twins()
    layer = SyncBatchNorm(3, process_group=group).double()
    eager = copy.deepcopy(layer)
    function = compiled(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant).sin(), backend=Graphs())
    (actual,) = torch.autograd.grad(function(x).square().sum(), x)
    assert group.calls == 2
    (expected,) = torch.autograd.grad(eager(x).sin().square().sum(), x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close([*layer.buffers()], [*eager.buffers()])


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch.export
def test_a_strict_export_is_refused(x):
    with pytest.raises(RuntimeError, match=r"got one that shares its statistics among 2 ranks: call model.eval\(\)"):
        torch.export.export(SyncBatchNorm(3, process_group=Twins()).double(), (x,), strict=True)


def both_one_values():
    return one_value(False), one_value(True)


def one_value(with_mask):
    """Return the errors of a compiled and of an uncompiled layer, and whether the compiled one moved its buffers."""
    torch._dynamo.reset()
    rank = syncnorm.communicator().rank
    x = torch.ones(2, 3, 2) if with_mask else torch.ones(1 - rank, 3)
    mask = torch.tensor([[rank == 0, False], [False, False]]) if with_mask else None
    layers = [SyncBatchNorm(3) for _ in range(2)]
    errors = []
    for call in (compiled(layers[0]), layers[1]):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
            call(x, mask=mask)
        errors.append(str(caught.value))
    return errors, [buffer.tolist() for buffer in layers[0].buffers()]


def test_one_value_in_the_whole_batch(run):
    for found in run(both_one_values, 2):
        for (error, in_eager), buffers in found:
            assert error == in_eager
            assert buffers == [[0.0] * 3, [1.0] * 3, 0]


def outputs_in_eval():
    """Compile and export a model that no training has compiled before, and return its outputs by way."""
    model = nn.Sequential(nn.Conv1d(3, 4, 1), SyncBatchNorm(4, activation="relu")).eval()
    x = torch.randn(2, 3, 5)
    return {
        "eager": model(x),
        "compiled": torch.compile(model, backend="eager", fullgraph=True)(x),
        "exported": torch.export.export(model, (x,), strict=True).module()(x),
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_first_model_is_in_eval(world_size):
    for outputs in run_ranks(outputs_in_eval, world_size):
        for output in outputs.values():
            torch.testing.assert_close(output, outputs["eager"])
