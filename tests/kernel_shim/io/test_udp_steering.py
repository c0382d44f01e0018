"""The UDP sockets of a local address, on the loopback of a namespace."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Iterator
from functools import partial
from ipaddress import ip_address

import pytest
from lab.namespaces import Lab, Namespace
from lab.process import PATIENCE

from kernel_shim.io.counters import Counters
from kernel_shim.io.esp_sockets import UDP_GRO, UDP_SEGMENT, EspSocket
from kernel_shim.io.sockets import GatewaySockets
from kernel_shim.model import PORT_NAT_T, Endpoint, IPAddress, KernelError

pytestmark = pytest.mark.root

MARK = 0x1234
ESP = bytes.fromhex("c0ffee01") + bytes(60)
IKE = bytes(4) + bytes(60)


@pytest.fixture
def network() -> Iterator[Namespace]:
    with Lab() as lab:
        namespace = lab.namespace("udp")
        namespace.ip("addr add 2001:db8::1/128 dev lo nodad")
        yield namespace


class Opened:
    """Bound sockets with what they report."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.counters = Counters()
        self.mtus: list[tuple[Endpoint, Endpoint, int]] = []
        self.sockets = GatewaySockets(MARK, self.counters, lambda *report: self.mtus.append(report))

    def bind(self, address: IPAddress) -> tuple[int, int]:
        return self.namespace.call(lambda: self.sockets.bind(address))

    def esp(self, address: IPAddress) -> EspSocket:
        found = self.sockets.esp(Endpoint(address, PORT_NAT_T))
        assert found is not None
        return found

    def sender(self, address: IPAddress) -> socket.socket:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        sender = self.namespace.socket(family, socket.SOCK_DGRAM)
        sender.connect((str(address), 4500))
        return sender


@pytest.fixture
def opened(network: Namespace) -> Iterator[Opened]:
    one = Opened(network)
    yield one
    one.sockets.close()


def readable(*descriptors: int) -> set[int]:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(5_000)}


def drain(descriptor: int) -> list[bytes]:
    found = []
    with socket.socket(fileno=os.dup(descriptor)) as reading:
        reading.setblocking(False)
        while True:
            try:
                found.append(reading.recv(65536))
            except BlockingIOError:
                return found


@pytest.mark.parametrize("text", ["127.0.0.1", "2001:db8::1"])
def test_the_non_esp_marker_goes_to_ike_and_everything_else_to_esp(opened: Opened, text: str) -> None:
    address = ip_address(text)
    _, nat_t = opened.bind(address)
    esp = opened.esp(address)
    with opened.sender(address) as sender:
        sender.send(IKE)
        assert readable(nat_t, esp.fileno()) == {nat_t}
        assert drain(nat_t) == [IKE]
        for datagram in (ESP, b"\xff", b"", bytes(3)):
            sender.send(datagram)
            assert readable(nat_t, esp.fileno()) == {esp.fileno()}
            assert drain(esp.fileno()) == [datagram]


def test_every_one_of_24_flows_is_steered_and_coalesced_by_contents(opened: Opened) -> None:
    address = ip_address("127.0.0.1")
    _, nat_t = opened.bind(address)
    esp = opened.esp(address)
    senders = [opened.sender(address) for _ in range(24)]
    segments = 8
    for sender in senders:
        sender.sendmsg([ESP * segments], [(socket.IPPROTO_UDP, UDP_SEGMENT, len(ESP).to_bytes(2, "little"))])
        sender.sendmsg([IKE * segments], [(socket.IPPROTO_UDP, UDP_SEGMENT, len(IKE).to_bytes(2, "little"))])
    buffer = memoryview(bytearray(65536))
    batches: list[tuple[int, int, int]] = []
    while len(batches) < len(senders):
        assert readable(esp.fileno()), f"only {batches} came"
        batches += [(batch.remote.port, batch.length, batch.segment_size) for batch in esp.receive(buffer)]
    assert sorted(batches) == sorted((sender.getsockname()[1], len(ESP) * segments, len(ESP)) for sender in senders)
    with socket.socket(fileno=os.dup(nat_t)) as ike:
        for _ in senders:
            assert readable(nat_t)
            data, control, _, _ = ike.recvmsg(65536, 64)
            assert data == IKE * segments
            assert [(level, kind, int.from_bytes(size, "little")) for level, kind, size in control] == [(socket.IPPROTO_UDP, UDP_GRO, len(IKE))]
    for sender in senders:
        sender.close()


def test_sent_batches_arrive_as_datagrams_with_our_mark(opened: Opened) -> None:
    address = ip_address("127.0.0.1")
    opened.bind(address)
    with opened.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(PATIENCE)
        remote = Endpoint(address, receiver.getsockname()[1])
        datagrams = [bytes([number]) * 100 for number in range(60)] + [b"short"]
        opened.esp(address).send(remote, memoryview(b"".join(datagrams)), 100)
        assert [receiver.recvfrom(2048) for _ in datagrams] == [(datagram, ("127.0.0.1", 4500)) for datagram in datagrams]
    assert opened.counters.values() == {}
    with socket.socket(fileno=os.dup(opened.esp(address).fileno())) as esp:
        assert esp.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == MARK


