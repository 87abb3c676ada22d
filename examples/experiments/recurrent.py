"""Does LayerNorm suit recurrent networks better than BatchNorm?

An RNN and a GRU predict the next byte of a text. The norm is in the cell: it normalizes what the byte contributes to a
step, and what the state contributes, each with weights of its own. Samples differ in length, and padding is left out of
BatchNorm's statistics by a mask. The weights of BatchNorm start at 0.1, as Cooijmans et al. recommend, or at 1, as
those of the other norms do. In eval mode it takes the running statistics of each step ("per step"), as Cooijmans et
al. do, or the mean of them over the steps ("shared"), as a layer does that is called at each step.

Each norm has the learning rate that suits it best, of those tried. The last steps of a batch, which one sample alone
reaches, are left out for all norms: there is no variance of a single value. Texts twice as long as those of the
training show what happens at steps without running statistics of their own.

Ba et al. compare on other tasks, and with LSTM and GRU networks. In their GRU the contributions to the gates and to the
new state are normalized separately, here together. Cooijmans et al. normalize an LSTM.
"""

import math
from typing import NamedTuple

import torch
from figures import NAMES, STYLES

from experiments.claim import FAILS, HOLDS, Claim, Verdict, only_if
from experiments.dots import dots, legend
from experiments.evaluation import best_rate
from experiments.panel import WIDTH, panel
from experiments.recurrent_model import Pairs, Recurrent, norms
from experiments.text import bits, curve_of, late, samples_of, train_on_text
from syncnorm.report import COLOURS, Table

CONTEXT, BATCH, WIDE, AT_ONCE = 32, 32, 64, 256
CELLS = {"rnn": "RNN", "gru": "GRU"}
BATCH_NORMS = {"bn": "BatchNorm", "bn_1": "BatchNorm from 1", "bn_padded": "BatchNorm with padding"}
NAMES_HERE = NAMES | BATCH_NORMS
STATISTICS = {"": "per step", ", shared": "shared"}
STYLES_HERE = STYLES | {"bn_1": (COLOURS["orange"], "o"), "bn_padded": (COLOURS["green"], "P")}
MODES = {  # metric -> what it is, and a marker
    "bits": ("eval mode", "o"),
    "bits, train mode": ("train mode", "s"),
    "bits, longer": ("eval mode, texts twice as long", "^"),
}


def cases(quick):
    rates, steps = ((0.03,), 90) if quick else ((0.01, 0.03), 500)
    compared = ("none", "ln", "rms", "bn") if quick else ("none", "ln", "rms", *BATCH_NORMS)
    return [
        ({"cell": cell, "norm": norm, "lr": lr, "steps": steps}, seconds_of(cell, norm, steps))
        for cell in CELLS
        for norm in compared
        for lr in rates
    ]


def seconds_of(cell, norm, steps):
    return (1 + (norm in BATCH_NORMS)) * (1 + 0.6 * (cell == "gru")) * (0.007 * steps + 0.4)


def measure(seed, cell, norm, lr, steps):
    train, held_out = samples_of(CONTEXT, Pairs)
    longer = samples_of(2 * CONTEXT, Pairs)[1]
    torch.manual_seed(seed)
    model = Recurrent(cell, WIDE, norms(CONTEXT)[norm])
    losses = train_on_text(model, train, steps=steps, batch=BATCH, lr=lr, seed=seed)
    numbers = {
        "loss": curve_of(losses),
        "bits": bits(model, held_out, AT_ONCE),
        "bits, longer": bits(model, longer, AT_ONCE),
    }
    if norm in BATCH_NORMS:
        numbers["bits, train mode"] = bits(model, held_out, BATCH, training=True)
        model.norm.share()
        numbers["bits, shared"] = bits(model, held_out, AT_ONCE)
        numbers["bits, longer, shared"] = bits(model, longer, AT_ONCE)
    return numbers


class Variant(NamedTuple):
    """A norm, and of BatchNorm the statistics of eval mode: what a metric's name ends with."""

    norm: str
    ending: str = ""

    @property
    def name(self):
        return NAMES_HERE[self.norm] + (f", {STATISTICS[self.ending]}" if self.norm in BATCH_NORMS else "")


def variants(data):
    """Return the variants of the norms that were measured."""
    return [
        Variant(norm, ending) for norm in data.all("norm") for ending in (STATISTICS if norm in BATCH_NORMS else [""])
    ]


def rate_of(data, cell, variant):
    """Return the learning rate with the fewest bits in eval mode."""
    return best_rate(data, "bits" + variant.ending, cell=cell, norm=variant.norm)


def finite_first(value):
    """Order numbers of bits, those of trainings that diverged last."""
    return value.mean if math.isfinite(value.mean) else math.inf


def number(data, cell, variant, metric="bits"):
    """Return a metric of a variant at its best rate. Norms of each position are the same in both modes."""
    if metric == "bits, train mode":
        ending, metric = "", metric if variant.norm in BATCH_NORMS else "bits"
    else:
        ending = variant.ending
    return data.value(metric + ending, cell=cell, norm=variant.norm, lr=rate_of(data, cell, variant))


