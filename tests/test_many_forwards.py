"""Many forwards before one backward, and more than one backward, held against one process on the whole batch.

Each scenario is one function, which runs in one process on the whole batch with torch's BatchNorm, and on ranks with
their shards. All tensors are float64. In DistributedDataParallel on a GPU, programs like these can fail with torch's
layers: backward raises that a variable "has been modified by an inplace operation", because a later forward has
broadcast the buffers (pytorch/pytorch#175024, and #24397 for torch.nn.SyncBatchNorm).

Shapes: the whole batch is (8, 3, 5) = (N, C, L); a rank has some of its samples.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, leaky_relu, softplus
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm import SyncBatchNorm
from syncnorm.testing import run_ranks

SIZES = {2: (5, 3), 4: (3, 2, 2, 1)}  # samples of each rank
SAMPLES, CHANNELS, LENGTH, FEATURES = 8, 3, 5, 4
STEPS = 3
RELATIVE = 1e-11


def keep(model):
    return model


class Place(NamedTuple):
    """Where a scenario runs. The default is the oracle: one process that has all samples."""

    norm: type = nn.BatchNorm1d
    samples: slice = slice(None)
    wrap: Callable = keep  # from a model to the one that is trained, such as DistributedDataParallel
    sum_over_ranks: Callable = keep  # of the gradient of a parameter, in place

    def shard(self, seed):
        """Return the samples of this process. They differ in mean and spread, so those of the ranks do."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(SAMPLES, CHANNELS, LENGTH, generator=generator, dtype=torch.float64)
        scale = torch.linspace(0.3, 2, SAMPLES, dtype=torch.float64).view(-1, 1, 1)
        return (x * scale + scale - 1)[self.samples]

    def encoder(self, seed, outputs):
        """Return a network from (N, C, L) to (N, outputs)."""
        head = nn.Flatten(), nn.Linear(FEATURES * LENGTH, outputs, bias=False)
        return self.wrap(vary(nn.Sequential(*self.blocks(), *head), seed))

    def generator(self, seed):
        """Return a network from (N, C, L) to (N, C, L)."""
        return self.wrap(vary(nn.Sequential(*self.blocks(), nn.Conv1d(FEATURES, CHANNELS, 1, bias=False)), seed))

    def blocks(self):
        """Return layers from (N, C, L) to (N, FEATURES, L), two of which are norms."""
        yield from (nn.Conv1d(CHANNELS, FEATURES, 3, padding=1, bias=False), self.norm(FEATURES), nn.SiLU())
        yield from (nn.Conv1d(FEATURES, FEATURES, 1, bias=False), self.norm(FEATURES, momentum=None), nn.SiLU())


