"""Two hosts on a wire in the emulated kernel, one of them with an `XfrmChannel`, and packets between them."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from lab.namespaces import Lab, Namespace
from lab.process import PATIENCE

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.channel.xfrm import XfrmChannel
from kernel_shim.model import (
    Action,
    AddressRange,
    Direction,
    KernelEvent,
    Mode,
    Policy,
    ReqId,
    SecurityAssociation,
    Selector,
    Spi,
    Template,
)
from kernel_shim.secret import Secret

HERE, PEER = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
NEAR, FAR = IPv4Network("10.1.0.0/16"), IPv4Network("10.2.0.0/16")
SPI, KEY = Spi(0x1001), bytes(range(20))
REQID = ReqId(7)
IN_KERNEL = 0x80000000 | REQID
HELD = 101  # packets: XFRM_MAX_QUEUE_LEN and one


@dataclass(frozen=True, slots=True)
class Ends:
    here: Namespace
    there: Namespace


@contextmanager
def two_ends(algorithm: Sequence[str] = ("aead", "rfc4106(gcm(aes))", "0x" + KEY.hex(), "128")) -> Iterator[Ends]:
    """Two hosts on a wire; `there` takes ESP of SPI 0x1001 in, set up by iproute2, in whose words `algorithm` is."""
    with Lab() as lab:
        here, there = lab.namespace("here"), lab.namespace("there")
        lab.veth(here, "wire", there, "wire")
        here.ip(f"addr add {HERE}/24 dev wire", f"addr add {NEAR[1]}/32 dev lo", f"route add {FAR} via {PEER} src {NEAR[1]}")
        there.ip(f"addr add {PEER}/24 dev wire", f"addr add {FAR[1]}/32 dev lo", f"route add {NEAR} via {HERE}")
        tunnel = f"src {HERE} dst {PEER} proto esp"
        there.run(["ip", "xfrm", *f"policy add src {NEAR} dst {FAR} dir in tmpl {tunnel} mode tunnel".split()])
        state = f"state add {tunnel} spi {SPI:#x} mode tunnel".split()
        there.run(["ip", "xfrm", *state, *algorithm])
        here.run(["ping", "-c", "1", "-W", "5", str(PEER)])
        yield Ends(here, there)


def within(namespace: Namespace, body: Callable[[XfrmChannel, list[KernelEvent]], Awaitable[None]], **settings: Any) -> None:
    """Run `body` on a loop in the namespace, with a channel that leaves nothing behind and the events that it reports."""

    async def run() -> None:
        channel, events = XfrmChannel(**settings), list[KernelEvent]()
        channel.on_event(events.append)
        await channel.open()
        try:
            async with asyncio.timeout(4 * PATIENCE):
                await body(channel, events)
        finally:
            await channel.flush_policies()
            await channel.flush_sas()
            await channel.close()

    namespace.call(lambda: asyncio.run(run()))


def outbound(**changes: Any) -> SecurityAssociation:
    values: dict[str, Any] = {
        "spi": SPI,
        "source": HERE,
        "destination": PEER,
        "direction": Direction.OUT,
        "mode": Mode.TUNNEL,
        "reqid": REQID,
        "algorithm": EspAlgorithm(EncryptionId.AES_GCM_16, 128),
        "encryption_key": Secret(KEY),
        "replay_window": 32,
    }
    return SecurityAssociation(**{**values, **changes})


TRAP = Policy(Selector(AddressRange.of(NEAR), AddressRange.of(FAR)), Direction.OUT, Action.PROTECT, 1000, (Template(Mode.TUNNEL, REQID, HERE, PEER),))


async def until(condition: Callable[[], bool]) -> None:
    """For what no event tells of; `within` bounds it."""
    while not condition():
        await asyncio.sleep(0.01)


def send(count: int, destination: IPv4Address = FAR[1]) -> tuple[int, int]:
    """How many packets the kernel took, and how many it refused."""
    taken = refused = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((str(NEAR[1]), 0))
        for number in range(count):
            try:
                sender.sendto(number.to_bytes(4, "big"), (str(destination), 9000))
                taken += 1
            except BlockingIOError:
                refused += 1
    return taken, refused


class Sink:
    """Counts what arrives at the far end, and when the first and the last came."""

    def __init__(self, namespace: Namespace) -> None:
        self._socket = namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((str(FAR[1]), 9000))
        self._socket.setblocking(False)
        self.numbers: list[int] = []
        self.first: float | None = None
        self.last: float | None = None

    def look(self) -> int:
        while True:
            try:
                self.numbers.append(int.from_bytes(self._socket.recv(64), "big"))
            except BlockingIOError:
                return len(self.numbers)
            self.last = time.monotonic()
            self.first = self.first or self.last

    def close(self) -> None:
        self._socket.close()