def worse(one, other):
    """Return whether a number of bits is clearly larger than another, or is of a training that diverged."""
    return math.isfinite(other.mean) and (not math.isfinite(one.mean) or one.clearly_above(other))


def suits(data, cell, against):
    """Return whether LayerNorm is clearly better than all BatchNorms `against`, and not clearly worse than no norm."""
    ln, none = (number(data, cell, Variant(norm)) for norm in ("ln", "none"))
    return not worse(ln, none) and all(worse(number(data, cell, variant), ln) for variant in against)


def held(data):
    batch_norms = [variant for variant in variants(data) if variant.norm in BATCH_NORMS]
    rnn, gru = (suits(data, cell, batch_norms) for cell in CELLS)
    if rnn and gru:
        return HOLDS
    if rnn or gru:
        return only_if("the network is an RNN, not a GRU" if rnn else "the network is a GRU, not an RNN")
    for ending, name in STATISTICS.items():
        if all(suits(data, cell, [v for v in batch_norms if v.ending == ending]) for cell in CELLS):
            return only_if(f"the running statistics of BatchNorm are {name}")
    return FAILS


def judge(data):
    batch_norms = [variant for variant in variants(data) if variant.norm in BATCH_NORMS]
    sentences, helped = [], []
    for cell, name in CELLS.items():
        ln, none = (number(data, cell, Variant(norm)) for norm in ("ln", "none"))
        best, variant = min(((number(data, cell, v), v) for v in batch_norms), key=lambda pair: finite_first(pair[0]))
        sentences.append(
            f"In the {name} a character takes {ln.text(3)} bits with LayerNorm, {best.text(3)} with the best BatchNorm "
            f"({variant.name}) and {none.text(3)} without a norm."
        )
        helped += [name] if worse(none, best) else []
    if helped:
        sentences.append(f"So BatchNorm clearly helps the {' and the '.join(helped)}, too.")
    sentences.append(f"The best of {len(batch_norms)} BatchNorms is chosen by the same text, which favours it.")
    return Verdict(held(data), " ".join(sentences), table(data))


def table(data):
    columns = ["norm and running statistics", "cell", "learning rate", *(f"bits, {name}" for name, _ in MODES.values())]
    rows = [
        [
            variant.name,
            CELLS[cell],
            f"{rate_of(data, cell, variant):g}",
            *(number(data, cell, variant, metric).text(3) for metric in MODES),
        ]
        for cell in CELLS
        for variant in variants(data)
    ]
    note = (
        "The running statistics of BatchNorm are kept per step, or shared by all steps. Train mode does not use them."
    )
    if "bn_1" in data.all("norm"):
        note += " Its weights start at 0.1, or from 1 where it says so. *With padding* means that it has no mask."
    return Table("", columns, [rows], note=note)


def draw(plt, data):
    figure = plt.figure(figsize=(WIDTH, 7.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    draw_losses(above.subplots(1, 2), data)
    found = variants(data)
    names, styles = {v: v.name for v in found}, {v: STYLES_HERE[v.norm] for v in found}
    axes = below.subplots(1, 2, sharey=True)
    for axis, (cell, name) in zip(axes, CELLS.items(), strict=True):
        rows = {v: {metric: number(data, cell, v, metric) for metric in modes_of(v)} for v in found}
        dots(axis, rows, MODES, xlabel="held-out text (bits per character)", title=name, names=names, styles=styles)
    legend(below, MODES)
    return figure


def modes_of(variant):
    return [metric for metric in MODES if metric != "bits, train mode" or variant.norm in BATCH_NORMS]


def draw_losses(axes, data):
    for axis, (cell, name) in zip(axes, CELLS.items(), strict=True):
        curves = {
            norm: late(*data.curve("loss", cell=cell, norm=norm, lr=rate_of(data, cell, Variant(norm))))
            for norm in ("none", "bn", "ln")
        }
        panel(axis, curves, xlabel="step (number)", ylabel="training loss (nats per byte)", title=name)


CLAIM = Claim(
    name="recurrent",
    title="Recurrent networks",
    sentence="LayerNorm suits recurrent networks better than BatchNorm does.",
    source="[Ba et al., 2016](https://arxiv.org/abs/1607.06450); against it "
    "[Cooijmans et al., 2016](https://arxiv.org/abs/1603.09025)",
    experiment="An RNN and a GRU with a norm in the cell are trained to predict the next byte of a text.",
    cases=cases,
    measure=measure,
    judge=judge,
    draw=draw,
    caption=lambda data: (
        "Above: the training loss of an RNN and of a GRU against the step, with LayerNorm, with BatchNorm and with no "
        "norm. Below: the bits per character of held-out text with each norm, in eval mode, there also of texts twice "
        "as long, and with BatchNorm in train mode."
    ),
)
