"""Which ranks should share statistics, and why."""

from __future__ import annotations

from collections.abc import Sequence

from .predict import BN, GLOBAL, NODE, TORCH, Prediction

__all__ = ["ENOUGH", "advise"]

ENOUGH = 32  # samples per statistic: Wu and He's BatchNorm with 16 is within 0.1 % of that with 32, with 8 it is not
CHEAP = 1.03  # times the step with BatchNorm: what synchronizing over all ranks may take without a reason against it
EQUAL = 1.01  # times the quickest step: what counts as equally quick


def advise(layers: int, batch: int, ranks_per_node: int, predictions: Sequence[Prediction]) -> str:
    """Return a recommendation and its reason.

    If the samples of one rank are ENOUGH, none. Else all ranks, if their step is at most CHEAP times that with
    BatchNorm. Else the group with ENOUGH samples and the quickest step, and of those that are EQUAL the largest.

    Source: Wu and He, Group Normalization, 2018, section 4.1, for the error of BatchNorm by samples per worker.

    Args:
        layers: how many would be synchronized.
        batch: samples of a rank.
        ranks_per_node: ranks of a node.
        predictions: of all variants on the same number of ranks.
    """
    by_name = {each.variant: each for each in predictions}
    unsynchronized, over_all = by_name[BN], by_name.get(GLOBAL)
    if not layers:
        return "There is nothing to synchronize: the model has no BatchNorm layer in training mode."
    if over_all is None or over_all.ranks == 1:
        return "There is nothing to synchronize: the job has one rank, whose statistics are those of the whole batch."
    if batch >= ENOUGH:
        return (
            f"You do not need to synchronize: each statistic is of {batch} samples already (at least {ENOUGH}). "
            f"Synchronizing all {over_all.ranks} ranks would make the step {_times(over_all, unsynchronized)} as long."
        )
    times = over_all.step / unsynchronized.step
    reach = f"{over_all.samples} samples per statistic"
    if times <= CHEAP:
        return (
            f"Synchronize over all {over_all.ranks} ranks: the step takes {times:.2f} times as long, and the training "
            f"is then the same on any number of ranks. {_capital(reach)}."
        )
    groups = [each for each in predictions if each.group > 1 and each.samples >= ENOUGH and each.variant != TORCH]
    if not groups:
        return (
            f"Synchronize over all {over_all.ranks} ranks: even they have only {reach}, fewer than {ENOUGH}. "
            f"The step takes {times:.2f} times as long. GroupNorm needs no communication."
        )
    quickest = min(each.step for each in groups)
    chosen = max((each for each in groups if each.step <= EQUAL * quickest), key=lambda each: each.group)
    if chosen.group == chosen.ranks:
        return (
            f"Synchronize over all {over_all.ranks} ranks: no smaller group with {ENOUGH} samples per statistic is "
            f"more than 1 % quicker. The step takes {_times(chosen, unsynchronized)} as long, with {reach}."
        )
    return (
        f"Synchronize over {_named(chosen, ranks_per_node)}: {chosen.samples} samples per statistic are enough (the "
        f"threshold is {ENOUGH}), and synchronizing all {over_all.ranks} ranks would make the step {times:.3f} times "
        f"as long instead of {chosen.step / unsynchronized.step:.3f}."
    )


def _named(chosen: Prediction, ranks_per_node: int) -> str:
    is_node = chosen.variant == NODE or chosen.group == ranks_per_node
    return f"the {chosen.group} ranks of a node" if is_node else f"groups of {chosen.group} ranks"


def _times(one: Prediction, other: Prediction) -> str:
    return f"{one.step / other.step:.2f} times"


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]
