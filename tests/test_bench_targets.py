"""bench/targets.py: which targets a layer has, and when it misses them."""

import pytest
import torch

from syncnorm.bench import cases, targets
from syncnorm.bench.timing import Timing


def seconds(**medians):
    """Return timings by candidate, without spread; names are those of `targets`, in lower case."""
    return {getattr(targets, name.upper()): Timing(median, median, median) for name, median in medians.items()}


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LARGE = cases.Case(cases.LARGE, (32, 64, 56, 56))
TINY = LARGE._replace(kind=cases.TINY)
ONE_RANK = {"copy": 1.0, "torch": 1.2, "alone": 1.1, "relu": 1.15, "add_relu": 1.15}
TWO_RANKS = {**ONE_RANK, "all_reduces": 2.0, "all_reduces_between": 3.1, "all": 3.25}


def verdicts(case, times, device=CPU):
    return {verdict.target: verdict for verdict in targets.verdicts(case, seconds(**times), device)}


@pytest.mark.parametrize("slower", ["alone", "relu", "add_relu", "all"])
def test_a_layer_that_is_too_slow_misses_its_target(slower):
    within = verdicts(LARGE, TWO_RANKS)
    assert all(verdict.met for verdict in within.values()), within
    beyond = verdicts(LARGE, {**TWO_RANKS, slower: 1.3 * TWO_RANKS[slower]})
    missed = {target for target, verdict in beyond.items() if not verdict.met}
    assert (
        missed
        == {
            "alone": {"one / copy"},
            "relu": {"one, relu / one"},
            "add_relu": {"one, add, relu / one"},
            "all": {
                "all / (one + 1.15 all-reduces)",
                "all / (one + 1.15 all-reduces in place)",
                "(all - all-reduces in place) / F.batch_norm",
            },
        }[slower]
    )
    assert {verdict.cells()[-1] for target, verdict in beyond.items() if target in missed} == {"MISSED"}


def test_the_all_reduces_of_a_layer_cost_what_they_add_to_the_copies_and_never_less_than_alone():
    """The layer is not to be judged by all-reduces that were quicker than bare ones by chance."""
    bare, in_place = "all / (one + 1.15 all-reduces)", "all / (one + 1.15 all-reduces in place)"
    slow = verdicts(LARGE, TWO_RANKS | {"all_reduces_between": 6.0})
    assert slow[in_place].value < slow[bare].value
    quick = verdicts(LARGE, TWO_RANKS | {"all_reduces_between": 1.1})
    assert quick[in_place].value == pytest.approx(quick[bare].value)


@pytest.mark.parametrize("kind", [cases.LARGE, cases.SMALL])
def test_a_layer_is_compared_with_torch(kind):
    case, target = LARGE._replace(kind=kind), "one / F.batch_norm"
    assert verdicts(case, ONE_RANK | {"torch": 2.2})[target].met
    assert not verdicts(case, ONE_RANK | {"torch": 1.0})[target].met


def test_a_tiny_layer_is_compared_with_the_module_of_torch_alone():
    for module, met in ((2.0, True), (0.5, False)):
        [(target, verdict)] = verdicts(TINY, {"alone": 1.1, "module": module}).items()
        assert (target, verdict.met) == ("one / nn.BatchNorm2d", met)


def test_a_layer_on_a_gpu_is_compared_with_the_synchronized_one_of_torch():
    for torch_sync, met in ((2.0, True), (1.0, False)):
        found = verdicts(LARGE, ONE_RANK | {"torch_sync": torch_sync}, CUDA)
        assert found["all / torch.nn.SyncBatchNorm"].met is met
        assert "one / F.batch_norm" not in found


@pytest.mark.parametrize(("kind", "limit"), [(cases.LARGE, 1.25), (cases.SMALL, 1.25)])
def test_a_layer_on_a_gpu_has_limits_over_the_copies_and_torch(kind, limit):
    for alone, met in ((1.25, True), (1.26, False)):
        found = verdicts(LARGE._replace(kind=kind), ONE_RANK | {"alone": alone, "torch_sync": 1.5 * 1.255}, CUDA)
        assert (found["one / copy"].limit, found["one / copy"].met) == (limit, met)
        assert found["all / torch.nn.SyncBatchNorm"].met is met


def test_the_host_time_of_a_layer_is_at_most_half_of_torchs():
    target = "host time, one / torch.nn.SyncBatchNorm"
    for torch_sync, met in ((2.2, True), (2.1, False)):
        [(name, verdict)] = verdicts(TINY, {"alone": 1.1, "module": 1.0, "torch_sync": torch_sync}, CUDA).items()
        assert (name, verdict.limit, verdict.met) == (target, 0.5, met)
    assert verdicts(TINY, {"alone": 1.1, "module": 1.0}, CUDA) == {}


@pytest.mark.parametrize("missing", ["alone", "relu", "add_relu"])
def test_a_candidate_that_failed_has_no_target(missing):
    times = {name: seconds for name, seconds in ONE_RANK.items() if name != missing}
    left = {"alone": set(), "relu": {"one, add, relu / one"}, "add_relu": {"one, relu / one"}}[missing]
    with_others = {"one / copy", "one / F.batch_norm"} if missing != "alone" else set()
    assert verdicts(LARGE, times).keys() == left | with_others


def test_half_precision_on_a_cpu_has_no_target_over_the_copies():
    """The copies move half of the bytes, and the arithmetic stays the same."""
    bf16 = LARGE._replace(dtype=torch.bfloat16)
    assert "one / copy" not in verdicts(bf16, ONE_RANK)
    assert "one / copy" in verdicts(bf16, ONE_RANK, CUDA)


def test_a_noisy_verdict_says_so():
    noisy = seconds(**ONE_RANK) | {targets.COPY: Timing(1.0, 0.8, 1.3)}
    first, second, *_ = targets.verdicts(LARGE, noisy, CPU)
    assert first.cells() == ["one / copy", "1.10", "<= 1.1", "met, noisy"]
    assert first.cell() == "1.10 (<= 1.1)"
    assert second.noisy is False
