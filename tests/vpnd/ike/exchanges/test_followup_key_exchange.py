"""IKE_FOLLOWUP_KE (RFC 9370 section 2.2.4): CHILD_SAs and a rekeyed IKE SA with additional key exchanges."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from lab.ike_pair import Datagram, Pair, Peer, agree, child, connection, mirrored, psk
from sk_messages import open_message, seal_message

from vpnd.ike.context import IkeSettings, Retransmission
from vpnd.ike.crypto.groups import group
from vpnd.ike.effects import ChildDenied, Reason, RekeyFailed
from vpnd.ike.followup import FOLLOWUP_SECONDS, MAX_FOLLOWUPS
from vpnd.ike.iana import Exchange, Group, NotifyType
from vpnd.ike.sa import IkeSaState
from vpnd.ike.wire.header import Header, MessageId
from vpnd.ike.wire.message import Message, decode_message
from vpnd.ike.wire.payloads import DeletePayload, KePayload, NotifyPayload, Payload

IKE = "aes128-sha256-x25519-ke1_mlkem768-ke4_ecp256"
NET = child("net", "10.1.0.0/16", "10.2.0.0/16", "aes128gcm16-x25519-ke1_mlkem768")
MORE = [child(f"more{number}", f"10.{number}.0.0/16", "10.2.0.0/16", "aes128gcm16-x25519-ke1_mlkem768-ke2_x448") for number in range(20, 30)]


def standing() -> Pair:
    a, b = [NET, *MORE], [mirrored(each) for each in (NET, *MORE)]
    pair = Pair(connection("to-b", psk("a"), psk("b"), a, IKE), connection("to-a", psk("b"), psk("a"), b, IKE))
    pair.connect()
    agree(pair, 1)
    pair.log.clear()
    for peer in pair.peers:
        peer.settings = IkeSettings(retransmission=Retransmission(timeout=1.0, base=1.0, tries=60), fragment_size=1500)
    return pair


def create(pair: Pair, peer: Peer, name: str = "more20") -> None:
    peer.run(peer.sa, peer.sa.create_child(peer.connections[0].children[name], pair.now), pair.now)


def rekey(pair: Pair, peer: Peer) -> None:
    peer.run(peer.sa, peer.sa.rekey_child(min(peer.sa.children), pair.now), pair.now)


def rekey_ike(pair: Pair, peer: Peer) -> None:
    peer.run(peer.sa, peer.sa.rekey(pair.now), pair.now)


def opened(pair: Pair, datagram: Datagram) -> Message:
    receiver = pair.b if datagram.sender == "a" else pair.a
    return open_message(datagram.data, decode_message(datagram.data), receiver.sa.keys.receive)


def sealed(sender: Peer, exchange: int, message_id: int, payloads: Sequence[Payload], *, response: bool = False) -> Datagram:
    sa = sender.sa
    header = Header(sa.wire_spi_i, sa.wire_spi_r, exchange, MessageId(message_id), initiator=sa.initiator, response=response)
    return Datagram(sender.name, sa.local, sa.remote, seal_message(header, payloads, sa.keys.send, sender.entropy))


def public(number: int) -> KePayload:
    return KePayload(number, group(number).initiate(lambda octets: bytes(octets - 1) + b"\1").public)


@pytest.mark.parametrize("by", ["a", "b"])
def test_a_child_with_two_more_key_exchanges(by: str) -> None:
    pair = standing()
    peer = pair.a if by == "a" else pair.b
    other = "b" if by == "a" else "a"
    first = 4 if by == "a" else 0  # after IKE_SA_INIT, two IKE_INTERMEDIATE and IKE_AUTH
    # CREATE_CHILD_SA { SA, Ni, KEi, TSi, TSr } -->   <-- CREATE_CHILD_SA { SA, Nr, KEr, TSi, TSr, N(ADDITIONAL_KEY_EXCHANGE) }
    create(pair, peer)
    pair.step()
    assert len(pair.a.sad) == len(pair.b.sad) == 2
    pair.step()
    # IKE_FOLLOWUP_KE { KEi(1), N(ADDITIONAL_KEY_EXCHANGE) } -->   <-- IKE_FOLLOWUP_KE { KEr(1), N(ADDITIONAL_KEY_EXCHANGE) }
    pair.step()
    pair.step()
    assert len(pair.a.sad) == len(pair.b.sad) == 2
    # IKE_FOLLOWUP_KE { KEi(2), N(ADDITIONAL_KEY_EXCHANGE) } -->   <-- IKE_FOLLOWUP_KE { KEr(2) }
    pair.settle()
    agree(pair, 2)
    assert pair.log == [
        *(f"{sender}: CREATE_CHILD_SA {kind} {first}" for sender, kind in ((by, "request"), (other, "response"))),
        *(f"{sender}: IKE_FOLLOWUP_KE {kind} {first + n}" for n in (1, 2) for sender, kind in ((by, "request"), (other, "response"))),
    ]


@pytest.mark.parametrize("by", ["a", "b"])
def test_rekeying_of_a_child(by: str) -> None:
    pair = standing()
    before = set(pair.a.sad)
    rekey(pair, pair.a if by == "a" else pair.b)
    pair.settle()
    pair.wait(IkeSettings().rekeyed_delay)
    agree(pair, 1)
    assert not before & set(pair.a.sad)
    assert sum("FOLLOWUP" in line for line in pair.log) == 2


@pytest.mark.parametrize("by", ["a", "b"])
def test_rekeying_of_the_ike_sa(by: str) -> None:
    pair = standing()
    old = pair.a.sa
    # CREATE_CHILD_SA { SA, Ni, KEi } -->   <-- CREATE_CHILD_SA { SA, Nr, KEr, N(ADDITIONAL_KEY_EXCHANGE) }, and IKE_FOLLOWUP_KE twice
    rekey_ike(pair, pair.a if by == "a" else pair.b)
    pair.settle()
    agree(pair, 1)
    assert len(pair.a.standing) == len(pair.b.standing) == 1
    assert old.closed
    assert pair.a.sa.keys.keys == pair.b.sa.keys.keys
    assert pair.a.sa.proposal is not None
    assert pair.a.sa.proposal.additional == (Group.ML_KEM_768, Group.ECP_256)
    assert sum("FOLLOWUP" in line for line in pair.log) == 4
    # and the new one works
    pair.a.run(pair.a.sa, pair.a.sa.probe(pair.now), pair.now)
    pair.settle()
    assert not pair.a.sa.tasks_active


@pytest.mark.parametrize("number", [Group.ML_KEM_768, Group.ML_KEM_1024])
def test_ml_kem_alone_is_a_key_exchange_too(number: int) -> None:
    word = {Group.ML_KEM_768: "mlkem768", Group.ML_KEM_1024: "mlkem1024"}[Group(number)]
    config = child(esp=f"aes128gcm16-{word}")
    ike = f"aes128-sha256-x25519-{word}"
    pair = Pair(connection("to-b", psk("a"), psk("b"), [config], ike), connection("to-a", psk("b"), psk("a"), [mirrored(config)], ike))
    pair.connect()
    rekey(pair, pair.a)
    pair.settle()
    rekey_ike(pair, pair.b)
    pair.settle()
    pair.wait(IkeSettings().rekeyed_delay)
    agree(pair, 1)


# Both at once; the random lives of test_random_lives.py go through every order


@pytest.mark.parametrize("act", [rekey, rekey_ike])
@pytest.mark.parametrize("first", ["a", "b"])
def test_both_sides_at_once(act: Callable[[Pair, Peer], None], first: str) -> None:
    pair = standing()
    one, other = pair.peers if first == "a" else pair.peers[::-1]
    act(pair, one)
    act(pair, other)
    pair.settle()
    pair.wait(200.0)
    agree(pair, 1)
    assert len(pair.a.standing) == len(pair.b.standing) == 1
    assert not pair.a.sa.followups
    assert not pair.b.sa.followups


def test_while_the_peer_rekeys_the_ike_sa_we_make_nothing_on_it() -> None:
    pair = standing()
    rekey_ike(pair, pair.a)
    pair.step()
    # b waits for IKE_FOLLOWUP_KE
    create(pair, pair.b)
    assert pair.b.sa.tasks_queued == ("CHILD_CREATE",)
    pair.settle()
    agree(pair, 2)
    assert len(pair.b.standing) == 1


# A peer that stops, errs or asks for too much


def test_key_exchanges_that_do_not_come_are_waited_for_a_bounded_time() -> None:
    pair = standing()
    create(pair, pair.a)
    pair.step()
    assert len(pair.b.larval) == 1
    pair.flight.clear()
    pair.a.settings = IkeSettings(retransmission=Retransmission(timeout=100.0, limit=0.0))
    pair.wait(FOLLOWUP_SECONDS - 1, drop=lambda datagram: True)
    assert pair.b.larval
    pair.wait(1.0, drop=lambda datagram: True)
    assert not pair.b.larval
    assert not pair.b.sa.followups


def test_a_request_that_comes_too_late_gets_state_not_found_and_is_begun_anew() -> None:
    pair = standing()
    create(pair, pair.a)
    pair.step()
    # the answer is lost for so long that the responder waits no more
    pair.wait(FOLLOWUP_SECONDS + 2, drop=lambda datagram: datagram.sender == "b")
    pair.settle()
    assert not pair.b.larval
    pair.wait(10.0)
    agree(pair, 2)
    assert pair.log.count("a: CREATE_CHILD_SA request 4") > 1
    assert any(line.startswith("a: CREATE_CHILD_SA request") and not line.endswith(" 4") for line in pair.log)


@pytest.mark.parametrize(
    ("payloads", "notify"),
    [
        (lambda link: [public(Group.ML_KEM_768)], NotifyType.STATE_NOT_FOUND),
        (lambda link: [public(Group.ML_KEM_768), NotifyPayload(NotifyType.ADDITIONAL_KEY_EXCHANGE, b"another link")], NotifyType.STATE_NOT_FOUND),
        (lambda link: [NotifyPayload(NotifyType.ADDITIONAL_KEY_EXCHANGE, link)], NotifyType.INVALID_SYNTAX),
        (lambda link: [public(Group.CURVE_448), NotifyPayload(NotifyType.ADDITIONAL_KEY_EXCHANGE, link)], NotifyType.INVALID_SYNTAX),
        (
            lambda link: [KePayload(Group.ML_KEM_1024, public(Group.ML_KEM_768).data), NotifyPayload(NotifyType.ADDITIONAL_KEY_EXCHANGE, link)],
            NotifyType.INVALID_SYNTAX,
        ),
        (lambda link: [KePayload(Group.ML_KEM_768, bytes(1183)), NotifyPayload(NotifyType.ADDITIONAL_KEY_EXCHANGE, link)], NotifyType.INVALID_SYNTAX),
    ],
)
def test_a_wrong_request_brings_nothing_up(payloads: Callable[[bytes], list[Payload]], notify: int) -> None:
    pair = standing()
    create(pair, pair.a)
    pair.step()
    link = opened(pair, pair.take()).notify(NotifyType.ADDITIONAL_KEY_EXCHANGE)
    assert link is not None
    pair.deliver(sealed(pair.a, Exchange.IKE_FOLLOWUP_KE, 5, payloads(link.data)))
    (answer,) = pair.flight
    assert [payload.type for payload in opened(pair, answer).all(NotifyPayload)] == [notify]
    pair.a.settings = IkeSettings(retransmission=Retransmission(timeout=100.0, limit=0.0))
    pair.wait(FOLLOWUP_SECONDS, drop=lambda datagram: True)
    assert len(pair.b.sad) == 2
    assert not pair.b.larval
    assert pair.b.sa.state is IkeSaState.ESTABLISHED


def test_a_link_serves_once() -> None:
    pair = standing()
    create(pair, pair.a)
    pair.step()
    pair.step()
    request = opened(pair, pair.flight[0]).payloads
    pair.settle()
    agree(pair, 2)
    pair.deliver(sealed(pair.a, Exchange.IKE_FOLLOWUP_KE, 7, request))
    assert opened(pair, pair.take()).notify(NotifyType.STATE_NOT_FOUND)


def test_what_waits_for_key_exchanges_is_bounded() -> None:
    pair = standing()
    kinds = []
    for number in range(4, 4 + MAX_FOLLOWUPS + 1):
        # a peer that begins and never goes on
        create(pair, pair.a, f"more{16 + number}")
        request = opened(pair, pair.flight.pop()).payloads
        pair.deliver(sealed(pair.a, Exchange.CREATE_CHILD_SA, number, request))
        kinds.append([payload.type for payload in opened(pair, pair.take()).all(NotifyPayload)][-1])
        task, pair.a.sa.active = pair.a.sa.active, None
        assert task is not None
        pair.a.sa._outstanding = None
    assert kinds == [NotifyType.ADDITIONAL_KEY_EXCHANGE] * MAX_FOLLOWUPS + [NotifyType.TEMPORARY_FAILURE]
    assert len(pair.b.larval) == MAX_FOLLOWUPS
    assert pair.b.happened(ChildDenied)


def test_the_end_of_the_ike_sa_takes_along_what_waits() -> None:
    pair = standing()
    create(pair, pair.a)
    pair.step()
    pair.flight.clear()
    assert pair.b.larval
    pair.deliver(sealed(pair.a, Exchange.INFORMATIONAL, 5, [DeletePayload(1)]))
    assert pair.b.closed is Reason.PEER_DELETED
    assert not pair.b.larval
    assert not pair.b.sad


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [public(Group.CURVE_448), NotifyPayload(NotifyType.ADDITIONAL_KEY_EXCHANGE, b"link")],
        [KePayload(Group.ML_KEM_768, bytes(1087)), NotifyPayload(NotifyType.ADDITIONAL_KEY_EXCHANGE, b"link")],
        [KePayload(Group.ML_KEM_768, bytes(1088))],  # and ends it, though one more was agreed on
        [NotifyPayload(NotifyType.NO_PROPOSAL_CHOSEN)],
    ],
)
def test_a_wrong_answer_brings_nothing_up(answer: list[Payload]) -> None:
    pair = standing()
    create(pair, pair.a)
    pair.step()
    pair.step()
    pair.step()
    pair.flight.clear()
    pair.deliver(sealed(pair.b, Exchange.IKE_FOLLOWUP_KE, 5, answer, response=True))
    assert len(pair.a.failed) == 1
    assert not pair.a.larval
    assert len(pair.a.sad) == 2


def test_a_failed_rekeying_of_the_ike_sa_leaves_the_old_one() -> None:
    pair = standing()
    rekey_ike(pair, pair.a)
    pair.step()
    pair.step()
    pair.step()
    pair.flight.clear()
    pair.deliver(sealed(pair.b, Exchange.IKE_FOLLOWUP_KE, 5, [KePayload(Group.ML_KEM_768, b"")], response=True))
    assert pair.a.happened(RekeyFailed)
    assert pair.a.sa.state is IkeSaState.ESTABLISHED
    pair.wait(FOLLOWUP_SECONDS + 1)
    assert len(pair.a.standing) == len(pair.b.standing) == 1
    agree(pair, 1)
