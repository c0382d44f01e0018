"""IKE_INTERMEDIATE and additional key exchanges before IKE_AUTH (RFC 9242, RFC 9370)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from lab.ike_pair import Datagram, Pair, agree, child, connection, mirrored, psk
from sk_messages import open_message, seal_message

from vpnd.ike.context import IkeSettings, Retransmission
from vpnd.ike.crypto.groups import group
from vpnd.ike.effects import AuthenticationRejected, Reason
from vpnd.ike.exchanges import ike_intermediate
from vpnd.ike.iana import Exchange, Group, NotifyType, ProtocolId
from vpnd.ike.proposal import default_proposals
from vpnd.ike.sa import IkeSaState
from vpnd.ike.session import Session
from vpnd.ike.steps import Steps
from vpnd.ike.transport import UNPROTECTED_ERROR_GRACE
from vpnd.ike.wire.header import Header, MessageId
from vpnd.ike.wire.message import Message, decode_message, encode_message
from vpnd.ike.wire.payloads import KePayload, NotifyPayload, Payload, SaPayload, UnknownPayload

ONE = "aes256gcm16-prfsha384-x25519-ke1_mlkem768"


def pair_of(ours: str, theirs: str | None = None) -> Pair:
    config = child()
    a = connection("to-b", psk("a.example"), psk("b.example"), [config], ours, mobike=False)  # IKE stays on port 500: a request with ML-KEM-768 is one datagram
    b = connection("to-a", psk("b.example"), psk("a.example"), [mirrored(config)], theirs or ours, mobike=False)
    return Pair(a, b)


@pytest.mark.parametrize(
    ("proposal", "exchanges", "chosen"),
    [
        (ONE, 1, (Group.ML_KEM_768,)),
        ("aes128-sha256-x25519-ke1_mlkem1024", 1, (Group.ML_KEM_1024,)),
        ("aes128gcm16-prfsha256-ecp256-ke1_mlkem768-ke3_x448-ke7_ecp521", 3, (Group.ML_KEM_768, Group.CURVE_448, Group.ECP_521)),
        ("aes128gcm16-prfsha256-x25519-ke1_none-ke1_mlkem768", 0, ()),
        ("aes128gcm16-prfsha256-x25519-ke1_x25519-ke1_mlkem768-ke2_mlkem768-ke2_none", 1, (Group.ML_KEM_768,)),  # no method twice
        ("aes128gcm16-prfsha256-mlkem768", 0, ()),
    ],
)
def test_each_additional_key_exchange_has_its_round(proposal: str, exchanges: int, chosen: tuple[int, ...]) -> None:
    pair = pair_of(proposal)
    # IKE_SA_INIT { SA(KE, ADDKE...), KE, Ni, N(INTERMEDIATE_EXCHANGE_SUPPORTED) } -->
    # <-- IKE_SA_INIT { SA, KE, Nr, N(INTERMEDIATE_EXCHANGE_SUPPORTED) }
    # IKE_INTERMEDIATE { KEi(n) } -->   <-- IKE_INTERMEDIATE { KEr(n) }
    # IKE_AUTH { IDi, AUTH, SA, TSi, TSr } -->   <-- IKE_AUTH { IDr, AUTH, SA, TSi, TSr }
    pair.connect()
    agree(pair, 1)
    assert list(dict.fromkeys(pair.log)) == [  # fragments of a message count once
        "a: IKE_SA_INIT request 0",
        "b: IKE_SA_INIT response 0",
        *(line for number in range(1, exchanges + 1) for line in (f"a: IKE_INTERMEDIATE request {number}", f"b: IKE_INTERMEDIATE response {number}")),
        f"a: IKE_AUTH request {exchanges + 1}",
        f"b: IKE_AUTH response {exchanges + 1}",
    ]
    for peer in pair.peers:
        assert peer.sa.proposal is not None
        assert peer.sa.proposal.additional == chosen


def test_the_keys_change_with_each_round_and_an_exchange_goes_on_under_the_last() -> None:
    pair = pair_of(ONE)
    pair.a.start(pair.b.endpoint, pair.now)
    pair.step()
    pair.step()
    before = pair.b.sa.keys
    pair.step()
    after = pair.b.sa.keys
    assert before.keys.d != after.keys.d
    assert before.keys.ei != after.keys.ei
    pair.settle()
    agree(pair, 1)
    assert pair.a.sa.keys.keys == pair.b.sa.keys.keys == after.keys


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (f"{ONE},aes256gcm16-prfsha384-x25519", "aes256gcm16-prfsha384-x25519"),
        (f"{ONE}-ke1_none", "aes256gcm16-prfsha384-x25519"),
        ("aes256gcm16-prfsha384-x25519", f"{ONE}-ke1_none"),
        ("aes256gcm16-prfsha384-x25519", f"{ONE},aes256gcm16-prfsha384-x25519"),
    ],
)
def test_a_peer_without_them_is_met_halfway_if_the_configuration_says_so(ours: str, theirs: str) -> None:
    pair = pair_of(ours, theirs)
    pair.connect()
    agree(pair, 1)
    assert not any("INTERMEDIATE" in line for line in pair.log)


@pytest.mark.parametrize(("ours", "theirs"), [(ONE, "aes256gcm16-prfsha384-x25519"), ("aes256gcm16-prfsha384-x25519", ONE)])
def test_a_demanded_key_exchange_is_not_left_out(ours: str, theirs: str) -> None:
    pair = pair_of(ours, theirs)
    pair.connect()
    pair.wait(UNPROTECTED_ERROR_GRACE)
    assert pair.a.closed is Reason.NO_PROPOSAL_CHOSEN
    assert not pair.b.sas


def test_the_default_proposals_meet_in_ml_kem() -> None:
    pair = pair_of("default")
    pair.connect()
    agree(pair, 1)
    assert pair.a.sa.proposal is not None
    assert pair.a.sa.proposal.additional == (Group.ML_KEM_768,)
    assert [proposal.asks_additional for proposal in default_proposals(ProtocolId.IKE)] == [True, False, False]


# Loss and repetition


def test_lost_and_repeated_messages_change_nothing() -> None:
    pair = pair_of("aes128gcm16-prfsha256-x25519-ke1_mlkem768-ke2_x448")
    for peer in pair.peers:
        peer.settings = IkeSettings(retransmission=Retransmission(timeout=1.0, base=1.5))
    seen: set[bytes] = set()

    def first_copy(datagram: Datagram) -> bool:
        new = datagram.data not in seen
        seen.add(datagram.data)
        return new

    pair.connect(drop=first_copy)
    pair.wait(60.0, drop=first_copy)
    agree(pair, 1)


def test_a_repeated_request_gets_the_same_answer_after_the_keys_changed() -> None:
    pair = pair_of(ONE)
    pair.a.start(pair.b.endpoint, pair.now)
    pair.step()
    pair.step()
    request = pair.take()
    pair.deliver(request)
    answer = pair.take()
    pair.deliver(request)
    assert pair.take().data == answer.data
    pair.deliver(answer)
    pair.settle()
    agree(pair, 1)


@pytest.mark.parametrize(("octets", "loss"), [(576, 0), (576, 1), (1280, 1)])
def test_fragments_of_any_size_are_covered_alike(octets: int, loss: int) -> None:
    """RFC 9242 section 3.3.2: what AUTH covers is the message, however it travelled; here the two sides cut differently, and copies are cut anew."""
    pair = pair_of("aes128gcm16-prfsha256-x25519-ke1_mlkem1024-ke2_mlkem768")
    for peer, size in zip(pair.peers, (octets, 0), strict=True):
        peer.settings = IkeSettings(retransmission=Retransmission(timeout=1.0, base=1.2), fragment_size=size)
    lost: dict[str, int] = {}

    def drop(datagram: Datagram) -> bool:
        key = str(datagram)
        lost[key] = lost.get(key, 0) + 1
        return "INTERMEDIATE" in key and lost[key] <= loss

    pair.connect(drop)
    pair.wait(20.0, drop)
    agree(pair, 1)
    assert pair.log.count("a: IKE_INTERMEDIATE request 1") > 1


# Somebody in between


def rewritten(datagram: Datagram, change: Callable[[Payload], Payload | None]) -> Datagram:
    message = decode_message(datagram.data)
    payloads = tuple(new for payload in message.payloads if (new := change(payload)) is not None)
    return replace(datagram, data=encode_message(Message(message.header, payloads)))


def _without_additional(payload: Payload) -> Payload | None:
    if isinstance(payload, SaPayload):
        bare = [proposal.without_additional() for proposal in payload.proposals]
        return SaPayload(tuple(proposal for proposal in bare if proposal is not None))
    if isinstance(payload, NotifyPayload) and payload.type == NotifyType.INTERMEDIATE_EXCHANGE_SUPPORTED:
        return None
    return payload


def test_a_downgrade_in_between_is_found_by_auth() -> None:
    pair = pair_of("default")
    pair.a.start(pair.b.endpoint, pair.now)
    # the proposals with ML-KEM and the notification go missing on the way there: the responder answers in good faith
    pair.deliver(rewritten(pair.take(), _without_additional))
    pair.settle()
    assert not any("INTERMEDIATE" in line for line in pair.log)
    assert pair.b.closed is Reason.AUTHENTICATION_FAILED
    assert pair.a.closed is Reason.PEER_AUTHENTICATION_FAILED
    agree(pair, 0)


def test_the_notification_alone_taken_away_leads_to_no_ike_sa() -> None:
    def strip(payload: Payload) -> Payload | None:
        return None if isinstance(payload, NotifyPayload) and payload.type == NotifyType.INTERMEDIATE_EXCHANGE_SUPPORTED else payload

    # on its way there: an offer of additional key exchanges from a peer that cannot do them counts for nothing
    pair = pair_of(ONE)
    pair.a.start(pair.b.endpoint, pair.now)
    pair.deliver(rewritten(pair.take(), strip))
    pair.settle()
    assert not pair.b.sas
    # on its way back: waits for a better answer, and then gives up
    pair = pair_of(ONE)
    pair.a.start(pair.b.endpoint, pair.now)
    pair.step()
    pair.deliver(rewritten(pair.take(), strip))
    assert not pair.flight
    pair.wait(UNPROTECTED_ERROR_GRACE, drop=lambda datagram: True)
    assert pair.a.closed is Reason.INVALID_SYNTAX


def test_a_method_chosen_twice_is_not_accepted() -> None:
    pair = pair_of("aes128gcm16-prfsha256-x25519-ke1_x25519-ke1_mlkem768")
    pair.a.start(pair.b.endpoint, pair.now)
    pair.step()

    def twice(payload: Payload) -> Payload:
        if not isinstance(payload, SaPayload):
            return payload
        (proposal,) = payload.proposals
        transforms = tuple(replace(t, id=Group.CURVE_25519) if t.id == Group.ML_KEM_768 else t for t in proposal.transforms)
        return SaPayload((replace(proposal, transforms=transforms),))

    pair.deliver(rewritten(pair.take(), twice))
    pair.wait(UNPROTECTED_ERROR_GRACE, drop=lambda datagram: True)
    assert pair.a.closed is Reason.NO_PROPOSAL_CHOSEN


# A peer that does it wrong


def half_way(proposal: str = ONE) -> Pair:
    """After IKE_SA_INIT; the first IKE_INTERMEDIATE request is in flight."""
    pair = pair_of(proposal)
    pair.a.start(pair.b.endpoint, pair.now)
    pair.step()
    pair.step()
    return pair


def forged(pair: Pair, exchange: int, payloads: list[Payload], message_id: int = 1) -> Datagram:
    """A request of `a`'s, protected as it should be."""
    sa = pair.a.sa
    header = Header(sa.wire_spi_i, sa.wire_spi_r, exchange, MessageId(message_id), initiator=True, response=False)
    return Datagram("a", sa.local, sa.remote, seal_message(header, payloads, sa.keys.send, pair.a.entropy))


