"""These tests run inside the guest of `tests/realkernel/boot` only; `test_real_kernel.py` beside this folder brings them there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import lab.process
import pytest
from lab.forks import fork_servers

collect_ignore_glob = [] if os.environ.get("REALKERNEL_GUEST") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def no_interpreter_starts() -> Iterator[None]:
    """No test pays for the start of an interpreter in a namespace."""
    with fork_servers() as servers:
        lab.process.fork_servers = servers
        yield
        lab.process.fork_servers = ()
