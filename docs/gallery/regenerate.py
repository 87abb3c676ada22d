"""Run the commands of ../gallery.md, in this folder, and put what they print below them, and draw its figure.

    python docs/gallery/regenerate.py            write the page and the figure
    python docs/gallery/regenerate.py --check    compare with the page, and exit with status 1 if something differs

Commands are blocks of sh that a block of text follows. Numbers may differ by 5 %, and those below 0.1 by any amount:
these are rounding errors, which depend on the processor.
"""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE, FIGURE = FOLDER.parent / "gallery.md", FOLDER.parent / "figures" / "gallery.png"
BLOCKS = re.compile(r"(?<=^```sh\n)(.*?)(^```\n\n```text\n)(.*?)(?=^```$)", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
BOXES = re.compile(r"[\u2500-\u257f]")  # around tables, as wide as their numbers
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "PYTHONWARNINGS": "ignore"}
FEW = 0.05


def output_of(commands: str) -> str:
    """Return what the commands print, with the exit status if it is not 0."""
    environment = os.environ | ENVIRONMENT
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", commands], cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=120
    )
    if done.stderr:
        sys.exit(f"expected no errors of\n{commands}got\n{done.stderr}")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return "\n".join(lines).strip("\n") + "\n" + f"(exit status {done.returncode})\n" * (done.returncode != 0)


def same(one: str, other: str) -> bool:
    """Return whether two outputs have the same words, and numbers that are near."""
    words = (NUMBER.sub("#", " ".join(BOXES.sub("", text).split())) for text in (one, other))
    if len({*words}) > 1:
        return False
    pairs = ((float(a), float(b)) for a, b in zip(NUMBER.findall(one), NUMBER.findall(other), strict=True))
    return all(abs(a - b) <= FEW * max(a, b) or max(a, b) < 0.1 for a, b in pairs)


def losses(output: str) -> list[tuple[int, float]]:
    """Return the steps and losses that a training has printed."""
    return [(int(step), float(loss)) for step, loss in re.findall(r"step +(\d+)  loss ([\d.]+)", output)]


def draw(page: str) -> None:
    """Draw the losses of the trainings, those before on the left and those after on the right."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for command, _, output in BLOCKS.findall(page):
        for ranks, script in re.findall(r"--nproc-per-node (\d) (\w+)\.py", command):
            axis = axes[int(script == "fixed")]
            style = {"1": "k-", "4": "k--o"}[ranks]
            axis.plot(*zip(*losses(output), strict=True), style, label=f"{ranks} rank{'s' * (ranks != '1')}")
            axis.set(title=f"{script}.py", xlabel="step")
    axes[0].set_ylabel("loss of the whole batch")
    for axis in axes:
        axis.legend()
    figure.savefig(FIGURE, dpi=150)


def main() -> None:
    """Rewrite the page, or compare it."""
    text = PAGE.read_text()
    found = []

    def rerun(match: re.Match[str]) -> str:
        commands, between, before = match.groups()
        after = output_of(commands)
        if not same(before, after):
            found.extend(difflib.unified_diff(before.splitlines(), after.splitlines(), "page", commands, lineterm=""))
        return commands + between + after

    page = BLOCKS.sub(rerun, text)
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(page)
        draw(page)
    elif found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
