"""Training on a device: no waiting, CUDA graphs, streams, autocast, torch.compile, memory formats, out of memory.

Shapes: x, residual, dy (N, C, H, W).
"""

import copy

import pytest
import torch
import torch.distributed as dist
from accelerator import (
    BACKEND,
    CUDA,
    DEVICE,
    SECOND_DEVICE,
    WARM_UPS,
    at_once,
    captured,
    compiled,
    compiler_may_warn,
    memory_in_use,
    memory_left,
    needs_device,
    needs_two_devices,
    runtime,
    size,
    without_waiting,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from worst import check

import syncnorm
from syncnorm.testing import CountingCommunicator

pytestmark = needs_device
SHAPE = size((16, 24, 14, 14), (3, 8, 3, 5))
FORMATS = [torch.contiguous_format, torch.channels_last]
FORMS = {  # arguments of the layer, and what its forward gets beside x
    "plain": ({}, ()),
    "relu-residual": ({"activation": "relu"}, ("residual",)),
    "silu-residual-mask": ({"activation": "silu", "momentum": None}, ("residual", "mask")),
    "leaky_relu-inplace": ({"activation": "leaky_relu", "inplace": True}, ()),
}


class Twice(CountingCommunicator):
    """Two ranks with the same data, as seen from one: the all-reduce is that of a group of one rank, doubled."""

    size = 2

    def all_reduce(self, tensor, *label):
        return super().all_reduce(tensor, *label).mul_(2)

    def all_gather(self, tensor):
        return super().all_gather(tensor) * 2


@pytest.fixture(scope="class")
def group(tmp_path_factory):
    """Return the default process group of this process alone, with the device's backend."""
    store = tmp_path_factory.mktemp("group") / "store"
    device = torch.device(DEVICE, 0) if CUDA else None
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            patch.setenv(name, "lo")
        dist.init_process_group(BACKEND, init_method=f"file://{store}", rank=0, world_size=1, device_id=device)
    yield dist.group.WORLD
    dist.destroy_process_group()


def tensors(count, dtype=torch.float32, memory_format=torch.contiguous_format, shape=SHAPE):
    made = (torch.randn(shape, device=DEVICE, dtype=dtype) + 1 for _ in range(count))
    return [t.contiguous(memory_format=memory_format) for t in made]


def step_of(form, memory_format=torch.contiguous_format, process_group=None, dtype=torch.float32, shape=SHAPE):
    """Return a layer, its inputs by name, the gradient of its output, and a step that returns y and all gradients."""
    arguments, names = FORMS[form]
    layer = syncnorm.SyncBatchNorm(shape[1], process_group=process_group, device=DEVICE, **arguments)
    x, residual, dy = tensors(3, dtype, memory_format, shape)
    mask = torch.rand(shape[0], *shape[2:], device=DEVICE) > 0.3
    inputs = {"x": x, "residual": residual, "mask": mask}
    optional = {name: inputs[name] for name in names}
    leaves = [x, *([residual] if "residual" in names else []), *layer.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()

    def step():
        y = layer(x.clone() if layer.inplace else x, **optional)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]  # autograd's nodes end here, with their stream

    return layer, (x, residual, dy), step


def copied(results):
    return [t.detach().clone() for t in results]


def assert_same_bits(actual, expected):
    for result, wanted in zip(actual, expected, strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_a_graph_replays_the_same_bits(form, memory_format):
    layer, inputs, step = step_of(form, memory_format)
    with captured(step) as (outputs, replay):
        assert layer.num_batches_tracked.item() == WARM_UPS
        for replays in range(1, 4):
            with torch.no_grad():
                for t in inputs:
                    t.copy_(torch.randn_like(t))
            before = copied(layer.buffers())
            replay()
            moved, results = copied(layer.buffers()), copied(outputs)
            assert layer.num_batches_tracked.item() == WARM_UPS + replays
            with torch.no_grad():
                for buffer, value in zip(layer.buffers(), before, strict=True):
                    buffer.copy_(value)
            assert_same_bits(results, step())
            assert_same_bits(moved, layer.buffers())


class Net(nn.Module):
    """Convolutions and norms in float64, so that it does not matter which algorithm a convolution takes."""

    def __init__(self, process_group=None, dtype=torch.float64):
        super().__init__()
        layers = {"device": DEVICE, "dtype": dtype}
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False, **layers)
        self.norm = syncnorm.SyncBatchNorm(8, activation="relu", process_group=process_group, **layers)
        self.body = nn.Conv2d(8, 8, 3, padding=1, bias=False, **layers)
        self.last = syncnorm.SyncBatchNorm(8, activation="relu", process_group=process_group, **layers)
        self.head = nn.Linear(8, 5, **layers)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = self.last(self.body(x), residual=x)
        return self.head(x.mean((2, 3)))


IMAGES = size((8, 3, 16, 16), (2, 3, 4, 4))


def training_step(model, optimizer, x, target):
    """Return a function that trains one step, with the gradients averaged by an all-reduce, and returns the loss."""

    def step():
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        return [loss.detach()]

    return step


class TestInAGroupOfOneRank:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("shared", [False, True])
    def test_a_step_does_not_wait_for_the_device(self, group, form, shared):
        twice = Twice(group)
        layer, _, step = step_of(form, process_group=twice if shared else None)
        for _ in range(2):  # compiles the kernels; the ranks compare which layer they are in
            step()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        twice.calls.clear()
        with without_waiting():
            for _ in range(2):
                y, *_, layer.weight.grad, layer.bias.grad = step()
                optimizer.step()
        assert y.isfinite().all()
        assert [call.name for call in twice.calls] == ["all_reduce"] * 4 * shared
        assert layer.num_batches_tracked.item() == 4

    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.filterwarnings("ignore:Waiting for pending NCCL work")  # torch says so before it captures
    def test_a_graph_trains_as_eager_does(self, record_property, group, shared):
        """Forward, backward, collectives and optimizer in one graph; `shared`: with the collectives of two ranks."""
        model = Net(Twice(group) if shared else None)
        twin = copy.deepcopy(model)
        x = torch.randn(IMAGES, device=DEVICE, dtype=torch.float64)
        target = torch.randn(IMAGES[0], 5, device=DEVICE, dtype=torch.float64)
        steps = [
            training_step(net, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), x, target)
            for net in (model, twin)
        ]
        for _ in range(WARM_UPS):
            steps[1]()
        with captured(steps[0]) as ((loss,), replay):
            for replays in range(1, 5):
                x.copy_(torch.randn_like(x))
                target.copy_(torch.randn_like(target))
                replay()
                check(record_property, "loss of a graph, float64", loss, steps[1]()[0], 1e-10)
                for (name, t), expected in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
                    if name.endswith("num_batches_tracked"):
                        assert t.item() == expected.item() == WARM_UPS + replays
                    else:
                        check(record_property, "state of a graph, float64", t, expected, 1e-10)
            assert not torch.equal(model.norm.running_var, torch.ones_like(model.norm.running_var))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_autocast_keeps_parameters_and_statistics_in_float32(record_property, memory_format, dtype):
    model = Net(dtype=torch.float32).to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16, init_scale=2.0**10)
    seen, before = [], copied(model.parameters())
    model.last.register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0].detach(), output.detach())))
    x = torch.randn(IMAGES, device=DEVICE).contiguous(memory_format=memory_format)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    mean, var = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    for given, output in seen:
        assert given.dtype == output.dtype == dtype
        assert output.is_contiguous(memory_format=memory_format)
        values = given.cpu().double().movedim(1, 0).flatten(1)
        mean, var = 0.9 * mean + 0.1 * values.mean(1), 0.9 * var + 0.1 * values.var(1)
    what = f"under autocast, {str(dtype)[6:]}"
    check(record_property, f"running_mean {what}", model.last.running_mean, mean, 2e-6)
    check(record_property, f"running_var {what}", model.last.running_var, var, 2e-6)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert not torch.equal(parameter, old)
    assert model.last.running_var.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_channels_last_is_kept(form, dtype):
    _, (x, _, _), step = step_of(form, torch.channels_last, dtype=dtype)
    given = [t for t in step() if t.dim() == 4]
    assert len(given) == 2 + ("residual" in FORMS[form][1])
    for t in given:
        assert t.stride() == x.stride()
        assert not t.is_contiguous()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.timeout(240)  # torch's compiler takes its time
