"""These tests run inside the guest of `tests/realkernel/boot` only; `test_real_kernel.py` beside this folder brings them there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

import lab.gateway
import lab.strongswan
import pytest
from lab.forks import ForkServer
from lab.process import Process

EMULATION = 6  # how many times longer things may take in the guest
PROGRAMS: Final = ("vpnd.app", "vpnd.cli.daemon", "vpnd.cli.control", "kernel_shim.io.shim", "kernel_shim.io.main", "asyncio_dgram")

collect_ignore_glob = [] if os.environ.get("REALKERNEL_GUEST") else ["test_*.py"]

if os.environ.get("REALKERNEL_GUEST"):
    for module in (lab.gateway, lab.strongswan):
        module.READY_SECONDS *= EMULATION


@pytest.fixture(scope="session", autouse=True)
def fork_servers() -> Iterator[None]:
    """No test pays for the start of an interpreter; the lab's small agents fork from a small process."""
    servers = ForkServer(("json", "socket", "hashlib", "select", "struct"), script="agent.py"), ForkServer(PROGRAMS)
    Process.fork_servers = servers
    yield
    Process.fork_servers = ()
    for server in servers:
        server.close()
