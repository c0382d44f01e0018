"""Traffic between hosts, with an account of what arrived: ping, TCP, numbered UDP datagrams.

Every server says that it listens before anything is sent to it, and every receiver is asked to wait for what was sent.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Final

from lab.namespaces import Namespace
from lab.process import PATIENCE, LabError, Process, wait_until

IPAddress = IPv4Address | IPv6Address

AGENT: Final = Path(__file__).with_name("agent.py")
TCP_TOTAL_RETRANS: Final = struct.Struct("=I")  # struct tcp_info of linux/tcp.h: eight bytes, then words; this is the 24th
TCP_TOTAL_RETRANS_OFFSET: Final = 8 + 23 * 4

ECHO: Final = struct.Struct("!BBHHH")  # type, code, checksum, identifier, number
ICMP_UNREACHABLE: Final = 3
ICMP_ERRORS: Final = (ICMP_UNREACHABLE, 11, 12)
ICMPV6_ERRORS: Final = (1, 2, 3, 4)
IP_MTU_DISCOVER: Final = 10  # linux/in.h
IPV6_MTU_DISCOVER: Final = 23  # linux/in6.h
PMTUDISC_DO: Final = 2

_NUMBERS: Final = itertools.count()


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

    def tell(self) -> None:
        """A message that gets no answer of its own."""
        self._control.send(b"{}")

    def close(self) -> None:
        self._control.close()
        if self.process.running:
            self.process.kill()


def ping(
    host: Namespace,
    target: IPAddress,
    *,
    count: int = 3,
    interval: float = 0.02,
    timeout: float = PATIENCE / 3,
    size: int = 56,
    dont_fragment: bool = False,
    source: IPAddress | None = None,
) -> PingResult:
    """Echo requests of `size` bytes of data, each until its answer or an ICMP error about it; `timeout`: seconds from the last one sent.

    The ping of iputils would not do: once something was answered it waits for the rest only for the longest of `interval` and
    two of the round-trip times seen, so on a busy machine it counts as lost what comes a little later.
    """
    family, protocol = (socket.AF_INET, socket.IPPROTO_ICMP) if target.version == 4 else (socket.AF_INET6, socket.IPPROTO_ICMPV6)
    with host.socket(family, socket.SOCK_RAW, protocol) as sock:
        if dont_fragment and target.version == 4:
            sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DO)
        elif dont_fragment:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_DO)
        if source is not None:
            sock.bind((str(source), 0))
        return _Echoes(sock, target, size).run(count, interval, timeout)


class LongPing:
    """Echoes until `lost` is asked for."""

    def __init__(self, host: Namespace, target: IPAddress, interval: float = 0.05) -> None:
        # A log of its own: answers to an earlier one would stand for those that this one misses.
        self._process = host.start(["ping", "-n", "-i", str(interval), str(target)], f"ping-{target}-{next(_NUMBERS)}")

    def lost(self, timeout: float = PATIENCE) -> int:
        """How many had no answer, of those before the next one that has; LabError when none comes within `timeout` seconds."""
        latest = max(self._answered(), default=0)
        wait_until(lambda: max(self._answered(), default=0) > latest, "an echo is answered", timeout)
        self._process.kill()
        answered = self._answered()
        return max(answered) - len(answered)

    def _answered(self) -> set[int]:
        return {int(number) for number in re.findall(r"icmp_seq=(\d+) ttl=", self._process.log())}


class _Echoes:
    """Echo requests under way on a raw socket (RFC 792, RFC 4443 section 4)."""

    def __init__(self, sock: socket.socket, target: IPAddress, size: int) -> None:
        self._sock = sock
        self._target = (str(target), 0)
        self._version = target.version
        self._request, self._reply = (8, 0) if target.version == 4 else (128, 129)
        self._identifier = int.from_bytes(os.urandom(2), "big")
        self._data = bytes(size)
        self._sent: dict[int, float] = {}  # those without an answer; by number, when they left
        self._times: list[float] = []

    def run(self, count: int, interval: float, timeout: float) -> PingResult:
        begin = time.monotonic()
        for number in range(count):
            self._receive(begin + number * interval)
            self._send(number)
        self._receive(time.monotonic() + timeout, all_sent=True)
        return PingResult(count, len(self._times), tuple(self._times))

    def _send(self, number: int) -> None:
        message = ECHO.pack(self._request, 0, 0, self._identifier, number) + self._data
        if self._version == 4:  # the kernel fills ICMPv6's checksum
            total = sum(struct.unpack(f"!{len(message) // 2}H", message[: len(message) & ~1])) + (message[-1] << 8 if len(message) & 1 else 0)
            while total >> 16:
                total = (total & 0xFFFF) + (total >> 16)
            message = ECHO.pack(self._request, 0, total ^ 0xFFFF, self._identifier, number) + self._data
        self._sent[number] = time.monotonic()
        try:
            self._sock.sendto(message, self._target)
        except OSError:  # no route, too long, refused by a rule: never answered
            del self._sent[number]

    def _receive(self, until: float, *, all_sent: bool = False) -> None:
        """Take answers until that time, or while any is missing."""
        while (left := until - time.monotonic()) > 0 and (self._sent or not all_sent):
            if not select.select([self._sock], [], [], left)[0]:
                return
            message = self._sock.recv(65535)
            if self._version == 4:
                message = message[(message[0] & 0xF) * 4 :]
            kind = message[0]
            if kind in (ICMP_ERRORS if self._version == 4 else ICMPV6_ERRORS):
                self._refused(message[ECHO.size :])
            elif kind == self._reply and len(message) >= ECHO.size:
                _, _, _, identifier, number = ECHO.unpack_from(message)
                if identifier == self._identifier and number in self._sent:
                    self._times.append(time.monotonic() - self._sent.pop(number))

    def _refused(self, quoted: bytes) -> None:
        """An ICMP error, with the head of the packet that it is about."""
        request = quoted[(quoted[0] & 0xF) * 4 if self._version == 4 and quoted else 40 :]
        if len(request) >= ECHO.size:
            kind, _, _, identifier, number = ECHO.unpack_from(request)
            if kind == self._request and identifier == self._identifier:
                self._sent.pop(number, None)


def trace_route(host: Namespace, target: IPv4Address, *, hops: int = 4, timeout: float = 2.0) -> list[tuple[IPAddress | None, bytes]]:
    """Who answers a UDP probe of each TTL until the target does, as traceroute has it: the source of the ICMP error, and what stands behind the
    128 octets of its quote (RFC 4884). None where nobody answers.
    """
    found: list[tuple[IPAddress | None, bytes]] = []
    with host.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as heard, host.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for ttl in range(1, hops + 1):
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
            with suppress(OSError):  # the error of the probe before
                probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            probe.sendto(b"probe", (str(target), 33434 + ttl))
            answer = _error_about(heard, 33434 + ttl, time.monotonic() + timeout)
            found.append((IPv4Address(answer[12:16]), answer[28 + 128 :]) if answer is not None else (None, b""))
            if answer is not None and answer[20] == ICMP_UNREACHABLE:
                break
    return found


def _error_about(heard: socket.socket, port: int, until: float) -> bytes | None:
    while (left := until - time.monotonic()) > 0 and select.select([heard], [], [], left)[0]:
        message = heard.recv(65535)
        if message[20] in ICMP_ERRORS and int.from_bytes(message[50:52], "big") == port:
            return message
    return None


@contextmanager
def tcp_server(host: Namespace, address: IPAddress, port: int = 0) -> Iterator[int]:
    """A server that digests what it gets; the value is its port."""
    agent = Agent(host, "tcp-server", address=str(address), port=port)
    try:
        yield agent.read(PATIENCE)["ready"]
    finally:
        agent.close()


class TcpStream:
    """A transfer under way."""

    def __init__(self, host: Namespace, target: IPAddress, port: int, *, size: int, seconds: float, timeout: float) -> None:
        self._timeout = timeout
        self._agent = Agent(host, "tcp-client", address=str(target), port=port, size=size, seconds=seconds, timeout=timeout)

    def wait_connected(self) -> float:
        """Seconds that connect() took. LabError when it failed."""
        return float(self._agent.read(self._timeout + PATIENCE)["ready"])

    def wait(self) -> BulkResult:
        try:
            return BulkResult(**self._agent.read(self._timeout))
        finally:
            self._agent.close()

    def abandon(self) -> None:
        self._agent.close()


def tcp_bulk(host: Namespace, target: IPAddress, port: int, *, size: int = 8 << 20, seconds: float = 0.0, timeout: float = 2 * PATIENCE) -> BulkResult:
    """Send `size` bytes, or as many as go in `seconds`, and have them checked."""
    stream = TcpStream(host, target, port, size=size if not seconds else 1 << 50, seconds=seconds, timeout=timeout)
    stream.wait_connected()
    return stream.wait()


@dataclass(frozen=True, slots=True)
class Connected:
    """How long connect() took, and how many segments TCP sent again: one a second without an answer, be it that the SYN was lost or that somebody is busy."""

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

    def __init__(self, host: Namespace, address: IPAddress, port: int = 0, *, acknowledge: int = 0, whole: int = 0) -> None:
        self.address = address
        self._agent = Agent(host, "udp-sink", address=str(address), port=port, acknowledge=acknowledge, whole=whole)
        self.port: int = self._agent.read(PATIENCE)["ready"]

    def expect(self, count: int, timeout: float = PATIENCE) -> Received:
        """The account once `count` distinct datagrams are here, or after `timeout` seconds."""
        return Received(**self._agent.ask(timeout + PATIENCE, expect=count, timeout=timeout))

    def close(self) -> None:
        self._agent.close()


@contextmanager
def udp_sink(host: Namespace, address: IPAddress, port: int = 0, *, acknowledge: int = 0, whole: int = 0) -> Iterator[UdpSink]:
    """`acknowledge`: answer every so many datagrams, and the last of `whole`, for a stream with a window."""
    sink = UdpSink(host, address, port, acknowledge=acknowledge, whole=whole)
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
        self._timeout = count * len(targets) / rate + PATIENCE
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
        self._agent.read(PATIENCE)

    def wait(self) -> Sent:
        try:
            return Sent(**self._agent.read(self._timeout))
        finally:
            self._agent.close()

    @property
    def running(self) -> bool:
        return self._agent.process.running

    def finish(self) -> Sent:
        """End now; what was sent until then."""
        self._agent.tell()
        return self.wait()

    def abandon(self) -> None:
        self._agent.close()
