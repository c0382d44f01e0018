"""Traffic between hosts, with an account of what arrived: ping, TCP, numbered UDP datagrams.

Every server says that it listens before anything is sent to it, and every receiver is asked to wait for what was sent.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Final

from lab.namespaces import Namespace
from lab.process import LabError, Process

IPAddress = IPv4Address | IPv6Address

AGENT: Final = Path(__file__).with_name("agent.py")
START_SECONDS: Final = 15.0
TCP_TOTAL_RETRANS: Final = struct.Struct("=I")  # struct tcp_info of linux/tcp.h: eight bytes, then words; this is the 24th
TCP_TOTAL_RETRANS_OFFSET: Final = 8 + 23 * 4


@dataclass(frozen=True, slots=True)
class PingResult:
    sent: int
    received: int
    times: tuple[float, ...]  # seconds

    @property
    def lost(self) -> int:
        return self.sent - self.received


@dataclass(frozen=True, slots=True)
class BulkResult:
    """`seconds` from connect() to the server's answer; `intact`: the server counted and digested what was sent."""

    bytes: int
    seconds: float
    connect: float
    intact: bool

    @property
    def gigabits(self) -> float:
        return self.bytes * 8 / self.seconds / 1e9


@dataclass(frozen=True, slots=True)
class Received:
    """A sink's account; the `_first` lists hold (flow, number) of the first few. `slowest` is the longest one-way time in seconds."""

    received: int
    duplicates: int
    reordered: int
    reordered_first: Sequence[tuple[int, int]]
    missing_first: Sequence[tuple[int, int]]
    flows: dict[str, int]
    slowest: float


@dataclass(frozen=True, slots=True)
class Sent:
    sent: int
    refused: int
    seconds: float


class Agent:
    """A process of `lab.agent` in a namespace."""

    def __init__(self, namespace: Namespace, role: str, **settings: Any) -> None:
        self._role = role
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings["control"] = theirs.fileno()
        with theirs:
            self.process: Process = namespace.start(
                [sys.executable, "-S", "-E", str(AGENT), role, json.dumps(settings)], f"{role}-{id(self):x}", pass_fds=[theirs.fileno()]
            )

    def read(self, timeout: float) -> dict[str, Any]:
        self._control.settimeout(timeout)
        try:
            line = self._control.recv(65536)
        except TimeoutError:
            raise LabError(f"{self._role} said nothing for {timeout:g} s\n{self.process.log()}") from None
        if not line:
            raise LabError(f"{self._role} ended early\n{self.process.log()}")
        message: dict[str, Any] = json.loads(line)
        return message

    def ask(self, wait: float, **question: Any) -> dict[str, Any]:
        self._control.send(json.dumps(question).encode())
        return self.read(wait)

    def close(self) -> None:
        self._control.close()
        if self.process.running:
            self.process.kill()


_PING_SUMMARY = re.compile(r"(\d+) packets transmitted, (\d+) received")
_PING_TIME = re.compile(r"time=([\d.]+) ms")


def ping(
    host: Namespace,
    target: IPAddress,
    *,
    count: int = 3,
    interval: float = 0.02,
    timeout: float = 3.0,
    size: int = 56,
    dont_fragment: bool = False,
    source: IPAddress | None = None,
) -> PingResult:
    """`timeout`: seconds to wait for the last answer."""
    argv = ["ping", "-n", "-c", str(count), "-i", str(interval), "-W", str(timeout), "-s", str(size)]
    if dont_fragment:
        argv += ["-M", "do"]
    if source is not None:
        argv += ["-I", str(source)]
    done = host.run([*argv, str(target)], check=False, timeout=count * interval + timeout + 20)
    summary = _PING_SUMMARY.search(done.stdout)
    if (summary is None and "unreachable" in done.stderr + done.stdout) or "No route to host" in done.stderr:
        return PingResult(count, 0, ())  # refused before the first was sent
    if summary is None:
        raise LabError(f"ping {target}: {done.stdout}{done.stderr}")
    return PingResult(int(summary[1]), int(summary[2]), tuple(float(ms) / 1000 for ms in _PING_TIME.findall(done.stdout)))


