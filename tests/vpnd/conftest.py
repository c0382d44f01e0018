"""The clock of asynchronous tests: the world's, or that of the simulation where a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
from simulation.clock import VirtualLoop


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "virtual_time: on a clock that a busy machine does not move; without threads and other processes")


@pytest.hookimpl(optionalhook=True)  # of newer versions of pytest-asyncio; with an older one such tests pass too, in the world's time
def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.get_closest_marker("virtual_time"):
        return {"virtual": VirtualLoop}
    return {"world": asyncio.new_event_loop}
