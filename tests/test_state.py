"""What a model knows survives copies, averages, pickles and checkpoints, and moves to and from other libraries.

The oracle is one process with the whole batch and the BatchNorm of torch.nn, in float64.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import syncnorm
from syncnorm import SyncBatchNorm
from syncnorm.communicators import LocalCommunicator
from syncnorm.testing import run_ranks

NORMS = {"SyncBatchNorm": SyncBatchNorm, "BatchNorm2d": nn.BatchNorm2d}


def network(norm, seed=0, channels=4, **arguments):
    """Return a model with a moving and a cumulative average, for inputs (N, 2, 5, 5)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, channels, 3),
        norm(channels, **arguments),
        nn.Tanh(),
        nn.Conv2d(channels, 3, 2),
        norm(3, momentum=None, **arguments),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).double()


def data(step, group):
    """Return this rank's shards of the inputs, (9, 2, 5, 5), and of the gradients of the outputs, (9, 5)."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(9, 2, 5, 5, generator=generator, dtype=torch.float64)
    x *= torch.linspace(0.2, 3, 9, dtype=torch.float64).view(-1, 1, 1, 1)  # the shards have other moments
    grad_output = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    return [whole.tensor_split(group.size)[group.rank].clone() for whole in (x, grad_output)]


def take_step(model, step, group, optimizer=None):
    """Take a step on the sum of the ranks' gradients. Return the output of this rank."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)
    x, grad_output = data(step, group)
    optimizer.zero_grad()
    y = model(x)
    y.backward(grad_output)
    parameters = list(model.parameters())
    total = group.all_reduce(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    for parameter, grad in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(grad.view_as(parameter))
    optimizer.step()
    return y.detach()


def assert_same_bits(states):
    for state in states:
        assert state.keys() == states[0].keys()
        for name, value in states[0].items():
            assert torch.equal(state[name], value), name


def assert_matches(states, oracle):
    """Assert that the states of the ranks are the same bits, and those of the oracle up to rounding."""
    assert_same_bits(states)
    torch.testing.assert_close(dict(states[0]), dict(oracle), rtol=1e-10, atol=1e-11)


# ---- copies and pickles on ranks


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


LAYERS = ("constructed", "converted")
WAYS = (copy.deepcopy, saved_and_loaded, pickled)


def trained_model(kind, process_group, group):
    """Return a model of constructed or converted layers after two steps."""
    if kind == "constructed":
        model = network(SyncBatchNorm, process_group=process_group)
    else:
        model = syncnorm.convert_sync_batchnorm(network(nn.BatchNorm2d), process_group)
    for step in range(2):
        take_step(model, step, group)
    return model


def what_differs(model, twin, group):
    """Take two steps with both. Return the names of the outputs, gradients and buffers that are not the same bits."""
    differ = []
    for step in (2, 3):
        outputs = [take_step(either, step, group) for either in (model, twin)]
        differ += ["output"] * (not torch.equal(*outputs))
        pairs = zip(model.named_parameters(), twin.parameters(), strict=True)
        differ += [f"gradient of {name}" for (name, one), other in pairs if not torch.equal(one.grad, other.grad)]
        pairs = zip(model.state_dict().items(), twin.state_dict().values(), strict=True)
        differ += [name for (name, one), other in pairs if not torch.equal(one, other)]
    return differ


def what_is_shared(model, twin, group):
    """Take a step with the twin, which equals the model.

    Return the tensors of the model that changed, the buffers of the twin that did not, and the tensors of both that are
    at the same address.
    """
    before = copy.deepcopy(model.state_dict())
    take_step(twin, 4, group)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    unchanged = [name for name, value in twin.named_buffers() if torch.equal(value, before[name])]
    pairs = zip(model.state_dict().items(), twin.state_dict().values(), strict=True)
    return changed + unchanged + [name for (name, one), other in pairs if one.data_ptr() == other.data_ptr()]


def copies_of_trained_models():
    group = syncnorm.communicator()
    outcomes = {}
    for kind in LAYERS:
        for way in WAYS:
            model = trained_model(kind, None, group)
            twin = way(model)
            differ = what_differs(model, twin, group)
            outcomes[kind, way.__name__] = differ, what_is_shared(model, twin, group), twin.state_dict()
    return outcomes


@pytest.mark.parametrize("world_size", [2])
def test_copied_and_saved_models_train_on_as_the_original(run, world_size):
    """Outputs, gradients and buffers are the original's, bit for bit, and the memory is the copy's own."""
    results = run(copies_of_trained_models, world_size)
    oracle = network(nn.BatchNorm2d)
    for step in range(5):
        take_step(oracle, step, LocalCommunicator())
    for case in results[0]:
        for outcomes in results:
            differ, shared, _ = outcomes[case]
            assert (differ, shared) == ([], []), case
        assert_matches([outcomes[case][2] for outcomes in results], oracle.state_dict())


def copies_in_a_subgroup():
    """Copy a model of a subgroup: one of ranks 0 and 1, and one of rank 2 alone."""
    pair = syncnorm.new_subgroups(2)
    outcomes = {}
    for kind in LAYERS:
        model = trained_model(kind, pair, pair)
        twin, loaded = copy.deepcopy(model), pickled(model)
        groups = [
            [layer.process_group is pair for layer in either if isinstance(layer, SyncBatchNorm)]
            for either in (model, twin, loaded)
        ]
        outcomes[kind] = groups, what_differs(model, twin, pair), what_differs(copy.deepcopy(twin), loaded, pair)
        for layer in loaded:
            if isinstance(layer, SyncBatchNorm):
                layer.process_group = pair
        loaded.load_state_dict(model.state_dict())
        outcomes[kind] += (what_differs(model, loaded, pair),)
    return outcomes


@pytest.mark.parametrize("world_size", [3])
def test_a_copy_stays_in_the_group_of_the_original_and_a_pickle_does_not(run, world_size):
    """The negative control: a pickle has no process group, so it does not compute the same until it is given one."""
    for outcomes in run(copies_in_a_subgroup, world_size):
        for groups, copied, unpickled, unpickled_with_group in outcomes.values():
            assert groups == [[True, True], [True, True], [False, False]]
            assert copied == []
            assert "output" in unpickled
            assert unpickled_with_group == []


def train_in_a_new_process(connection, models, threads):
    torch.set_num_threads(threads)
    outputs = [take_step(model, 2, LocalCommunicator()) for model in models]
    file = io.BytesIO()
    torch.save((outputs, models.state_dict()), file)
    connection.send_bytes(file.getvalue())


def test_a_model_that_is_sent_to_a_spawned_process_trains_on_there():
    """Torch shares the memory of what it sends. So the sender sees the statistics of the process that trains."""
    models = nn.ModuleList(trained_model(kind, None, LocalCommunicator()) for kind in LAYERS)
    twins = copy.deepcopy(models)
    context = torch.multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=train_in_a_new_process, args=(sender, models, torch.get_num_threads()))
    process.start()
    try:
        assert receiver.poll(60)
        outputs, state = torch.load(io.BytesIO(receiver.recv_bytes()))
        process.join(60)
    finally:
        process.kill()
        process.join()
        receiver.close()
        sender.close()
    for output, twin in zip(outputs, twins, strict=True):
        assert torch.equal(output, take_step(twin, 2, LocalCommunicator()))
    assert_same_bits([twins.state_dict(), state, models.state_dict()])


