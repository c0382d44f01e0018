"""What every test shares: which tests this machine can run, and profiles of the property tests."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from typing import Final

import hypothesis
import lab.process
import pytest
from lab import openiked, strongswan
from lab.forks import fork_servers
from lab.root import HOST, NEWER, newer_peers
from realkernel import guest
from realkernel.guest import MOST_REPEATED, REPEATED, Guest

CI = os.environ.get("CI") == "true"
GUEST: Final = pytest.StashKey[Guest]()
REAL: Final = ("pair", "interop", "root")  # tests whose clock somebody else has: a kernel, another daemon, a scheduler

# Examples are bounded by number, never by time: the machine may be busy. In CI they are the same in each run; elsewhere new ones are sought.
hypothesis.settings.register_profile("shared", deadline=None, max_examples=100, suppress_health_check=[hypothesis.HealthCheck.too_slow], derandomize=CI)
hypothesis.settings.load_profile("shared")


@pytest.fixture(scope="session", autouse=True)
def no_interpreter_starts() -> Iterator[None]:
    """No test pays for the start of an interpreter in a namespace."""
    with fork_servers() as servers:
        lab.process.fork_servers = servers
        yield
        lab.process.fork_servers = ()


@pytest.fixture(scope="session", autouse=True)
def real_kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest | None]:
    """It boots as soon as its tests are chosen, and runs them beside all others; None where the machine lacks what it needs."""
    chosen = any(item.get_closest_marker("realkernel") for item in request.session.items)
    if not chosen or guest.missing():
        yield None
        return
    running = request.config.stash[GUEST] = Guest(tmp_path_factory.mktemp("realkernel"))
    yield running
    running.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The kernel's tests come last: it takes as long as all others together."""
    items.sort(key=lambda item: item.get_closest_marker("realkernel") is not None)
    if CI:
        for item in items:
            if _is_real(item):
                item.add_marker(pytest.mark.flaky(reruns=1))


def _is_real(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in REAL)


def pytest_configure(config: pytest.Config) -> None:
    if CI:
        config.option.max_suite_reruns = MOST_REPEATED
        config.option.rerun_show_tracebacks = True
    config.addinivalue_line("markers", "newer: meets the strongSwan of a newer Debian")
    config.addinivalue_line("markers", "openiked: meets OpenIKED")
    config.addinivalue_line("markers", "root: needs root, /dev/net/tun, iproute2 and nftables, but no second gateway")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Those of the guest's tests, too, that passed at their second run only."""
    if GUEST in config.stash and (repeated := config.stash[GUEST].repeated()):
        terminalreporter.section(f"guest: {REPEATED}")
        terminalreporter.write_line(repeated)


def pytest_report_header() -> str:
    return f"peers of a newer Debian: {newer_peers()}"


@functools.cache
def _lab_lacks() -> str:
    lacks = [tool for tool in ("ip", "nft", "ethtool", "ping", "setpriv") if shutil.which(tool) is None]
    if os.geteuid() != 0:
        lacks.append("root")
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        lacks.append(f"/dev/net/tun ({error.strerror})")
    return ", ".join(lacks)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run; in CI that is a failure, for nothing may be missed there."""
    lacks = ""
    if _is_real(item):
        lacks = _lab_lacks()
    for marker, peer in (("interop", HOST), ("newer", NEWER)):
        if item.get_closest_marker(marker):
            lacks = ", ".join(filter(None, (lacks, strongswan.missing(peer))))
    if item.get_closest_marker("openiked"):
        lacks = ", ".join(filter(None, (lacks, openiked.missing())))
    if lacks:
        reason = f"missing: {lacks}"
        if CI:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