def vary(model, seed):
    """Convert to float64, and draw the parameters of all layers, also of the norms, by the seed."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values + 0.5 if parameter.dim() == 1 else values - 0.5)
    return model


def unwrapped(model):
    """Return the model without DistributedDataParallel."""
    return getattr(model, "module", model)


@dataclass
class Outcome:
    """What a scenario gives."""

    training: dict = field(default_factory=dict)  # gradients of the whole batch, and parameters after each step
    shards: dict = field(default_factory=dict)  # tensors of this process's samples
    statistics: dict = field(default_factory=dict)  # the buffers, after each step

    def add_gradients(self, place, when, tensors):
        """Sum gradients over the ranks, and keep them. `tensors`: parameters, or their gradients by name."""
        for name, tensor in tensors.items():
            gradient = tensor.grad if isinstance(tensor, nn.Parameter) else tensor
            self.training[f"gradient of {name}, {when}"] = place.sum_over_ranks(gradient).clone()

    def add_state(self, when, model):
        """Keep parameters and buffers."""
        for name, parameter in parameters(model).items():
            self.training[f"{name}, {when}"] = parameter.detach().clone()
        for name, buffer in unwrapped(model).named_buffers():
            self.statistics[f"{name}, {when}"] = buffer.clone()

    def step(self, place, when, model, loss):
        """Take a step of gradient descent on a loss that is a sum over the samples.

        It is written out because the first step of torch.optim takes seconds to import torch.compile.
        """
        model.zero_grad()
        loss.backward()
        self.add_gradients(place, when, parameters(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=0.01)
        self.add_state(when, model)


def parameters(model):
    return dict(unwrapped(model).named_parameters())


def gan(place):
    """D(real) and D(fake) before one backward, then G learns through D. The two are trained in turn."""
    generator, discriminator = place.generator(1), place.encoder(2, 1)
    outcome = Outcome()
    for i in range(STEPS):
        real, noise = place.shard(10 + i), place.shard(20 + i)
        fake = generator(noise)
        loss = (softplus(-discriminator(real)) + softplus(discriminator(fake.detach()))).sum()
        outcome.step(place, f"D, step {i}", discriminator, loss)
        loss = softplus(-discriminator(fake)).sum()
        outcome.step(place, f"G, step {i}", generator, loss)
        outcome.shards[f"fake, step {i}"] = fake.detach()
        outcome.add_state(f"D after G, step {i}", discriminator)
    return outcome


def siamese(place):
    """Two views of each sample go through one network, and the loss compares them."""
    model, outcome = place.encoder(3, 4), Outcome()
    for i in range(STEPS):
        x, noise = place.shard(30 + i).requires_grad_(), place.shard(40 + i)
        loss = -cosine_similarity(model(x + 0.5 * noise), model(2 * x - 0.5 * noise)).sum()
        outcome.step(place, f"step {i}", model, loss)
        outcome.shards[f"gradient of the input, step {i}"] = x.grad
    return outcome


def mean_teacher(place):
    """Between two forwards of the student, the teacher goes forward in training mode without gradients."""
    student = place.encoder(4, 2)
    teacher = copy.deepcopy(unwrapped(student)).requires_grad_(False)
    outcome = Outcome()
    for i in range(STEPS):
        x, noise = place.shard(50 + i), place.shard(60 + i)
        first = student(x)
        with torch.no_grad():
            target = teacher(x + noise)
        second = student(x - noise)
        loss = ((first - target).square() + (second - target).square()).sum()
        outcome.step(place, f"student, step {i}", student, loss)
        follow(teacher, unwrapped(student))
        outcome.add_state(f"teacher, step {i}", teacher)
    return outcome


@torch.no_grad()
def follow(teacher, student):
    """Update the exponential moving averages of parameters and buffers."""
    states = teacher.state_dict(), student.state_dict()
    for average, value in zip(*(state.values() for state in states), strict=True):
        if average.is_floating_point():
            average.lerp_(value, 0.1)
        else:
            average.copy_(value)


class Recurrent(nn.Module):
    """Convolutions with one norm, which every iteration calls."""

    def __init__(self, norm):
        super().__init__()
        self.input = nn.Conv1d(CHANNELS, FEATURES, 1, bias=False)
        self.hidden = nn.Conv1d(FEATURES, FEATURES, 3, padding=1, bias=False)
        self.norm = norm(FEATURES)
        self.head = nn.Linear(FEATURES * LENGTH, 2, bias=False)

    def forward(self, x, iterations):
        z = self.input(x)
        h = torch.zeros_like(z)
        for _ in range(iterations):
            h = self.norm(z + self.hidden(h)).tanh()
        return self.head(h.flatten(1))


def recurrence(place):
    """One norm is called three times in the first step, then a random number of times."""
    model, outcome = vary(Recurrent(place.norm), 5), Outcome()
    lengths = [3, *torch.randint(1, 6, (STEPS - 1,), generator=torch.Generator().manual_seed(0)).tolist()]
    for i, length in enumerate(lengths):
        x = place.shard(70 + i).requires_grad_()
        outcome.step(place, f"step {i} of length {length}", model, model(x, length).sin().sum())
        outcome.shards[f"gradient of the input, step {i}"] = x.grad
    return outcome


def without_gradients(place):
    """Forwards under no_grad and inference_mode in training mode, alone and between a forward and its backward."""
    model, outcome = place.encoder(6, 2), Outcome()
    for i, mode in enumerate((torch.no_grad, torch.inference_mode)):
        with mode():
            y = model(place.shard(80 + i))
        outcome.shards[f"output under {mode.__name__}"] = y.clone()
        outcome.add_state(f"after {mode.__name__}", model)
        x = place.shard(82 + i).requires_grad_()
        y = model(x)
        with mode():
            model(place.shard(84 + i))
        outcome.step(place, f"after {mode.__name__}", model, y.sin().sum())
        outcome.shards[f"gradient of the input after {mode.__name__}"] = x.grad
    return outcome


def retained(place):
    """Go backward twice through one graph. Each gradient is exactly twice that of the first time."""
    model, outcome = place.encoder(7, 2), Outcome()
    x = place.shard(90).requires_grad_()
    go_backward_twice(place, outcome, model, x, (model(x).sin() + model(2 * x).cos()).sum())
    return outcome


def retained_in_place(place):
    """Go backward twice through layers that have overwritten their input, and compute it from their output."""
    model, outcome = vary(Recurrent(IN_PLACE[place.norm]), 8), Outcome()
    x = place.shard(91).requires_grad_()
    go_backward_twice(place, outcome, model, x, (model(x, 3).sin() + model(2 * x, 2).cos()).sum())
    return outcome


class BatchNormLeakyReLU(nn.BatchNorm1d):
    """The oracle of a layer with an activation."""

    def forward(self, x):
        return leaky_relu(super().forward(x))


IN_PLACE = {
    nn.BatchNorm1d: BatchNormLeakyReLU,
    SyncBatchNorm: functools.partial(SyncBatchNorm, activation="leaky_relu", inplace=True),
}


def go_backward_twice(place, outcome, model, x, loss):
    loss.backward(retain_graph=True)
    leaves = {"the input": x, **parameters(model)}
    once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    loss.backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, 2 * once[name]), f"expected twice the gradient of {name}"
    outcome.shards["twice the gradient of the input"] = x.grad
    outcome.add_gradients(place, "twice", parameters(model))
    outcome.add_state("at the end", model)


def out_of_order(place):
    """Three forwards have a backward each, in another order."""
    model, outcome = place.encoder(9, 2), Outcome()
    inputs = [place.shard(92 + i).requires_grad_() for i in range(3)]
    losses = [model(x).sin().sum() for x in inputs]
    for i in (1, 2, 0):
        losses[i].backward()
        outcome.shards[f"gradient of input {i}"] = inputs[i].grad
    outcome.add_gradients(place, "of all", parameters(model))
    outcome.add_state("at the end", model)
    return outcome


def partial(place):
    """Ask for the gradients of some tensors only, of two forwards through one layer."""
    norm, outcome = vary(place.norm(FEATURES), 10), Outcome()
    unused = nn.Parameter(torch.ones(2))
    x = place.shard(100).repeat(1, 2, 1)[:, :FEATURES].requires_grad_()
    leaves = {"input": x, "weight": norm.weight, "bias": norm.bias, "unused": unused}
    loss = (norm(x).sin() * x.detach() + norm(2 * x.square()).cos()).sum()
    for wanted in (["input"], ["weight"], ["bias"], ["unused", "weight"], ["unused", "input", "bias"], ["unused"]):
        grads = torch.autograd.grad(loss, [leaves[name] for name in wanted], retain_graph=True, allow_unused=True)
        named = dict(zip(wanted, grads, strict=True))
        assert named.pop("unused", None) is None
        if "input" in named:
            outcome.shards[f"gradient of input, of {wanted}"] = named.pop("input")
        outcome.add_gradients(place, f"of {wanted}", named)
    outcome.add_state("at the end", norm)
    return outcome


def wgan_gp(place):
    """Train a critic whose loss has the norm of a gradient, so its gradient is one of second order."""
    critic, outcome = place.encoder(11, 1), Outcome()
    for i in range(STEPS):
        real, fake = place.shard(110 + i), place.shard(120 + i).flip(1)
        mixed = (0.3 * real + 0.7 * fake).requires_grad_()
        (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().sum()
        loss = (critic(fake) - critic(real)).sum() + 10 * penalty
        outcome.step(place, f"step {i}", critic, loss)
        outcome.shards[f"slope, step {i}"] = slope.detach()
    return outcome


def on_rank(scenarios, norm, broadcast_buffers=None):
    """Run scenarios on this rank's samples. With `broadcast_buffers` True or False, DistributedDataParallel trains."""
    group = syncnorm.communicator()
    sizes = SIZES[group.size]
    samples = slice(sum(sizes[: group.rank]), sum(sizes[: group.rank + 1]))
    if broadcast_buffers is None:
        place = Place(norm, samples, sum_over_ranks=group.all_reduce)
    else:

        def wrap(model):
            return DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)

        place = Place(norm, samples, wrap, lambda gradient: gradient.mul_(group.size))  # which DDP has averaged
    return {scenario.__name__: scenario(place) for scenario in scenarios}


