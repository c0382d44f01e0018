"""Processes of the lab: started by argument vector, logged to a file, stopped by pid."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

from lab.forks import ForkedChild, ForkServer

T = TypeVar("T")

LONGEST_PAUSE: Final = 0.1  # seconds after a probe that took long: the rest of the time is for what is awaited

EMULATION: Final = 3 if os.environ.get("REALKERNEL_GUEST") else 1  # how many times longer things may take here
PATIENCE: Final = 30.0 * EMULATION  # seconds for what should take one: beyond it nothing comes any more, however busy the machine
STOP_SECONDS: Final = PATIENCE  # an orderly stop deletes its SAs first; what takes longer hangs


class LabError(RuntimeError):
    """The laboratory itself failed: a tool is missing, a command was refused, a daemon did not come up."""


def wait_until(probe: Callable[[], T | None], what: str, timeout: float = PATIENCE, interval: float = 0.01) -> T:
    """The first true value of `probe`. For states that no event tells of; LabError naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        begin = time.monotonic()
        value = probe()
        if value:
            return value
        now = time.monotonic()
        if now > deadline:
            raise LabError(f"waited {timeout:g} s in vain: {what}")
        time.sleep(max(interval, min(now - begin, LONGEST_PAUSE)))


def open_files() -> set[str]:
    """What the descriptors of this process stand for. Garbage of other tests, whenever it is collected, closes some: look for what came, and do not count."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return found


# What one of them serves, the first first, is not started anew but forked.
fork_servers: Sequence[ForkServer] = ()


def _server_of(argv: Sequence[str]) -> ForkServer | None:
    return next((server for server in fork_servers if server.serves(argv)), None)


def run(
    argv: Sequence[str], *, check: bool = True, timeout: float = 2 * PATIENCE, text_input: str | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run to the end. LabError with both outputs when the exit status is not 0 and `check` is set."""
    server = _server_of(argv) if text_input is None else None
    if server is not None:
        done = _run_forked(server, argv, timeout, env)
    else:
        done = subprocess.run(
            list(argv),
            input=text_input,
            stdin=subprocess.DEVNULL if text_input is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=env,
        )
    if check and done.returncode:
        raise LabError(f"{' '.join(argv)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def _run_forked(server: ForkServer, argv: Sequence[str], timeout: float, env: Mapping[str, str] | None) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = server.start(argv, output.fileno(), errors.fileno(), env, ())
        try:
            status = child.wait(timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            raise
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(list(argv), status, output.read(), errors.read())


class Process:
    """A running program; its outputs go to `log_path`."""

    def __init__(self, argv: Sequence[str], log_path: Path, *, env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()) -> None:
        self.argv = list(argv)
        self.log_path = log_path
        self._child: subprocess.Popen[bytes] | ForkedChild
        with log_path.open("ab") as log:
            server = _server_of(argv)
            if server is not None:
                self._child = server.start(argv, log.fileno(), log.fileno(), env, pass_fds)
                return
            # The death signal takes the program along when the test run itself is killed.
            self._child = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(env) if env is not None else None,
                pass_fds=tuple(pass_fds),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._child.poll()

    @property
    def running(self) -> bool:
        return self.status is None

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; LabError when it does not end in time, by default `STOP_SECONDS`."""
        timeout = timeout or STOP_SECONDS
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise LabError(f"{' '.join(self.argv)} did not end in {timeout:g} s\n{self.log()[-4000:]}") from None

    def kill(self) -> None:
        """SIGKILL: what a crash looks like."""
        self._child.kill()
        self._child.wait()

    def stop(self, timeout: float | None = None) -> int:
        """SIGTERM and the exit status; SIGKILL and LabError when it does not end in time, by default `STOP_SECONDS`."""
        timeout = timeout or STOP_SECONDS
        if self.running:
            self._child.terminate()
        try:
            return self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise LabError(f"{' '.join(self.argv)} ignored SIGTERM for {timeout:g} s\n{self.log()[-4000:]}") from None
