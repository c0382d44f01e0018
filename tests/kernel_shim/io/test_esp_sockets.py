"""ESP sockets of two local addresses on the loopback of a namespace: with UDP and without, and what the IP headers around it say."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address

import pytest
from lab.namespaces import Lab, Namespace
from lab.process import PATIENCE, wait_until

from kernel_shim.io.counters import Counters
from kernel_shim.io.esp_sockets import Batch, EspSocket
from kernel_shim.io.sockets import GatewaySockets
from kernel_shim.model import NO_PORT, PORT_NAT_T, Endpoint, KernelError

pytestmark = pytest.mark.root

ADDRESSES = {4: ("127.0.0.11", "127.0.0.12"), 6: ("2001:db8::1", "2001:db8::2")}
KINDS = [(version, port) for version in ADDRESSES for port in (PORT_NAT_T, NO_PORT)]
SPI = bytes.fromhex("c0ffee01")


@pytest.fixture
def network() -> Iterator[Namespace]:
    with Lab() as lab:
        namespace = lab.namespace("esp")
        for address in ADDRESSES[6]:
            namespace.ip(f"addr add {address}/128 dev lo nodad")
        for address in ADDRESSES[6]:
            wait_until(partial(_reachable, namespace, address), f"{address} on the loopback")
        yield namespace


def _reachable(namespace: Namespace, address: str) -> bool:
    """The kernel finishes a new IPv6 address in the background, and drops what comes to it before."""
    with namespace.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        probe.settimeout(0.05)
        probe.sendto(b"?", probe.getsockname())
        with contextlib.suppress(TimeoutError):
            return probe.recv(1) == b"?"
    return False


@dataclass
class Line:
    """What `left` sends, `right` gets."""

    left: EspSocket
    right: EspSocket

    def carry(self, data: bytes, size: int, **how: int | bool) -> list[tuple[Batch, bytes]]:
        self.left.send(self.right.local, memoryview(data), size, **how)  # type: ignore[arg-type]
        buffer, got, left = memoryview(bytearray(65535)), [], len(data)
        while left > 0:
            poll = select.poll()
            poll.register(self.right.fileno(), select.POLLIN)
            assert poll.poll(PATIENCE * 1000), f"{left} octets missing"
            for batch in self.right.receive(buffer):
                got.append((batch, bytes(buffer[: batch.length])))
                left -= batch.length
        return got


def line(namespace: Namespace, sockets: list[GatewaySockets], version: int, port: int) -> Line:
    ends = []
    for address in map(ip_address, ADDRESSES[version]):
        one = GatewaySockets(1, Counters(), lambda *_: None, raw=True)
        sockets.append(one)
        namespace.call(lambda one=one, address=address: one.bind(address))
        found = one.esp(Endpoint(address, port))
        assert found is not None
        ends.append(found)
    return Line(*ends)


@pytest.fixture
def sockets() -> Iterator[list[GatewaySockets]]:
    opened: list[GatewaySockets] = []
    yield opened
    for one in opened:
        one.close()


@pytest.mark.parametrize(("version", "port"), KINDS)
def test_packets_arrive_as_they_were_sent(network: Namespace, sockets: list[GatewaySockets], version: int, port: int) -> None:
    wire = line(network, sockets, version, port)
    rows = b"".join(SPI + bytes([number]) * 96 for number in range(20)) + SPI + b"end"
    got = wire.carry(rows, 100)
    assert b"".join(data for _, data in got) == rows
    assert {(batch.remote, batch.segment_size, batch.traffic_class) for batch, _ in got} <= {(wire.left.local, 100, 0), (wire.left.local, 7, 0)}


@pytest.mark.parametrize(("version", "port"), KINDS)
@pytest.mark.parametrize("value", [0x02, 0x03, 0xB8, 0xBA])
def test_the_traffic_class_goes_along(network: Namespace, sockets: list[GatewaySockets], version: int, port: int, value: int) -> None:
    wire = line(network, sockets, version, port)
    for data in (SPI + bytes(96), (SPI + bytes(96)) * 10):
        assert {batch.traffic_class for batch, _ in wire.carry(data, 100, traffic_class=value)} == {value}
    assert {batch.traffic_class for batch, _ in wire.carry(SPI + bytes(96), 100)} == {0}


@pytest.mark.parametrize(("version", "port"), KINDS)
def test_a_packet_over_the_mtu_travels_in_fragments_where_it_may(network: Namespace, sockets: list[GatewaySockets], version: int, port: int) -> None:
    network.ip("link set lo mtu 1400")
    wire = line(network, sockets, version, port)
    data = SPI + bytes(2000)
    ((batch, got),) = wire.carry(data, len(data), whole=False)
    assert (batch.remote, got) == (wire.left.local, data)


def test_packets_without_udp_are_joined_by_peer_length_and_class(network: Namespace, sockets: list[GatewaySockets]) -> None:
    sizes = [100] * 5 + [50, 200]
    with network.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ESP) as witness:
        witness.bind((ADDRESSES[4][1], 0))
        witness.settimeout(PATIENCE)
        wire = line(network, sockets, 4, NO_PORT)
        for size in sizes:
            wire.left.send(wire.right.local, memoryview(SPI + bytes(size - 4)), size)
        wire.left.send(wire.right.local, memoryview(SPI + bytes(196)), 200, traffic_class=1)
        # A kernel that is busy delivers later, some of them perhaps; to the oldest socket last.
        for _ in range(len(sizes) + 1):
            witness.recv(1000)
    got = [(batch.length, batch.segment_size, batch.traffic_class) for batch in wire.right.receive(memoryview(bytearray(65535)))]
    assert got == [(550, 100, 0), (200, 200, 0), (200, 200, 1)]


def test_without_leave_for_raw_sockets_there_is_none() -> None:
    closed = GatewaySockets(1, Counters(), lambda *_: None)
    closed.bind_raw(ip_address("127.0.0.11"))
    assert closed.esp(Endpoint(ip_address("127.0.0.11"), NO_PORT)) is None


def test_a_foreign_address_is_refused(network: Namespace, sockets: list[GatewaySockets]) -> None:
    sockets.append(GatewaySockets(1, Counters(), lambda *_: None, raw=True))
    with pytest.raises(KernelError, match="protocol 50"):
        network.call(lambda: sockets[0].bind_raw(ip_address("192.0.2.77")))
