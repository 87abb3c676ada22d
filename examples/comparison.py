"""The norms compared: a table whose numbers are those of the claims, and a figure of what each takes its moments over.

All is told for 4 ranks with few samples each. The batch that BatchNorm sees is then that of a rank, the batch that the
other norms see is that of all ranks.
"""

import math

from experiments import CLAIMS, batch_size, cnn_layer_norm, recurrent, regularization, rms_norm, train_eval
from experiments.claim import anchor
from experiments.cost_numbers import Costs, ratio
from experiments.panel import WIDTH
from figures import NAMES
from spread import Value

from syncnorm.report import COLOURS, Table

TITLE = "The norms compared"
MOMENTS = {  # norm: what a mean and a variance are taken over
    "bn": "a channel of the rank's samples",
    "sync_bn": "a channel of all ranks' samples",
    "gn": "a group of channels of a sample",
    "ln": "the features of a position",
    "rms": "the features of a position, about zero",
}
NEEDED = ("cost", "batch-size", "train-eval", "regularization", "cnn-layer-norm", "recurrent", "rms-norm")


def table(data, page=""):
    """Return the norms, and what was measured of each, with links to the figures on the page of the report."""

    def link(text, claim=None):
        return f"[{text}]({page}#{anchor(CLAIMS[claim].title if claim else TITLE)})"

    rows = [
        [
            NAMES[norm],
            link(MOMENTS[norm]),
            link(_collectives(data["batch-size"], norm), "batch-size"),
            link(_errors(data["batch-size"], norm), "batch-size"),
            link(_eval_mode(data["train-eval"], norm), "train-eval"),
            link(_gap(data["regularization"], norm), "regularization"),
            link(_time(data["cost"], norm), "cost"),
            "; ".join(link(text, claim) for text, claim in _used(data, norm)),
        ]
        for norm in MOMENTS
    ]
    columns = [
        "norm",
        "moments over",
        "collectives per layer and step",
        "test error with few and with many samples (%)",
    ]
    columns += ["loss in eval mode / in train mode", "overfitting (nats)", "time (copies of the tensor)", "used in"]
    return Table("", columns, [rows], names=len(columns), note=_note(data))


def _note(data):
    few, many = batch_size.sizes_of(data["batch-size"])[:: len(batch_size.sizes_of(data["batch-size"])) - 1]
    modes, gaps = (_batch(data[claim], "bn") for claim in ("train-eval", "regularization"))
    epochs = max(data["train-eval"].all("epochs"))
    without = regularization.gap(data["regularization"], "none", [_batch(data["regularization"], "sync_bn")])
    return (
        f"There are {batch_size.RANKS} ranks. Few and many samples are {few} and {many} per rank. The losses in both "
        f"modes are those of {modes} samples per rank and a momentum of 0.1, after {epochs} epochs. Overfitting is the "
        f"test loss less the training loss, with {gaps} samples per rank. Without a norm it is {without.text(3)}. Time "
        "is that of forward and backward on one core of a CPU, as a multiple of the time of a copy of the tensor. "
        "Of SyncBatchNorm, the losses, the overfitting, the time and the error in CNNs are those of BatchNorm in one "
        "process with the batch of all ranks; its collectives add to the time. The errors in CNNs are of 300 training "
        "images."
    )


def _batch(data, norm):
    """Return the smallest batch for BatchNorm, and the one of all ranks, or the next larger, for the other norms."""
    batches = sorted(data.all("batch"))
    whole = [batch for batch in batches if batch >= batch_size.RANKS * batches[0]]
    return batches[0] if norm == "bn" else whole[0]


def _as_one_process(norm):
    """Return the norm that takes the place of SyncBatchNorm in one process."""
    return "bn" if norm == "sync_bn" else norm


def _collectives(data, norm):
    return f"{batch_size.communicated(data, norm, 'collectives').mean:g}"


def _errors(data, norm):
    few, *_, many = batch_size.sizes_of(data)
    return " and ".join(batch_size.error_of(data, norm, samples).text(1) for samples in (few, many))


