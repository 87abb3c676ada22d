"""What every benchmark reports: where it ran, tables on the terminal and in Markdown, all numbers as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from .. import info
from ..report import Table, listing
from .timing import left_out

try:
    import rich  # noqa: F401 (so that a benchmark without it fails before it measures)
except ImportError as error:
    raise RuntimeError(
        "python -m syncnorm bench draws its tables with rich, which cannot be imported: pip install 'syncnorm[bench]'"
    ) from error

__all__ = [
    "WARNING",
    "Files",
    "Table",
    "digits",
    "header",
    "left_undone",
    "numbers",
    "publish",
    "publish_rows",
    "ranks",
    "told",
    "undisturbed",
    "write_json",
]

WARNING = " (--quick: tells whether it runs, not how fast)"


class Files(NamedTuple):
    """Where a benchmark writes what it has found, other than to the terminal."""

    json: Path | None = None
    markdown: Path | None = None
    figure: Path | None = None

    def check(self) -> None:
        """Raise RuntimeError unless all can be written."""
        for path in self:
            if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
                raise RuntimeError(f"expected a file that can be written, got {path}")
        if self.figure is not None:
            from . import figure  # needs matplotlib

            figure.check(self.figure)


def header(job: Mapping[str, str]) -> dict[str, str]:
    """Return where and when this runs, by name; `job` is what `syncnorm.info.job` told."""
    machine = info.machine()
    gpu = {name: machine[name] for name in ("cuda", "nccl", "triton", "kernels on cuda")}
    triton = {"triton": machine["triton"]} if os.environ.get("SYNCNORM_KERNELS") == "triton" else {}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{info.processor()}, {os.cpu_count()} cores, "
        f"of which rank 0 may use {len(os.sched_getaffinity(0))}",
        **({**gpu, "L2 cache": _l2_cache()} if torch.cuda.is_available() else triton),
        **{name: machine[name] for name in ("syncnorm", "python", "torch", "mpi4py", "mpi", "kernels on cpu")},
        **{name: fact for name, fact in job.items() if name not in ("rank", "local rank")},
        "threads per rank": str(torch.get_num_threads()),
    }


def publish(
    facts: Mapping[str, str],
    printed: Sequence[Table],
    numbers: Mapping[str, Sequence[Mapping[str, Any]]],
    files: Files,
    in_markdown: Sequence[Table],
) -> None:
    """Print the header and the tables; write all numbers as JSON, and tables as Markdown."""
    print(listing(facts))
    for table in printed:
        table.show()
    write_json(facts, numbers, files)
    if files.markdown is not None:
        files.markdown.write_text("\n".join([_provenance(facts), *map(_section, in_markdown)]))


def write_json(facts: Mapping[str, str], numbers: Mapping[str, Sequence[Mapping[str, Any]]], files: Files) -> None:
    """Write the header and the numbers as JSON. A benchmark does so after each part, in case it is killed later."""
    if files.json is not None:
        files.json.write_text(json.dumps({"header": facts, **numbers}, indent=2) + "\n")


class _Row(Protocol):
    """A row of a benchmark that has one table."""

    @property
    def noisy(self) -> bool: ...
    def cells(self) -> list[str]: ...


class _Noisy(Protocol):
    @property
    def noisy(self) -> bool: ...


class _Told(Protocol):
    def numbers(self) -> dict[str, Any]: ...


class _Failure(Protocol):
    def _asdict(self) -> dict[str, Any]: ...


_Result = TypeVar("_Result", bound=_Noisy)


def numbers(sections: Iterable[Iterable[_Told]], failures: Iterable[_Failure]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows and the failures of a benchmark as they are written to JSON."""
    return {
        "rows": [row.numbers() for rows in sections for row in rows],
        "failures": [failure._asdict() for failure in failures],
    }


def publish_rows(
    facts: Mapping[str, str],
    empty: Table,
    sections: Sequence[Sequence[_Row]],
    numbers: Mapping[str, Sequence[Mapping[str, Any]]],
    files: Files,
) -> None:
    """Publish one table of rows: all of them on the terminal and as JSON, the undisturbed ones as Markdown."""
    printed = empty._replace(sections=[[row.cells() for row in rows] for rows in sections])
    quiet, note = undisturbed([row for rows in sections for row in rows])
    in_markdown = empty._replace(sections=[[row.cells() for row in quiet]], note=note)
    publish(facts, [printed], numbers, files, [in_markdown])


def undisturbed(results: Sequence[_Result]) -> tuple[list[_Result], str]:
    """Return the results that are not noisy, and a sentence that counts the others."""
    quiet = [result for result in results if not result.noisy]
    return quiet, left_out(len(results), len(quiet))


def digits(micros: float) -> str:
    """Return a number of microseconds with about three digits."""
    return f"{micros:,.0f}" if abs(micros) >= 100 else f"{micros:.2f}"


def told(error: Exception) -> str:
    """Return what went wrong in one line: of a compiler's errors the first lines say the most."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def left_undone(parts: Iterable[str]) -> dict[str, str]:
    """Return a line for the header that names what there was no time for, if there is something."""
    names = ", ".join(parts)
    return {"no time for": names} if names else {}


def ranks(size: int) -> str:
    """Return how many ranks were timed, for a title."""
    return "one rank" if size == 1 else f"{size} ranks, of whom the slowest counts"


def _provenance(facts: Mapping[str, str]) -> str:
    """Return a sentence on where the numbers are from."""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("syncnorm", "torch", "mpi4py") if name in facts)
    where = f"{facts['cuda']}; {facts['machine']}" if "cuda" in facts else facts["machine"]
    threads = f"{facts['threads per rank']} thread(s) per rank"
    ranks = f"{facts['communicator']} on {facts['hosts']}, {threads}"
    return f"{where} ({versions}, {facts['mpi']}; {ranks}; {facts['date'][:10]}).\n"


def _section(table: Table) -> str:
    return f"{table.title[0].upper()}{table.title[1:]}:\n\n{table.markdown()}"


def _l2_cache() -> str:
    """Return the size of the GPU's last cache and what the benchmarks do about it."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return f"{size / 1e6:.0f} MB, not flushed between calls: smaller tensors stay in it"
