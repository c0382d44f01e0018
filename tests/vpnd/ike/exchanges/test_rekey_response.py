"""Peers that rekey: a CHILD_SA is replaced, an IKE SA is not yet."""

from __future__ import annotations

from lab.ike_pair import Pair, Peer, agree, child, psk_pair

from vpnd.ike.child import Keying, make_offer, read_answer
from vpnd.ike.context import ChildRequest
from vpnd.ike.effects import ChildClosed, Reason
from vpnd.ike.exchanges.create_child_sa import finish
from vpnd.ike.iana import Exchange, NotifyType, ProtocolId
from vpnd.ike.proposal import number_proposals
from vpnd.ike.sa import ChildSaState, IkeSa
from vpnd.ike.session import Ask, Steps, Task, ask
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import NoncePayload, NotifyPayload, Payload, SaPayload

NONCE = bytes(range(32))


def send(pair: Pair, peer: Peer, payloads: tuple[Payload, ...]) -> Message:
    """What the other side answers to a CREATE_CHILD_SA request."""
    answers: list[Message] = []

    def steps() -> Steps[None]:
        answers.append((yield from ask(Ask(Exchange.CREATE_CHILD_SA, payloads))))

    peer.sa.queue.append(Task("TEST", steps()))
    pair.settle()
    return answers[0]


def rekey(sa: IkeSa, spi: int, task: Task) -> Steps[None]:
    assert task.child is not None
    offer = yield from make_offer(sa, task.child, key_exchange=True)
    old = NotifyPayload(NotifyType.REKEY_SA, b"", ProtocolId.ESP, spi.to_bytes(4, "big"))
    proposal, *rest = offer.payloads()
    # CREATE_CHILD_SA { N(REKEY_SA), SA, Ni, TSi, TSr } -->  <-- CREATE_CHILD_SA { SA, Nr, TSi, TSr }
    answer = yield from ask(Ask(Exchange.CREATE_CHILD_SA, (old, proposal, NoncePayload(NONCE), *rest)))
    nonce = answer.first(NoncePayload)
    assert nonce is not None
    finish(sa, task, read_answer(sa, offer, answer), offer, Keying(NONCE, nonce.data, True))


def test_a_child_is_replaced_and_the_old_one_goes_when_the_peer_deletes_it() -> None:
    pair = psk_pair()
    pair.connect()
    sa = pair.a.sa
    (old,) = sa.children.values()
    task = Task("CHILD_REKEY", iter(()), ChildRequest(old.config, reqid=old.sa.reqid))  # type: ignore[arg-type]
    task.steps = rekey(sa, old.sa.inbound.spi, task)
    sa.queue.append(task)
    pair.settle()
    agree(pair, 2)
    theirs, fresh = pair.b.sa.children.values()
    assert theirs.state is ChildSaState.REKEYED
    assert theirs.sa.reqid == fresh.sa.reqid
    # INFORMATIONAL { D(old) } -->
    pair.a.run(sa, sa.delete_child(old.sa.id, pair.now), pair.now)
    pair.settle()
    agree(pair, 1)
    (closed,) = pair.b.happened(ChildClosed)
    assert isinstance(closed, ChildClosed)
    assert closed.reason is Reason.REPLACED


def test_a_child_that_is_not_there_cannot_be_replaced() -> None:
    pair = psk_pair()
    pair.connect()
    answer = send(pair, pair.a, (NotifyPayload(NotifyType.REKEY_SA, b"", ProtocolId.ESP, b"nope"), NoncePayload(NONCE)))
    notify = answer.notify(NotifyType.CHILD_SA_NOT_FOUND)
    assert notify is not None
    assert (notify.protocol, notify.spi) == (ProtocolId.ESP, b"nope")
    agree(pair, 1)


def test_rekeying_the_ike_sa_is_declined() -> None:
    pair = psk_pair()
    pair.connect()
    proposals = number_proposals(pair.a.connections[0].proposals, bytes(8))
    answer = send(pair, pair.a, (SaPayload(proposals), NoncePayload(NONCE)))
    assert answer.notify(NotifyType.NO_ADDITIONAL_SAS) is not None
    agree(pair, 1)


def test_incomplete_requests_get_invalid_syntax() -> None:
    pair = psk_pair(child())
    pair.connect()
    for payloads in ((), (NoncePayload(NONCE),), (SaPayload(()),)):
        answer = send(pair, pair.a, payloads)
        assert answer.notify(NotifyType.INVALID_SYNTAX) is not None
    agree(pair, 1)
