"""Boots a Debian kernel once and runs the tests of `inside/` there; each of them is a test here."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import pytest

HERE: Final = Path(__file__).resolve().parent
REPOSITORY: Final = HERE.parents[1]
PROGRAMS: Final = ("qemu-system-x86_64", "busybox", "cpio", "modprobe", "flock")
BOOT_SECONDS: Final = 2400  # with all tests, on a busy machine
LACKS: Final = 126  # exit status of `boot` when something is missing on this machine
SHOWN: Final = 6000  # octets of the guest's console in a failure

pytestmark = [pytest.mark.realkernel, pytest.mark.timeout(BOOT_SECONDS + 60)]


def _inner_tests() -> list[str]:
    found = []
    for path in sorted((HERE / "inside").glob("test_*.py")):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        found += [f"{path.stem}::{function.name}" for function in functions if function.name.startswith("test_")]
    return found


@dataclass(frozen=True, slots=True)
class Case:
    """One inner test with one set of parameters."""

    name: str
    outcome: str  # passed, failed, error or skipped
    text: str
    properties: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Guest:
    status: int
    console: str
    cases: dict[str, list[Case]]  # by `module::function`


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Guest:
    """What came of all inner tests."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None] + (["root"] if os.geteuid() else [])
    if missing:
        reason = f"missing: {', '.join(missing)} (make peers installs them)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    # Here it takes seconds, there half a minute.
    subprocess.run([sys.executable, "-m", "compileall", "-q", "vpnd", "kernel_shim", "tests/lab", "tests/realkernel"], cwd=REPOSITORY, check=False)
    exchange = tmp_path_factory.mktemp("realkernel")
    arguments = [
        "tests/realkernel/inside",
        "-m",
        "realkernel",
        "-p",
        "no:cacheprovider",
        *("-p", "pytest_timeout", "-p", "pytest_asyncio.plugin"),
        "--confcutdir=tests/realkernel/inside",
        "--timeout=300",
        "--junitxml=/exchange/junit.xml",
        "-v",
        "--durations=20",
    ]
    # Under emulation what is imported in vain costs half a minute: plugins are named, and the outer conftest.py brings hypothesis.
    environment = ["REALKERNEL_GUEST=1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1", f"PYTHONPATH={REPOSITORY}:{HERE.parent}", f"CI={os.environ.get('CI', '')}"]
    console = exchange / "console.log"  # what to look at while it runs
    with console.open("wb") as output:
        done = subprocess.run(
            [str(HERE / "boot"), "env", *environment, sys.executable, "-m", "pytest", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "REALKERNEL_EXCHANGE": str(exchange), "REALKERNEL_TIMEOUT": str(BOOT_SECONDS)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    told = console.read_text(errors="replace")
    if done.returncode == LACKS and os.environ.get("CI") != "true":
        pytest.skip(told.strip()[-SHOWN:])  # no kernel package can be had, as without a network
    return Guest(done.returncode, told, _cases(exchange / "junit.xml"))


def _cases(report: Path) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    if not report.exists():
        return found
    for element in ElementTree.parse(report).iter("testcase"):
        name = element.get("name", "")
        key = f"{element.get('classname', '').rpartition('.')[2]}::{name.partition('[')[0]}"
        outcome, text = "passed", ""
        for kind, word in (("skipped", "skipped"), ("error", "error"), ("failure", "failed")):
            for child in element.findall(kind):
                outcome, text = word, f"{child.get('message', '')}\n{child.text or ''}"
        properties = [(entry.get("name", ""), entry.get("value", "")) for entry in element.iter("property")]
        found.setdefault(key, []).append(Case(name, outcome, text, properties))
    return found


@pytest.mark.parametrize("inner", _inner_tests())
def test_inside(guest: Guest, inner: str, record_property: Callable[[str, object], None]) -> None:
    cases = guest.cases.get(inner, [])
    if not cases:
        pytest.fail(f"did not run; the guest ended with status {guest.status}\n{guest.console[-SHOWN:]}", pytrace=False)
    for name, value in (entry for case in cases for entry in case.properties):
        record_property(name, value)
        print(f"{name}: {value}")
    bad = [case for case in cases if case.outcome in ("failed", "error")]
    if bad:
        pytest.fail("\n\n".join(f"{case.name} {case.outcome}: {case.text}" for case in bad), pytrace=False)
    if all(case.outcome == "skipped" for case in cases):
        pytest.skip(cases[0].text.strip())


def test_the_guest_ran_every_inner_test_and_no_other(guest: Guest) -> None:
    assert sorted(guest.cases) == sorted(_inner_tests())
