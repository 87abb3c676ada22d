"""What tools and examples print and draw with: tables for the terminal and for Markdown, and colours for figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["COLOURS", "Table", "listing"]

COLOURS = {  # that the colour-blind can tell apart. Source: Okabe and Ito, Color Universal Design, 2008
    "black": "#000000",
    "orange": "#E69F00",
    "sky blue": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
    "grey": "#8C8C8C",
}
WIDTH = 130  # characters; mpirun gives ranks a terminal of 80 whatever the real one is


class Table(NamedTuple):
    """Sections of rows of cells, as printed.

    Args:
        title: above the table.
        columns: their names.
        sections: rows between lines.
        names: how many of the first columns hold words. The others hold numbers and are aligned to the right.
        note: a sentence below the table in Markdown.
    """

    title: str
    columns: Sequence[str]
    sections: Sequence[Sequence[Sequence[str]]]
    names: int = 2
    note: str = ""

    def show(self) -> None:
        """Print the table. Needs rich."""
        from rich.console import Console
        from rich.table import Table as RichTable

        drawn = RichTable(title=self.title)
        for i, column in enumerate(self.columns):
            drawn.add_column(column, justify="left" if i < self.names else "right", no_wrap=i < self.names)
        for section in self.sections:
            for row in section:
                drawn.add_row(*row, end_section=row is section[-1])
        Console(width=WIDTH, force_terminal=False).print(drawn)

    def markdown(self) -> str:
        """Return the table in Markdown, without its title."""
        aligned = ["---"] * self.names + ["---:"] * (len(self.columns) - self.names)
        rows = [_escaped(self.columns), aligned, *(_escaped(row) for section in self.sections for row in section)]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"


def listing(facts: Mapping[str, str]) -> str:
    """Return facts as lines of two aligned columns."""
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _escaped(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]
