"""Python programs without the start of an interpreter: a server that has everything imported forks one for each.

An interpreter with our packages takes a second to start, in the emulated kernel many. The children become those of who started the server,
which is a subreaper: it waits for them as for any child.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, Final

PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWNET: Final = 0x40000000
MS_REC: Final = 0x4000
MS_SLAVE: Final = 1 << 19
MNT_DETACH: Final = 2
MAX_REQUEST: Final = 1 << 16  # octets: arguments and environment
MAX_DESCRIPTORS: Final = 16
NETNS: Final = ("ip", "netns", "exec")
POLL_SECONDS: Final = 0.01

_libc = ctypes.CDLL(None, use_errno=True)


class ForkedChild:
    """As much of `subprocess.Popen` as the lab needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and timeout is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(POLL_SECONDS)
        return status

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class ForkServer:
    """`modules` are imported once, before the first program starts. `script`: it forks only programs of this file name; else all.

    The server runs from the first program on.
    """

    def __init__(self, modules: Sequence[str], script: str = "") -> None:
        self._modules = modules
        self._script = script
        self._lock = threading.Lock()
        self._running: tuple[socket.socket, subprocess.Popen[bytes]] | None = None

    def _server(self) -> socket.socket:
        if self._running is None:
            _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                argv = [sys.executable, str(Path(__file__)), str(theirs.fileno())]  # it ends when our end of the socket does
                self._running = ours, subprocess.Popen(argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            # Not on its command line, which is that of all its children: who looks for a program there would find each of them.
            ours.send(json.dumps(self._modules).encode())
        return self._running[0]

    def serves(self, argv: Sequence[str]) -> bool:
        """Whether this is a Python program in a network namespace, run by this interpreter."""
        if tuple(argv[:3]) != NETNS or len(argv) <= 5 or argv[4] != sys.executable:
            return False
        return not self._script or any(Path(word).name == self._script for word in argv[5:8])

    def start(self, argv: Sequence[str], output: int, errors: int, env: Mapping[str, str] | None, pass_fds: Sequence[int]) -> ForkedChild:
        """`argv` as `serves` takes it; `output` and `errors` are descriptors. OSError when the server is gone."""
        request = {"namespace": argv[3], "argv": list(argv[5:]), "env": dict(os.environ if env is None else env), "fds": list(pass_fds)}
        with self._lock:
            server = self._server()
            socket.send_fds(server, [json.dumps(request).encode()], [output, errors, *pass_fds])
            answer = server.recv(64)
        if not answer:
            raise ConnectionResetError("the fork server is gone")
        return ForkedChild(int(answer))

    def close(self) -> None:
        if self._running is not None:
            control, server = self._running
            control.close()
            server.wait()
            self._running = None


# Of our programs, and of the lab's small ones from a small process.
OUR_PROGRAMS: Final = ("vpnd.app", "vpnd.cli.daemon", "vpnd.cli.control", "kernel_shim.io.shim", "kernel_shim.io.main", "asyncio_dgram")
AGENT_MODULES: Final = ("json", "socket", "hashlib", "select", "struct")


@contextlib.contextmanager
def fork_servers() -> Iterator[tuple[ForkServer, ...]]:
    """Servers for all that a test bed starts."""
    servers = ForkServer(AGENT_MODULES, script="agent.py"), ForkServer(OUR_PROGRAMS)
    try:
        yield servers
    finally:
        for server in servers:
            server.close()


# The server


def _serve(control: socket.socket) -> None:
    compiled: dict[str, CodeType] = {}
    while True:
        data, ancillary, _, _ = control.recvmsg(MAX_REQUEST, socket.CMSG_SPACE(4 * MAX_DESCRIPTORS))
        if not data:
            return
        descriptors = array.array("i")
        for _level, _kind, value in ancillary:
            descriptors.frombytes(value)
        request = json.loads(data)
        _prepare(request["argv"], compiled)
        # Twice, so that the program's parent is the subreaper above us; it is told of it when that is so.
        told, tell = os.pipe()
        middle = os.fork()
        if middle == 0:
            parent = os.getpid()
            program = os.fork()
            if program == 0:
                while os.getppid() == parent:
                    time.sleep(0.001)
                _become(request, list(descriptors), compiled)
            os.write(tell, str(program).encode())
            os._exit(0)
        os.close(tell)
        os.waitpid(middle, 0)
        control.send(os.read(told, 64))
        os.close(told)
        for descriptor in descriptors:
            os.close(descriptor)


def _prepare(argv: list[str], compiled: dict[str, CodeType]) -> None:
    """Drop the options of an interpreter's own start; a script is compiled once, for all the children that run it."""
    while argv[0] in ("-S", "-E"):
        del argv[0]
    script = argv[0]
    if script not in ("-c", "-m") and script not in compiled:
        with contextlib.suppress(OSError, SyntaxError, ValueError):  # the child says it
            compiled[script] = compile(Path(script).read_bytes(), script, "exec")


def _become(request: dict[str, Any], descriptors: list[int], compiled: Mapping[str, CodeType]) -> None:
    status = 1
    try:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.setsid()
        _arrange(descriptors, request["fds"])
        _enter(request["namespace"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        _run(request["argv"], compiled)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(error.code + "\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _arrange(descriptors: list[int], numbers: list[int]) -> None:
    """The first two become the outputs, and each other one gets the number that it has at the asker; what is not passed is closed."""
    spare = max([*descriptors, *numbers, 2]) + 1
    moved = [os.dup2(descriptor, spare + place) for place, descriptor in enumerate(descriptors)]
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    kept = sorted({0, 1, 2, *numbers})
    for source, number in zip(moved, [1, 2, *numbers], strict=True):
        os.dup2(source, number)
    for low, high in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(low + 1, high)


def _enter(namespace: str) -> None:
    """As `ip netns exec`: its network, and a /sys that shows it."""
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    for result in (_libc.setns(descriptor, CLONE_NEWNET), _libc.unshare(CLONE_NEWNS), _libc.mount(b"", b"/", None, MS_SLAVE | MS_REC, None)):
        if result:
            raise OSError(ctypes.get_errno(), f"network namespace {namespace}")
    os.close(descriptor)
    _libc.umount2(b"/sys", MNT_DETACH)
    _libc.mount(namespace.encode(), b"/sys", b"sysfs", 0, None)


def _run(argv: list[str], compiled: Mapping[str, CodeType]) -> None:
    """What the interpreter does with these arguments."""
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    elif argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] in compiled:
        sys.argv = argv
        exec(compiled[argv[0]], {"__name__": "__main__", "__file__": argv[0]})
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    # what is imported is the parent's: the folder of this file is no place to look
    sys.path[0] = os.getcwd()
    with socket.socket(fileno=int(sys.argv[1])) as asked:
        for name in json.loads(asked.recv(MAX_REQUEST)):
            importlib.import_module(name)
        gc.freeze()  # else the first collection of each child copies all pages
        _serve(asked)
