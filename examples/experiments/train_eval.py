"""Does BatchNorm differ between training and inference? The loss of the same weights on the same images in both modes.

A plain CNN is trained with batches of several sizes for several numbers of epochs. The learning rate is proportional to
the batch, and falls to 0. In train mode the test images are normalized in batches of the same size as in training. In
eval mode they are normalized by running statistics. Several are kept at once, with several momenta and as a cumulative
average (momentum=None), and the last are recomputed after the training. They do not influence the training, so all
belong to the same weights. The ratio of the two losses is 1 if the modes do not differ.

The two reasons for a difference are told apart by the recomputed statistics, which belong to the last weights. What
they leave is the difference between a batch and all data, of which Ioffe, 2017, speaks. Running statistics that do
worse lag behind the weights, or are averages of too few samples. GroupNorm, LayerNorm and RMSNorm do the same in both
modes and are the control.
"""

import itertools
import math
from typing import NamedTuple

import datasets
import torch
from figures import NAMES, log_ticks
from spread import CLEAR, Value
from words import listed, plural

import syncnorm
from experiments.claim import FAILS, HOLDS, Claim, Verdict, only_if
from experiments.loop import train
from experiments.models import NORMS, plain_cnn
from experiments.modes import MOMENTA, Tracking, chosen, loss, ratios
from experiments.panel import WIDTH, panel, styles_of
from syncnorm.report import Table

LR = 0.05 / 64  # for each sample of the batch
RECOMPUTED = "recomputed"
STATISTICS = (RECOMPUTED, *MOMENTA)
LABELS = {name: "cumulative" if momentum is None else f"momentum {name}" for name, momentum in MOMENTA.items()}
LABELS[RECOMPUTED] = "recomputed"
SAID = LABELS | {"cumulative": "a cumulative average"}
CONTROLS = ("gn", "ln", "rms")
ORDERS = 2  # of the test images, for the mean loss in train mode
TESTED = 256  # images of each order
RECOMPUTED_OVER = 512  # images
MEANT = 0.025  # of a logarithm, so that at least 5 % are a difference


def cases(quick):
    batches, lengths = ((4, 64), (1, 2)) if quick else ((4, 16, 64), (1, 4, 16))
    found = []
    for norm, batch, epochs in itertools.product(("bn", *CONTROLS), batches, lengths):
        if norm == "bn" or epochs == lengths[0]:
            seconds = epochs * datasets.TRAIN_SIZE / batch * (0.003 + 0.0001 * batch) + 6 / batch
            found.append(({"norm": norm, "batch": batch, "epochs": epochs}, seconds))
    return found


def measure(seed, norm, batch, epochs):
    (images, labels), tests = datasets.load()
    torch.manual_seed(seed)
    model = plain_cnn(1, 10, Tracking if norm == "bn" else NORMS[norm])
    steps = epochs * len(images) // batch
    train(model, images, labels, steps=steps, batch=batch, lr=LR * batch, seed=seed, decay=steps)
    orders = [torch.randperm(len(tests[0]))[:TESTED] for _ in range(ORDERS)]
    batches = [[of[which] for of in tests] for order in orders for which in order.split(batch)]
    if norm != "bn":
        return ratios({"": loss(model.eval(), batches)}, loss(model.train(), batches))
    in_eval_mode = {name: loss(chosen(model, place).eval(), batches) for place, name in enumerate(MOMENTA)}
    in_train_mode = loss(model.train(), batches)
    syncnorm.recompute_running_stats(model, images[:RECOMPUTED_OVER].split(batch))
    return ratios(in_eval_mode | {RECOMPUTED: loss(model.eval(), batches)}, in_train_mode)


class Case(NamedTuple):
    """What a ratio of BatchNorm is of."""

    statistics: str
    batch: int
    epochs: int


def cases_of(data):
    of_bn = data.where(norm="bn")
    return list(itertools.starmap(Case, itertools.product(STATISTICS, of_bn.all("batch"), of_bn.all("epochs"))))


def logarithm(data, case):
    return data.value(f"logarithm {case.statistics}", MEANT, norm="bn", batch=case.batch, epochs=case.epochs)


def ratio(data, case):
    return Value(tuple(map(math.exp, logarithm(data, case).numbers)))


def differs(value):
    """Return whether a logarithm is clearly different from 0. Its modes are of the same weights, seed by seed."""
    return len(value.numbers) > 1 and abs(value.mean) > CLEAR * value.spread


def mismatched(data, case):
    """Return whether the loss with running statistics is clearly above that with recomputed ones."""
    running, recomputed = (logarithm(data, c).numbers for c in (case, case._replace(statistics=RECOMPUTED)))
    above = Value(tuple(one - other for one, other in zip(running, recomputed, strict=True)), MEANT)
    return above.mean > 0 and differs(above)


