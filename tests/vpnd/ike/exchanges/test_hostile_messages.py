"""Messages that are whole and yet not what they pretend: sent back, for another exchange, with what nobody knows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lab.ike_pair import Datagram, Pair, agree, child, connection, mirrored, psk, psk_pair, selectors
from sk_messages import open_message, seal_message

from vpnd.ike.effects import Reason
from vpnd.ike.exchanges import create_child_sa
from vpnd.ike.iana import Exchange, Group, NotifyType, TransformType
from vpnd.ike.identity import Identity
from vpnd.ike.session import MAX_EARLY_DELETES, Session
from vpnd.ike.steps import Ask, Steps, Task, ask
from vpnd.ike.wire.header import Header, IkeSpi, MessageId
from vpnd.ike.wire.message import Message, decode_message, encode_message
from vpnd.ike.wire.payloads import DeletePayload, IdiPayload, NoncePayload, NotifyPayload, Payload, SaPayload, TsiPayload, TsrPayload, UnknownPayload

UNKNOWN = 200


def back(pair: Pair, datagram: Datagram, flags: int = 0) -> None:
    """To its sender, from where it was going to, with these flags of the header turned round."""
    peer = pair.a if datagram.sender == "a" else pair.b
    data = bytearray(datagram.data)
    data[19] ^= flags
    peer.arrive(Datagram(datagram.sender, datagram.local, datagram.remote, bytes(data)), pair.now)


@pytest.mark.parametrize("flags", [0, 0x08, 0x20, 0x28], ids=["as-it-was", "initiator-turned", "response-turned", "both-turned"])
def test_what_is_sent_back_changes_nothing(flags: int) -> None:
    """A whole life, of whose messages each comes back to its sender before it arrives; of IKE_SA_INIT the daemon refuses it (`Manager`)."""
    pair = psk_pair(child())
    seen = []

    def reflect(datagram: Datagram) -> bool:
        if datagram.data[18] != Exchange.IKE_SA_INIT or datagram.data[19] & 0x20:
            before = len(pair.flight)
            back(pair, datagram, flags)
            seen.append(str(datagram))
            assert len(pair.flight) == before
        return False

    pair.connect(reflect)
    agree(pair, 1)
    for act in (
        lambda: (pair.b, pair.b.sa.rekey_child(next(iter(pair.b.sa.children)), pair.now)),
        lambda: (pair.a, pair.a.sa.rekey(pair.now)),
        lambda: (pair.b, pair.b.sa.probe(pair.now)),
    ):
        peer, effects = act()
        peer.run(peer.sa, effects, pair.now)
        pair.settle(reflect)
        pair.wait(20.0, reflect)
        agree(pair, 1)
    pair.a.run(pair.a.sa, pair.a.sa.delete(pair.now), pair.now)
    pair.settle(reflect)
    assert len(seen) >= 15
    assert not pair.a.standing
    assert not pair.b.standing


def make_answer(pair: Pair, request: Header, exchange: int, *payloads: Payload) -> Datagram:
    """What `b` would say to that request of `a`'s, in any exchange."""
    sealed = pair.b.sa._seal(exchange, request.message_id, payloads, response=True).datagrams[0]
    return Datagram("b", pair.b.sa.local, pair.b.sa.remote, sealed)


def test_an_answer_of_another_exchange_is_none() -> None:
    pair = psk_pair(child())
    pair.connect()
    pair.a.run(pair.a.sa, pair.a.sa.rekey_child(1, pair.now), pair.now)
    request = pair.take()
    for exchange in (Exchange.INFORMATIONAL, Exchange.IKE_AUTH, Exchange.IKE_FOLLOWUP_KE, 99):
        answer = make_answer(pair, decode_message(request.data).header, exchange, NotifyPayload(NotifyType.NO_PROPOSAL_CHOSEN))
        pair.deliver(answer)
        assert pair.a.sa.tasks_active == ("CHILD_REKEY",)
    pair.deliver(request)
    pair.settle()
    pair.wait(20.0)
    agree(pair, 1)


