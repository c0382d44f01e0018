"""Network namespaces, the links between them, and what runs in them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from lab import netns
from lab.netns import NETNS_DIRECTORY, in_namespace
from lab.process import PATIENCE, LabError, Process, run

T = TypeVar("T")

PREFIX: Final = "lab"
SIOCGIFFLAGS: Final = 0x8913
SIOCSIFFLAGS: Final = 0x8914
SIOCETHTOOL: Final = 0x8946
ETHTOOL_GLINK: Final = 0xA
IFF_UP: Final = 0x1
IFF_RUNNING: Final = 0x40
RTF_LOCAL: Final = 0x80000000

_NAME = re.compile(rf"^{PREFIX}(\d+)-\d+-")
_MAY_ADD_IPV6 = re.compile(r"^addr\w* (add|replace) \S*:|\bup\b")
_serial = itertools.count(1)


class Namespace:
    """One network namespace of a `Lab`."""

    def __init__(self, name: str, role: str, directory: Path) -> None:
        self.name = name
        self.role = role
        self.directory = directory

    def __repr__(self) -> str:
        return f"<Namespace {self.role}>"

    @property
    def path(self) -> Path:
        return NETNS_DIRECTORY / self.name

    def call(self, function: Callable[[], T]) -> T:
        return in_namespace(self.path, function)

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        return self.call(lambda: socket.socket(family, kind, protocol))

    def argv(self, argv: Sequence[str]) -> list[str]:
        """The vector that runs `argv` here; the pid stays that of the program, for each step is an exec."""
        return ["ip", "netns", "exec", self.name, *argv]

    def run(
        self, argv: Sequence[str], *, check: bool = True, timeout: float = 2 * PATIENCE, text_input: str | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return run(self.argv(argv), check=check, timeout=timeout, text_input=text_input, env=env)

    def start(self, argv: Sequence[str], log_name: str, *, env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()) -> Process:
        return Process(self.argv(argv), self.directory / f"{self.role}-{log_name}.log", env=env, pass_fds=pass_fds)

    def ip(self, *commands: str) -> None:
        """Run lines of `ip` commands, all or LabError. Links that are up pass packets, and IPv6 addresses there can be reached, when it returns."""
        run(["ip", "-n", self.name, "-batch", "-"], text_input="\n".join(commands) + "\n")
        if any(_MAY_ADD_IPV6.search(command) for command in commands):
            self.settle()

    def up(self, interface: str) -> None:
        """As `ip link set up`; it passes packets, and IPv6 addresses there can be reached, when it returns, if it has a carrier."""
        self.call(lambda: _up(interface))

    def settle(self) -> None:
        """Wait until every link that has a carrier passes packets, and its IPv6 addresses can be reached."""
        self.call(_settle)

    def sysctl(self, **settings: int | str) -> None:
        """Keys below net., with `__` for a dot: `ipv4__ip_forward=1`."""

        def write() -> None:
            for key, value in settings.items():
                Path("/proc/sys/net", *key.split("__")).write_text(str(value))

        self.call(write)

    def offloads(self, interface: str, **features: bool) -> None:
        """Switch features of `ethtool -K`, `_` for `-`: `offloads("wan", tso=False, tx_udp_segmentation=False)`."""
        words = [word for name, on in features.items() for word in (name.replace("_", "-"), "on" if on else "off")]
        self.run(["ethtool", "-K", interface, *words])

    def interfaces(self) -> set[str]:
        return set(self.call(lambda: [name for _, name in socket.if_nameindex()]))

    def hardware_address(self, interface: str) -> str:
        (link,) = json.loads(run(["ip", "-n", self.name, "-json", "link", "show", "dev", interface]).stdout)
        return str(link["address"])

    def pids(self) -> list[int]:
        """Every process whose main thread lives here."""
        return netns.pids(self.name)


def _up(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = struct.pack("16s24x", interface.encode())
        flags = int(struct.unpack_from("H", fcntl.ioctl(asking, SIOCGIFFLAGS, request), 16)[0])
        fcntl.ioctl(asking, SIOCSIFFLAGS, struct.pack("16sH22x", interface.encode(), flags | IFF_UP))
    _settle()


def _settle() -> None:
    """Linux does both from work queues, up to a second later, and drops what is sent before, untold.

    linkwatch_event acts upon a carrier; addrconf_dad_work puts in the local route of an IPv6 address, on a link whose carrier was acted upon.
    """
    limit = time.monotonic() + PATIENCE
    while unsettled := _without_carrier() | _without_local_route():
        if time.monotonic() > limit:
            raise LabError(f"no carrier or local route yet: {unsettled}")
        time.sleep(0.002)


def _without_carrier() -> set[str]:
    """Links that are up and have a carrier, which the kernel has not acted upon."""
    found = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            flags = _flags(asking, name)
            # Always, and afterwards: it waits for the lock under which the kernel acts.
            if _has_link(asking, name) and flags & (IFF_UP | IFF_RUNNING) == IFF_UP:
                found.add(name)
    return found


def _without_local_route() -> set[str]:
    """IPv6 addresses, in hexadecimal, of links that are up and have a carrier."""
    table = [line.split() for line in Path("/proc/thread-self/net/ipv6_route").read_text().splitlines()]
    local = {words[0] for words in table if int(words[8], 16) & RTF_LOCAL}
    addresses = [line.split() for line in Path("/proc/thread-self/net/if_inet6").read_text().splitlines()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        return {words[0] for words in addresses if words[0] not in local and not ~_flags(asking, words[5]) & (IFF_UP | IFF_RUNNING)}


def _flags(asking: socket.socket, interface: str) -> int:
    try:
        answer = fcntl.ioctl(asking, SIOCGIFFLAGS, struct.pack("16s24x", interface.encode()))
    except OSError:  # it went
        return 0
    return int(struct.unpack_from("H", answer, 16)[0])


def _has_link(asking: socket.socket, interface: str) -> bool:
    value = ctypes.create_string_buffer(struct.pack("=II", ETHTOOL_GLINK, 0))
    try:
        fcntl.ioctl(asking, SIOCETHTOOL, struct.pack("16sP16x", interface.encode(), ctypes.addressof(value)))
    except OSError:  # it went, or has no carrier to tell of
        return False
    return bool(struct.unpack("=II", value.raw[:8])[1])


def _delete_namespace(name: str) -> None:
    for pid in netns.pids(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    netns.remove(name)


def _is_left_behind(name: str) -> bool:
    """Made by a lab whose process is gone."""
    match = _NAME.match(name)
    return match is not None and not Path("/proc", match.group(1)).exists()


def remove_leftovers() -> list[str]:
    """Namespaces of runs that were killed, with the processes in them. Returns their names."""
    if not NETNS_DIRECTORY.is_dir():
        return []
    stale = [entry.name for entry in NETNS_DIRECTORY.iterdir() if _is_left_behind(entry.name)]
    for name in stale:
        _delete_namespace(name)
    for entry in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if _is_left_behind(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
    return stale


class Lab:
    """Owns namespaces, links, processes and a scratch directory; `with Lab() as lab:` takes all of it away again."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._number = next(_serial)

    def __enter__(self) -> Self:
        remove_leftovers()
        # Short, for paths of UNIX sockets end at 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-{self._number}-"))
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def enter(self, manager: contextlib.AbstractContextManager[T]) -> T:
        return self._stack.enter_context(manager)

    def namespace(self, role: str) -> Namespace:
        """A namespace with its loopback up, no IPv6 duplicate address detection, and no traffic of its own on new links."""
        name = f"{PREFIX}{os.getpid()}-{self._number}-{role}"
        netns.make(name)
        self._stack.callback(_delete_namespace, name)
        namespace = Namespace(name, role, self.directory)
        namespace.sysctl(
            ipv6__conf__default__accept_dad=0,
            ipv6__conf__default__accept_ra=0,
            ipv6__conf__default__router_solicitations=0,
            ipv4__conf__all__rp_filter=0,
            ipv4__conf__default__rp_filter=0,
        )
        namespace.up("lo")
        return namespace

    def veth(self, a: Namespace, a_name: str, b: Namespace, b_name: str, *, mtu: int = 1500) -> None:
        """A wire between two namespaces, both ends up."""
        run(["ip", "-n", a.name, *f"link add {a_name} mtu {mtu} type veth peer name {b_name} mtu {mtu} netns {b.name}".split()])
        a.up(a_name)
        b.up(b_name)
        a.settle()  # only now it has a carrier


@contextlib.contextmanager
def stopping(process: Process) -> Iterator[Process]:
    """Kill `process` at the end, whatever happened."""
    try:
        yield process
    finally:
        if process.running:
            process.kill()
