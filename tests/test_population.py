"""Running statistics recomputed over batches, held against those of all values that the layers get in one process."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm import SyncNormError, recompute_running_stats, testing

BATCHES = {2: [(2, 2), (3, 1), (0, 2)], 4: [(2, 0, 3, 1)]}  # of each rank


class Net(nn.Module):
    """A model with dropout, a layer that is called twice, another buffer that moves, and a layer that is not called."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.dropout = nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Dropout(0.5)
        self.norm, self.last, self.unused = norm(4), norm(4), norm(2)
        self.instance = nn.InstanceNorm1d(4, track_running_stats=True)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1  # another tensor each time
        x = self.norm(self.linear(x)).tanh()
        x = self.norm(self.dropout(x) * 2 + 1)
        return self.last(self.instance(x.unsqueeze(2).expand(-1, -1, 3) + torch.arange(3)).mean(2))


def samples(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(2 + step + rank, 3, generator=generator, dtype=torch.float64) * (1 + rank) + 100 * rank


def net(norm):
    model = Net(norm).double().eval()
    for name, buffer in model.named_buffers():
        if "num_batches" in name:
            buffer.fill_(7)
    return model


def state_of(model):
    modes = [module.training for module in model.modules()]
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return tensors, modes, len([module for module in model.modules() if module._forward_pre_hooks])


def recomputed(counts, norm, wrapped):
    rank = syncnorm.communicator().rank
    model = net(norm)
    before = state_of(model)
    given = DistributedDataParallel(model) if wrapped else model
    recompute_running_stats(given, ((samples(step, rank), "target") for step in range(counts[rank])))
    return before, state_of(model)


def expected(counts, synchronized):
    """Return mean and var of all values of each layer, by hooks in one process."""
    model = net(nn.BatchNorm1d)
    received = {name: [] for name in ("norm", "last")}
    for name, inputs in received.items():
        layer = model.get_submodule(name).train()
        layer.register_forward_pre_hook(lambda _layer, args, inputs=inputs: inputs.append(args[0].detach()))
    for step in range(max(counts)):
        shards = [samples(step, rank) for rank, count in enumerate(counts) if count > step]
        for x in [torch.cat(shards)] if synchronized else shards:
            model(x)
    return {name: (torch.cat(inputs).mean(0), torch.cat(inputs).var(0)) for name, inputs in received.items()}


def assert_matches(outcomes, counts, synchronized):
    wanted = expected(counts, synchronized)
    for (before, modes, hooks), (after, modes_after, hooks_after) in outcomes:
        assert (modes_after, hooks_after) == (modes, hooks)
        for name, tensor in after.items():
            layer, _, kind = name.rpartition(".")
            if layer in wanted and kind.startswith("running"):
                statistics = wanted[layer][kind == "running_var"]
                torch.testing.assert_close(tensor, statistics, rtol=1e-11, atol=1e-11)
                assert torch.equal(tensor, outcomes[0][1][0][name])
            else:
                assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("world_size", "counts"), [(size, counts) for size, of_size in BATCHES.items() for counts in of_size], ids=str
)
@pytest.mark.parametrize("norm", [syncnorm.SyncBatchNorm, nn.BatchNorm1d])
def test_it_is_mean_and_variance_of_all_values(run, world_size, counts, norm):
    synchronized = norm is syncnorm.SyncBatchNorm
    outcomes = run(recomputed, world_size, counts, norm, False)
    assert_matches(outcomes, counts, synchronized)
    if all(count > 1 for count in counts):  # the negative control
        with pytest.raises(AssertionError):
            assert_matches(outcomes, counts, not synchronized)


def test_ddp_around_the_model_is_left_out():
    assert_matches(testing.run_ranks(recomputed, 2, (3, 1), syncnorm.SyncBatchNorm, True), (3, 1), True)


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [lambda model: model, compiled], ids=["plain", "compiled"])
def test_alone(wrap):
    model = net(syncnorm.SyncBatchNorm)
    before = state_of(model)
    recompute_running_stats(wrap(model), [samples(step, 0) for step in range(3)], progress=True)
    assert_matches([(before, state_of(model))], (3,), True)


def test_how_the_model_is_called_and_with_which_mask():
    layer = syncnorm.SyncBatchNorm(3)
    x, mask = torch.randn(5, 3, 7), torch.rand(5, 7) < 0.5
    recompute_running_stats(layer, [(x, mask)] * 2, forward=lambda layer, batch: layer(input=batch[0], mask=batch[1]))
    values = torch.cat([x.movedim(1, -1)[mask]] * 2)
    torch.testing.assert_close(layer.running_mean, values.mean(0))
    torch.testing.assert_close(layer.running_var, values.var(0))


def failing(fails):
    """The loader or the model of all ranks raises at the second batch."""
    rank = syncnorm.communicator().rank
    model = net(syncnorm.SyncBatchNorm).train()
    before = state_of(model)

    def batches():
        yield samples(0, rank)
        if fails == "loader":
            raise ZeroDivisionError
        yield samples(1, rank).float()

    with pytest.raises(ZeroDivisionError if fails == "loader" else RuntimeError):
        recompute_running_stats(model, batches())
    return before, state_of(model)


@pytest.mark.parametrize("fails", ["loader", "model"])
def test_after_an_exception_the_model_is_as_before(run, fails):
    for (before, *modes), (after, *modes_after) in run(failing, 2, fails):
        assert modes == modes_after
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def one_value():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Identity())
    before = state_of(model)
    batches = [torch.randn(1, 3, 1)] if syncnorm.communicator().rank == 0 else []
    model[0].register_forward_pre_hook(lambda layer, _args: layer.eval() and None)  # else it would refuse the input
    with pytest.raises(ValueError, match="expected more than 1 value per channel in the batches, got 1 in 0"):
        recompute_running_stats(model, batches)
    return all(torch.equal(tensor, state_of(model)[0][name]) for name, tensor in before[0].items())


def test_one_value_in_all_batches_is_refused_on_all_ranks(run):
    assert run(one_value, 2) == [True, True]


def of_other_models():
    rank = syncnorm.communicator().rank
    model = nn.Sequential(*[nn.BatchNorm1d(3)] * (1 + rank), *[nn.BatchNorm1d(3)] * rank)
    with pytest.raises(SyncNormError, match="expected the same layers with running statistics on all ranks, got 2 "):
        recompute_running_stats(model, [torch.randn(4, 3)])
    return model[0].running_mean.sum().item()


def test_other_models_are_refused_on_all_ranks(run):
    assert run(of_other_models, 2) == [0, 0]


def test_without_rich_the_line_to_install_it_is_given(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rich.progress", None)
    with pytest.raises(RuntimeError, match="expected rich for progress=True, got none: pip install rich"):
        recompute_running_stats(syncnorm.SyncBatchNorm(3), [torch.randn(4, 3)], progress=True)
