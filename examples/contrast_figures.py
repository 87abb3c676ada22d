"""The figures of examples/contrast.py. Each is drawn from the Cells of contrast_report.py, 830 pixels wide."""

from figures import NAMES, STYLES, curve, ink, label_ends, log_ticks, sizes_axis

from syncnorm.report import COLOURS

MODELS = {"cnn": "CNN", "transformer": "Transformer"}
TITLES = {
    "error": "Test error of the CNN against samples per rank",
    "step-time": "Time of a step: compute and communication",
    "collectives": "Collectives and bytes of a step",
    "transformer": "The Transformer: quality against time, and what eval mode loses",
}
COMPUTE, COMMUNICATION = "#9AA5B1", COLOURS["orange"]


def draw_error(plt, cells):
    figure, axis = plt.subplots(figsize=(8.3, 4.4), layout="constrained")
    sizes = cells.sizes("cnn")
    ends, values = {}, []
    for place, norm in enumerate(cells.norms("cnn")):
        aside = 2 ** (0.08 * (place - 2))  # so that bars of equal height do not hide one another
        errors = cells.values("cnn", norm, "error")
        curve(axis, norm, [size * aside for size in sizes], errors)
        ends[norm] = sizes[-1] * aside, max(errors[-1].mean, 0.1)
        values += errors
    low, high = 0.8 * max(0.1, min(v.mean - v.spread for v in values)), 1.2 * max(v.mean + v.spread for v in values)
    axis.set_yscale("log", nonpositive="clip")
    sizes_axis(axis, sizes)
    ticks = log_ticks(low, high, (1, 2, 3, 5))
    axis.set_ylim(min(low, ticks[0]), max(high, ticks[-1]))
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axis.set_ylabel("test error (%, logarithmic)")
    label_ends(axis, ends, 0.065)
    of = "mean and standard deviation over seeds" if cells.seeds() > 1 else "one seed"
    axis.set_title(f"CNN: {of}", loc="left")
    return figure


def draw_step_time(plt, cells):
    models = cells.models()
    figure, axes = plt.subplots(
        len(models), figsize=(8.3, 0.3 + 3.1 * len(models)), layout="constrained", squeeze=False
    )
    for axis, model in zip(axes[:, 0], models, strict=True):
        place, ticks, top = 0, [], max(c["step"].mean + c["step"].spread for k, c in cells.items() if k[0] == model)
        for norm in cells.norms(model):
            start = place
            for samples in cells.sizes(model):
                cell = cells[model, norm, samples]
                step, communication = cell["step"], cell["communication"].mean
                axis.bar(place, step.mean - communication, color=COMPUTE)
                axis.bar(place, communication, bottom=step.mean - communication, color=COMMUNICATION)
                axis.errorbar(place, step.mean, step.spread, color="black", capsize=2, linewidth=1)
                ticks.append((place, samples))
                place += 1
            middle = (start + place - 1) / 2
            axis.text(middle, 1, NAMES[norm], ha="center", va="top", transform=axis.get_xaxis_transform())
            place += 0.8
        axis.set_xticks(*zip(*ticks, strict=True))
        axis.tick_params(axis="x", length=0)
        axis.set(xlabel="samples per rank (number)", ylabel="time of a step (ms)", ylim=(0, 1.2 * top))
        axis.set_title(MODELS[model], loc="left")
        for x, text, colour in (0.62, "compute", COMPUTE), (0.98, "communication, with waiting", COMMUNICATION):
            axis.text(x, 1.04, f"■ {text}", color=ink(colour), ha="right", transform=axis.transAxes, weight="bold")
    return figure