def _eval_mode(data, norm):
    epochs, batch = max(data.all("epochs")), _batch(data, norm)
    if norm in ("bn", "sync_bn"):
        return train_eval.ratio(data, train_eval.Case("0.1", batch, epochs)).text(2)
    numbers = [row["value"] for row in data.where(metric="logarithm", norm=norm).rows]
    return "1" if not any(numbers) else Value(tuple(map(math.exp, numbers))).text(2)


def _gap(data, norm):
    return regularization.gap(data, _as_one_process(norm), [_batch(data, norm)]).text(3)


def _time(data, norm):
    costs = Costs(data, "cpu")
    return ratio(costs.value(_as_one_process(norm)), costs.copy()).text(1)


def _used(data, norm):
    """Return (text, claim) of each kind of network that the norm is used in, with its quality there."""
    cnn = cnn_layer_norm.best_errors(data["cnn-layer-norm"])
    alone = _as_one_process(norm)
    in_cnns = [(f"CNNs ({cnn[alone].text(1)} % error)", "cnn-layer-norm")] if alone in cnn and norm != "rms" else []
    if norm not in ("ln", "rms"):
        return in_cnns
    bits = rms_norm.number(data["rms-norm"], norm)
    in_text = [(f"Transformers ({bits.text(2)} bits per character)", "rms-norm")]
    if norm == "ln":
        in_rnns = recurrent.number(data["recurrent"], "rnn", recurrent.Variant("ln"))
        in_text.append((f"RNNs ({in_rnns.text(2)} bits)", "recurrent"))
    return in_text + in_cnns


# the figure

SAMPLES, CHANNELS, POSITIONS, RANKS, GROUPS = 4, 6, 4, 2, 2
MARKED = {  # norm: is the value of (sample, channel, position) among those of the first mean and variance?
    "bn": lambda n, c, p: c == 0 and n < SAMPLES // RANKS,
    "sync_bn": lambda n, c, p: c == 0,
    "gn": lambda n, c, p: n == 0 and c < CHANNELS // GROUPS,
    "ln": lambda n, c, p: n == 0 and p == 0,
    "rms": lambda n, c, p: n == 0 and p == 0,
}
CAPTION = (
    "A batch of four samples on two ranks, a row each, with six channels and four positions. The values that share the "
    "first mean and variance are marked. BatchNorm: one channel of a rank's samples. SyncBatchNorm: one channel of all "
    "samples. GroupNorm: one sample, half of the channels. LayerNorm and RMSNorm: one position of one sample, all "
    "channels."
)


def draw_moments(plt):
    """Draw a batch of samples on two ranks for each norm, with the values of its first mean and variance marked."""
    figure, axes = plt.subplots(1, len(MARKED), figsize=(WIDTH, 2.1), layout="constrained")
    for axis, (norm, marked) in zip(axes, MARKED.items(), strict=True):
        for sample in range(SAMPLES):
            top = -sample - 0.5 * (sample * RANKS // SAMPLES)  # a gap between the ranks
            for channel in range(CHANNELS):
                for position in range(POSITIONS):
                    _cell(plt, axis, channel, top - position / POSITIONS, marked(sample, channel, position))
                axis.add_patch(plt.Rectangle((channel, top - 1), 1, 1, fill=False, edgecolor="black", linewidth=0.8))
        for rank in range(RANKS):
            middle = -(rank + 0.5) * SAMPLES / RANKS - 0.5 * rank
            axis.text(-0.3, middle, f"rank {rank}", rotation=90, va="center", ha="right", size=9)
        axis.set(xlim=(-1.2, CHANNELS + 0.1), ylim=(-SAMPLES - 0.6, 0.1), aspect="equal")
        axis.axis("off")
        axis.set_title(NAMES[norm], size=10)
        axis.text(CHANNELS / 2, -SAMPLES - 0.9, "channels", ha="center", va="top", size=9)
    return figure


def _cell(plt, axis, x, y, marked):
    height = 1 / POSITIONS
    colour = COLOURS["blue"] if marked else "#EEEEEE"
    axis.add_patch(plt.Rectangle((x, y - height), 1, height, facecolor=colour, edgecolor="white", linewidth=0.5))