def synchronized_and_plain(scenarios):
    """Return the outcomes with SyncBatchNorm, and with torch's BatchNorm, which has the statistics of its shard."""
    return on_rank(scenarios, SyncBatchNorm), on_rank(scenarios, nn.BatchNorm1d)


def synchronized_and_plain_in_ddp(scenarios):
    """Return the outcomes with buffers broadcast and not, and those of torch's BatchNorm."""
    return (
        on_rank(scenarios, SyncBatchNorm, broadcast_buffers=True),
        on_rank(scenarios, SyncBatchNorm, broadcast_buffers=False),
        on_rank(scenarios, nn.BatchNorm1d, broadcast_buffers=False),
    )


def assert_close(actual, expected, name):
    """Compare relative to the largest value, which must not be zero."""
    largest = expected.abs().max().item()
    assert largest > 1e-3, f"{name} is zero, and compares nothing"
    torch.testing.assert_close(actual, expected, rtol=0, atol=RELATIVE * largest, msg=lambda text: f"{name}: {text}")


def assert_training_matches(outcomes, expected, scenario):
    """Compare gradients and parameters with the oracle's."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.training.keys() == expected.training.keys()
        for name, tensor in outcome.training.items():
            assert_close(tensor, expected.training[name], f"{scenario}, rank {rank}: {name}")


def assert_shards_match(outcomes, expected, scenario):
    """Compare the tensors of all ranks' samples with the oracle's."""
    for name, tensor in expected.shards.items():
        assert_close(torch.cat([outcome.shards[name] for outcome in outcomes]), tensor, f"{scenario}: {name}")


def assert_statistics_match(outcomes, expected, scenario):
    """Compare the running statistics with the oracle's, and those of the ranks bit by bit."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.statistics.keys() == expected.statistics.keys()
        for name, tensor in outcome.statistics.items():
            title = f"{scenario}, rank {rank}: {name}"
            assert_close(tensor, expected.statistics[name], title)
            assert torch.equal(tensor, outcomes[0].statistics[name]), f"{title} differs between ranks"


