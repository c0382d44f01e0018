"""Delay, loss, reordering and duplication between two interfaces of one namespace, frame by frame (this kernel has no netem).

The relay is a process of its own. Frames keep their virtio_net_hdr, so checksums that the sender left to its card and
large sends survive the way. Run as a program it reads settings, one JSON object a line, and answers each with its counters.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import random
import select
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from lab.namespaces import Namespace

# linux/if_packet.h, linux/if_ether.h
SOL_PACKET: Final = 263
PACKET_VNET_HDR: Final = 15
PACKET_IGNORE_OUTGOING: Final = 23
ETH_P_ALL: Final = 3
SO_RCVBUFFORCE: Final = 33
SO_SNDBUFFORCE: Final = 32

VNET_HDR_BYTES: Final = 10
FRAME_BYTES: Final = 65536 + 64
UDP_CHECKSUM: Final = slice(VNET_HDR_BYTES + 14 + 20 + 6, VNET_HDR_BYTES + 14 + 20 + 8)
NEEDS_CHECKSUM: Final = 1  # in the first octet of a virtio_net_hdr: it is still to be computed
QUEUE_FRAMES: Final = 20000  # what a long fat path holds; beyond it frames are dropped and counted
BUFFER_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class RelaySettings:
    """`delay` and `jitter` in seconds one way (jitter reorders), probabilities per frame from 0 to 1, `cut` drops everything.

    `forged`: hexadecimal octets that stand in place of `genuine` ones, as many, wherever these are in IPv4 datagrams of UDP.
    """

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    cut: bool = False
    seed: int = 1
    genuine: str = ""
    forged: str = ""


@dataclass(slots=True)
class RelayCounters:
    forwarded: int = 0
    lost: int = 0
    duplicated: int = 0
    overflowed: int = 0


class Relay:
    """The test's handle on a relay process between interfaces `a` and `b` of `namespace`."""

    def __init__(self, namespace: Namespace, a: str, b: str, settings: RelaySettings) -> None:
        from lab.process import PATIENCE, Process

        self.settings = settings
        sockets = [namespace.call(lambda name=name: _packet_socket(name)) for name in (a, b)]  # type: ignore[misc]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = [*(s.fileno() for s in sockets), theirs.fileno()]
        self._control = ours
        self._control.settimeout(PATIENCE)
        self.process = Process(
            [sys.executable, "-S", str(Path(__file__)), *map(str, fds), json.dumps(asdict(settings))],
            namespace.directory / f"relay-{namespace.role}.log",
            pass_fds=fds,
        )
        for one in (*sockets, theirs):
            one.close()

    def wait_ready(self) -> None:
        self._read()

    def _read(self) -> RelayCounters:
        return RelayCounters(**json.loads(self._control.recv(4096)))

    def change(self, settings: RelaySettings) -> RelayCounters:
        """New settings for frames from now on; the counters as they stand once the relay has taken them."""
        self._control.send(json.dumps(asdict(settings)).encode())
        self.settings = settings
        return self._read()

    def counters(self) -> RelayCounters:
        return self.change(self.settings)


def _packet_socket(interface: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    for option in (SO_RCVBUFFORCE, SO_SNDBUFFORCE):
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    sock.bind((interface, ETH_P_ALL))
    sock.setblocking(False)
    return sock


def _forge(frame: bytes, settings: RelaySettings) -> bytes:
    genuine = bytes.fromhex(settings.genuine)
    if not genuine or genuine not in frame:
        return frame
    altered = bytearray(frame.replace(genuine, bytes.fromhex(settings.forged)))
    if not altered[0] & NEEDS_CHECKSUM:
        altered[UDP_CHECKSUM] = bytes(2)  # none
    return bytes(altered)


def _forward(a: int, b: int, control: int, settings: RelaySettings) -> None:
    counters = RelayCounters()
    chance = random.Random(settings.seed)
    order = itertools.count()
    queue: list[tuple[float, int, int, bytes]] = []  # due, order of arrival, descriptor, frame
    other = {a: b, b: a}

    def send(fd: int, frame: bytes) -> None:
        try:
            os.write(fd, frame)
            counters.forwarded += 1
        except (BlockingIOError, OSError):
            counters.overflowed += 1

    def arrive(fd: int, frame: bytes, now: float) -> None:
        if settings.cut or (settings.loss and chance.random() < settings.loss):
            counters.lost += 1
            return
        frame = _forge(frame, settings)
        copies = 1
        if settings.duplicate and chance.random() < settings.duplicate:
            copies = 2
            counters.duplicated += 1
        for _ in range(copies):
            if not settings.delay and not settings.jitter:
                send(other[fd], frame)
            elif len(queue) >= QUEUE_FRAMES:
                counters.overflowed += 1
            else:
                due = now + settings.delay + settings.jitter * chance.random()
                heapq.heappush(queue, (due, next(order), other[fd], frame))

    poller = select.epoll()
    for fd in (a, b, control):
        poller.register(fd, select.EPOLLIN)
    os.write(control, json.dumps(asdict(counters)).encode())
    while True:
        # 0.2 ms early and then at once: epoll's own resolution is a millisecond, rounded up.
        wait = -1.0 if not queue else max(0.0, queue[0][0] - time.monotonic() - 0.0002)
        for fd, _ in poller.poll(wait):
            if fd == control:
                line = os.read(control, 4096)
                if not line:
                    return
                settings = RelaySettings(**json.loads(line))
                chance = random.Random(settings.seed)
                os.write(control, json.dumps(asdict(counters)).encode())
                continue
            for _ in range(64):
                try:
                    frame = os.read(fd, FRAME_BYTES)
                except BlockingIOError:
                    break
                except OSError:
                    break  # the link went down for a moment
                arrive(fd, frame, time.monotonic())
        now = time.monotonic()
        while queue and queue[0][0] <= now:
            _, _, fd, frame = heapq.heappop(queue)
            send(fd, frame)


if __name__ == "__main__":
    first, second, commands = map(int, sys.argv[1:4])
    _forward(first, second, commands, RelaySettings(**json.loads(sys.argv[4])))
