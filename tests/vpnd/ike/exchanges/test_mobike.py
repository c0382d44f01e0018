"""MOBIKE (RFC 4555) between two peers: moves, lists of addresses, paths that fail, return routability, what is refused."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest
from lab.ike_pair import Datagram, Pair, agree, child, psk_pair

from kernel_shim.model import Endpoint, Mode
from vpnd.ike.effects import ChildClosed, IkeMoved, Reason
from vpnd.ike.exchanges import mobike
from vpnd.ike.exchanges.mobike import MAX_ADDITIONAL
from vpnd.ike.iana import Exchange, NotifyType
from vpnd.ike.session import Session
from vpnd.ike.steps import Ask, Steps, Task, ask
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import NotifyPayload, Payload

NEW = "198.51.100.20"


def connected(**options: object) -> Pair:
    pair = psk_pair(**options)  # type: ignore[arg-type]
    pair.connect()
    return pair


def addresses(pair: Pair) -> list[set[str]]:
    return [{str(address) for sa in peer.sad.values() for address in (sa.source, sa.destination)} for peer in pair.peers]


def keys(pair: Pair) -> set[object]:
    return {(sa.spi, sa.encryption_key) for peer in pair.peers for sa in peer.sad.values()}


def roam(pair: Pair, *own: str) -> None:
    """`a` has these addresses now, the first is the one that routing prefers."""
    pair.a.address, pair.a.further_addresses = own[0], list(own[1:])
    pair.a.run(pair.a.sa, pair.a.sa.addresses_changed(pair.now), pair.now)


def told(pair: Pair, *payloads: Payload) -> Message:
    """What `b` answers when `a` sends these payloads in an INFORMATIONAL request."""
    answers: list[Message] = []

    def steps(session: Session, task: Task) -> Steps[None]:
        answers.append((yield from ask(Ask(Exchange.INFORMATIONAL, payloads))))

    pair.a.sa._enqueue(Task("TEST", steps))
    pair.a.run(pair.a.sa, pair.a.sa._done(), pair.now)
    pair.settle()
    (answer,) = answers
    return answer


@pytest.mark.parametrize("at_a", [True, False])
@pytest.mark.parametrize("at_b", [True, False])
def test_both_sides_must_want_it(at_a: bool, at_b: bool) -> None:
    pair = psk_pair()
    for peer, wants in zip(pair.peers, (at_a, at_b), strict=True):
        peer.connections = [replace(peer.connections[0], mobike=wants)]
    pair.connect()
    assert pair.a.sa.mobike == pair.b.sa.mobike == (at_a and at_b)
    agree(pair, 1)


def test_a_new_address_moves_everything_and_renews_nothing() -> None:
    pair = connected()
    before, ike = keys(pair), pair.a.sa
    # HDR, SK { N(UPDATE_SA_ADDRESSES), N(NAT_DETECTION_*), N(NO_ADDITIONAL_ADDRESSES), N(COOKIE2) } -->   <-- HDR, SK { N(COOKIE2), N(NAT_DETECTION_*) }
    # <-- HDR, SK { N(NAT_DETECTION_*), N(COOKIE2) }   HDR, SK { N(COOKIE2), N(NAT_DETECTION_*) } -->
    pair.log.clear()
    roam(pair, NEW)
    pair.settle()
    assert len(pair.log) == 4
    assert addresses(pair) == [{NEW, "192.0.2.2"}] * 2
    assert keys(pair) == before
    assert pair.a.sa is ike
    agree(pair, 1)
    assert all(peer.happened(IkeMoved) for peer in pair.peers)
    for peer in pair.peers:
        (known,) = peer.sa.children.values()
        assert {known.sa.inbound.id, known.sa.outbound.id} == {*peer.sad}


def test_no_data_goes_to_an_address_before_its_route_is_checked() -> None:
    pair = connected()
    roam(pair, NEW)
    pair.step()
    assert addresses(pair)[1] == {"192.0.2.1", "192.0.2.2"}
    pair.settle()
    assert addresses(pair)[1] == {NEW, "192.0.2.2"}


@pytest.mark.parametrize("echo", [[], [NotifyPayload(NotifyType.COOKIE2, bytes(32))], [NotifyPayload(NotifyType.COOKIE2, b"")]], ids=["none", "other", "empty"])
def test_a_cookie_that_does_not_come_back_closes(echo: list[NotifyPayload], monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 4555 section 3.7."""
    pair = connected()
    answer = mobike.answer
    monkeypatch.setattr(mobike, "answer", lambda session, request: echo if session.initiator else answer(session, request))
    roam(pair, NEW)
    pair.settle()
    assert pair.b.closed is Reason.INVALID_SYNTAX
    assert not pair.b.sad


