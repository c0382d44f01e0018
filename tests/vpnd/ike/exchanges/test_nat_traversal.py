"""NATs before either side, forced encapsulation, keepalives."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from lab.ike_pair import Datagram, Pair, Peer, agree, child, psk_pair, selectors
from sk_messages import open_message

from kernel_shim.model import Direction, Endpoint, Mode, UdpEncapsulation
from vpnd.ike.context import IkeSettings
from vpnd.ike.effects import Reason, SendKeepalive
from vpnd.ike.iana import Exchange
from vpnd.ike.wire.message import decode_message
from vpnd.ike.wire.payloads import TsiPayload, TsrPayload


def encapsulations(peer: Peer) -> dict[Direction, UdpEncapsulation | None]:
    return {sa.direction: sa.encapsulation for sa in peer.sad.values()}


@pytest.mark.parametrize(("mobike", "port"), [(False, 500), (True, 4500)])
def test_without_nat_esp_goes_bare(mobike: bool, port: int) -> None:
    pair = psk_pair(mobike=mobike)
    pair.connect()
    assert {sa.local.port for sa in (pair.a.sa, pair.b.sa)} == {port}
    assert encapsulations(pair.a) == {Direction.IN: None, Direction.OUT: None}
    assert not any((pair.a.sa.nat_local, pair.a.sa.nat_remote, pair.a.sa.nat_fake))


def test_an_initiator_behind_a_nat() -> None:
    pair = psk_pair(nat_a="198.51.100.7")
    pair.connect()
    agree(pair, 1)
    assert (pair.a.sa.nat_local, pair.a.sa.nat_remote) == (True, False)
    assert (pair.b.sa.nat_local, pair.b.sa.nat_remote) == (False, True)
    assert (pair.a.sa.local.port, pair.a.sa.remote.port) == (4500, 4500)
    assert pair.b.sa.remote == Endpoint(ip_address("198.51.100.7"), 24500)
    assert pair.b.sa.local.port == 4500
    assert encapsulations(pair.a) == {Direction.IN: UdpEncapsulation(4500, 4500), Direction.OUT: UdpEncapsulation(4500, 4500)}
    assert encapsulations(pair.b) == {Direction.IN: UdpEncapsulation(24500, 4500), Direction.OUT: UdpEncapsulation(4500, 24500)}
    assert {str(sa.source) for sa in pair.b.sad.values()} == {"198.51.100.7", "192.0.2.2"}


def test_a_responder_behind_a_nat() -> None:
    pair = psk_pair(nat_b="203.0.113.9")
    pair.connect()
    agree(pair, 1)
    assert (pair.a.sa.nat_local, pair.a.sa.nat_remote) == (False, True)
    assert (pair.b.sa.nat_local, pair.b.sa.nat_remote) == (True, False)
    assert all(encapsulations(pair.a).values())


def test_keepalives_come_from_behind_the_nat_while_nothing_else_does() -> None:
    pair = psk_pair(nat_a="198.51.100.7")
    pair.connect()
    pair.wait(65.0)
    kept = pair.a.happened(SendKeepalive)
    assert len(kept) == 3
    assert kept[0] == SendKeepalive(pair.a.sa.local, pair.a.sa.remote)
    assert not pair.b.happened(SendKeepalive)


def test_keepalives_can_be_switched_off() -> None:
    pair = psk_pair(nat_a="198.51.100.7")
    pair.a.settings = IkeSettings(keepalive=0.0)
    pair.connect()
    pair.wait(65.0)
    assert not pair.a.happened(SendKeepalive)


@pytest.mark.parametrize("forces", ["a", "b"])
def test_either_side_can_force_encapsulation(forces: str) -> None:
    pair = psk_pair()
    peer, other = (pair.a, pair.b) if forces == "a" else (pair.b, pair.a)
    peer.capabilities = replace(peer.capabilities, encapsulation_required=True)
    pair.connect()
    agree(pair, 1)
    assert peer.sa.nat_fake
    assert other.sa.nat_remote
    assert all(encapsulations(pair.a).values())
    assert all(encapsulations(pair.b).values())
    assert {pair.a.sa.local.port, pair.a.sa.remote.port, pair.b.sa.local.port} == {4500}
    pair.wait(65.0)
    assert not peer.happened(SendKeepalive)  # a pretended NAT keeps no mapping


@pytest.mark.parametrize(
    ("encap", "required", "preferred", "in_udp"),
    [
        (True, False, False, True),
        (False, False, True, False),
        (False, True, True, True),
        (None, False, True, True),
        (None, False, False, False),
    ],
)
def test_a_connection_says_whether_esp_goes_in_udp(encap: bool | None, required: bool, preferred: bool, in_udp: bool) -> None:
    pair = psk_pair()
    pair.a.connections[0] = replace(pair.a.connections[0], encap=encap)
    pair.a.capabilities = replace(pair.a.capabilities, encapsulation_required=required, encapsulation_preferred=preferred)
    pair.connect()
    agree(pair, 1)
    assert set(map(bool, encapsulations(pair.a).values())) == set(map(bool, encapsulations(pair.b).values())) == {in_udp}


def test_a_peer_that_moves_behind_its_nat_is_followed() -> None:
    pair = psk_pair(nat_a="198.51.100.7", mobike=False)
    pair.connect()
    pair.nat_a = "198.51.100.200"
    pair.a.run(pair.a.sa, pair.a.sa.probe(pair.now), pair.now)
    pair.settle()
    assert str(pair.b.sa.remote.address) == "198.51.100.200"
    pair.b.run(pair.b.sa, pair.b.sa.probe(pair.now), pair.now)
    pair.settle()
    assert pair.b.sa.tasks_active == ()
    agree(pair, 1)
    assert {str(sa.destination) for sa in pair.b.sad.values()} == {"198.51.100.200", "192.0.2.2"}
    (known,) = pair.b.sa.children.values()
    assert {known.sa.inbound.id, known.sa.outbound.id} == {*pair.b.sad}


def test_esp_from_another_mapping_moves_the_peer() -> None:
    pair = psk_pair(nat_a="198.51.100.7", mobike=False)
    pair.connect()
    pair.nat_a = "198.51.100.200"
    pair.b.run(pair.b.sa, pair.b.sa.mapping_changed(Endpoint(ip_address("198.51.100.200"), 24500), pair.now), pair.now)
    assert {str(sa.destination) for sa in pair.b.sad.values()} == {"198.51.100.200", "192.0.2.2"}
    pair.b.run(pair.b.sa, pair.b.sa.probe(pair.now), pair.now)
    pair.settle()
    assert pair.b.sa.tasks_active == ()


@pytest.mark.parametrize("options", [{"mobike": False}, {"nat_a": "198.51.100.7"}, {"nat_a": "198.51.100.7", "mobike": False, "follow_nat": False}])
def test_a_mapping_that_there_cannot_be_is_not_followed(options: dict[str, Any]) -> None:
    """Without a NAT, where it is forbidden, and with MOBIKE, where the peer says so itself (RFC 4555 section 3.8)."""
    pair = psk_pair(**options)
    pair.connect()
    before = pair.b.sa.remote, set(pair.b.sad)
    assert pair.b.sa.mapping_changed(Endpoint(ip_address("203.0.113.66"), 666), pair.now) == []
    assert (pair.b.sa.remote, set(pair.b.sad)) == before


def test_an_attacker_cannot_move_a_peer_by_repeating_its_messages() -> None:
    pair = psk_pair(nat_a="198.51.100.7")
    pair.connect()
    pair.a.run(pair.a.sa, pair.a.sa.probe(pair.now), pair.now)
    probe = pair.flight[0]
    pair.settle()
    pair.b.arrive(Datagram("a", pair.b.sa.local, Endpoint(ip_address("203.0.113.66"), 666), probe.data), pair.now)
    assert str(pair.b.sa.remote.address) == "198.51.100.7"


def test_without_nat_nobody_is_followed() -> None:
    pair = psk_pair(mobike=False)
    pair.connect()
    pair.a.run(pair.a.sa, pair.a.sa.probe(pair.now), pair.now)
    probe = pair.take()
    elsewhere = Endpoint(ip_address("203.0.113.66"), 500)
    pair.b.arrive(Datagram("a", pair.b.endpoint, elsewhere, probe.data), pair.now)
    (answer,) = pair.flight
    assert answer.remote == elsewhere
    assert pair.b.sa.remote == pair.a.endpoint


@pytest.mark.parametrize("nat_a", [None, "198.51.100.7"])
@pytest.mark.parametrize("nat_b", [None, "203.0.113.9"])
def test_transport_mode_through_a_nat(nat_a: str | None, nat_b: str | None) -> None:
    """RFC 7296 section 2.23.1: each side says the addresses that it sees, and puts its own in the place of the other's."""
    pair = psk_pair(child(local="dynamic", remote="dynamic", mode=Mode.TRANSPORT), nat_a=nat_a, nat_b=nat_b)
    said: list[tuple[object, object]] = []

    def note(datagram: Datagram) -> bool:
        message = decode_message(datagram.data)
        if message.header.exchange in (Exchange.IKE_AUTH, Exchange.CREATE_CHILD_SA):
            receiver = pair.b if datagram.sender == "a" else pair.a
            opened = open_message(datagram.data, message, receiver.sa.keys.receive)
            tsi, tsr = opened.first(TsiPayload), opened.first(TsrPayload)
            assert tsi is not None
            assert tsr is not None
            said.append((tsi.selectors, tsr.selectors))
        return False

    def check() -> None:
        agree(pair, 1)
        (ours,), (theirs,) = pair.a.sa.children.values(), pair.b.sa.children.values()
        assert (ours.sa.local_ts, ours.sa.remote_ts) == of_a
        assert (theirs.sa.local_ts, theirs.sa.remote_ts) == of_b

    # IKE_AUTH { ..., TSi(192.0.2.1), TSr(NAT of b) } -->  <-- { ..., TSi(NAT of a), TSr(192.0.2.2) }
    pair.connect(note)
    of_a = selectors("192.0.2.1/32"), selectors(f"{nat_b or '192.0.2.2'}/32")
    of_b = selectors("192.0.2.2/32"), selectors(f"{nat_a or '192.0.2.1'}/32")
    assert said == [of_a, of_b[::-1]]
    check()
    # and the same when the responder rekeys it
    pair.b.run(pair.b.sa, pair.b.sa.rekey_child(next(iter(pair.b.sa.children)), pair.now), pair.now)
    pair.settle(lambda datagram: datagram.data[18] == Exchange.CREATE_CHILD_SA and note(datagram))
    assert said[2:] == [of_b, of_a[::-1]]
    pair.wait(10.0)
    check()


def test_a_kernel_that_needs_encapsulation_does_not_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = psk_pair()
    pair.a.capabilities = replace(pair.a.capabilities, encapsulation_required=True)
    monkeypatch.setattr("vpnd.ike.exchanges.opening.detection_payloads", lambda *_: ())  # a peer without NAT traversal
    pair.connect()
    assert pair.a.failed == [Reason.KERNEL_REFUSED]
    assert pair.a.closed is Reason.KERNEL_REFUSED
    assert not pair.a.larval


def test_ports_other_than_500_stay() -> None:
    pair = Pair(psk_pair().a.connections[0], psk_pair().b.connections[0], nat_a="198.51.100.7")
    pair.b.local_port = 4500
    pair.a.local_port = 4500
    pair.connect()
    agree(pair, 1)
    assert pair.a.sa.local.port == pair.b.sa.local.port == 4500