def test_a_compiled_layer_computes_the_same(record_property, mode):
    eager = nn.Sequential(syncnorm.SyncBatchNorm(8, activation="relu"), syncnorm.SyncBatchNorm(8)).to(DEVICE)
    other = copy.deepcopy(eager)
    with compiler_may_warn():
        model = compiled(other, mode)
        for _ in range(4):  # reduce-overhead warms up, captures and replays
            torch.compiler.cudagraph_mark_step_begin()
            x, dy = tensors(2, shape=(SHAPE[0], 8, *SHAPE[2:]))
            results = []
            for net in (eager, model):
                net.zero_grad()
                leaf = x.clone().requires_grad_()
                y = net(leaf)
                y.backward(dy)
                results.append(copied([y, leaf.grad, *(parameter.grad for parameter in net.parameters())]))
            for actual, expected in zip(*reversed(results), strict=True):
                check(record_property, f"torch.compile, {mode}", actual, expected, 1e-5)
            for actual, expected in zip(other.buffers(), eager.buffers(), strict=True):
                check(record_property, f"buffers, torch.compile, {mode}", actual, expected, 1e-5)
    assert other[0].num_batches_tracked.item() == 4


ROUNDS = size(25, 2)
LARGER = size((32, 64, 28, 28), (3, 8, 3, 5))  # for all of the programs that a device runs at once


