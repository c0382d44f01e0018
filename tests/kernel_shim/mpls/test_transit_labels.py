"""Whose labels reach whom beneath others: at this node each label that it acts on is the sender's to use; at the next one it is this node's."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from scapy.layers.inet import IP, UDP

from kernel_shim.mpls.forward import Forwarder
from kernel_shim.mpls.labels import Entry, Label, LabelRange, LabelSet, write_stack
from kernel_shim.mpls.lfib import Lfib, Nhlfe, Peer, ToInterface, ToPeer, ToStack, ToVrf, TtlModel
from kernel_shim.mpls.switch import LabelSwitch, Outcome
from kernel_shim.reasons import DropReason

PACKET = bytes(IP(src="10.0.0.1", dst="10.0.1.1") / UDP(sport=1, dport=2))
TRANSIT, TUNNEL_END, RED, BLUE = 100, 101, 200, 201
AT_B = 300  # what the transit label becomes


class Node:
    def __init__(self, **accepts: Iterable[int]) -> None:
        self.lfib = Lfib()
        for peer, labels in accepts.items():
            self.lfib.admit(Peer(peer, LabelSet(LabelRange(Label(label), Label(label)) for label in labels)))
        self.switch = LabelSwitch(Forwarder(self.lfib), lambda _peer: 1400)

    def bind(self, label: int, hop: ToInterface | ToPeer | ToStack | ToVrf, *push: int) -> None:
        self.lfib.bind(Label(label), (Nhlfe(hop, tuple(map(Label, push)), TtlModel.PIPE),))

    def receive(self, peer: str, *labels: int) -> Outcome:
        return self.switch.from_peer(peer, write_stack([Entry(Label(label), 0, 64) for label in labels]) + PACKET, 0.0)


def middle(*push: int) -> Node:
    """The edge may use its transit label to the PE b, and one that ends here; the VRF blue is not its own."""
    node = Node(edge=(TRANSIT, TUNNEL_END))
    node.bind(TRANSIT, ToPeer("b"), *push)
    node.bind(TUNNEL_END, ToStack())
    node.bind(BLUE, ToInterface("blue"))
    return node


@pytest.mark.parametrize(
    "above", [(TUNNEL_END,), (TUNNEL_END, TUNNEL_END), (0,), (2,), (1,), (7, 5000), (TUNNEL_END, 7, 5000), (TUNNEL_END, 0), (1, TUNNEL_END)]
)
def test_nothing_above_a_label_makes_it_the_senders(above: tuple[int, ...]) -> None:
    """What comes to light by a pop, or stands beneath nulls, an alert and entropy, is asked for like the first."""
    node = middle(AT_B)
    assert node.receive("edge", *above, BLUE).reason is DropReason.MPLS_LABEL_FORBIDDEN
    assert node.receive("edge", *above, TRANSIT).reason is None


def test_a_label_to_a_vrf_ends_the_stack() -> None:
    node = Node(edge=(RED,))
    node.bind(RED, ToInterface("red"))
    node.bind(BLUE, ToInterface("blue"))
    assert node.receive("edge", RED).reason is None
    assert node.receive("edge", RED, BLUE).reason is DropReason.MPLS_NOT_BOTTOM


@pytest.mark.parametrize("push", [(), (3,), (AT_B,), (AT_B + 1, AT_B)], ids=["popped", "implicit-null", "swapped", "swapped and pushed upon"])
def test_beneath_a_transit_label_the_next_node_asks_for_what_this_one_may_send(push: tuple[int, ...]) -> None:
    """So whoever has a transit label to a PE can use there what this node may: docs/mpls.md."""
    node = middle(*push)
    b = Node(middle=(AT_B, AT_B + 1, RED))
    b.bind(AT_B, ToStack())
    b.bind(AT_B + 1, ToStack())
    b.bind(RED, ToInterface("red"))
    b.bind(BLUE, ToInterface("blue"))

    def through(label: int) -> Outcome:
        (sent,) = node.receive("edge", TRANSIT, label).sent
        assert sent.next_hop == ToPeer("b")
        return b.switch.from_peer("middle", sent.packet, 0.0)

    # The same number that the edge may not use at the node in the middle goes on, and is not accepted from that one.
    assert through(BLUE).reason is DropReason.MPLS_LABEL_FORBIDDEN
    assert through(RED).sent[0].next_hop == ToInterface("red")
    # Directly neither is the edge's.
    assert node.receive("edge", RED).reason is DropReason.MPLS_LABEL_FORBIDDEN
    assert b.receive("edge", RED).reason is DropReason.MPLS_PEER_UNKNOWN
