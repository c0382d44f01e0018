"""Requests to rekey that are not as they should be."""

from __future__ import annotations

import pytest
from lab.ike_pair import Pair, Peer, agree, child, psk_pair

from vpnd.ike.iana import Exchange, NotifyType, ProtocolId
from vpnd.ike.proposal import number_proposals
from vpnd.ike.session import Session
from vpnd.ike.steps import Ask, Steps, Task, ask
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import KePayload, NoncePayload, NotifyPayload, Payload, SaPayload, TsiPayload, TsrPayload

NONCE = bytes(range(32))
X25519 = 31


def send(pair: Pair, peer: Peer, *payloads: Payload) -> Message:
    """What the other side answers to a CREATE_CHILD_SA request."""
    answers: list[Message] = []

    def steps(_session: Session, _task: Task) -> Steps[None]:
        answers.append((yield from ask(Ask(Exchange.CREATE_CHILD_SA, payloads))))

    peer.sa.queue.append(Task("TEST", steps))
    pair.settle()
    return answers[0]


def connected() -> Pair:
    pair = psk_pair(child())
    pair.connect()
    return pair


def test_a_child_that_is_not_there_cannot_be_replaced() -> None:
    pair = connected()
    answer = send(pair, pair.a, NotifyPayload(NotifyType.REKEY_SA, b"", ProtocolId.ESP, b"nope"), NoncePayload(NONCE))
    notify = answer.notify(NotifyType.CHILD_SA_NOT_FOUND)
    assert notify is not None
    assert (notify.protocol, notify.spi) == (ProtocolId.ESP, b"nope")
    agree(pair, 1)


def test_incomplete_requests_get_invalid_syntax() -> None:
    pair = connected()
    for payloads in ((), (NoncePayload(NONCE),), (SaPayload(()),)):
        assert send(pair, pair.a, *payloads).notify(NotifyType.INVALID_SYNTAX) is not None
    agree(pair, 1)


@pytest.mark.parametrize(
    ("spi", "nonce", "group", "public", "expected"),
    [
        (bytes(8), NONCE, X25519, b"\x09" + bytes(31), NotifyType.NO_PROPOSAL_CHOSEN),  # the SPI 0
        (b"\x01" * 4, NONCE, X25519, b"\x09" + bytes(31), NotifyType.NO_PROPOSAL_CHOSEN),  # one of ESP's length
        (b"\x01" * 8, b"short", X25519, b"\x09" + bytes(31), NotifyType.INVALID_SYNTAX),
        (b"\x01" * 8, NONCE, None, b"", NotifyType.INVALID_SYNTAX),
        (b"\x01" * 8, NONCE, 19, bytes(64), NotifyType.INVALID_KE_PAYLOAD),
        (b"\x01" * 8, NONCE, X25519, bytes(32), NotifyType.INVALID_SYNTAX),  # a point of small order
        (b"\x01" * 8, NONCE, X25519, b"short", NotifyType.INVALID_SYNTAX),
    ],
)
def test_faulty_rekeyings_of_the_ike_sa_change_nothing(spi: bytes, nonce: bytes, group: int | None, public: bytes, expected: NotifyType) -> None:
    pair = connected()
    proposals = number_proposals(pair.a.connections[0].proposals, spi)
    key_exchange = [KePayload(group, public)] if group is not None else []
    answer = send(pair, pair.a, SaPayload(proposals), NoncePayload(nonce), *key_exchange)
    assert answer.notify(expected) is not None
    agree(pair, 1)
    assert len(pair.a.standing) == len(pair.b.standing) == 1


@pytest.mark.parametrize("nonce", [b"", bytes(15), bytes(257)])
def test_a_nonce_of_a_wrong_length_brings_nothing_up(nonce: bytes) -> None:
    """RFC 7296 section 3.9."""
    pair = connected()
    (entry,) = pair.a.sa.children.values()
    offer = number_proposals(entry.config.esp_proposals, b"\x01\x02\x03\x04")
    selectors = TsiPayload(entry.sa.local_ts), TsrPayload(entry.sa.remote_ts)
    answer = send(pair, pair.a, SaPayload(offer), NoncePayload(nonce), *selectors)
    assert answer.notify(NotifyType.INVALID_SYNTAX) is not None
    agree(pair, 1)
    # with a right one it would have come up
    assert send(pair, pair.a, SaPayload(offer), NoncePayload(NONCE), *selectors).first(SaPayload) is not None
    assert len(pair.b.sad) == 4