def answer_of(pair: Pair) -> list[int]:
    """Types of the notifications in the answer that is in flight."""
    (datagram,) = pair.flight
    opened = open_message(datagram.data, decode_message(datagram.data), pair.a.sa.keys.receive)
    return [payload.type for payload in opened.payloads if isinstance(payload, NotifyPayload)]


def _key(number: int, octets: int | None = None) -> KePayload:
    public = group(number).initiate(lambda octets: bytes(octets)).public
    return KePayload(number, public[:octets] + bytes(max(0, (octets or 0) - len(public))))


@pytest.mark.parametrize(
    ("payloads", "notify"),
    [
        ([], NotifyType.INVALID_SYNTAX),
        ([_key(Group.CURVE_25519)], NotifyType.INVALID_SYNTAX),
        ([_key(Group.ML_KEM_1024)], NotifyType.INVALID_SYNTAX),
        ([replace(_key(Group.ML_KEM_768), group=Group.ML_KEM_1024)], NotifyType.INVALID_SYNTAX),  # right in all but its number
        ([_key(Group.ML_KEM_768, 1183)], NotifyType.INVALID_SYNTAX),
        ([_key(Group.ML_KEM_768, 1185)], NotifyType.INVALID_SYNTAX),
        ([KePayload(Group.ML_KEM_768, b"\xff" * 1184)], NotifyType.INVALID_SYNTAX),
        ([UnknownPayload(200, b"", critical=True), _key(Group.ML_KEM_768)], NotifyType.UNSUPPORTED_CRITICAL_PAYLOAD),
    ],
)
def test_a_wrong_key_exchange_ends_it(payloads: list[Payload], notify: int) -> None:
    pair = half_way()
    pair.flight.clear()
    pair.deliver(forged(pair, Exchange.IKE_INTERMEDIATE, payloads))
    assert answer_of(pair) == [notify]
    assert pair.b.closed in (Reason.INVALID_SYNTAX, Reason.UNSUPPORTED_CRITICAL_PAYLOAD)
    agree_nothing(pair)