def test_an_answer_to_ike_sa_init_in_another_exchange_is_none() -> None:
    pair = psk_pair(child())
    pair.a.start(pair.b.endpoint, pair.now, *pair.a.connections[0].children.values())
    pair.step()
    answer = pair.take()
    for exchange in (Exchange.IKE_SESSION_RESUME, Exchange.IKE_AUTH, Exchange.INFORMATIONAL):
        pair.deliver(replace(answer, data=answer.data[:18] + bytes((exchange,)) + answer.data[19:]))
        assert not pair.flight
    pair.deliver(answer)
    pair.settle()
    agree(pair, 1)


# RFC 7296 section 2.5: critical payloads that nobody knows


@pytest.mark.parametrize("sender", ["a", "b"])
@pytest.mark.parametrize("exchange", [Exchange.CREATE_CHILD_SA, Exchange.INFORMATIONAL, Exchange.IKE_FOLLOWUP_KE])
def test_a_request_with_an_unknown_critical_payload_is_answered_and_not_acted_upon(sender: str, exchange: int) -> None:
    pair = psk_pair(child())
    pair.connect()
    peer, other = (pair.a, pair.b) if sender == "a" else (pair.b, pair.a)
    (entry,) = peer.sa.children.values()
    answers: list[Message] = []

    def steps(_session: Session, _task: Task) -> Steps[None]:
        # SK { D(ESP), ?* } -->  <-- SK { N(UNSUPPORTED_CRITICAL_PAYLOAD) }
        deletion = DeletePayload(3, (entry.sa.inbound.spi.to_bytes(4, "big"),))
        answers.append((yield from ask(Ask(exchange, (deletion, UnknownPayload(UNKNOWN, b"?", critical=True))))))

    peer.sa.queue.append(Task("TEST", steps))
    pair.settle()
    assert [(notify.type, notify.data) for notify in answers[0].payloads if isinstance(notify, NotifyPayload)] == [
        (NotifyType.UNSUPPORTED_CRITICAL_PAYLOAD, bytes((UNKNOWN,)))
    ]
    agree(pair, 1)
    assert other.closed is None


def test_ike_auth_with_an_unknown_critical_payload_establishes_nothing() -> None:
    pair = psk_pair(child())
    pair.a.start(pair.b.endpoint, pair.now, *pair.a.connections[0].children.values())
    pair.step()
    # the initiator takes the keys; its own IKE_AUTH is replaced by one with a payload more
    pair.step()
    request = decode_message(pair.take().data)
    sealed = pair.a.sa._seal(Exchange.IKE_AUTH, request.header.message_id, (UnknownPayload(UNKNOWN, b"?", critical=True),), response=False)
    pair.deliver(Datagram("a", pair.a.sa.local, pair.a.sa.remote, sealed.datagrams[0]))
    pair.settle()
    assert pair.b.closed is Reason.INVALID_SYNTAX
    assert pair.a.closed is Reason.UNSUPPORTED_CRITICAL_PAYLOAD
    assert not pair.a.sad
    assert not pair.b.sad


def test_an_answer_with_an_unknown_critical_payload_brings_nothing_up() -> None:
    pair = psk_pair(child())
    pair.connect()
    (entry,) = pair.a.sa.children.values()
    pair.a.run(pair.a.sa, pair.a.sa.create_child(entry.config, pair.now), pair.now)
    request = pair.take()
    pair.deliver(make_answer(pair, decode_message(request.data).header, Exchange.CREATE_CHILD_SA, UnknownPayload(UNKNOWN, b"", critical=True)))
    assert pair.a.closed is Reason.INVALID_SYNTAX
    assert not pair.a.sad
    assert not pair.a.larval


def test_one_in_clear_before_sk_is_nobodys() -> None:
    """It is covered by no key of anybody's, so whoever put it there is not answered."""
    pair = psk_pair(child())
    pair.connect()
    pair.a.run(pair.a.sa, pair.a.sa.probe(pair.now), pair.now)
    probe = pair.take()
    data = probe.data
    unknown = bytes((data[16], 0x80, 0, 4))
    forged = data[:16] + bytes((UNKNOWN,)) + data[17:24] + (len(data) + 4).to_bytes(4, "big") + unknown + data[28:]
    pair.deliver(replace(probe, data=forged))
    assert not pair.flight
    pair.deliver(probe)
    pair.settle()
    assert pair.a.sa.tasks_active == ()
    agree(pair, 1)