def test_a_peer_that_returns_cookies_only_beside_nat_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    """As libreswan 5.2 does."""
    pair = connected()
    answer = mobike.answer

    def particular(session: Session, request: Message) -> list[Payload]:
        return answer(session, request) if request.notify(NotifyType.NAT_DETECTION_SOURCE_IP) is not None else []

    monkeypatch.setattr(mobike, "answer", particular)
    roam(pair, NEW)
    pair.settle()
    assert addresses(pair) == [{NEW, "192.0.2.2"}] * 2
    agree(pair, 1)


@pytest.mark.parametrize("echo", [[], [NotifyPayload(NotifyType.COOKIE2, bytes(32))]], ids=["none", "other"])
def test_an_update_whose_cookie_does_not_come_back_moves_nothing(echo: list[NotifyPayload], monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 4555 section 3.7: the peer could have written such an answer without having got the update."""
    pair = connected()
    answer = mobike.answer
    monkeypatch.setattr(
        mobike,
        "answer",
        lambda session, request: (
            answer(session, request) if session.initiator else [*(payload for payload in answer(session, request) if payload.type != NotifyType.COOKIE2), *echo]  # type: ignore[attr-defined]
        ),
    )
    roam(pair, NEW)
    pair.settle()
    assert pair.a.closed is Reason.INVALID_SYNTAX
    assert not pair.a.sad


def test_addresses_that_change_while_the_update_is_under_way() -> None:
    pair = connected()
    roam(pair, NEW)
    pair.flight.clear()
    roam(pair, "198.51.100.21")
    pair.settle()
    assert addresses(pair) == [{"198.51.100.21", "192.0.2.2"}] * 2
    agree(pair, 1)


def test_a_move_takes_an_exchange_that_is_under_way_along() -> None:
    pair = connected()
    pair.a.run(pair.a.sa, pair.a.sa.rekey_child(1, pair.now), pair.now)
    pair.flight.clear()
    roam(pair, NEW)
    pair.settle()
    pair.wait(60)
    agree(pair, 1)
    assert addresses(pair) == [{NEW, "192.0.2.2"}] * 2


def test_an_ike_sa_that_was_rekeyed_by_the_other_side_moves_as_well() -> None:
    pair = connected()
    pair.b.run(pair.b.sa, pair.b.sa.rekey(pair.now), pair.now)
    pair.settle()
    assert not pair.a.sa.initiator
    roam(pair, NEW)
    pair.settle()
    assert addresses(pair) == [{NEW, "192.0.2.2"}] * 2
    agree(pair, 1)


def test_lists_of_addresses_follow_the_host() -> None:
    pair = psk_pair()
    pair.b.further_addresses = ["203.0.113.5", "2001:db8::5"]
    pair.connect()
    assert list(map(str, pair.a.sa.peer_addresses)) == ["203.0.113.5", "2001:db8::5"]
    pair.b.further_addresses = []
    pair.b.run(pair.b.sa, pair.b.sa.addresses_changed(pair.now), pair.now)
    pair.settle()
    assert pair.a.sa.peer_addresses == ()
    roam(pair, pair.a.address, "203.0.113.99")
    pair.settle()
    assert list(map(str, pair.b.sa.peer_addresses)) == ["203.0.113.99"]
    agree(pair, 1)


def test_a_path_that_fails_is_found_out_and_another_taken() -> None:
    pair = psk_pair()
    pair.b.further_addresses = ["203.0.113.5"]
    pair.connect()
    pair.a.run(pair.a.sa, pair.a.sa.probe(pair.now), pair.now)
    pair.wait(30, lambda datagram: "192.0.2.2" in (str(datagram.local.address), str(datagram.remote.address)))
    assert addresses(pair) == [{"192.0.2.1", "203.0.113.5"}] * 2
    agree(pair, 1)


def test_a_peer_behind_a_nat_keeps_its_encapsulation() -> None:
    pair = connected(nat_a="198.51.100.7")
    pair.nat_a = None
    roam(pair, NEW)
    pair.settle()
    assert addresses(pair) == [{NEW, "192.0.2.2"}] * 2
    assert not any(sa.encapsulation for peer in pair.peers for sa in peer.sad.values()), "no NAT, no encapsulation"
    agree(pair, 1)


def test_a_mapping_that_changed_is_seen_by_a_liveness_check() -> None:
    """RFC 4555 section 3.8."""
    pair = connected(nat_a="198.51.100.7")
    for mapping in ("198.51.100.7", "198.51.100.200"):
        pair.nat_a = mapping
        pair.a.run(pair.a.sa, pair.a.sa.probe(pair.now), pair.now)
        pair.settle()
    assert addresses(pair)[1] == {"198.51.100.200", "192.0.2.2"}
    agree(pair, 1)


def test_transport_mode_stays_behind() -> None:
    pair = connected(config=child(local="dynamic", remote="dynamic", mode=Mode.TRANSPORT))
    roam(pair, NEW)
    pair.settle()
    assert [event.reason for peer in pair.peers for event in peer.happened(ChildClosed)] == [Reason.ADDRESS_CHANGED] * 2  # type: ignore[union-attr]
    agree(pair, 0)


def test_a_kernel_that_cannot_move_an_sa_gets_a_new_one() -> None:
    pair = connected()
    before = keys(pair)
    pair.a.refuse_migration = pair.b.refuse_migration = True
    roam(pair, NEW)
    pair.settle()
    pair.wait(10)
    assert not keys(pair) & before
    assert addresses(pair) == [{NEW, "192.0.2.2"}] * 2


def test_an_update_of_the_responder_is_ignored() -> None:
    """RFC 4555 section 3.5: only the original initiator may."""
    pair = connected()
    answers: list[Message] = []

    def steps(session: Session, task: Task) -> Steps[None]:
        answers.append((yield from ask(Ask(Exchange.INFORMATIONAL, (NotifyPayload(NotifyType.UPDATE_SA_ADDRESSES),)))))

    pair.b.sa._enqueue(Task("TEST", steps))
    pair.b.run(pair.b.sa, pair.b.sa._done(), pair.now)
    datagram = pair.take()
    pair.deliver(replace(datagram, local=Endpoint(ip_address("203.0.113.66"), 4500)))
    pair.settle()
    assert addresses(pair) == [{"192.0.2.1", "192.0.2.2"}] * 2


def test_an_update_without_our_keys_is_nobodys() -> None:
    pair = connected()
    roam(pair, NEW)
    datagram = pair.take()
    forged = bytearray(datagram.data)
    forged[-1] ^= 1
    pair.deliver(Datagram("a", Endpoint(ip_address("203.0.113.66"), 4500), datagram.remote, bytes(forged)))
    assert not pair.flight
    assert str(pair.b.sa.remote.address) == "192.0.2.1"


def test_an_update_that_is_played_again_moves_nobody_back() -> None:
    pair = connected()
    roam(pair, NEW)
    old = pair.flight[0]
    pair.settle()
    roam(pair, "198.51.100.21")
    pair.settle()
    pair.deliver(old)
    pair.settle()
    assert addresses(pair) == [{"198.51.100.21", "192.0.2.2"}] * 2


def test_a_nat_where_none_is_allowed() -> None:
    """RFC 4555 section 3.9."""
    pair = connected()
    seen = ip_address("192.0.2.1").packed + ip_address("192.0.2.2").packed + (4500).to_bytes(2, "big") * 2
    update = NotifyPayload(NotifyType.UPDATE_SA_ADDRESSES)
    assert told(pair, update, NotifyPayload(NotifyType.NO_NATS_ALLOWED, seen)).payloads == ()
    (refusal,) = told(pair, update, NotifyPayload(NotifyType.NO_NATS_ALLOWED, bytes(12))).payloads
    assert refusal == NotifyPayload(NotifyType.UNEXPECTED_NAT_DETECTED)
    assert told(pair, NotifyPayload(NotifyType.COOKIE2, b"12345678")).payloads == (NotifyPayload(NotifyType.COOKIE2, b"12345678"),)


def test_an_address_that_nobody_can_have() -> None:
    pair = connected()
    roam(pair, "224.0.0.1")
    pair.settle()
    assert pair.a.closed is Reason.ADDRESS_REFUSED
    assert str(pair.b.sa.remote.address) == "192.0.2.1"


def test_a_long_list_of_addresses_is_cut() -> None:
    pair = connected()
    many = [NotifyPayload(NotifyType.ADDITIONAL_IP4_ADDRESS, (0xCB007100 + number).to_bytes(4, "big")) for number in range(100)]
    told(pair, *many, NotifyPayload(NotifyType.ADDITIONAL_IP6_ADDRESS, b"short"))
    assert len(pair.b.sa.peer_addresses) == MAX_ADDITIONAL


VICTIM = Endpoint(ip_address("203.0.113.66"), 4500)


def claim(pair: Pair, source: Endpoint = VICTIM) -> None:
    """`a` says from `source` that it is there."""

    def steps(session: Session, task: Task) -> Steps[None]:
        yield from ask(Ask(Exchange.INFORMATIONAL, (NotifyPayload(NotifyType.UPDATE_SA_ADDRESSES),)))

    sa = pair.a.sa
    sa._enqueue(Task("TEST", steps))
    pair.a.run(sa, sa._done(), pair.now)
    request = pair.take()
    pair.b.arrive(Datagram("a", pair.b.endpoint, source, request.data), pair.now)
    for answer in [datagram for datagram in pair.flight if datagram.data[19] & 0x20]:
        pair.flight.remove(answer)
        pair.a.arrive(Datagram("b", pair.a.endpoint, pair.b.endpoint, answer.data), pair.now)


def victims(pair: Pair) -> list[object]:
    return [sa for sa in pair.b.sad.values() if VICTIM.address in (sa.source, sa.destination)]


def forged(pair: Pair, route_check_arrives: bool = False) -> None:
    """All that flies arrives, but as an attacker has it: its packets come from the victim, and what goes to the victim is guessed, save for the route check."""
    for _ in range(100):
        if not pair.flight:
            if not pair.tick():
                return
            continue
        datagram = pair.take()
        if datagram.sender == "a":
            pair.b.arrive(Datagram("a", pair.b.endpoint, VICTIM, datagram.data), pair.now)
        elif route_check_arrives or not (datagram.data[18] == Exchange.INFORMATIONAL and not datagram.data[19] & 0x20):
            pair.a.arrive(Datagram("b", pair.a.endpoint, pair.b.endpoint, datagram.data), pair.now)


@pytest.mark.parametrize("act", ["create", "rekey", "rekey-ike", "rekeyed-by-b", "ike-rekeyed-by-b"])
def test_a_peer_that_claims_to_be_elsewhere_brings_nothing_up_there(act: str) -> None:
    """RFC 4555 section 3.7: nor are there new CHILD_SAs towards a third party."""
    pair = connected()
    if act == "rekeyed-by-b":
        pair.b.run(pair.b.sa, pair.b.sa.rekey_child(min(pair.b.sa.children), pair.now), pair.now)
        held = pair.flight.copy()
    elif act == "ike-rekeyed-by-b":
        pair.b.run(pair.b.sa, pair.b.sa.rekey(pair.now), pair.now)
        held = pair.flight.copy()
    else:
        held = []
    pair.flight.clear()
    claim(pair)
    pair.flight[:] = [*held, *pair.flight]
    forged(pair)
    sa = pair.a.sa
    if act == "create":
        pair.a.run(sa, sa.create_child(next(iter(sa.connection.children.values())), pair.now), pair.now)
    elif act == "rekey":
        pair.a.run(sa, sa.rekey_child(min(sa.children), pair.now), pair.now)
    elif act == "rekey-ike":
        pair.a.run(sa, sa.rekey(pair.now), pair.now)
    forged(pair)
    if "ike" in act:
        pair.a.run(pair.a.sa, pair.a.sa.create_child(next(iter(sa.connection.children.values())), pair.now), pair.now)
        forged(pair)
    assert len(pair.b.sad) >= 2
    assert not victims(pair)
    # it is there after all
    pair.a.address = str(VICTIM.address)
    pair.wait(60.0)
    assert len(pair.b.sad) == len(victims(pair))


def test_a_cookie_that_went_elsewhere_in_between_proves_nothing() -> None:
    pair = connected()
    claim(pair)
    pair.flight.clear()
    # the true address gets a copy of the route check, and then it is the victim's again
    claim(pair, Endpoint(ip_address("198.51.100.99"), 4500))
    copies = [datagram for datagram in pair.flight if str(datagram.remote.address) == "198.51.100.99"]
    assert copies
    pair.flight.clear()
    claim(pair)
    pair.flight.clear()
    for copy in copies:
        pair.a.arrive(Datagram("b", pair.a.endpoint, pair.b.endpoint, copy.data), pair.now)
    for answer in list(pair.flight):
        pair.b.arrive(Datagram("a", pair.b.endpoint, VICTIM, answer.data), pair.now)
    assert not victims(pair)