def test_a_peer_that_cannot_be_sent_to_costs_the_others_no_segmentation(opened: Opened) -> None:
    address = ip_address("127.0.0.1")
    opened.bind(address)
    esp = opened.esp(address)
    receiver = opened.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    receiver.bind(("127.0.0.1", 0))
    batch = memoryview(ESP * 10)
    esp.send(Endpoint(address, 0), batch, len(ESP))  # EINVAL
    assert sum(opened.counters.values().values()) == 10
    esp.send(Endpoint(address, receiver.getsockname()[1]), batch, len(ESP))
    assert len(receiver.recv(65535)) == len(batch), "one read: it was one send"
    receiver.close()


@pytest.mark.parametrize("text", ["127.0.0.1", "::1"])
def test_what_need_not_stay_whole_is_fragmented_and_nothing_else(opened: Opened, text: str) -> None:
    opened.namespace.ip("link set lo mtu 1500")
    address = ip_address(text)
    opened.bind(address)
    esp = opened.esp(address)
    receiver = opened.namespace.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    receiver.bind((text, 0))
    receiver.settimeout(PATIENCE)
    target = Endpoint(address, receiver.getsockname()[1])
    large = memoryview(bytes(5000))
    esp.send(target, large, len(large))
    assert opened.counters.values()["io.esp.send.too-big"] == 1
    esp.send(target, large, len(large), whole=False)
    assert len(receiver.recv(65535)) == 5000
    esp.send(target, large, len(large))
    assert opened.counters.values()["io.esp.send.too-big"] == 2
    receiver.close()


def test_binding_twice_gives_the_same_descriptors_and_unbinding_frees_the_ports(opened: Opened) -> None:
    address = ip_address("127.0.0.1")
    assert opened.bind(address) == opened.bind(address)
    assert opened.sockets.addresses() == {address}
    opened.sockets.unbind(address)
    assert opened.sockets.esp(Endpoint(address, PORT_NAT_T)) is None
    opened.bind(address)


@pytest.mark.parametrize("port", [500, 4500])
def test_a_port_that_another_process_holds_is_not_shared(opened: Opened, port: int) -> None:
    with opened.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", port))
        with pytest.raises(KernelError) as refused:
            opened.bind(ip_address("127.0.0.1"))
        assert refused.value.errno == errno.EADDRINUSE
    assert opened.sockets.addresses() == frozenset()
    opened.bind(ip_address("127.0.0.1"))


def test_an_address_that_is_not_ours_is_refused(opened: Opened) -> None:
    with pytest.raises(KernelError) as refused:
        opened.bind(ip_address("203.0.113.1"))
    assert refused.value.errno == errno.EADDRNOTAVAIL


def test_a_datagram_above_the_path_mtu_is_reported_not_fragmented() -> None:
    with Lab() as lab:
        near, far = lab.namespace("near"), lab.namespace("far")
        lab.veth(near, "wan", far, "wan", mtu=1400)
        for namespace, number in ((near, 1), (far, 2)):
            namespace.ip(f"addr add 192.0.2.{number}/24 dev wan", f"addr add 2001:db8::{number}/64 dev wan nodad")
        for prefix in ("192.0.2.", "2001:db8::"):
            opened = Opened(near)
            local, remote = ip_address(f"{prefix}1"), Endpoint(ip_address(f"{prefix}2"), 4500)
            opened.bind(local)
            for datagrams in (1, 3):
                near.call(partial(opened.esp(local).send, remote, memoryview(bytes(1390 * datagrams)), 1390))
            assert set(opened.mtus) == {(Endpoint(local, 4500), remote, 1400)}
            assert opened.counters.value("io.esp.send.too-big") == 4
            opened.sockets.close()


def test_a_router_s_too_big_reaches_the_data_plane() -> None:
    with Lab() as lab:
        near, router, far = lab.namespace("near"), lab.namespace("router"), lab.namespace("far")
        lab.veth(near, "wan", router, "near")
        lab.veth(router, "far", far, "wan", mtu=1300)
        router.sysctl(ipv4__ip_forward=1)
        near.ip("addr add 192.0.2.1/24 dev wan", "route add default via 192.0.2.254")
        router.ip("addr add 192.0.2.254/24 dev near", "addr add 198.51.100.254/24 dev far")
        far.ip("addr add 198.51.100.1/24 dev wan", "route add default via 198.51.100.254")
        opened = Opened(near)
        local, remote = ip_address("192.0.2.1"), Endpoint(ip_address("198.51.100.1"), 4500)
        opened.bind(local)
        esp = opened.esp(local)
        poll = select.poll()
        poll.register(esp.fileno(), 0)
        # The error may be queued on the other member of the group (the kernel picks by hash); then the next send is refused and tells.
        for _ in range(50):
            near.call(partial(esp.send, remote, memoryview(bytes(1390)), 1390))
            if opened.mtus or poll.poll(100):
                break
        esp.read_errors()
        assert set(opened.mtus) == {(Endpoint(local, 4500), remote, 1300)}
        opened.sockets.close()
