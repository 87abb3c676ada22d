"""Does BatchNorm's error grow as the batch per rank shrinks? The CNN of cnn.py on 4 ranks, and one sample at a time.

Each training of the CNN sees equally many samples, at a learning rate proportional to the global batch, as in Wu and
He, 2018. SyncBatchNorm at the same size differs from BatchNorm in its statistics alone, so a difference between the two
is not owed to the number of steps. BatchNorm depends on how the batch is split and trains on 4 real ranks. With the
other norms one process has the whole global batch; some steps on 4 ranks check that this is the same.

Rank 0 evaluates with its own running statistics, those that DistributedDataParallel would store. BatchNorm is also
evaluated with recomputed statistics. The error that is left then was caused in training.

In online learning a step sees one sample. BatchNorm normalizes by the space of that sample then, and a layer without
space has one value per channel, of which there is no variance. All norms have the plain CNN here, whose initialization
suits a network without norms, and each is judged at its best learning rate.

The paper trains ResNets on ImageNet on 8 GPUs; this is a small CNN on digits.
"""

import itertools

from figures import NAMES, STYLES
from spread import Value
from words import listed, plural

from experiments import on_ranks
from experiments.claim import FAILS, HOLDS, Claim, Published, Verdict, only_if
from experiments.evaluation import best_rate
from experiments.models import FEATURE_NORMS
from experiments.online import one_vector, online
from experiments.panel import WIDTH, bars, panel
from syncnorm.report import COLOURS, Table

RANKS = 4
RECOMPUTED = "bn, recomputed"
COMPARED = ("bn", "sync_bn", "gn", "ln", "rms")
ONLINE = ("bn", "gn", "ln", "none")
IMAGE = 100 / 297  # percent of the test images
LABELS = NAMES | {RECOMPUTED: "BatchNorm, recomputed"}
LOOKS = STYLES | {RECOMPUTED: (COLOURS["orange"], "P")}


def cases(quick):
    sizes, seen, trainings = ((1, 4), 1500, 1) if quick else ((1, 2, 4, 8, 16), 7500, 2)
    rates, steps = ((0.003, 0.01), 500) if quick else ((0.001, 0.003, 0.01, 0.03), 1500)
    split = {"part": "communication", "samples": 4, "of": RANKS, "ranks": RANKS, "steps": 5}
    found = [(split, 3)]
    for norm, samples in itertools.product(COMPARED, sizes):
        case = {"part": "error", "norm": norm, "samples": samples, "of": RANKS, "ranks": RANKS if norm == "bn" else 1}
        a_step = 0.008 if norm == "bn" else 0.003 + 0.0001 * RANKS * samples
        seconds = trainings * a_step * seen / (RANKS * samples)
        found.append((case | {"seen": seen, "trainings": trainings}, seconds))
    for norm, lr in itertools.product(ONLINE, rates):
        found.append(({"part": "online", "norm": norm, "ranks": 1, "lr": lr, "steps": steps}, 0.0015 * steps))
    return found + [({"part": "one vector", "norm": norm, "ranks": 1}, 0.1) for norm in FEATURE_NORMS]


def measure(seed, part, **settings):
    if part == "error":
        return on_ranks.error(seed, **settings)
    if part == "communication":
        return on_ranks.communication(seed, COMPARED, **settings)
    return {"online": online, "one vector": one_vector}[part](seed, **settings)


def error_of(data, norm, samples):
    metric, norm = ("error, recomputed", "bn") if norm == RECOMPUTED else ("error", norm)
    return data.value(metric, IMAGE, part="error", norm=norm, samples=samples)


def online_error(data, norm, metric="error"):
    """Return the error of online learning at the learning rate where it is lowest."""
    case = {"part": "online", "norm": norm}
    return data.value(metric, IMAGE, lr=best_rate(data, metric, **case), **case)


def communicated(data, norm, what):
    return data.value(f"{norm}: {what}", part="communication")


def sizes_of(data):
    return sorted(data.where(part="error").all("samples"))


def raised_at(data):
    """Return the sizes, from the smallest on, at which BatchNorm's error is clearly raised.

    It is then above its own at the largest size, and above that of SyncBatchNorm at the same size.
    """
    *sizes, largest = sizes_of(data)

    def raised(size):
        with_few = error_of(data, "bn", size)
        return all(with_few.clearly_above(error_of(data, *other)) for other in (("bn", largest), ("sync_bn", size)))

    return list(itertools.takewhile(raised, sizes))


def judge(data):
    sizes, raised = sizes_of(data), raised_at(data)
    smallest, largest = plural(sizes[0], "sample"), plural(sizes[-1], "sample")
    held = only_if(f"there {_are(raised[-1])} per rank") if raised else FAILS
    if raised and raised == sizes[:-1]:
        held = HOLDS
    few, many, synchronized, recomputed = (
        error_of(data, *cell).text(1)
        for cell in (("bn", sizes[0]), ("bn", sizes[-1]), ("sync_bn", sizes[0]), (RECOMPUTED, sizes[0]))
    )
    return Verdict(
        held,
        f"BatchNorm's test error is {few} % at {smallest} per rank and {many} % at {largest}. At {smallest} per rank "
        f"SyncBatchNorm's is {synchronized} %. Recomputed running statistics leave BatchNorm at {recomputed} %.",
        table(data),
    )