# ---- averages of weights


def averaged(norm, use_buffers, group):
    """Return the EMA of a model after three steps, and then its output and state of a forward in training."""
    model = network(NORMS[norm])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=use_buffers)
    for step in range(3):
        take_step(model, step, group)
        average.update_parameters(model)
    state = copy.deepcopy(average.state_dict())
    same = [name for name, buffer in model.named_buffers() if torch.equal(state[f"module.{name}"], buffer)]
    output = average(data(3, group)[0]).detach()
    return state, same, output, average.state_dict()


def averages_on_ranks():
    group = syncnorm.communicator()
    return {(norm, buffers): averaged(norm, buffers, group) for norm in NORMS for buffers in (True, False)}


@pytest.mark.parametrize("world_size", [2])
def test_the_ema_of_a_model_on_ranks_is_that_of_one_process(run, world_size):
    """Of weights alone or of weights and statistics. In training the average synchronizes as the model does.

    The negative control: with plain BatchNorm the ranks' averages differ.
    """
    results = run(averages_on_ranks, world_size)
    for use_buffers in (True, False):
        oracle = averaged("BatchNorm2d", use_buffers, LocalCommunicator())
        states, same, outputs, later = zip(*(result["SyncBatchNorm", use_buffers] for result in results), strict=True)
        assert_matches(states, oracle[0])
        assert same == (oracle[1],) * world_size
        assert len(oracle[1]) == (0 if use_buffers else 6)
        torch.testing.assert_close(torch.cat(outputs), oracle[2], rtol=1e-10, atol=1e-11)
        assert_matches(later, oracle[3])
        with pytest.raises(AssertionError, match="running_mean"):
            assert_same_bits([result["BatchNorm2d", use_buffers][0] for result in results])


