"""Is LayerNorm less suited to CNNs than BatchNorm? A residual CNN with each norm, at the best learning rate of each.

Ba et al. explain why it could be: statistics over a layer assume that its units contribute alike, and units at the
border of an image do not. They and Wu and He take the moments over channels, height and width of each sample. ConvNeXt
takes them over the channels of each position. Both forms are measured here, beside RMSNorm, GroupNorm and no norm.

The CNN is that of examples/cnn.py, with the initialization of He et al., which helps a network without norms most. It
is trained on few of the digits, so that there are errors to compare, and tested on all others. The best rate of each
norm is that with the lowest mean test error, by the same rule for all. Two models are trained for each seed (with
--quick one) and their numbers averaged, since models that differ in their random numbers alone differ in their errors.

Wu and He train ResNet-50 on ImageNet instead, at one rate for all norms, with a schedule, weight decay and
augmentation, which this experiment does not have.
"""

import functools
import itertools
import math

import datasets
import torch
from cnn import cnn
from figures import NAMES, STYLES
from torch import nn

import syncnorm
from experiments.claim import FAILS, HOLDS, Claim, Published, Verdict, only_if
from experiments.evaluation import best_rate, loss_and_error
from experiments.loop import smoothed, steps_to, train
from experiments.models import NORMS, draw_as_he
from experiments.panel import WIDTH, bars, panel
from syncnorm.report import COLOURS, Table

TRAINING = 300  # images of 1797
BATCH = 32
TARGET = 0.1  # the loss to reach: nats
RATES = (0.01, 0.03, 0.1, 0.3, 1)
DRAWN = 20  # %: larger errors are left out of the figure
FORMS = {"ln": "the channels of each position", "ln_chw": "channels, height and width of each sample"}
OVER = FORMS | {
    "bn": "batch, height and width of each channel",
    "gn": "height, width and the channels of each of 8 groups",
    "rms": FORMS["ln"],
    "none": "nothing",
}
MODEL_NORMS = NORMS | {"ln_chw": functools.partial(syncnorm.GroupNorm, 1)}
LABELS = NAMES | {"ln": "LayerNorm C", "ln_chw": "LayerNorm CHW"}
LOOKS = STYLES | {"ln_chw": (COLOURS["orange"], "P")}


def cases(quick):
    norms = ("bn", "ln", "ln_chw", "none") if quick else ("bn", "ln", "ln_chw", "gn", "rms", "none")
    rates, steps, models = (RATES[:-1], 80, 1) if quick else (RATES, 200, 2)
    return [
        ({"norm": norm, "lr": lr, "steps": steps, "models": models}, models * (0.1 + 0.0075 * steps))
        for norm in norms
        for lr in rates
    ]


def measure(seed, norm, lr, steps, models):
    """Train several models and return the means of their numbers."""
    runs = [measure_one(seed * models + number, norm, lr, steps) for number in range(models)]
    return {metric: sum(run[metric] for run in runs) / models for metric in runs[0]}


def measure_one(seed, norm, lr, steps):
    images, labels = (torch.cat(parts) for parts in zip(*datasets.load(), strict=True))
    torch.manual_seed(seed)
    model = cnn(1, 10, MODEL_NORMS[norm])
    draw_as_he(model, nn.Conv2d)
    losses = train(model, images[:TRAINING], labels[:TRAINING], steps=steps, batch=BATCH, lr=lr, seed=seed)
    return {
        "test error": 100 * loss_and_error(model, images[TRAINING:], labels[TRAINING:])[1],
        "last loss": smoothed(losses)[-1].item(),
        "steps to the loss": steps_to(TARGET, losses),
    }


def error(data, norm, lr):
    """Return the test error in %, which one image resolves."""
    return data.value("test error", 100 / (1797 - TRAINING), norm=norm, lr=lr)


def best_rates(data):
    """Return the rate with the lowest mean test error, for each norm."""
    return {norm: best_rate(data, "test error", norm=norm) for norm in data.all("norm")}


def best_errors(data):
    return {norm: error(data, norm, lr) for norm, lr in best_rates(data).items()}


