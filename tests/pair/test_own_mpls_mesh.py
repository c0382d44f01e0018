"""Three of our gateways as PE routers: hub and spoke, any to any, and labels that are forged by a PE, a customer or a stranger."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.capture import Capture
from lab.namespaces import Namespace
from lab.process import wait_until
from lab.provider_mesh import BLUE, GREEN, MARKER, RED, Mesh, forged, in_tunnel, provider_mesh

from kernel_shim.mpls.encapsulation import Encapsulation

pytestmark = [pytest.mark.pair, pytest.mark.timeout(180)]


@pytest.fixture
def mesh(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with provider_mesh(tmp_path, getattr(request, "param", Encapsulation.GRE)) as found:
        yield found


def inject(namespace: Namespace, packet: bytes) -> None:
    """An IPv4 packet with a header of one's own."""
    with namespace.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        sock.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))


class Marked:
    """Who sees the marked packet: every host of every customer."""

    def __init__(self, mesh: Mesh, stack: contextlib.ExitStack) -> None:
        self._seen = {(name, letter): stack.enter_context(Capture(mesh.host(name, letter), "lan")) for name in ("red", "blue", "green") for letter in "abc"}

    def at(self, tag: bytes = b"") -> set[tuple[str, str]]:
        return {place for place, capture in self._seen.items() if any(MARKER + tag in packet.payload for packet in capture.packets())}

    def wait(self, tag: bytes) -> None:
        wait_until(lambda: self.at(tag), f"{tag.decode()} arrives")


def drops(mesh: Mesh, letter: str) -> dict[str, int]:
    """But for what had no route: hosts that answer the forger of an address."""
    found = {name.removeprefix("drop_"): number for name, number in mesh.gateway(letter).counters().items() if name.startswith("drop_mpls")}
    return {name: number for name, number in found.items() if name != "mpls_no_route"}


@pytest.mark.parametrize("mesh", Encapsulation, indirect=True)
def test_any_to_any_and_hub_and_spoke(mesh: Mesh) -> None:
    for source, target in ("ab", "bc", "ca"):
        mesh.reaches("red", source, target)
    mesh.reaches("blue", "a", "b")
    before = mesh.gateway("a").counters().get("hairpinned", 0)
    mesh.reaches("green", "b", "c")
    assert mesh.gateway("a").counters()["hairpinned"] - before >= 4  # there and back, of both families
    assert mesh.received("blue", "c", "a") == mesh.received("blue", "a", "c") == 0


@pytest.mark.parametrize("mesh", Encapsulation, indirect=True)
def test_a_third_pe_cannot_use_the_labels_of_others(mesh: Mesh) -> None:
    """C has a valid SA with A and with B, and is told red's label and at the hub green's. It writes packets by hand into these SAs."""
    mesh.reaches("red", "c", "a")
    mesh.reaches("red", "c", "b")
    a, b, c = mesh.lab.edges
    to_a, to_b = a.customers["blue"].host4, b.customers["blue"].host4
    with contextlib.ExitStack() as stack:
        marked = Marked(mesh, stack)

        def send(target: bytes, *labels: int, tag: bytes) -> None:
            pe, host = (a, to_a) if target == b"a" else (b, to_b)
            inject(c.gateway, in_tunnel(c.wan4, pe.wan4, mesh.encapsulation, forged(host, labels, tag)))

        send(b"a", BLUE, tag=b"<blue>")
        send(b"b", BLUE, tag=b"<blue>")
        send(b"b", GREEN, tag=b"<other spoke>")
        send(b"a", RED, BLUE, tag=b"<beneath>")
        send(b"a", 0, BLUE, tag=b"<null>")
        send(b"a", 1, BLUE, tag=b"<alert>")
        send(b"a", 7, 1000, BLUE, tag=b"<entropy>")
        send(b"a", BLUE, RED, tag=b"<above>")
        send(b"a", 0, tag=b"<null alone>")
        send(b"a", 500, tag=b"<unbound>")
        # As if it were B: that packet is no flow of C's own SA, and in clear it is what a policy protects.
        inject(c.gateway, in_tunnel(b.wan4, a.wan4, mesh.encapsulation, forged(to_a, [BLUE], b"<as b>")))
        send(b"a", RED, tag=b"<red>")  # behind all of them
        send(b"b", RED, tag=b"<red>")
        wait_until(lambda: marked.at(b"<red>") == {("red", "a"), ("red", "b")}, "red's own packets arrive")
        assert marked.at() == {("red", "a"), ("red", "b")}
        assert marked.at(b"<b") == set()
    assert drops(mesh, "a") == {"mpls_label_forbidden": 6, "mpls_not_bottom": 1}
    assert drops(mesh, "b") == {"mpls_label_forbidden": 2}
    assert mesh.gateway("a").counters()["guard.clear-dropped.packets"] >= 1


@pytest.mark.parametrize("mesh", Encapsulation, indirect=True)
def test_a_customer_cannot_send_labels(mesh: Mesh) -> None:
    """Red's host at A writes tunnel packets and MPLS frames: to either PE, as if it were one, and through its VPN, which leads everywhere."""
    mesh.write("a", default="b")
    mesh.gateway("a").vpnctl("reload")
    mesh.reaches("red", "a", "b")
    mesh.reaches("blue", "a", "b")
    a, b, c = mesh.lab.edges
    red, far = a.customers["red"], b.customers["red"]
    red.host.ip(f"route add default via {red.net4[1]}")
    with contextlib.ExitStack() as stack:
        marked = Marked(mesh, stack)
        for labels in ([BLUE], [RED], [0], [RED, BLUE]):
            labelled = forged(b.customers["blue"].host4, labels)
            for source in (red.host4, b.wan4, c.wan4, a.wan4):
                for target in (red.net4[1], a.wan4, b.wan4, far.net4[1]):
                    inject(red.host, in_tunnel(source, target, mesh.encapsulation, labelled))
            frame = bytes.fromhex(a.gateway.hardware_address("ce-red").replace(":", "")) + bytes(6) + b"\x88\x47" + labelled
            with red.host.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
                sock.bind(("lan", 0))
                sock.send(frame)
        # From host to host it is a packet like any other.
        opaque = in_tunnel(red.host4, far.host4, mesh.encapsulation, forged(b.customers["blue"].host4, [BLUE], b"<opaque>"))
        inject(red.host, opaque)
        marked.wait(b"<opaque>")
        wait_until(lambda: ("red", "b") in marked.at(b"<opaque>"), "the opaque packet arrives")
        assert {place for place in marked.at() if place[0] != "red"} == set()
    for letter in "abc":
        assert drops(mesh, letter) == {}
