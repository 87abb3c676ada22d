"""A collective that was started: what torch.distributed calls a Work, and its future."""

# torch calls the methods, which have its names and are documented there.
# ruff: noqa: D102
# mypy: disable-error-code="override, assignment, no-untyped-call, no-any-return"

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from threading import Lock
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from ..errors import DesyncError
from ..job.desync import raise_desync
from . import unfinished
from .health import Health
from .library import MPI, raise_of_mpi, ranks_in_the_job
from .progress import overdue, wait_until

__all__ = ["NO_TIME", "MpiFuture", "MpiWork", "Started"]

ISSUES_COLLECTIVES = True  # what `syncnorm.job.desync` knows these functions by

NO_TIME = timedelta(0)
MOMENT = 0.01  # seconds in which most works are complete; a thread would take the time from the backward pass

Started = tuple[MPI.Request, Callable[[], Any]]  # a request, and what to do when it is complete


class MpiWork(dist.Work):
    """A collective under way: non-blocking MPI requests, and what to do with the memory they fill.

    It is held until MPI is done with it, also when nobody waits for it and its group is destroyed.

    Args:
        name: of the collective and where it runs, for errors.
        started: requests, and what to do with the memory of each when all are complete.
        result: the tensors that `result` and `get_future` give.
        timeout: after which `wait` raises.
        comm: whose ranks take part.
        health: of its group.
        record: the profiler's, which ends with the collective.
    """

    def __init__(
        self,
        name: str,
        started: Sequence[Started],
        result: list[Tensor],
        timeout: timedelta,
        comm: MPI.Comm,
        health: Health,
        record: Any = None,
    ):
        super().__init__()
        self.name = name
        self.comm = comm
        self.health = health
        self.started = started
        self.tensors = result
        self.timeout = timeout
        self.over = False  # MPI is done with it
        self.error: BaseException | None = None
        self.status = MPI.Status()
        self.record = record
        self.advancing = Lock()  # since a thread makes progress for futures
        unfinished.hold(self._advance, self)

    def _advance(self) -> bool:
        """Return whether MPI is done with the requests; makes progress, does not block."""
        if not self.over and self.advancing.acquire(blocking=False):
            try:
                if not self.over:
                    self._test()
            finally:
                self.advancing.release()
        return self.over

    def _test(self) -> None:
        started = self.started
        try:
            if len(started) == 1:
                over = started[0][0].Test(self.status)
            else:
                over = MPI.Request.Testall([request for request, _ in started])
            if not over:
                return
            if self.error is None:
                for _, finish in started:
                    finish()
        except Exception as error:
            self._fail(error, f"{self.name}: {error}")
            if len(started) > 1:
                unfinished.hold(lambda: False, started)  # the error was one request's
        self.over = True
        self.started = ()
        unfinished.release(self)
        if self.record is not None:
            self.record.__exit__(None, None, None)

    def _fail(self, error: BaseException, what: str) -> None:
        """End in an error. What follows on this communicator may meet other calls of the peers."""
        self.error = error
        if isinstance(error, MPI.Exception | TimeoutError):
            self.health.fail(what)

    def is_completed(self) -> bool:
        """Return whether the result is there, or will never be; makes progress, does not block."""
        return self._advance() or self.error is not None

    def is_success(self) -> bool:
        """Return whether the collective has ended without an error."""
        return self.is_completed() and self.error is None

    def exception(self) -> BaseException | None:
        """Return the error that `wait` raises, if there is one yet."""
        return self.error

    def wait(self, timeout: timedelta = NO_TIME) -> bool:
        """Return True when the result is there; raise what MPI reported, or DesyncError."""
        if not self.is_completed():
            self.health.check()
            try:
                wait_until(self.is_completed, timeout or self.timeout, self.name)
            except TimeoutError as error:
                self._fail(error, str(error))
        try:
            if isinstance(self.error, TimeoutError):
                raise_desync(self.error, str(self.error), ranks_in_the_job(self.comm))
            if isinstance(self.error, MPI.Exception):
                raise_of_mpi(self.error, self.name, self.comm)
        except DesyncError as desync:  # the roll is called once
            self.error = desync
        if self.error is not None:
            raise self.error
        return True

    def result(self) -> list[Tensor]:
        """Return the tensors that the collective wrote to, when it has."""
        self.wait()
        return self.tensors

    def get_future(self) -> Future[list[Tensor]]:
        """Return a future of the result."""
        return MpiFuture(self)

    def _source_rank(self) -> int:
        source: int = self.status.Get_source()
        return source


class MpiFuture(Future[list[Tensor]]):
    """The future of a work.

    Callbacks run in the thread that adds them, which waits for the work: what they communicate, as PowerSGD's do, is
    then in one order on all ranks. C++, such as DistributedDataParallel's, waits without Python. Works that are not
    complete after a moment are watched by a thread, where MPI allows that.
    """

    def __init__(self, work: MpiWork):
        super().__init__()
        self.work = work
        self.settling = Lock()
        until = time.monotonic() + MOMENT
        while not self._settled() and time.monotonic() < until:
            os.sched_yield()
        if not self._settled():
            if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
                self._settle()
            else:
                self.deadline = time.monotonic() + work.timeout.total_seconds()
                unfinished.watch(self._settled_in_time)

    def _settled_in_time(self) -> bool:
        if not self._settled() and time.monotonic() > self.deadline:
            self.work._fail(error := TimeoutError(overdue(self.work.name, self.work.timeout)), str(error))
        return self._settled()

    def _settled(self) -> bool:
        """Return whether the result or the error is there; does not wait for it."""
        if self.work.is_completed():
            self._settle()
        return super().done()

    def _settle(self) -> None:
        with self.settling:
            if super().done():
                return
            try:
                self.work.wait()
            except Exception as error:
                self.set_exception(error)  # type: ignore[arg-type]
            else:
                self.set_result(self.work.tensors)

    def done(self) -> bool:
        return self._settled()

    def wait(self) -> list[Tensor]:
        self._settle()
        return super().wait()

    def value(self) -> list[Tensor]:
        self._settled()
        return super().value()

    def then(self, callback: Callable[[Future[list[Tensor]]], Any]) -> Future[Any]:
        self._settle()
        return super().then(callback)

    def add_done_callback(self, callback: Callable[[Future[list[Tensor]]], None]) -> None:
        self._settle()
        super().add_done_callback(callback)