def judge(data):
    best = best_errors(data)
    worse = [form for form in FORMS if best[form].clearly_above(best["bn"])]
    if len(worse) == len(FORMS):
        held = HOLDS
    elif worse:
        held = only_if(f"LayerNorm takes its moments over {FORMS[worse[0]]}")
    else:
        held = FAILS
    return Verdict(
        held,
        f"At the best learning rate of each norm the test error is {best['bn'].text(2)} % with BatchNorm. With "
        f"LayerNorm it is {best['ln'].text(2)} % over {FORMS['ln']} and {best['ln_chw'].text(2)} % over "
        f"{FORMS['ln_chw']}. Without a norm it is {best['none'].text(2)} %.",
        table(data),
    )


def table(data):
    best, rows = best_errors(data), []
    for norm, lr in best_rates(data).items():
        loss, steps = (data.value(metric, norm=norm, lr=lr) for metric in ("last loss", "steps to the loss"))
        reached = steps.text(0) if math.isfinite(steps.mean) else "not by all seeds"
        name = NAMES.get(norm, NAMES["ln"])
        rows.append([name, OVER[norm], f"{lr:g}", best[norm].text(2), loss.text(4), reached])
    columns = ["norm", "moments over", "best learning rate", "test error (%)", "last loss (nats)"]
    clear = [f"{best[form].clear_difference(best['bn']):.1f}" for form in FORMS]
    note = (
        f"LayerNorm's test error is clearly above BatchNorm's if it is larger by more than {clear[0]} points over "
        f"{FORMS['ln']}, and by more than {clear[1]} points over {FORMS['ln_chw']}."
    )
    return Table("", [*columns, f"steps to a loss of {TARGET}"], [rows], note=note)


def draw(plt, data):
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.9), layout="constrained")
    rates, errors = data.all("lr"), {norm: {} for norm in best_rates(data)}
    for norm, lr in itertools.product(errors, rates):
        value = error(data, norm, lr)
        if value.mean < DRAWN:
            errors[norm][lr] = value
    panel(
        axes[0],
        {norm: tuple(zip(*of_norm.items(), strict=True)) for norm, of_norm in errors.items() if of_norm},
        xlabel="learning rate (logarithmic)",
        ylabel="test error (%)",
        logx=True,
        ticks=rates,
        names=LABELS,
        styles=LOOKS,
    )
    bars(axes[1], best_errors(data), ylabel="test error at the best rate (%)", styles=LOOKS, names=LABELS, digits=1)
    return figure


def more_than_bn(norm):
    """Return a function of the data: how much larger the error of a norm is than BatchNorm's, in points."""

    def text(data):
        best = best_errors(data)
        if norm not in best:
            return "not measured"
        return f"{best[norm].mean - best['bn'].mean:+.2f} points, {best['bn'].text(2)} % with BatchNorm"

    return text


WU_AND_HE = "([Wu and He, 2018](https://arxiv.org/abs/1803.08494), Table 1)"
DIFFERS = "ResNet-50 on ImageNet, batches of 32 per GPU; here a CNN of 3 residual blocks and 300 digits"

CLAIM = Claim(
    name="cnn-layer-norm",
    title="LayerNorm in CNNs",
    sentence="LayerNorm is less suited to CNNs than BatchNorm.",
    source="[Ba et al., 2016](https://arxiv.org/abs/1607.06450), section 6.7; "
    "[Wu and He, 2018](https://arxiv.org/abs/1803.08494)",
    experiment=f"A residual CNN is trained on {TRAINING} digits in batches of {BATCH} at constant learning rates, with "
    "each norm, and tested on the other digits. The best rate of each norm is that with the lowest mean test error.",
    cases=cases,
    measure=measure,
    judge=judge,
    draw=draw,
    caption=lambda data: (
        "Left: the test error of a residual CNN with each norm against the learning rate, "
        f"where it is below {DRAWN} %. Right: the test error at the best rate of each norm. "
        "LayerNorm C takes its moments over channels, LayerNorm CHW over channels, height and width."
    ),
    published=(
        Published(
            "error with LayerNorm over channels, height and width, less BatchNorm's",
            f"+1.7 points, 23.6 % with BatchNorm {WU_AND_HE}",
            more_than_bn("ln_chw"),
            DIFFERS,
        ),
        Published(
            "error with GroupNorm, less BatchNorm's",
            f"+0.5 points, 23.6 % with BatchNorm {WU_AND_HE}",
            more_than_bn("gn"),
            DIFFERS + "; 32 groups there, 8 here",
        ),
    ),
)
