"""Start the ranks of `run_ranks` as forks of a server process that has already imported torch.

The server is our own. `multiprocessing.get_context("forkserver")` shares one server in the whole program, so
`set_forkserver_preload` there would change the processes of the caller.
"""

from __future__ import annotations

from multiprocessing import forkserver, popen_forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FunctionType, SimpleNamespace

from . import PRELOADED, worker

__all__ = ["Forked"]

_server = forkserver.ForkServer()
_server.set_forkserver_preload(PRELOADED)
_ours = SimpleNamespace(**vars(forkserver) | {"connect_to_new_process": _server.connect_to_new_process})


class _Popen(popen_forkserver.Popen):
    """multiprocessing's, with our server instead of the shared one."""

    _launch = FunctionType(
        popen_forkserver.Popen._launch.__code__,  # type: ignore[attr-defined]
        vars(popen_forkserver) | {"forkserver": _ours},
    )


class _Process(ForkServerProcess):
    _Popen = _Popen


class Forked:
    """One rank, forked from the server."""

    def __init__(self, directory: Path, rank: int):
        self.name = f"rank {rank}"
        self.process = _Process(target=worker.main, args=(directory, rank), daemon=True)
        self.process.start()

    @property
    def exitcode(self) -> int | None:
        """The exit status of the rank, or None while it runs."""
        return self.process.exitcode

    def is_alive(self) -> bool:
        """Return whether the rank is still running."""
        return self.process.is_alive()

    def stop(self) -> None:
        """Kill the rank if it is still running."""
        if self.is_alive():
            self.process.kill()
        self.process.join()