def recomputed(norm, group):
    """Return the state of an SWA model after update_bn over four batches, and the momenta that it leaves."""
    model = network(NORMS[norm])
    average = AveragedModel(model)
    for step in range(3):
        take_step(model, step, group)
        average.update_parameters(model)
    update_bn([data(step, group) for step in range(3, 7)], average.eval())
    momenta = [layer.momentum for layer in average.modules() if isinstance(layer, _BatchNorm)]
    return average.state_dict(), momenta, average.training


def recomputed_on_ranks():
    return {norm: recomputed(norm, syncnorm.communicator()) for norm in NORMS}


@pytest.mark.parametrize("world_size", [2])
def test_update_bn_on_ranks_gives_the_average_of_the_whole_batches(run, world_size):
    """The negative control: with plain BatchNorm each rank has the average of its shards."""
    results = run(recomputed_on_ranks, world_size)
    expected, *kept = recomputed("BatchNorm2d", LocalCommunicator())
    states = [result["SyncBatchNorm"][0] for result in results]
    assert_matches(states, expected)
    assert states[0]["module.1.num_batches_tracked"] == 4
    assert [result["SyncBatchNorm"][1:] for result in results] == [tuple(kept)] * world_size
    assert kept == [[0.1, None], False]
    for result in results:
        state = result["BatchNorm2d"][0]
        for name in ("module.1.running_mean", "module.4.running_var"):
            with pytest.raises(AssertionError, match="not close"):
                torch.testing.assert_close(state[name], expected[name], rtol=1e-3, atol=1e-3)


# ---- checkpoints of torch.distributed


def in_ddp(seed, channels=4):
    model = DistributedDataParallel(network(SyncBatchNorm, seed, channels))
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def train_in_ddp(model, optimizer, steps):
    group = syncnorm.communicator()
    for step in steps:
        x, grad_output = data(step, group)
        optimizer.zero_grad()
        model(x).backward(grad_output * group.size)  # DDP averages over the ranks
        optimizer.step()


def save_a_checkpoint(directory):
    import torch.distributed.checkpoint as dcp  # here, since other ranks can do without
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = in_ddp(seed=0)
    train_in_ddp(model, optimizer, range(2))
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=directory)
    return copy.deepcopy(model.module.state_dict())


