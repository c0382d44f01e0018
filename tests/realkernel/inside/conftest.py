"""These tests run inside the guest of `tests/realkernel/boot` only; `test_real_kernel.py` beside this folder brings them there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import lab.frr
import lab.gateway
import lab.libreswan
import lab.openiked
import lab.process
import lab.strongswan
import pytest
from lab.forks import fork_servers

EMULATION = 3  # how many times longer things may take in the guest

collect_ignore_glob = [] if os.environ.get("REALKERNEL_GUEST") else ["test_*.py"]

if os.environ.get("REALKERNEL_GUEST"):
    for module in (lab.frr, lab.gateway, lab.libreswan, lab.openiked, lab.strongswan):
        module.READY_SECONDS *= EMULATION
    lab.process.STOP_SECONDS *= EMULATION


@pytest.fixture(scope="session", autouse=True)
def no_interpreter_starts() -> Iterator[None]:
    """No test pays for the start of an interpreter in a namespace."""
    with fork_servers() as servers:
        lab.process.fork_servers = servers
        yield
        lab.process.fork_servers = ()
