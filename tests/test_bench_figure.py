"""bench/figure.py: one dot for each candidate and shape, where its time is."""

import matplotlib.figure
import pytest
from launchers import launch

from syncnorm.bench import figure, memory, targets


def row(case, candidate, ratio, noisy=False, setting=memory.RETURNED):
    micros = 100 * ratio
    return {
        "case": case,
        "candidate": candidate,
        "memory": setting,
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


def test_the_target_is_a_line_through_the_row_of_its_shape(drawn):
    rows = [row("big", targets.ALONE, 0.8), row("small", targets.ALONE, 2.0)]
    limit = {"case": "small", "memory": memory.RETURNED, "target": targets.OVER_COPY, "limit": 1.4}
    axis = drawn(rows, [limit])
    [line] = [lines for lines in axis.collections if lines.get_label() == f"target of {targets.ALONE}"]
    [segment] = line.get_segments()
    assert segment.tolist() == [[1.4, 0.5], [1.4, 1.5]]


def test_a_figure_without_rows_is_drawn(drawn):
    assert dots(drawn([row("big", targets.ALONE, 1.0, noisy=True)])) == {}


def test_matplotlib_is_asked_for(tmp_path):
    script = tmp_path / "no_matplotlib.py"
    script.write_text("import sys\nsys.modules['matplotlib'] = None\nimport syncnorm.bench.figure")
    done = launch("alone", 1, script)
    assert done.returncode == 1
    assert "RuntimeError: python -m syncnorm bench layer --figure draws with matplotlib" in done.stderr