def load_a_checkpoint(directory):
    """Load what other ranks saved, and train on. Before this try to load it into a wider model."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    wider, _ = in_ddp(seed=1, channels=6)
    before = copy.deepcopy(wider.module.state_dict())
    try:
        dcp.load({"model": wider.module.state_dict()}, checkpoint_id=directory)
        error = None
    except dcp.CheckpointException as raised:
        error = str(raised)
    untouched = all(torch.equal(value, before[name]) for name, value in wider.module.state_dict().items())
    model, optimizer = in_ddp(seed=1)
    states = get_state_dict(model, optimizer)
    dcp.load(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    loaded = copy.deepcopy(model.module.state_dict())
    train_in_ddp(model, optimizer, [2])
    syncnorm.assert_running_stats_agree(model)
    return error, untouched, loaded, model.module.state_dict()


def test_a_distributed_checkpoint_of_four_ranks_trains_on_on_two(tmp_path):
    """The negative control: a wider model does not load it, which leaves its tensors alone."""
    saved = run_ranks(save_a_checkpoint, 4, str(tmp_path / "checkpoint"))
    errors, untouched, loaded, later = zip(*run_ranks(load_a_checkpoint, 2, str(tmp_path / "checkpoint")), strict=True)
    assert all(error is not None and "mismatch" in error for error in errors), errors
    assert untouched == (True, True)
    assert_same_bits([*saved, *loaded])
    oracle = network(nn.BatchNorm2d)
    optimizer = torch.optim.SGD(oracle.parameters(), lr=0.01, momentum=0.9)
    for step in range(3):
        take_step(oracle, step, LocalCommunicator(), optimizer)
    assert_matches(later, oracle.state_dict())


# ---- state dicts of other layers


class ApexSyncBatchNorm(_BatchNorm):
    """Stands in for apex.parallel.SyncBatchNorm, which is not installed: the same base class and keys."""

    def __init__(self, num_features, process_group=None, channel_last=False):
        super().__init__(num_features)
        self.process_group, self.channel_last = process_group, channel_last

    def forward(self, input):
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


class ABN(nn.Module):
    """Stands in for the ABN of InPlace-ABN before its version 2, which is not installed: no num_batches_tracked."""

    def __init__(self, num_features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, input):
        y = F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, 1e-5)
        return F.leaky_relu(y, 0.01)


class ABN2(ABN):
    """Stands in for the ABN of InPlace-ABN from its version 2 on, which is not installed."""

    _version = 2

    def __init__(self, num_features):
        super().__init__(num_features)
        self.register_buffer("num_batches_tracked", torch.tensor(0))


class BatchNormAct2d(nn.BatchNorm2d):
    """Stands in for timm's layer, which is not installed: a BatchNorm2d with modules that have no state."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, input):
        return self.act(self.drop(super().forward(input)))