@pytest.mark.parametrize("flaw", ["spi-of-the-sender", "initiator", "both-spis-turned"])
def test_a_header_that_names_another_ike_sa_is_nobodys_even_under_our_keys(flaw: str) -> None:
    pair = psk_pair(child())
    pair.connect()
    sa = pair.a.sa
    spis = {"spi-of-the-sender": (IkeSpi(b"anothers"), sa.wire_spi_r), "both-spis-turned": (sa.wire_spi_r, sa.wire_spi_i)}
    spi_i, spi_r = spis.get(flaw, (sa.wire_spi_i, sa.wire_spi_r))
    header = Header(spi_i, spi_r, Exchange.INFORMATIONAL, MessageId(2), initiator=flaw != "initiator", response=False)
    sealed = seal_message(header, (DeletePayload(1),), sa.keys.send, pair.a.entropy)
    assert pair.b.sa.receive(sealed, pair.b.sa.local, pair.b.sa.remote, pair.now) == []
    agree(pair, 1)
    # what is right about everything else is acted upon
    right = Header(sa.wire_spi_i, sa.wire_spi_r, Exchange.INFORMATIONAL, MessageId(2), initiator=True, response=False)
    pair.deliver(Datagram("a", sa.local, sa.remote, seal_message(right, (DeletePayload(1),), sa.keys.send, pair.a.entropy)))
    assert pair.b.closed is Reason.PEER_DELETED


def test_a_responder_that_names_another_spi_of_its_own_is_nobody() -> None:
    pair = psk_pair(child())
    pair.connect()
    sa = pair.b.sa
    for spi_r, heard in ((IkeSpi(b"anothers"), False), (IkeSpi(bytes(8)), False), (sa.wire_spi_r, True)):
        header = Header(sa.wire_spi_i, spi_r, Exchange.INFORMATIONAL, MessageId(0), initiator=False, response=False)
        pair.deliver(Datagram("b", sa.local, sa.remote, seal_message(header, (DeletePayload(1),), sa.keys.send, pair.b.entropy)))
        assert (pair.a.closed is Reason.PEER_DELETED) is heard


def test_a_choice_that_is_not_that_of_the_key_exchange_is_no_answer() -> None:
    """The responder says one group in SA and uses another in KE, both of which were offered."""
    both = "aes128-sha256-x25519-ecp256"
    pair = Pair(connection("to-b", psk("a"), psk("b"), [child()], both), connection("to-a", psk("b"), psk("a"), [mirrored(child())], both))
    pair.a.start(pair.b.endpoint, pair.now)
    pair.step()
    answer = pair.take()
    message = decode_message(answer.data)

    def other_group(payload: Payload) -> Payload:
        if not isinstance(payload, SaPayload):
            return payload
        (chosen,) = payload.proposals
        transforms = tuple(replace(each, id=Group.ECP_256) if each.type == TransformType.KE else each for each in chosen.transforms)
        return SaPayload((replace(chosen, transforms=transforms),))

    forged = encode_message(replace(message, payloads=tuple(map(other_group, message.payloads))))
    pair.deliver(replace(answer, data=forged))
    assert not pair.flight
    # and the true one, should it come, is still taken
    pair.deliver(answer)
    pair.settle()
    agree(pair, 1)