def rounds(step):
    """Return what the last of many calls gives, and whether all gave the same bits."""

    def run():
        first = step()
        same = [torch.stack([(a == b).all() for a, b in zip(first, step(), strict=True)]) for _ in range(ROUNDS)]
        return first, torch.stack(same)

    return run


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_layers_on_two_streams_do_not_disturb_each_other(memory_format):
    steps = [step_of(form, memory_format, shape=LARGER)[2] for form in ("relu-residual", "plain")]
    expected = [step() for step in steps]
    runtime.synchronize()
    for (first, same), alone in zip(at_once(*map(rounds, steps)), expected, strict=True):
        assert_same_bits(first, alone)
        assert same.all()


def test_graphs_on_two_streams_do_not_disturb_each_other():
    steps = [step_of(form, shape=LARGER)[2] for form in ("relu-residual", "plain")]
    expected = [copied(step()) for step in steps]
    with captured(steps[0]) as (first, replay_first), captured(steps[1]) as (second, replay_second):

        def repeated(outputs, replay):
            def run():
                gathered = []
                for _ in range(ROUNDS):
                    replay()
                    gathered.append(copied(outputs))
                return gathered

            return run

        runtime.synchronize()
        results = at_once(repeated(first, replay_first), repeated(second, replay_second))
    for gathered, alone in zip(results, expected, strict=True):
        for outputs in gathered:
            assert_same_bits(outputs, alone)


def test_a_step_on_another_stream_gives_the_same_bits():
    layer, _, step = step_of("relu-residual")
    expected, state = step(), copied(layer.buffers())
    layer.reset_running_stats()
    runtime.synchronize()
    (actual,) = at_once(step)
    assert_same_bits(actual, expected)
    assert_same_bits(layer.buffers(), state)


def test_a_step_leaves_the_current_device():
    before = runtime.current_device(), runtime.current_stream()
    step_of("relu-residual")[2]()
    assert (runtime.current_device(), runtime.current_stream()) == before


@needs_two_devices
def test_a_layer_runs_on_a_device_that_is_not_the_current_one():
    layer, (x, residual, dy), step = step_of("relu-residual")
    expected, before = step(), runtime.current_device()
    other = copy.deepcopy(layer).to(SECOND_DEVICE)
    other.reset_running_stats()
    leaves = [t.detach().to(SECOND_DEVICE).requires_grad_() for t in (x, residual)]
    y = other(leaves[0], residual=leaves[1])
    actual = [y, *torch.autograd.grad(y, [*leaves, *other.parameters()], dy.to(SECOND_DEVICE))]
    assert runtime.current_device() == before
    for t in actual:
        assert t.device == torch.device(SECOND_DEVICE)
    assert_same_bits([t.cpu() for t in actual], [t.cpu() for t in expected])
    assert_same_bits([t.cpu() for t in other.buffers()], [t.cpu() for t in layer.buffers()])


@pytest.mark.parametrize("form", ["plain", "relu-residual", "silu-residual-mask"])
def test_out_of_memory_leaves_the_statistics(form):
    """In forward, with more and more memory until it is enough. Then the layer works."""
    shape = size((64, 64, 56, 56), (3, 8, 3, 5))  # 51 MB
    layer, (x, residual, _), step = step_of(form, shape=shape)
    step()
    expected = copied(step())
    layer.reset_running_stats()
    untouched = copied(layer.state_dict().values())
    given = {"residual": residual} if "residual" in FORMS[form][1] else {}
    failures, y = 0, None
    parts = size(8, 64)  # of the input's size: smaller than what the smallest tensor takes of the device
    for part in range(4 * parts):
        with memory_left(part * x.nbytes // parts):
            try:
                y = layer(x, **given)
                break
            except torch.OutOfMemoryError:
                failures += 1
        assert_same_bits(layer.state_dict().values(), untouched)
    assert failures > 1
    assert y is not None
    assert layer.num_batches_tracked.item() == 1
    layer.reset_running_stats()
    assert_same_bits(step(), expected)
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_moves_the_statistics_once(reentrant):
    layer, (x, residual, dy), step = step_of("relu-residual")
    expected = copied(step())
    state = copied(layer.buffers())
    layer.reset_running_stats()
    leaves = [x, residual, *layer.parameters()]
    y = checkpoint(lambda x, residual: layer(x, residual=residual), x, residual, use_reentrant=reentrant)
    y.backward(dy)
    assert_same_bits([y, *(leaf.grad for leaf in leaves)], expected)
    assert_same_bits(layer.buffers(), state)
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize(("form", "kept"), [("plain", 1), ("relu-residual", 1 + 1 / 32)])
def test_a_layer_keeps_its_input_alone(record_property, form, kept):
    """And one bit a value for the signs after a residual. Beside them there is the output."""
    layer, (x, residual, _), step = step_of(form, shape=size((64, 64, 56, 56), SHAPE))
    step()
    runtime.synchronize()
    before = memory_in_use()
    y = layer(x, residual=residual) if "residual" in FORMS[form][1] else layer(x)
    grown = (memory_in_use() - before) / y.nbytes  # the input was there before
    record_property(f"error: memory beside the input, {form}", grown)
    record_property(f"bound: memory beside the input, {form}", kept + 0.01)
    assert grown <= kept + 0.01