def agree_nothing(pair: Pair) -> None:
    assert not pair.b.sad
    assert not pair.b.larval
    assert not pair.b.established()


def test_ike_auth_before_the_last_key_exchange_ends_it() -> None:
    pair = half_way()
    pair.flight.clear()
    pair.deliver(forged(pair, Exchange.IKE_AUTH, []))
    assert answer_of(pair) == [NotifyType.INVALID_SYNTAX]
    assert pair.b.closed is Reason.INVALID_SYNTAX
    assert pair.b.happened(AuthenticationRejected)


def test_a_peer_that_leaves_the_additional_key_exchange_out_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its AUTH is right: it has the secret, and nothing of IKE_INTERMEDIATE is to be covered."""

    def none_at_all(_session: Session) -> Steps[bool]:
        yield from ()
        return True

    monkeypatch.setattr(ike_intermediate, "initiate", none_at_all)
    pair = pair_of(ONE)
    pair.connect()
    assert not any("INTERMEDIATE" in line for line in pair.log)
    assert pair.b.closed is Reason.INVALID_SYNTAX
    agree_nothing(pair)
    assert not pair.a.sad


def test_no_more_rounds_than_were_agreed_on() -> None:
    pair = half_way()
    pair.step()
    pair.step()
    pair.flight.clear()
    # IKE_INTERMEDIATE { KEi } once more, instead of IKE_AUTH
    pair.deliver(forged(pair, Exchange.IKE_INTERMEDIATE, [_key(Group.ML_KEM_768)], 2))
    assert answer_of(pair) == [NotifyType.INVALID_SYNTAX]
    assert pair.b.closed is Reason.INVALID_SYNTAX


def test_without_an_agreement_there_is_no_intermediate_exchange() -> None:
    pair = half_way("aes256gcm16-prfsha384-x25519")
    pair.flight.clear()
    pair.deliver(forged(pair, Exchange.IKE_INTERMEDIATE, [_key(Group.ML_KEM_768)]))
    assert pair.b.closed is Reason.INVALID_SYNTAX


def test_rounds_that_do_not_come_end_with_the_half_open_time() -> None:
    pair = half_way("aes128gcm16-prfsha256-x25519-ke1_mlkem768-ke2_x448")
    pair.step()
    pair.flight.clear()
    pair.wait(pair.b.settings.half_open_timeout, drop=lambda datagram: True)
    assert pair.b.closed is Reason.HALF_OPEN_TIMEOUT


def test_foreign_ids_and_repetition_of_an_old_round_change_nothing() -> None:
    pair = half_way("aes128gcm16-prfsha256-x25519-ke1_mlkem768-ke2_x448")
    first = pair.flight[0]
    # a round out of order, and one that nobody protected
    pair.deliver(forged(pair, Exchange.IKE_INTERMEDIATE, [_key(Group.CURVE_448)], 2))
    damaged = replace(first, data=first.data[:-1] + bytes((first.data[-1] ^ 1,)))
    pair.deliver(damaged)
    assert pair.flight == [first]
    pair.step()
    pair.step()
    # the first round again, in the middle of the second
    pair.deliver(first)
    pair.settle()
    agree(pair, 1)


@pytest.mark.parametrize("answer", [[], [_key(Group.CURVE_25519)], [KePayload(Group.ML_KEM_768, bytes(1087))], [NotifyPayload(NotifyType.NO_PROPOSAL_CHOSEN)]])
def test_an_initiator_ends_it_too(answer: list[Payload]) -> None:
    pair = half_way()
    pair.flight.clear()
    sa = pair.b.sa
    header = Header(sa.wire_spi_i, sa.wire_spi_r, Exchange.IKE_INTERMEDIATE, MessageId(1), initiator=False, response=True)
    pair.deliver(Datagram("b", sa.local, sa.remote, seal_message(header, answer, sa.keys.send, pair.b.entropy)))
    assert pair.a.closed in (Reason.INVALID_SYNTAX, Reason.NO_PROPOSAL_CHOSEN)
    assert pair.a.sa.state is IkeSaState.DESTROYING
    assert not pair.flight


def test_a_changed_ciphertext_is_found_by_the_next_message() -> None:
    pair = half_way()
    keys = pair.b.sa.keys
    pair.step()
    pair.flight.clear()
    # instead of the responder's answer another ciphertext of the right length arrives: from now on the keys differ
    sa = pair.b.sa
    header = Header(sa.wire_spi_i, sa.wire_spi_r, Exchange.IKE_INTERMEDIATE, MessageId(1), initiator=False, response=True)
    payloads = [KePayload(Group.ML_KEM_768, bytes(1088))]
    pair.deliver(Datagram("b", sa.local, sa.remote, seal_message(header, payloads, keys.send, pair.b.entropy)))
    assert [str(datagram) for datagram in pair.flight] == ["a: IKE_AUTH request 2"]
    pair.settle()
    agree_nothing(pair)
    pair.wait(pair.b.settings.half_open_timeout)
    assert pair.b.closed is Reason.HALF_OPEN_TIMEOUT
