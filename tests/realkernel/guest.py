"""A Debian kernel that boots once, beside the other tests, and runs those of `inside/`."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

HERE: Final = Path(__file__).resolve().parent
REPOSITORY: Final = HERE.parents[1]
PROGRAMS: Final = ("qemu-system-x86_64", "busybox", "cpio", "modprobe", "flock")
BOOT_SECONDS: Final = 2400  # with all tests, on a busy machine
NICENESS: Final = 10  # the tests outside wait for each other, those inside for nobody
MOST_REPEATED: Final = 2  # tests of real peers and kernels in one run of CI; what fails beyond that, or twice, fails the run
REPEATED: Final = "rerun test summary info"  # pytest-rerunfailures' heading
LACKS: Final = 126  # exit status of `boot` when something is missing on this machine


@dataclass(frozen=True, slots=True)
class Case:
    """One inner test with one set of parameters."""

    name: str
    outcome: str  # passed, failed, error or skipped
    text: str
    properties: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Outcome:
    status: int
    console: str
    cases: dict[str, list[Case]]  # by `module::function`


def inner_tests() -> list[str]:
    """`module::function` of each."""
    found = []
    for path in sorted((HERE / "inside").glob("test_*.py")):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        found += [f"{path.stem}::{function.name}" for function in functions if function.name.startswith("test_")]
    return found


def missing() -> str:
    """What this machine lacks for it."""
    return ", ".join([program for program in PROGRAMS if shutil.which(program) is None] + (["root"] if os.geteuid() else []))


class Guest:
    """Runs from `__init__` on. Its console, to look at meanwhile, and its report are in the folder `exchange`."""

    def __init__(self, exchange: Path) -> None:
        # Here it takes seconds, there half a minute.
        subprocess.run([sys.executable, "-m", "compileall", "-q", "vpnd", "kernel_shim", "tests/lab", "tests/realkernel"], cwd=REPOSITORY, check=False)
        self._console: Final = exchange / "console.log"
        self._report: Final = exchange / "junit.xml"
        arguments = [
            "tests/realkernel/inside",
            "-m",
            "realkernel",
            "-p",
            "no:cacheprovider",
            *("-p", "pytest_timeout", "-p", "pytest_asyncio.plugin"),
            "--confcutdir=tests/realkernel/inside",
            "--timeout=600",
            "--junitxml=/exchange/junit.xml",
            "-v",
            "--durations=20",
        ]
        if os.environ.get("CI") == "true":
            arguments += ["-p", "pytest_rerunfailures", "--reruns=1", f"--max-suite-reruns={MOST_REPEATED}", "--rerun-show-tracebacks"]
        # Under emulation what is imported in vain costs half a minute: plugins are named, and the outer conftest.py brings hypothesis.
        environment = ["REALKERNEL_GUEST=1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1", f"PYTHONPATH={REPOSITORY}:{HERE.parent}", f"CI={os.environ.get('CI', '')}"]
        with self._console.open("wb") as output:
            self._process: Final = subprocess.Popen(
                ["nice", "-n", str(NICENESS), str(HERE / "boot"), "env", *environment, sys.executable, "-m", "pytest", *arguments],
                cwd=REPOSITORY,
                env={**os.environ, "REALKERNEL_EXCHANGE": str(exchange), "REALKERNEL_TIMEOUT": str(BOOT_SECONDS)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def repeated(self) -> str:
        """The report of those tests that passed at their second run only."""
        _, heading, report = self._console.read_text(errors="replace").partition(REPEATED)
        return heading and report.partition("\n")[2].partition("\n====")[0]

    def outcome(self) -> Outcome:
        """What came of all inner tests; waits for them."""
        status = self._process.wait()
        return Outcome(status, self._console.read_text(errors="replace"), self._cases())

    def stop(self) -> None:
        """Whatever it does."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _cases(self) -> dict[str, list[Case]]:
        found: dict[str, list[Case]] = {}
        if not self._report.exists():
            return found
        for element in ElementTree.parse(self._report).iter("testcase"):
            name = element.get("name", "")
            key = f"{element.get('classname', '').rpartition('.')[2]}::{name.partition('[')[0]}"
            outcome, text = "passed", ""
            for kind, word in (("skipped", "skipped"), ("error", "error"), ("failure", "failed")):
                for child in element.findall(kind):
                    outcome, text = word, f"{child.get('message', '')}\n{child.text or ''}"
            properties = [(entry.get("name", ""), entry.get("value", "")) for entry in element.iter("property")]
            found.setdefault(key, []).append(Case(name, outcome, text, properties))
        return found