@contextmanager
def tcp_server(host: Namespace, address: IPAddress, port: int = 0) -> Iterator[int]:
    """A server that digests what it gets; the value is its port."""
    agent = Agent(host, "tcp-server", address=str(address), port=port)
    try:
        yield agent.read(START_SECONDS)["ready"]
    finally:
        agent.close()


class TcpStream:
    """A transfer under way."""

    def __init__(self, host: Namespace, target: IPAddress, port: int, *, size: int, seconds: float, timeout: float) -> None:
        self._timeout = timeout
        self._agent = Agent(host, "tcp-client", address=str(target), port=port, size=size, seconds=seconds, timeout=timeout)

    def wait_connected(self) -> float:
        """Seconds that connect() took. LabError when it failed."""
        return float(self._agent.read(self._timeout + START_SECONDS)["ready"])

    def wait(self) -> BulkResult:
        try:
            return BulkResult(**self._agent.read(self._timeout))
        finally:
            self._agent.close()

    def abandon(self) -> None:
        self._agent.close()


def tcp_bulk(host: Namespace, target: IPAddress, port: int, *, size: int = 8 << 20, seconds: float = 0.0, timeout: float = 60.0) -> BulkResult:
    """Send `size` bytes, or as many as go in `seconds`, and have them checked."""
    stream = TcpStream(host, target, port, size=size if not seconds else 1 << 50, seconds=seconds, timeout=timeout)
    stream.wait_connected()
    return stream.wait()


@dataclass(frozen=True, slots=True)
class Connected:
    """How long connect() took, and how many segments TCP had to send again: 0 when the first SYN came through."""

    seconds: float
    retransmissions: int


def tcp_connect(host: Namespace, target: IPAddress, port: int, *, timeout: float = 20.0) -> Connected:
    """Connect to a `tcp_server` and part again. OSError as connect() gives it, TimeoutError among them."""
    family = socket.AF_INET if target.version == 4 else socket.AF_INET6
    with host.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        begin = time.monotonic()
        sock.connect((str(target), port))
        seconds = time.monotonic() - begin
        information = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        # Both ends close before we return, else the last segments would meet whatever the test does next.
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass
        return Connected(seconds, *TCP_TOTAL_RETRANS.unpack_from(information, TCP_TOTAL_RETRANS_OFFSET))


class UdpSink:
    """Receives and accounts numbered datagrams."""

    def __init__(self, host: Namespace, address: IPAddress, port: int = 0, *, acknowledge: int = 0) -> None:
        self.address = address
        self._agent = Agent(host, "udp-sink", address=str(address), port=port, acknowledge=acknowledge)
        self.port: int = self._agent.read(START_SECONDS)["ready"]

    def expect(self, count: int, timeout: float = 10.0) -> Received:
        """The account once `count` distinct datagrams are here, or after `timeout` seconds."""
        return Received(**self._agent.ask(timeout + START_SECONDS, expect=count, timeout=timeout))

    def close(self) -> None:
        self._agent.close()


@contextmanager
def udp_sink(host: Namespace, address: IPAddress, port: int = 0, *, acknowledge: int = 0) -> Iterator[UdpSink]:
    """`acknowledge`: answer every so many datagrams, for a stream with a window."""
    sink = UdpSink(host, address, port, acknowledge=acknowledge)
    try:
        yield sink
    finally:
        sink.close()


class UdpStream:
    """A stream under way: `count` numbered datagrams to each target, `rate` a second in all, never more than `window` (0: any number) unacknowledged."""

    def __init__(
        self,
        host: Namespace,
        targets: Sequence[tuple[IPAddress, int]],
        *,
        count: int,
        rate: float,
        size: int = 64,
        source: IPAddress | None = None,
        window: int = 0,
    ) -> None:
        self._timeout = count * len(targets) / rate + START_SECONDS
        self._agent = Agent(
            host,
            "udp-source",
            address=str(source or ""),
            targets=[(str(target), port) for target, port in targets],
            count=count,
            rate=rate,
            size=size,
            window=window,
        )
        self._agent.read(START_SECONDS)

    def wait(self) -> Sent:
        try:
            return Sent(**self._agent.read(self._timeout))
        finally:
            self._agent.close()

    def abandon(self) -> None:
        self._agent.close()