def draw_collectives(plt, cells):
    models = cells.models()
    count = sum(len(cells.norms(model)) for model in models)
    figure, axes = plt.subplots(1, 2, figsize=(8.3, 1.2 + 0.33 * count), layout="constrained", sharey=True)
    labels, place = [], 0
    for model in models:
        for norm in cells.norms(model):
            cell = cells[model, norm, cells.sizes(model)[0]]
            for axis, unit, digits in (axes[0], "collectives", 0), (axes[1], "kB", 1):
                gradients, norms = cell[f"gradients {unit}"], cell[f"norm {unit}"]
                axis.barh(place, gradients, color=COMPUTE)
                axis.barh(place, norms, left=gradients, color=COMMUNICATION)
                text = f" {gradients:.{digits}f} + {norms:.{digits}f}" if norms else f" {gradients:.{digits}f}"
                axis.text(gradients + norms, place, text, va="center")
            labels.append((place, f"{MODELS[model]}, {NAMES[norm]}"))
            place += 1
        place += 0.6
    axes[0].set_yticks(*zip(*labels, strict=True))
    axes[0].invert_yaxis()
    axes[0].set_xlabel("collectives per step (number)")
    axes[1].set_xlabel("given by each rank per step (kB)")
    for axis in axes:
        axis.tick_params(axis="y", length=0)
        axis.set_xlim(0, 1.4 * axis.get_xlim()[1])
        for x, text, colour in (0, "gradients", COMPUTE), (0.4, "+ norms", COMMUNICATION):
            axis.text(x, 1.03, f"■ {text}", size=9, color=ink(colour), weight="bold", transform=axis.transAxes)
    return figure


def draw_transformer(plt, cells):
    figure, axes = plt.subplots(1, 2, figsize=(8.3, 4.0), layout="constrained", width_ratios=[1.25, 1])
    sizes, norms = cells.sizes("transformer"), cells.norms("transformer")
    seconds = {norm: [cells.training_seconds("transformer", norm, size) for size in sizes] for norm in norms}
    slowest = max(("ln", "rms"), key=lambda norm: seconds[norm][-1])  # of the two curves that lie near each other
    for norm in norms:
        bits = cells.values("transformer", norm, "bits")
        curve(axes[0], norm, seconds[norm], bits)
        curve(axes[1], norm, sizes, cells.values("transformer", norm, "gap"))
        for size, second, value in zip(sizes, seconds[norm], bits, strict=True):
            axes[0].annotate(
                str(size),
                (second, value.mean),
                xytext=(5, 4) if norm == slowest else (-5, -4),
                textcoords="offset points",
                ha="left" if norm == slowest else "right",
                va="bottom" if norm == slowest else "top",
                color=ink(STYLES[norm][0]),
                size=9,
            )
    axes[0].margins(0.16, 0.1)
    axes[1].margins(y=0.15)
    axes[0].set_xscale("log")
    low, high = axes[0].get_xlim()
    ticks = log_ticks(low, high, (1, 2, 5))
    axes[0].set_xlim(min(low, ticks[0]), max(high, ticks[-1]))
    axes[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].minorticks_off()
    axes[0].set_xlabel("training on all ranks (s, logarithmic)")
    axes[0].set_ylabel("validation, eval mode (bits per character)")
    axes[0].set_title("quality against time, by samples per rank", loc="left", size=10)
    sizes_axis(axes[1], sizes)
    axes[1].axhline(0, color="#BBBBBB", linewidth=0.8, zorder=0)
    axes[1].set_ylabel("eval − train mode (bits per character)")  # noqa: RUF001
    axes[1].set_title("above 0: eval mode is worse", loc="left", size=10)
    label_ends(axes[0], {n: (seconds[n][0], cells["transformer", n, sizes[0]]["bits"].mean) for n in norms}, 0.075)
    label_ends(axes[1], {n: (sizes[-1], cells["transformer", n, sizes[-1]]["gap"].mean) for n in norms}, 0.075)
    return figure


DRAWINGS = {
    "error": draw_error,
    "step-time": draw_step_time,
    "collectives": draw_collectives,
    "transformer": draw_transformer,
}
