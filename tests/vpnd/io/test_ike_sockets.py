"""IKE sockets of a kernel that leaves them to the key manager: they pass every IPsec policy, and nothing else does."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address

import pytest
from lab.namespaces import Lab, Namespace
from lab.process import PATIENCE, open_files

from kernel_shim.channel.xfrm import bypass_policies
from kernel_shim.model import PORT_IKE, PORT_NAT_T, IPAddress, KernelError
from vpnd.io.ike_sockets import open_ike_sockets

pytestmark = pytest.mark.root

MARKED = bytes(4) + b"an IKE message behind the non-ESP marker"


@dataclass(frozen=True, slots=True)
class Closed:
    """Two hosts whose kernels discard all traffic, in and out."""

    a: Namespace
    b: Namespace

    def addresses(self, version: int) -> tuple[IPAddress, IPAddress]:
        names = ("192.0.2.1", "192.0.2.2") if version == 4 else ("2001:db8::1", "2001:db8::2")
        return ip_address(names[0]), ip_address(names[1])


@pytest.fixture
def closed() -> Iterator[Closed]:
    with Lab() as lab:
        a, b = lab.namespace("a"), lab.namespace("b")
        lab.veth(a, "wire", b, "wire")
        hardware = {each: each.hardware_address("wire") for each in (a, b)}
        for near, far, number in ((a, b, 1), (b, a, 2)):
            near.ip(f"addr add 192.0.2.{number}/24 dev wire", f"addr add 2001:db8::{number}/64 dev wire nodad")
            # neighbour discovery is traffic too
            near.ip(*(f"neigh replace {to}{3 - number} lladdr {hardware[far]} dev wire nud permanent" for to in ("192.0.2.", "2001:db8::")))
            for everything in ("0.0.0.0/0", "::/0"):
                for direction in ("in", "out"):
                    near.run(["ip", "xfrm", *f"policy add src {everything} dst {everything} dir {direction} action block".split()])
        yield Closed(a, b)


def opened(namespace: Namespace, address: IPAddress) -> tuple[socket.socket, socket.socket]:
    plain, natt = (socket.socket(fileno=descriptor) for descriptor in namespace.call(lambda: open_ike_sockets(address, bypass_policies)))
    for each in (plain, natt):
        each.settimeout(PATIENCE)
    return plain, natt


@pytest.mark.parametrize("version", [4, 6])
def test_ike_passes_where_all_else_is_discarded(closed: Closed, version: int) -> None:
    here, there = closed.addresses(version)
    ours, theirs = opened(closed.a, here), opened(closed.b, there)
    try:
        for near, far, port, message in ((ours[0], theirs[0], PORT_IKE, b"IKE"), (ours[1], theirs[1], PORT_NAT_T, MARKED)):
            assert near.getsockname()[:2] == (str(here), port)
            near.sendto(message, (str(there), port))
            received, sender = far.recvfrom(100)
            assert (received, sender[:2]) == (message, (str(here), port))
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with closed.a.socket(family, socket.SOCK_DGRAM) as other, pytest.raises(OSError):
            other.sendto(b"not IKE", (str(there), PORT_IKE))
    finally:
        for each in (*ours, *theirs):
            each.close()


def test_the_kernel_takes_esp_and_keepalives_out(closed: Closed) -> None:
    here, there = closed.addresses(4)
    ours, theirs = opened(closed.a, here), opened(closed.b, there)
    try:
        for message in (b"\xff", b"\x00\x00\x10\x01 ESP that nobody has an SA for", MARKED):
            ours[1].sendto(message, (str(there), PORT_NAT_T))
        assert theirs[1].recv(100) == MARKED
        theirs[1].setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs[1].recv(100)
    finally:
        for each in (*ours, *theirs):
            each.close()


def test_what_is_taken_or_foreign_is_refused_by_name(closed: Closed) -> None:
    here, there = closed.addresses(4)
    ours = opened(closed.a, here)
    try:
        before = open_files()
        with pytest.raises(KernelError, match=rf"port 500 of {here}") as refused:
            opened(closed.a, here)
        assert refused.value.errno == errno.EADDRINUSE
        with pytest.raises(KernelError, match=rf"port 500 of {there}") as refused:
            opened(closed.a, there)
        assert refused.value.errno == errno.EADDRNOTAVAIL
        assert open_files() <= before
    finally:
        for each in ours:
            each.close()
