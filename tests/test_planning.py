"""`plan`: what collectives cost, what a model sends, how long ranks wait, and which group is recommended."""

import math

import planted
import pytest
import torch
from torch import nn

import syncnorm
from syncnorm.bench.timing import Timing
from syncnorm.planning import Check, Link, plan, plan_by_measuring
from syncnorm.planning.advice import advise
from syncnorm.planning.explain import COMPUTING, CONVERTED, PARTS, PARTS_SUMMED, SUMMED, Costs, explain
from syncnorm.planning.fit import fit
from syncnorm.planning.network import (
    Network,
    buckets,
    direct,
    doubling,
    doubling_all_gather,
    halving,
)
from syncnorm.planning.predict import BN, GLOBAL, LOCAL, NODE, TORCH, TWO_LEVELS, Step, of_block, variants
from syncnorm.planning.trace import trace
from syncnorm.planning.waiting import Noise, deviation_of_maximum, expected_maximum
from syncnorm.testing import CountingCommunicator, run_ranks

LINK = Link(1e-5, 1e9)
NEAR, FAR = Link(1e-6, 1e10), Link(1e-5, 1e9)


class Twice(nn.Module):
    """A layer that is called twice, and one whose input needs no gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.shared = nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)
        self.frozen = nn.BatchNorm2d(5)
        self.local = nn.GroupNorm(1, 5)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x):
        return self.local(self.frozen(self.shared(self.shared(self.conv(self.first(x))))))


def reproducible():
    return syncnorm.convert_sync_batchnorm(Twice(), reproducible=True)


MODELS = {"sound": planted.sound, "twice": Twice, "reproducible": reproducible}


@pytest.mark.parametrize("algorithm", [halving, doubling, direct, doubling_all_gather])
def test_one_rank_sends_nothing(algorithm):
    assert algorithm(1000, 1, LINK) == 0


def test_collectives_in_closed_form():
    message = 1e-5 + 1000 / 1e9
    assert doubling(1000, 2, LINK) == pytest.approx(message)
    assert doubling(1000, 8, LINK) == pytest.approx(3 * message)
    assert doubling(1000, 5, LINK) == pytest.approx(3 * message)  # whole steps
    assert halving(1000, 2, LINK) == pytest.approx(2e-5 + 1000 / 1e9)
    assert halving(1000, 4, LINK) == pytest.approx(4e-5 + 1.5 * 1000 / 1e9)
    assert direct(1000, 4, LINK) == pytest.approx(3 * message)
    assert doubling_all_gather(1000, 4, LINK) == pytest.approx(2e-5 + 3 * 1000 / 1e9)


def test_small_messages_are_doubled_and_large_ones_halved():
    """On 4 ranks, 2 α + 2 n β = 4 α + 1.5 n β at n = 4 α / β."""
    network, crossover = Network(4, LINK, LINK), 4 * LINK.latency * LINK.bandwidth
    for size in (0.5 * crossover, 2 * crossover):
        kind = doubling if size < crossover else halving
        assert network.all_reduce(size, 4) == kind(size, 4, LINK)
        assert min(doubling(size, 4, LINK), halving(size, 4, LINK)) == kind(size, 4, LINK)


def test_links_between_nodes_are_used_by_groups_of_several_nodes():
    network = Network(4, NEAR, FAR)
    assert network.all_reduce(800, 4) == doubling(800, 4, NEAR)
    assert network.all_reduce(800, 16) == pytest.approx(doubling(800, 4, NEAR) + doubling(800, 4, FAR))
    assert network.two_levels(800, 16) == pytest.approx(doubling(800, 4, NEAR) + 3 * FAR.seconds(800))
    assert network.all_reduce(1e9, 16) == halving(1e9, 16, FAR)
    assert [network.levels(ranks) for ranks in (1, 2, 4, 8, 10)] == [(1, 1), (2, 1), (4, 1), (4, 2), (4, 3)]


def test_gradients_are_summed_in_buckets():
    assert buckets(0) == []
    assert buckets(1000) == [1000]
    assert buckets(60 << 20) == [1 << 20, 25 << 20, 25 << 20, 9 << 20]


def test_expected_maxima_of_normal_numbers_are_the_known_ones():
    """Those of 2, 3 and 4 numbers have closed forms; that of 8 is from Harter, Biometrika 48, 1961."""
    assert expected_maximum(1) == 0
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-10)
    assert expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-10)
    assert expected_maximum(4) == pytest.approx(1.02938, abs=1e-5)
    assert expected_maximum(8) == pytest.approx(1.42360, abs=1e-5)
    assert deviation_of_maximum(1) == 1
    assert deviation_of_maximum(2) == pytest.approx(math.sqrt(1 - 1 / math.pi), abs=1e-10)
    assert expected_maximum(4096) < math.sqrt(2 * math.log(4096))  # its limit


def test_ranks_wait_in_each_collective_or_once_in_a_step():
    noise = Noise(of_parts=0.01)
    assert noise.waiting(16, 1, 1) == 0
    assert noise.waiting(16, 1, 4) == pytest.approx(expected_maximum(4) * 0.01)
    assert noise.waiting(16, 4, 4) == pytest.approx(4 * expected_maximum(4) * 0.01)
    simulated = torch.randn(20_000, 16, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.01 / 4
    in_pairs = simulated.amax(3).sum(1).amax(1).mean()  # step, point, group, rank
    assert noise.waiting(16, 2, 4) == pytest.approx(float(in_pairs), rel=0.02)
    of_steps = Noise(of_parts=0.0, of_steps=0.01)
    assert of_steps.waiting(16, 4, 4) == of_steps.waiting(16, 1, 4) == pytest.approx(expected_maximum(4) * 0.01)


def test_noise_is_told_from_how_long_ranks_wait():
    planted_noise = Noise(0.003, 0.004)
    found = Noise.of(planted_noise.total, math.sqrt(16) * 0.003 + 0.004, 16)
    assert found == pytest.approx(planted_noise)
    assert Noise.of(0.002, 0.0, 16) == Noise(0.0, 0.001)
    most = Noise.of(0.002, 0.5, 16)  # more than parts of such a step can explain
    assert most.total == pytest.approx(0.002)
    assert 4 * most.of_parts + most.of_steps == pytest.approx(math.sqrt(17) * 0.002)
    assert Noise.beyond_slowest(0.3, 16) == pytest.approx(Noise(0.1))
    assert Noise.beyond_slowest(0.3, 1) == Noise(0.0)


def test_the_fit_finds_planted_latency_and_bandwidth():
    sizes = [100, 1000, 10_000, 100_000]
    assert fit({n: LINK.seconds(n) for n in sizes}) == pytest.approx(LINK)
    generator = torch.Generator().manual_seed(0)
    disturbed = {n: LINK.seconds(n) * (1 + 0.05 * torch.randn((), generator=generator).item()) for n in sizes}
    assert fit(disturbed) == pytest.approx(LINK, rel=0.15)
    assert fit({8: 2e-6, 800: 1e-6}).bandwidth == math.inf
    assert fit({8: 1e-9, 800: 1e-6}).latency == 0
    with pytest.raises(ValueError, match="expected the times of two message sizes or more, got 1"):
        fit({8: 1e-6})


def count(build):
    """Return the bytes of the collectives of a step on this rank, in order."""
    group = CountingCommunicator()
    model = syncnorm.convert_sync_batchnorm(build().train(), group)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert {call.name for call in group.calls} == {"all_reduce"}
    return [call.nbytes for call in group.calls]


@pytest.mark.parametrize("name", MODELS)
def test_the_trace_counts_what_ranks_send(name):
    build = MODELS[name]
    found = trace(build().train(), torch.randn(4, 3, 8, 8))
    for of_rank in run_ranks(count, 2, build):
        assert sorted(of_rank) == sorted(found.messages())
        forward = [size for call in found.calls for size in call._replace(backward=False).messages()]
        assert of_rank[: len(forward)] == forward
    assert found.gradient_bytes == sum(4 * parameter.numel() for parameter in build().parameters())


def test_the_trace_names_layers_and_norms_without_communication():
    found = trace(Twice().train(), torch.randn(4, 3, 8, 8))
    assert [call.layer for call in found.calls] == ["first", "shared", "shared"]
    assert [call.backward for call in found.calls] == [False, True, True]
    assert {call.values for call in found.calls} == {4 * 8 * 8}
    assert found.kinds() == {"BatchNorm2d": 2}
    assert found.local == {"GroupNorm": 1}


def step_of(build=planted.sound, batch=8, link=LINK):
    network = Network(4, link, link)
    found = trace(build().train(), torch.randn(2, 3, 8, 8))
    return Step(found, batch, Costs(0.01, 0.01, Noise(0.0), network, network))


def test_a_step_is_the_sum_of_its_parts():
    step = step_of()
    by_name = {variant.name: step.predict(variant, 16) for variant in variants(16, 4)}
    assert list(by_name) == [BN, of_block(2).name, of_block(8).name, NODE, GLOBAL, TWO_LEVELS, TORCH, LOCAL]
    sizes = [8 * (2 * 8 + 3)] * 2 + [8 * (2 * 8 + 2)] * 2
    assert by_name[GLOBAL].messages == pytest.approx(sum(doubling(size, 16, LINK) for size in sizes))
    assert by_name[NODE].messages == pytest.approx(sum(doubling(size, 4, LINK) for size in sizes))
    gathers = 2 * doubling_all_gather(4 * (2 * 8 + 1), 16, LINK)
    assert by_name[TORCH].messages == pytest.approx(gathers + 2 * doubling(4 * 2 * 8, 16, LINK))
    for each in by_name.values():
        assert each.step == each.compute + each.messages + each.waiting + each.gradients
        assert each.gradients == by_name[BN].gradients > 0
    assert by_name[BN].messages == by_name[LOCAL].messages == 0
    assert [by_name[name].samples for name in (BN, NODE, GLOBAL)] == [8, 32, 128]
    alone = [step.predict(variant, 1) for variant in variants(16, 4)]
    assert {each.efficiency for each in alone} == {1.0}


@pytest.mark.parametrize("shares_cores", [False, True])
@pytest.mark.parametrize("added", [0.0002, 0.002, 0.008])  # by all-reduces between computing: also less than before
def test_measured_times_are_explained(added, shares_cores):
    """The predictions from samples are these samples."""
    fast, slow = 0.010, 0.012
    base = slow if shares_cores else (fast + slow) / 2
    times = {COMPUTING: 0, CONVERTED: -0.001, SUMMED: 0.003, PARTS: 0, PARTS_SUMMED: base + added - slow}
    samples = [{name: [rank + more] * 3 for name, more in times.items()} for rank in (fast, slow)]
    found, network = step_of().trace, Network(2, Link(1e-4, 1e9), Link(1e-4, 1e9))
    costs = explain(samples, found, network, network, shares_cores)
    by_name = {variant.name: Step(found, 8, costs).predict(variant, 2) for variant in variants(2, 2)}
    assert by_name[GLOBAL].step == pytest.approx(base - 0.001 + added + 0.003, rel=0.05)
    assert by_name[BN].step == pytest.approx(slow + 0.003, rel=0.05)
    assert costs.statistics.within.latency > 0
    assert by_name[BN].gradients == pytest.approx(0.003)


def test_a_wrong_cost_model_is_noticed():
    """Negative control: the error of a check shows a prediction with all messages counted twice."""
    slow = Link(1e-3, 1e9)
    right, wrong = step_of(link=slow), step_of(link=slow)
    wrong.trace.calls.extend(wrong.trace.calls)
    (over_all,) = (variant for variant in variants(4, 4) if variant.name == GLOBAL)
    truth = right.predict(over_all, 4).step
    measured = Timing.of([0.99 * truth, truth, 1.01 * truth])
    assert abs(Check(GLOBAL, 4, right.predict(over_all, 4).step, measured).error) < 0.01
    assert Check(GLOBAL, 4, wrong.predict(over_all, 4).step, measured).error > 0.3


def advice(batch, nodes=2, build=planted.sound, **settings):
    step = step_of(build, batch, **settings)
    ranks = 4 * nodes
    predictions = [step.predict(variant, ranks) for variant in variants(ranks, 4)]
    return advise(len(step.trace.calls), batch, 4, predictions)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch": 32}, "You do not need to synchronize: each statistic is of 32 samples already"),
        ({"batch": 8, "link": Link(1e-7, 1e11)}, "Synchronize over all 8 ranks: the step takes 1.00 times as long"),
        ({"batch": 8, "link": Link(1e-3, 1e9)}, "Synchronize over the 4 ranks of a node: 32 samples per statistic are"),
        ({"batch": 16, "link": Link(1e-3, 1e9)}, "Synchronize over groups of 2 ranks: 32 samples per statistic"),
        (
            {"batch": 4, "link": Link(1e-3, 1e9)},
            "no smaller group with 32 samples per statistic is more than 1 % quicker",
        ),
        ({"batch": 2, "link": Link(1e-3, 1e9)}, "even they have only 16 samples per statistic, fewer than 32"),
        ({"batch": 8, "build": planted.no_norms}, "There is nothing to synchronize: the model has no BatchNorm layer"),
    ],
)
def test_the_recommendation_and_its_reason(settings, words):
    assert words in advice(**settings)


def test_a_job_of_one_rank_has_nothing_to_synchronize():
    step = step_of()
    assert "the job has one rank" in advise(2, 8, 1, [step.predict(variant, 1) for variant in variants(1, 1)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_per_rank": 0}, "expected batch_per_rank to be positive, got 0"),
        ({"nodes": -1}, "expected nodes to be positive, got -1"),
        ({"step": 0.0}, "expected step to be positive, got 0.0"),
        ({"noise": -0.1}, "expected noise to be 0 or more, got -0.1"),
        ({"between": Link(-1, 1)}, "expected a latency of 0 or more and a positive bandwidth"),
        ({"build": "planted"}, "expected \"MODULE:FUNCTION\", got 'planted'"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_said(settings, message):
    given = {"build": planted.sound, "input_shape": (3, 8, 8), "batch_per_rank": 2, "nodes": 2, "ranks_per_node": 2}
    with pytest.raises(ValueError, match=message):
        plan(**{**given, "between": LINK, "step": 0.01, **settings})


def test_measuring_needs_ranks():
    with pytest.raises(RuntimeError, match="expected several ranks to measure on, got one"):
        plan_by_measuring(planted.sound, (3, 8, 8), 2)