def assert_same(results, scenarios):
    """Compare the results by rank with those of one process."""
    for scenario in scenarios:
        outcomes = [result[scenario.__name__] for result in results]
        expected = scenario(Place())
        assert_training_matches(outcomes, expected, scenario.__name__)
        assert_shards_match(outcomes, expected, scenario.__name__)
        assert_statistics_match(outcomes, expected, scenario.__name__)


def assert_all_differ(results, scenarios):
    """The negative control: for every scenario each of the assertions fails."""
    for scenario in scenarios:
        outcomes = [result[scenario.__name__] for result in results]
        expected = scenario(Place())
        with pytest.raises(AssertionError, match="not close"):
            assert_training_matches(outcomes, expected, scenario.__name__)
        with pytest.raises(AssertionError, match="not close"):
            assert_statistics_match(outcomes, expected, scenario.__name__)
        if expected.shards:
            with pytest.raises(AssertionError, match="not close"):
                assert_shards_match(outcomes, expected, scenario.__name__)


def check(run, world_size, scenarios):
    synchronized, plain = zip(*run(synchronized_and_plain, world_size, scenarios), strict=True)
    assert_same(synchronized, scenarios)
    assert_all_differ(plain, scenarios)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("scenario", [gan, siamese, mean_teacher])
def test_networks_that_take_turns_train_as_on_the_whole_batch(run, world_size, scenario):
    check(run, world_size, [scenario])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ddp_trains_gans_and_siamese_networks_with_buffers_broadcast_and_not(world_size):
    scenarios = [gan, siamese, mean_teacher]
    results = run_ranks(synchronized_and_plain_in_ddp, world_size, scenarios)
    broadcast, not_broadcast, plain = zip(*results, strict=True)
    assert_same(broadcast, scenarios)
    assert_same(not_broadcast, scenarios)
    assert_all_differ(plain, scenarios)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_norm_that_one_forward_calls_many_times_learns_from_all_calls(run, world_size):
    check(run, world_size, [recurrence])


@pytest.mark.parametrize("world_size", [2, 4])
def test_forwards_without_gradients_move_the_statistics_and_spoil_no_backward(run, world_size):
    check(run, world_size, [without_gradients])


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_retained_graph_gives_its_gradients_again(run, world_size):
    check(run, world_size, [retained, retained_in_place])


@pytest.mark.parametrize("world_size", [2, 4])
def test_backward_passes_may_come_in_another_order_or_for_some_inputs_only(run, world_size):
    check(run, world_size, [out_of_order, partial])


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_gradient_penalty_trains_a_critic_as_on_the_whole_batch(run, world_size):
    check(run, world_size, [wgan_gp])