@pytest.mark.parametrize("exchange", [Exchange.IKE_AUTH, Exchange.IKE_INTERMEDIATE, Exchange.CREATE_CHILD_SA, Exchange.INFORMATIONAL])
def test_a_responder_that_is_not_authenticated_asks_nothing_of_us(exchange: int) -> None:
    """Who did the key exchange has the keys, whoever it is (RFC 7296 section 2.2)."""
    pair = psk_pair(child())
    pair.a.start(pair.b.endpoint, pair.now)
    pair.step()
    pair.step()
    genuine = pair.take()
    stranger = pair.b.sa
    for number in (0, 1):
        header = Header(stranger.wire_spi_i, stranger.wire_spi_r, exchange, MessageId(number), initiator=False, response=False)
        sealed = seal_message(header, (DeletePayload(1), IdiPayload(Identity.parse("b.example"))), stranger.keys.send, pair.b.entropy)
        pair.deliver(Datagram("b", stranger.local, stranger.remote, sealed))
        assert not pair.flight
        assert pair.a.closed is None
    pair.deliver(genuine)
    pair.settle()
    agree(pair, 1)


def test_a_peer_gets_no_more_children_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create_child_sa, "MAX_CHILDREN", 3)
    pair = psk_pair(child())
    pair.connect()
    (entry,) = pair.a.sa.children.values()
    for _ in range(5):
        pair.a.run(pair.a.sa, pair.a.sa.create_child(entry.config, pair.now), pair.now)
        pair.settle()
    assert pair.a.failed == [Reason.NO_ADDITIONAL_SAS] * 3
    agree(pair, 3)
    # one that replaces another is refused as well, and the old one stays
    pair.a.run(pair.a.sa, pair.a.sa.rekey_child(entry.sa.id, pair.now), pair.now)
    pair.settle()
    agree(pair, 3)


# Answers of a peer that has the keys


@pytest.mark.parametrize(
    ("tsi", "tsr"),
    [("0.0.0.0/0", "10.2.0.0/16"), ("10.1.0.0/16", "0.0.0.0/0"), ("10.1.0.0/16,10.9.0.0/16", "10.2.0.0/16"), ("10.9.0.0/16", "10.9.0.0/16")],
)
def test_an_answer_that_widens_the_selectors_brings_nothing_up(tsi: str, tsr: str) -> None:
    """RFC 7296 section 2.9; and what stands only at the peer is deleted there."""
    pair = psk_pair(child())
    pair.connect()
    (entry,) = pair.a.sa.children.values()
    pair.a.run(pair.a.sa, pair.a.sa.create_child(entry.config, pair.now), pair.now)
    request = pair.take()
    opened = open_message(request.data, decode_message(request.data), pair.b.sa.keys.receive)
    offer = opened.first(SaPayload)
    assert offer is not None
    widened = TsiPayload(selectors(tsi)), TsrPayload(selectors(tsr))
    answer = SaPayload((offer.proposals[0].with_spi(b"\x0a\x0b\x0c\x0d"),)), NoncePayload(bytes(32)), *widened
    pair.deliver(make_answer(pair, decode_message(request.data).header, Exchange.CREATE_CHILD_SA, *answer))
    assert pair.a.failed == [Reason.TS_UNACCEPTABLE]
    agree(pair, 1)
    # INFORMATIONAL { D(ESP) } -->
    deletion = open_message(pair.flight[0].data, decode_message(pair.flight[0].data), pair.b.sa.keys.receive).first(DeletePayload)
    assert deletion is not None
    assert deletion.spis == (offer.proposals[0].spi,)


def test_what_is_remembered_of_early_deletes_is_bounded() -> None:
    pair = psk_pair(child())
    pair.connect()
    (entry,) = pair.a.sa.children.values()
    pair.a.run(pair.a.sa, pair.a.sa.create_child(entry.config, pair.now), pair.now)
    made_up = tuple((0x1000 + number).to_bytes(4, "big") for number in range(4 * MAX_EARLY_DELETES))
    sa = pair.b.sa
    header = Header(sa.wire_spi_i, sa.wire_spi_r, Exchange.INFORMATIONAL, MessageId(0), initiator=False, response=False)
    pair.deliver(Datagram("b", sa.local, sa.remote, seal_message(header, (DeletePayload(3, made_up),), sa.keys.send, pair.b.entropy)))
    sa._next_id += 1
    assert len(pair.a.sa.early_deletes) == MAX_EARLY_DELETES
    pair.settle()
    agree(pair, 2)
