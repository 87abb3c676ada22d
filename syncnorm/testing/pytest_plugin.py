"""A pytest plugin: the marker `ranks`, by which a test runs on real ranks. An entry point makes pytest load it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest

__all__: list[str] = []

MARKER = (
    'ranks(*sizes, backend="gloo", timeout=60): run the test on so many ranks, once for each size, each in a process. '
    "`syncnorm.communicator()` is their group. The fixture `world_size` is the number of ranks."
)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", MARKER)


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    """Return `syncnorm.testing.run_ranks`."""
    from .ranks import run_ranks

    return run_ranks


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Repeat a test with the marker for each number of ranks."""
    if sizes := _sizes(metafunc.definition):
        if "world_size" not in metafunc.fixturenames:
            metafunc.fixturenames.append("world_size")
        metafunc.parametrize("world_size", sizes, ids=[f"{size}ranks" for size in sizes])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Call the function of a test with the marker on its ranks, with the values of its fixtures."""
    __tracebackhide__ = True
    if not _sizes(pyfuncitem):
        return None
    if pyfuncitem.config.getoption("--with-mpi", default=False):
        pytest.skip("a test with the marker ranks starts its ranks itself: leave out --with-mpi")
    from .ranks import run_ranks

    marker = pyfuncitem.get_closest_marker("ranks")
    assert marker is not None
    values = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    for name, value in values.items():
        try:
            pickle.dumps(value)
        except Exception as error:
            raise TypeError(f"expected fixtures that can be pickled in a test on ranks, got {name}: {error}") from error
    world_size = cast(int, pyfuncitem.callspec.params["world_size"])
    run_ranks(_call, world_size, pyfuncitem.obj, values, **marker.kwargs)
    return True


def _sizes(node: pytest.Item) -> tuple[int, ...]:
    marker = node.get_closest_marker("ranks")
    return () if marker is None else marker.args


def _call(function: Callable[..., None], values: dict[str, Any]) -> None:
    function(**values)
