"""Linux' label forwarding and ours, given the same labels and the same packets: the same bytes, or a difference with its reason."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

import pytest
from lab.namespaces import Lab, Namespace

from kernel_shim.mpls.forward import Forwarder
from kernel_shim.mpls.labels import FIRST_LABEL, LAST_LABEL, Entry, Label, LabelRange, LabelSet, write_stack
from kernel_shim.mpls.lfib import Lfib, Nhlfe, Peer, ToPeer
from kernel_shim.mpls.switch import LabelSwitch
from kernel_shim.packet.checksum import checksum, partial_sum

pytestmark = pytest.mark.realkernel

MPLS, IPV4 = b"\x88\x47", b"\x08\x00"
END = b"the end of the packets"  # sent after each case, under a label that both pass

# Label: the labels in its place.
SWAPS = {100: (200,), 101: (300, 301), 102: (), 103: (3,), 999: (998,)}


def ip(ttl: int = 64, payload: bytes = b"payload") -> bytes:
    header = bytearray(bytes((0x45, 0)) + (20 + len(payload)).to_bytes(2, "big") + bytes(4) + bytes((ttl, 253, 0, 0)))
    header += IPv4Address("10.1.0.1").packed + IPv4Address("10.2.0.1").packed
    header[10:12] = checksum(partial_sum(header)).to_bytes(2, "little")
    return bytes(header) + payload


def stack(*entries: tuple[int, int, int]) -> bytes:
    """Label, traffic class, TTL."""
    return write_stack([Entry(Label(label), tc, ttl) for label, tc, ttl in entries])


@dataclass(frozen=True)
class Case:
    packet: bytes
    difference: str = ""  # why the two differ


SILENT = "Linux drops it without a word, ours answers its sender"
RAISED = "Linux writes the label's TTL into what comes to light, ours never raises one (RFC 3443 section 5.4)"
NO_NULL = "Linux takes no swap for the implicit null"
BENEATH = "Linux leaves TTL and class of the label beneath alone, ours hands them down"
CLASS = "Linux sets the class of every label that it writes to 0"
NO_ENTRY = "Linux knows this label only by an entry of the table"

CASES = {
    "swapped": Case(stack((100, 0, 64)) + ip()),
    "swapped above others": Case(stack((100, 0, 64), (555, 5, 9), (556, 0, 8)) + ip()),
    "swapped, two in its place": Case(stack((101, 0, 64)) + ip()),
    "popped to IP": Case(stack((102, 0, 20)) + ip()),
    "popped to IP of a lower TTL": Case(stack((102, 0, 64)) + ip(ttl=10), RAISED),
    "implicit null is a pop": Case(stack((103, 0, 20)) + ip(), NO_NULL),
    "popped, another label beneath": Case(stack((102, 3, 64), (555, 5, 9)) + ip(), BENEATH),
    "the class goes on": Case(stack((100, 5, 64)) + ip(), CLASS),
    "TTL 1": Case(stack((100, 0, 1)) + ip(), SILENT),
    "TTL 0": Case(stack((100, 0, 0)) + ip(), SILENT),
    "unknown": Case(stack((500, 0, 64)) + ip()),
    "explicit null of IPv4 above a label": Case(stack((0, 0, 64), (100, 0, 64)) + ip(), NO_ENTRY),
    "router alert": Case(stack((1, 0, 64), (100, 0, 64)) + ip(), NO_ENTRY),
    "reserved": Case(stack((9, 0, 64), (100, 0, 64)) + ip()),
    "no bottom": Case(stack((100, 0, 64))[:2] + b"\x00\x40"),
    "cut off": Case(stack((100, 0, 64))[:3]),
}


class Linux:
    """A node with a wire in and a wire out."""

    def __init__(self, lab: Lab) -> None:
        node, near, far = lab.namespace("node"), lab.namespace("near"), lab.namespace("far")
        lab.veth(near, "wire", node, "in")
        lab.veth(node, "out", far, "wire")
        node.sysctl(mpls__platform_labels=1000, mpls__conf__in__input=1, ipv4__ip_forward=1)
        node.ip("addr add 192.0.2.1/24 dev out", f"neigh add 192.0.2.2 lladdr {_mac(far, 'wire')} dev out")
        for label, labels in SWAPS.items():
            if 3 not in labels:
                swap = f"as to {'/'.join(map(str, labels))} " if labels else ""
                node.run(f"ip -f mpls route add {label} {swap}via inet 192.0.2.2 dev out".split())
        self._header = bytes.fromhex(_mac(node, "in").replace(":", "")) + bytes(6)
        self._in = near.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
        self._in.bind(("wire", 0))
        self._out = far.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
        self._out.bind(("wire", 0))
        self._out.settimeout(20)

    def forward(self, packet: bytes) -> list[bytes]:
        self._in.send(self._header + MPLS + packet)
        self._in.send(self._header + MPLS + stack((999, 0, 64)) + ip(payload=END))
        found = []
        while True:
            frame = self._out.recv(2000)
            if frame.endswith(END):
                return found
            if frame[12:14] in (MPLS, IPV4):
                found.append(frame[14:])

    def close(self) -> None:
        self._in.close()
        self._out.close()


def _mac(namespace: Namespace, device: str) -> str:
    return namespace.run(["cat", f"/sys/class/net/{device}/address"]).stdout.strip()


def ours() -> LabelSwitch:
    lfib = Lfib()
    lfib.admit(Peer("near", LabelSet([LabelRange(FIRST_LABEL, LAST_LABEL)])))
    for label, labels in SWAPS.items():
        lfib.bind(Label(label), (Nhlfe(ToPeer("far"), tuple(map(Label, labels))),))
    return LabelSwitch(Forwarder(lfib), lambda _: 1500)


@pytest.fixture
def linux() -> Iterator[Linux]:
    with Lab() as lab:
        node = Linux(lab)
        yield node
        node.close()


def test_the_same_packets_come_out(linux: Linux) -> None:
    switch, wrong = ours(), list[str]()
    for name, case in CASES.items():
        sent = [one.packet for one in switch.from_peer("near", case.packet, 0.0).sent]
        forwarded = linux.forward(case.packet)
        if (sent == forwarded) is bool(case.difference):
            outputs = (", ".join(it.hex() for it in packets) or "nothing" for packets in (forwarded, sent))
            wrong.append("{}: {}: Linux {}; ours {}".format(name, "alike" if case.difference else "they differ", *outputs))
    assert not wrong, "\n".join(wrong)