def judge(data):
    batches = sorted(data.where(norm="bn").all("batch"))
    trained = [Case(RECOMPUTED, batch, max(data.where(norm="bn").all("epochs"))) for batch in batches]
    different = [case.batch for case in trained if differs(logarithm(data, case))]
    others = [case for case in cases_of(data) if case.batch not in different]
    conditions = [f"the batch is {_sizes(different, batches)}"] if different else []
    if any(mismatched(data, case) for case in others):
        conditions.append("the running statistics do not match the weights")
    held = HOLDS if different == batches else only_if(" or ".join(conditions)) if conditions else FAILS
    few, many = (ratio(data, trained[end]).text(2) for end in (0, -1))
    worst = max((c for c in cases_of(data) if c.statistics != RECOMPUTED), key=lambda c: logarithm(data, c).mean)
    remedied = ratio(data, worst._replace(statistics=RECOMPUTED)).text(2)
    return Verdict(
        held,
        f"With recomputed statistics, eval mode's loss after {plural(trained[0].epochs, 'epoch')} is {few} times train "
        f"mode's in batches of {batches[0]} and {many} times in batches of {batches[-1]}. Below 1, eval mode is the "
        "better one: train mode normalizes by the statistics of few samples. The ratio is highest with "
        f"{SAID[worst.statistics]}, in batches of {worst.batch} after {plural(worst.epochs, 'epoch')}: "
        f"{ratio(data, worst).text(2)} times, and {remedied} times when the statistics are recomputed.",
        table(data),
    )


def _sizes(some, batches):
    return f"at most {some[-1]} samples" if some == batches[: len(some)] else f"{listed(map(str, some), 'or')} samples"


def table(data):
    cases = cases_of(data)
    groups = list(dict.fromkeys((case.batch, case.epochs) for case in cases))
    rows = []
    for statistics in STATISTICS:
        found = [Case(statistics, *group) for group in groups]
        bold = ["**" * differs(logarithm(data, case)) for case in found]
        cells = (mark + ratio(data, case).text(2) + mark for mark, case in zip(bold, found, strict=True))
        rows.append([LABELS[statistics], *cells])
    rows += [[NAMES[norm], *(control(data, norm, *group) for group in groups)] for norm in CONTROLS]
    columns = [f"batches of {batch}, {plural(epochs, 'epoch')}" for batch, epochs in groups]
    note = "**Bold**: clearly different from 1, by 5 % or more."
    return Table("", ["loss, eval / train mode", *columns], [rows], names=1, note=note)


def control(data, norm, batch, epochs):
    """Return the ratio of a norm without running statistics, if it was measured."""
    numbers = [row["value"] for row in data.where(metric="logarithm", norm=norm, batch=batch, epochs=epochs).rows]
    return " to ".join(dict.fromkeys(f"{math.exp(end(numbers)):g}" for end in (min, max))) if numbers else ""


def draw(plt, data):
    batches = data.where(norm="bn").all("batch")
    figure, axes = plt.subplots(1, len(batches), figsize=(WIDTH, 4.2), layout="constrained", sharey=True)
    for axis, batch in zip(axes, batches, strict=True):
        axis.margins(0.1)
        lengths = data.where(norm="bn").all("epochs")
        curves = {one: (lengths, [ratio(data, Case(one, batch, n)) for n in lengths]) for one in STATISTICS}
        panel(
            axis,
            curves,
            xlabel="length (epochs, logarithmic)",
            ylabel="loss, eval / train mode (ratio)" if batch == batches[0] else "",
            title=f"batches of {batch}",
            logx=True,
            logy=True,
            ticks=lengths,
            names=LABELS,
            styles=styles_of(STATISTICS),
            labels=batch == batches[-1],
        )
        axis.axhline(1, color="#999999", linewidth=0.8, zorder=0)
    means = [ratio(data, case).mean for case in cases_of(data)]
    ticks = log_ticks(min(means), max(means), (1, 2, 5))
    axes[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])  # of all panels
    axes[0].minorticks_off()
    return figure


CLAIM = Claim(
    name="train-eval",
    title="Training and inference",
    sentence="BatchNorm differs between training and inference.",
    source="[Ioffe, 2017](https://arxiv.org/abs/1702.03275)",
    experiment="A plain CNN is trained on digits in small and large batches, for few and many epochs. The loss on the "
    "test images in eval mode is divided by that in train mode, for several running statistics of the same training.",
    cases=cases,
    measure=measure,
    judge=judge,
    draw=draw,
    caption=lambda data: (
        "Loss in eval mode divided by loss in train mode against the length of the training, in one panel for each "
        "batch size, with running statistics of three momenta, as a cumulative average, and recomputed."
    ),
)