def with_random_state(model):
    """Fill parameters and buffers as after a training, in float64."""
    with torch.no_grad():
        for tensor in model.double().state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else torch.tensor(7))
    return model


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def in_training_and_eval(layer):
    """Return the outputs of a forward in training and one in eval, the gradients, and the running statistics."""
    torch.manual_seed(3)
    x, grad_output = torch.randn(2, 6, 4, 3, 3, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    y = layer.train()(leaf * 1)  # in place, a layer takes no leaf
    y.backward(grad_output)
    grads = [leaf.grad, *(parameter.grad for parameter in layer.parameters())]
    return [y, layer.eval()(x.clone()), *grads, *(buffer for buffer in layer.buffers() if buffer.dim())]


FOREIGN = [
    (ApexSyncBatchNorm, {}),
    (ABN, {"activation": "leaky_relu"}),
    (ABN, {"activation": "leaky_relu", "inplace": True}),
    (ABN2, {"activation": "leaky_relu", "inplace": True}),
    (BatchNormAct2d, {"activation": "relu"}),
]


@pytest.mark.parametrize(("foreign", "arguments"), FOREIGN)
def test_states_of_other_libraries_load_and_train_on(foreign, arguments):
    """And load back. All but the old ABN have torch's keys, and that one has torch's without num_batches_tracked."""
    theirs = nn.Sequential(with_random_state(foreign(4)))
    ours = nn.Sequential(SyncBatchNorm(4, **arguments)).double()
    state = through_a_file(theirs.state_dict())
    assert ours.load_state_dict(state, strict=True) == ([], [])
    assert [name for name in ours.state_dict() if name not in state] == ["0.num_batches_tracked"] * (foreign is ABN)
    assert_same_bits([state, {name: ours.state_dict()[name] for name in state}])
    assert ours[0].num_batches_tracked == (0 if foreign is ABN else 7)
    torch.testing.assert_close(in_training_and_eval(ours), in_training_and_eval(theirs), rtol=1e-10, atol=1e-11)

    again = nn.Sequential(foreign(4)).double()
    state = through_a_file(ours.state_dict())
    if foreign is ABN:
        with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.num_batches_tracked"):
            again.load_state_dict(state, strict=True)
        del state["0.num_batches_tracked"]
    assert again.load_state_dict(state, strict=True) == ([], [])
    assert_same_bits([state, again.state_dict()])


def loading(kind, state):
    """Load a state into a layer that has seen 3 batches. Return the error, or else the state of the layer."""
    model = nn.Sequential(kind(4)).double()
    model[0].num_batches_tracked.fill_(3)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        return str(error), {}
    return None, model.state_dict()


def converted(channels):
    return syncnorm.convert_sync_batchnorm(nn.BatchNorm2d(channels))


@pytest.mark.parametrize("kind", [SyncBatchNorm, converted])
@pytest.mark.parametrize("version", [None, 1, 2])
@pytest.mark.parametrize("missing", ["num_batches_tracked", "running_var"])
def test_which_keys_may_be_missing_is_as_in_torch(kind, version, missing):
    """num_batches_tracked may be, in states without metadata and in those of version 1. It then keeps its value."""
    state = nn.Sequential(with_random_state(nn.BatchNorm2d(4))).state_dict()
    del state[f"0.{missing}"]
    state._metadata["0"]["version"] = version
    if version is None:
        state = dict(state)
    error, loaded = loading(kind, state)
    error_of_torch, loaded_by_torch = loading(nn.BatchNorm2d, state)
    assert error == error_of_torch
    assert_same_bits([loaded, loaded_by_torch])
    if missing == "num_batches_tracked" and version != 2:
        assert loaded["0.num_batches_tracked"] == 3
    else:
        assert f'Missing key(s) in state_dict: "0.{missing}"' in error


@pytest.mark.parametrize("kind", [converted, nn.BatchNorm2d])
def test_a_wrong_shape_in_the_state_of_a_model_leaves_a_converted_layer_alone(kind):
    """The negative control: torch's layer is left with the new running_mean and the old running_var."""
    model = nn.Sequential(with_random_state(kind(4)))
    before = copy.deepcopy(model.state_dict())
    state = nn.Sequential(with_random_state(nn.BatchNorm2d(4))).state_dict()
    state["0.running_var"] = torch.ones(5)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.running_var"):
        model.load_state_dict(state)
    unchanged = [torch.equal(value, before[name]) for name, value in model.named_buffers()]
    assert unchanged == ([True] * 3 if kind is converted else [False, True, True])


KINDS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"affine": False}, {"track_running_stats": False}, {"affine": False, "track_running_stats": False}],
)
def test_states_of_models_of_torchs_layers_are_the_same_both_ways(arguments):
    """Key for key and bit for bit, with torch's metadata."""
    torchs = with_random_state(nn.ModuleList(kind(4, **arguments) for kind in KINDS))
    constructed = nn.ModuleList(SyncBatchNorm(4, **arguments) for _ in KINDS)
    of_torchs_layers = syncnorm.convert_sync_batchnorm(nn.ModuleList(kind(4, **arguments) for kind in KINDS))
    for ours in (constructed.double(), of_torchs_layers.double()):
        state = through_a_file(torchs.state_dict())
        assert ours.load_state_dict(state, strict=True) == ([], [])
        assert list(ours.state_dict()) == list(state)
        assert_same_bits([state, ours.state_dict()])
        assert ours.state_dict()._metadata == state._metadata
        back = nn.ModuleList(kind(4, **arguments) for kind in KINDS).double()
        assert back.load_state_dict(through_a_file(ours.state_dict()), strict=True) == ([], [])
        assert_same_bits([state, back.state_dict()])