def _are(samples):
    return f"are at most {samples} samples" if samples > 1 else "is 1 sample"


def table(data):
    sizes = sizes_of(data)
    columns = ["test error (%)", *(f"{size} per rank" for size in sizes), "one at a time", "collectives per layer"]
    rows = []
    for norm in dict.fromkeys(("bn", RECOMPUTED, *COMPARED, *ONLINE)):
        errors = ["" if norm == "none" else error_of(data, norm, size).text(1) for size in sizes]
        alone = online_error(data, norm).text(1) if norm in ONLINE else ""
        calls = f"{communicated(data, norm, 'collectives').mean:g}" if norm in COMPARED else ""
        rows.append([LABELS[norm], *errors, alone, calls])
    apart = max(communicated(data, norm, "apart").mean for norm in COMPARED if norm != "bn")
    refused = [NAMES[norm] for norm in FEATURE_NORMS if data.value("refused", part="one vector", norm=norm).mean == 1]
    own_space = online_error(data, "bn", "error in train mode").text(1)
    note = (
        "*One at a time*: the plain CNN in online learning, at the best learning rate of each norm. BatchNorm's error "
        f"is {own_space} % there if each test image is normalized by its own space, as in training. Of the "
        f"perceptrons, which have no space, {listed(refused) if refused else 'none'} refused a single sample. "
        "*Collectives* are those of a step, in forward and backward. Those of SyncBatchNorm carry "
        f"{communicated(data, 'sync_bn', 'bytes').mean:.0f} bytes per layer on average. On 4 real ranks the first "
        f"losses of the norms beside BatchNorm differ from those of one process by at most {apart:.0e}."
    )
    return Table("", columns, [rows], names=1, note=note)


def draw(plt, data):
    figure = plt.figure(figsize=(WIDTH, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.4, 1))
    left, top, bottom = (figure.add_subplot(place) for place in (grid[:, 0], grid[0, 1], grid[1, 1]))
    sizes, curves = sizes_of(data), {}
    for place, norm in enumerate(("bn", RECOMPUTED, *COMPARED[1:])):
        aside = 2 ** (0.07 * (place - 2))  # so that bars of equal height do not hide one another
        curves[norm] = [size * aside for size in sizes], [error_of(data, norm, size) for size in sizes]
    panel(
        left,
        curves,
        xlabel="samples per rank (number, logarithmic)",
        ylabel="test error (%)",
        title=f"{RANKS} ranks",
        logx=True,
        ticks=sizes,
        names=LABELS,
        styles=LOOKS,
    )
    bars(
        top,
        {norm: online_error(data, norm) for norm in ONLINE},
        ylabel="test error (%)",
        title="one sample at a time",
        digits=0,
    )
    bars(
        bottom,
        {norm: Value((communicated(data, norm, "collectives").mean,)) for norm in COMPARED},
        ylabel="collectives (number)",
        title="per layer and step",
        digits=0,
    )
    return figure


def _ours(data):
    sizes = sizes_of(data)
    samples = 2 if 2 in sizes else sizes[0]
    batch, group = (error_of(data, norm, samples) for norm in ("bn", "gn"))
    points = f"{batch.mean - group.mean:.1f} points ({batch.text(1)} and {group.text(1)} %)"
    return points + f", at {plural(samples, 'sample')}" * (samples != 2)


CLAIM = Claim(
    name="batch-size",
    title="The batch per rank",
    sentence="BatchNorm depends on the batch: its error grows as the batch per rank shrinks.",
    source="[Wu and He, 2018](https://arxiv.org/abs/1803.08494)",
    experiment="The CNN of `cnn.py` is trained on digits on 4 ranks with few and many samples per rank, and with each "
    "norm. Each training sees equally many samples. A plain CNN learns from one sample at a time.",
    cases=cases,
    measure=measure,
    judge=judge,
    draw=draw,
    caption=lambda data: (
        f"Left: test error of the CNN against the samples per rank, from {sizes_of(data)[0]} to {sizes_of(data)[-1]}, "
        "with each norm, and with BatchNorm that has recomputed statistics. Top right: test "
        "error of online learning. Bottom right: collectives per norm layer and step."
    ),
    published=(
        Published(
            "BatchNorm's error above GroupNorm's at 2 samples per rank",
            "10.6 points ([Wu and He, 2018](https://arxiv.org/abs/1803.08494), abstract)",
            _ours,
            "ResNet-50 on ImageNet there, on 8 GPUs; a small CNN on digits here, on 4 ranks",
        ),
    ),
)
