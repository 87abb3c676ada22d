"""bench/figure.py: one dot for each candidate and shape, where its time is."""

import matplotlib.figure
import pytest
from launchers import launch

from syncnorm.bench import figure, memory, targets, timing, train_figure


def row(case, candidate, ratio, noisy=False, setting=memory.RETURNED, clock=timing.WALL):
    micros = 100 * ratio
    return {
        "case": case,
        "candidate": candidate,
        "memory": setting,
        "clock": clock,
        "ratio": ratio,
        "median_us": micros,
        "quartiles_us": [0.9 * micros, 1.2 * micros],
        "noisy": noisy,
    }


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Return what draws rows and returns the axis, as it is when it is saved."""
    axes = []
    save = matplotlib.figure.Figure.savefig

    def keep(self, path):
        axes.extend(self.axes)
        save(self, path)

    def draw(rows, targets=()):
        monkeypatch.setattr(figure.Figure, "savefig", keep)
        figure.draw(tmp_path / "figure.png", rows, targets, "title")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        return axes[-1]

    return draw


def dots(axis):
    """Return the dots of each candidate: (ratio, case, low, high)."""
    names = [label.get_text() for label in axis.get_yticklabels()]
    found = {}
    for container in axis.containers:
        line, _, [bars] = container
        for x, y, bar in zip(line.get_xdata(), line.get_ydata(), bars.get_segments(), strict=True):
            found.setdefault(container.get_label(), []).append(
                (x, names[round(y)], *(round(float(b), 6) for b in bar[:, 0]))
            )
    return found


def test_each_candidate_is_a_dot_with_its_quartiles_in_the_row_of_its_shape(drawn):
    rows = [row("big", targets.ALONE, 0.8), row("big", targets.TORCH, 1.5), row("small", targets.ALONE, 2.0)]
    axis = drawn(rows)
    assert dots(axis) == {
        targets.ALONE: [(0.8, "big", 0.72, 0.96), (2.0, "small", 1.8, 2.4)],
        targets.TORCH: [(1.5, "big", 1.35, 1.8)],
    }
    assert axis.get_xscale() == "log"
    low, high = axis.get_xlim()
    assert low < 0.72
    assert high > 2.0


def test_disturbed_dots_are_left_out_and_counted(drawn):
    axis = drawn([row("big", targets.ALONE, 0.8), row("big", targets.TORCH, 1.5, noisy=True)])
    assert dots(axis).keys() == {targets.ALONE}
    assert "Left out as disturbed: 1 of 2" in axis.get_xlabel()


def test_other_memory_and_what_does_not_compute_the_same_are_not_drawn(drawn):
    rows = [row("big", targets.ALONE, 0.8), row("big", targets.ALONE, 0.5, setting=memory.KEPT)]
    axis = drawn([*rows, row("big", targets.RELU, 0.9), row("big", targets.ALL_REDUCES, 0.1)])
    assert dots(axis) == {targets.ALONE: [(0.8, "big", 0.72, 0.96)]}


def test_what_a_gpu_has_is_drawn_without_the_times_of_the_host(drawn):
    named = (targets.ALONE, targets.GRAPH, targets.COMPILED, targets.TORCH_SYNC)
    rows = [row("big", name, 1.5, setting=memory.CACHED, clock=timing.DEVICE) for name in named]
    axis = drawn([*rows, row("tiny", targets.ALONE, 9.0, setting=memory.CACHED, clock=timing.HOST)])
    assert dots(axis) == {name: [(1.5, "big", 1.35, 1.8)] for name in named}
    assert [label.get_text() for label in axis.get_yticklabels()] == ["big"]


def test_the_target_is_a_line_through_the_row_of_its_shape(drawn):
    rows = [row("big", targets.ALONE, 0.8), row("small", targets.ALONE, 2.0)]
    limit = {"case": "small", "memory": memory.RETURNED, "target": targets.OVER_COPY, "limit": 1.4}
    axis = drawn(rows, [limit])
    [line] = [lines for lines in axis.collections if lines.get_label() == f"target of {targets.ALONE}"]
    [segment] = line.get_segments()
    assert segment.tolist() == [[1.4, 0.5], [1.4, 1.5]]


def test_a_figure_without_rows_is_drawn(drawn):
    assert dots(drawn([row("big", targets.ALONE, 1.0, noisy=True)])) == {}


def step(norm, batch, milliseconds, megabytes, noisy=False):
    quartiles = [0.9 * milliseconds, 1.2 * milliseconds]
    return {
        "norm": norm,
        "images_per_rank": batch,
        "median_ms": milliseconds,
        "quartiles_ms": quartiles,
        "peak_memory_mb": megabytes,
        "noisy": noisy,
    }


def lines(axis):
    """Return the line of each norm: (batches, values)."""
    return {of.get_label(): (of[0].get_xdata().tolist(), of[0].get_ydata().tolist()) for of in axis.containers}


def test_a_training_is_a_line_over_the_batch_for_time_and_for_memory(monkeypatch, tmp_path):
    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, path: (figures.append(self), save(self, path))
    )
    rows = [step("BN", 4, 2.0, 300.0), step("SyncBN", 4, 9.0, 350.0, noisy=True), step("BN", 2, 1.0, 200.0)]
    train_figure.draw(tmp_path / "train.png", [*rows, step("SyncBN", 2, 3.0, 250.0)], "title")
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")
    time, memory = figures[0].axes
    assert lines(time) == {"BN": ([2, 4], [1.0, 2.0]), "SyncBN": ([2], [3.0])}
    assert lines(memory) == {"BN": ([2, 4], [200.0, 300.0]), "SyncBN": ([2, 4], [250.0, 350.0])}
    assert "Left out as disturbed: 1 of 4" in figures[0].get_suptitle()
    train_figure.draw(tmp_path / "train.png", [step("BN", 2, 1.0, None)], "title")
    assert [axis.get_ylabel() for axis in figures[1].axes] == ["step, ms (median and quartiles)"]


def test_matplotlib_is_asked_for(tmp_path):
    script = tmp_path / "no_matplotlib.py"
    script.write_text("import sys\nsys.modules['matplotlib'] = None\nimport syncnorm.bench.figure")
    done = launch("alone", 1, script)
    assert done.returncode == 1
    assert "RuntimeError: --figure draws with matplotlib" in done.stderr
