"""Session resumption by ticket (RFC 5723): both roles, and tickets that are not good (any more)."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.ike_pair import Datagram, Pair, agree, child, connection, mirrored, psk

from kernel_shim.secret import Secret
from vpnd.config.model import AuthMethod, SharedSecret
from vpnd.ike import resumption
from vpnd.ike.cookie import CookieJar, cookie_reply, parse_init_request, stateless_reply
from vpnd.ike.effects import Reason
from vpnd.ike.exchanges import rekey_ike
from vpnd.ike.exchanges.ike_session_resume import basis_of
from vpnd.ike.iana import Exchange, Group, NotifyType, ProtocolId
from vpnd.ike.identity import Identity
from vpnd.ike.proposal import parse_proposals
from vpnd.ike.resumption import LIFETIME, MAX_AGE, MAX_TICKET, Resumable, Resumption, Ticket, TicketOffice, Wallet
from vpnd.ike.sa import IkeSa
from vpnd.ike.steps import Ask, Task, ask
from vpnd.ike.wire.header import Header
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import NotifyPayload

IKE = "aes128gcm16-prfsha256-x25519-ke1_mlkem768"


def standing(ike: str = IKE, **options: Any) -> Pair:
    """An IKE SA that was made in full, with a ticket for the next one."""
    config = child()
    names = {"resumption": True, **options}
    pair = Pair(
        connection("to-b", psk("a.example"), psk("b.example"), [config], ike, **names),
        connection("to-a", psk("b.example"), psk("a.example"), [mirrored(config)], ike, **names),
    )
    pair.connect()
    agree(pair, 1)
    pair.log.clear()
    return pair


def lose(pair: Pair, reason: Reason = Reason.PEER_SILENT) -> None:
    """Both sides give the IKE SA up without a word."""
    for peer in pair.peers:
        for sa in peer.standing:
            peer.run(sa, sa.abort(pair.now, reason), pair.now)
    assert not pair.a.sad
    pair.log.clear()


def altered(pair: Pair, ticket: Ticket, **changes: Any) -> Ticket:
    """As `a` would keep it if it believed in the changes."""
    state = replace(ticket.state, **changes)
    return Ticket(ticket.data, replace(state, basis=basis_of(pair.a, pair.a.connections[0], state.local_id, state.remote_id, state.d)))


def in_full(pair: Pair) -> bool:
    return any("IKE_SA_INIT" in line for line in pair.log)


def test_the_next_ike_sa_needs_no_key_exchange() -> None:
    pair = standing()
    before = pair.a.sa.keys.keys
    lose(pair)
    # IKE_SESSION_RESUME { Ni, N(TICKET_OPAQUE), ... } -->   <-- IKE_SESSION_RESUME { Nr, ... }
    # IKE_AUTH { IDi, AUTH, SA, TSi, TSr, N(TICKET_REQUEST) } -->   <-- IKE_AUTH { IDr, AUTH, SA, TSi, TSr, N(TICKET_LT_OPAQUE) }
    pair.connect()
    agree(pair, 1)
    assert pair.log == [
        *("a: IKE_SESSION_RESUME request 0", "b: IKE_SESSION_RESUME response 0"),
        *("a: IKE_AUTH request 1", "b: IKE_AUTH response 1"),
    ]
    assert pair.a.sa.keys.keys == pair.b.sa.keys.keys != before
    assert (str(pair.b.sa.remote_id), str(pair.a.sa.remote_id)) == ("a.example", "b.example")
    assert pair.a.sa.proposal is not None
    assert pair.a.sa.proposal.additional == (Group.ML_KEM_768,)
    # and it goes on from there: rekeying, and resumption again
    for act in (lambda sa: sa.rekey(pair.now), lambda sa: sa.rekey_child(min(sa.children), pair.now)):
        pair.a.run(pair.a.sa, act(pair.a.sa), pair.now)
        pair.settle()
    pair.wait(10.0)
    agree(pair, 1)
    lose(pair)
    pair.connect()
    agree(pair, 1)
    assert not in_full(pair)


def test_a_stranger_who_begins_and_never_ends_voids_no_ticket() -> None:
    pair = standing()
    lose(pair)
    pair.b.start(pair.a.endpoint, pair.now)
    pair.step()
    (half_open,) = pair.a.standing
    pair.flight.clear()
    pair.a.run(half_open, half_open.timer(pair.now + 31.0), pair.now)
    assert half_open.close_reason is Reason.HALF_OPEN_TIMEOUT
    assert pair.a.resumption.wallet.take("to-b", pair.now) is not None


def test_a_cookie_is_returned_first() -> None:
    pair = standing()
    lose(pair)
    jar = CookieJar(pair.b.entropy)
    pair.a.start(pair.b.endpoint, pair.now)
    first = pair.take()
    request = parse_init_request(first.data)
    assert request is not None
    cookie = jar.make(request.nonce, first.local.address, request.header.initiator_spi, pair.now)
    pair.deliver(Datagram("b", pair.b.endpoint, pair.a.endpoint, cookie_reply(request, cookie)))
    again = parse_init_request(pair.flight[0].data)
    assert again is not None
    assert (again.cookie, again.nonce) == (cookie, request.nonce)
    pair.settle()
    agree(pair, 1)


@pytest.mark.parametrize("rekeyed", [False, True])
@pytest.mark.parametrize("by", ["a", "b"])
def test_an_end_on_purpose_voids_the_ticket(by: str, rekeyed: bool) -> None:
    pair = standing()
    if rekeyed:
        pair.b.run(pair.b.sa, pair.b.sa.rekey(pair.now), pair.now)
        pair.settle()
    ticket = pair.a.resumption.wallet.take("to-b", pair.now)
    assert ticket is not None
    pair.a.resumption.wallet.keep(ticket)
    peer = pair.a if by == "a" else pair.b
    peer.run(peer.sa, peer.sa.delete(pair.now), pair.now)
    pair.settle()
    assert pair.a.resumption.wallet.take("to-b", pair.now) is None
    assert pair.b.resumption.office.open(ticket.data, pair.now) is None
    pair.connect()
    assert in_full(pair)
    agree(pair, 1)


def kept(pair: Pair) -> Ticket:
    """The ticket of `a`."""
    ticket = pair.a.resumption.wallet.take("to-b", pair.now)
    assert ticket is not None
    pair.a.resumption.wallet.keep(ticket)
    return ticket


@pytest.mark.parametrize("who", ["a", "b", "ab"])
def test_a_ticket_ends_with_the_keys_that_are_in_it_and_another_one_is_got(who: str) -> None:
    pair = standing()
    first = kept(pair)
    pair.now += 100.0
    for peer in [peer for peer in pair.peers if peer.name in who]:
        peer.run(peer.sa, peer.sa.rekey(pair.now), pair.now)
    # INFORMATIONAL { N(TICKET_REQUEST) } -->   <-- INFORMATIONAL { N(TICKET_LT_OPAQUE) }, on the new IKE SA
    pair.wait(10.0)
    agree(pair, 1)
    assert len(pair.a.standing) == 1
    second = kept(pair)
    assert pair.b.resumption.office.open(first.data, pair.now) is None
    opened = pair.b.resumption.office.open(second.data, pair.now)
    assert opened is not None
    assert second.state.d == opened.d == pair.a.sa.keys.keys.d
    assert second.state.authenticated_at == first.state.authenticated_at, "a rekeying proves nothing"
    assert opened.authenticated_at == pytest.approx(first.state.authenticated_at, abs=0.001)
    lose(pair)
    pair.connect()
    assert not in_full(pair)
    agree(pair, 1)


@pytest.mark.parametrize(("ike", "answer"), [("aes128gcm16-prfsha256-x25519", NotifyType.TICKET_LT_OPAQUE), (IKE, NotifyType.TICKET_ACK)])
def test_who_asks_while_he_rekeys_gets_it_at_once_or_is_told_to_ask_later(ike: str, answer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, answers = standing(ike), list[Message]()

    def asking(wait: Any) -> Any:
        if wait.exchange == Exchange.CREATE_CHILD_SA:
            wait = replace(wait, payloads=(*wait.payloads, NotifyPayload(NotifyType.TICKET_REQUEST)))
        response = yield from ask(wait)
        answers.append(response)
        return response

    monkeypatch.setattr(rekey_ike, "ask", asking)
    pair.a.run(pair.a.sa, pair.a.sa.rekey(pair.now), pair.now)
    pair.wait(10.0)
    notify = answers[0].notify(answer)
    assert notify is not None
    if answer == NotifyType.TICKET_LT_OPAQUE:
        opened = pair.b.resumption.office.open(notify.data[4:], pair.now)
        assert opened is not None
        assert opened.id == pair.b.sa.ticket_id, "the one that is asked for later is the same, sealed again"
        assert opened.d == pair.a.sa.keys.keys.d


def test_an_initiator_gives_no_tickets() -> None:
    pair = standing()

    def steps(session: Any, _task: Any) -> Any:
        response = yield from ask(Ask(Exchange.INFORMATIONAL, (NotifyPayload(NotifyType.TICKET_REQUEST),)))
        answers.append(response.payloads)

    answers: list[Any] = []
    pair.b.sa.queue.append(Task("TEST", steps))
    pair.settle()
    assert answers == [()]


def test_a_ticket_that_the_responder_forgot_leads_to_a_full_exchange() -> None:
    pair = standing()
    lose(pair)
    pair.b.resumption = Resumption(random.Random(99).randbytes)  # it was started anew
    # IKE_SESSION_RESUME { Ni, N(TICKET_OPAQUE) } -->   <-- IKE_SESSION_RESUME { N(TICKET_NACK) }   IKE_SA_INIT { ... } -->
    pair.connect()
    agree(pair, 1)
    assert pair.log[:3] == ["a: IKE_SESSION_RESUME request 0", "b: IKE_SESSION_RESUME response 0", "a: IKE_SA_INIT request 0"]


@pytest.mark.parametrize("change", ["resumption", "name", "identity", "own identity", "proposals", "secret", "another secret", "method", "ppk"])
def test_what_the_configuration_no_longer_allows_is_not_resumed(change: str) -> None:
    pair = standing()
    lose(pair)
    old = pair.b.connections[0]
    match change:
        case "resumption":
            pair.b.connections[0] = replace(old, resumption=False)
        case "name":
            pair.b.connections[0] = replace(old, name="another")
        case "identity":
            pair.b.connections[0] = replace(old, remote=(psk("z.example"),))
        case "proposals":
            pair.b.connections[0] = replace(old, proposals=parse_proposals(ProtocolId.IKE, "aes256-sha512-x25519"))
        case "secret":
            pair.b.credentials.clear()
        case "another secret":
            for peer in pair.peers:
                peer.credentials.load_shared(SharedSecret("all", b"the old one is known to somebody"))
        case "method":
            pair.b.connections[0] = replace(old, remote=(replace(old.remote[0], auth=AuthMethod.PUBKEY),))
        case "own identity":
            pair.b.connections[0] = replace(old, local=(psk("c.example"),))
        case "ppk":
            pair.b.connections[0] = replace(old, ppk_required=True)
    pair.connect()
    assert in_full(pair)


def test_our_own_configuration_counts_as_well() -> None:
    pair = standing()
    lose(pair)
    pair.a.connections[0] = replace(pair.a.connections[0], resumption=False)
    pair.connect()
    agree(pair, 1)
    assert in_full(pair)


def test_a_ticket_is_good_for_one_ike_sa() -> None:
    pair = standing()
    ticket = pair.a.resumption.wallet.take("to-b", pair.now)
    assert ticket is not None
    lose(pair)
    pair.a.resumption.wallet.keep(ticket)
    pair.connect()
    agree(pair, 1)
    lose(pair)
    pair.a.resumption.wallet.keep(ticket)
    pair.connect()
    agree(pair, 1)
    assert in_full(pair)


def test_who_replays_a_ticket_without_its_keys_gets_nowhere_and_uses_nothing_up() -> None:
    pair = standing()
    ticket = pair.a.resumption.wallet.take("to-b", pair.now)
    assert ticket is not None
    lose(pair)
    pair.a.resumption.wallet.keep(altered(pair, ticket, d=Secret(bytes(32))))
    pair.connect()
    assert not pair.b.established() or not pair.b.sad
    pair.wait(pair.b.settings.half_open_timeout, drop=lambda datagram: True)
    assert pair.b.closed is Reason.HALF_OPEN_TIMEOUT
    for sa in pair.a.standing:
        pair.a.run(sa, sa.abort(pair.now, Reason.PEER_SILENT), pair.now)
    pair.log.clear()
    pair.a.resumption.wallet.keep(ticket)
    pair.connect()
    agree(pair, 1)
    assert not in_full(pair)


def test_an_identity_that_is_not_the_tickets_is_refused() -> None:
    pair = standing()
    ticket = pair.a.resumption.wallet.take("to-b", pair.now)
    assert ticket is not None
    lose(pair)
    pair.a.connections[0] = replace(pair.a.connections[0], local=(psk("root.example"),))
    pair.a.resumption.wallet.keep(altered(pair, ticket, local_id=Identity.parse("root.example")))
    pair.connect()
    assert pair.b.closed is Reason.AUTHENTICATION_FAILED
    assert pair.a.closed is Reason.RESUMPTION_FAILED
    agree(pair, 0)


def test_a_responder_with_another_identity_than_the_tickets_is_refused() -> None:
    pair = standing()
    ticket = pair.a.resumption.wallet.take("to-b", pair.now)
    assert ticket is not None
    lose(pair)
    pair.a.connections[0] = replace(pair.a.connections[0], remote=(psk("root.example"),))
    pair.a.resumption.wallet.keep(altered(pair, ticket, remote_id=Identity.parse("root.example")))
    pair.connect()
    assert pair.a.closed is Reason.RESUMPTION_FAILED
    agree(pair, 0)


def test_resumption_does_not_put_off_authentication_for_ever() -> None:
    pair = standing(rekey_time=0.0)
    end = pair.now + MAX_AGE
    while pair.now + LIFETIME / 2 < end:
        pair.wait(LIFETIME / 2)
        lose(pair)
        pair.connect()
        agree(pair, 1)
        assert not in_full(pair)
    pair.wait(end - pair.now)
    lose(pair)
    pair.connect()
    assert in_full(pair)


def test_a_reauthentication_is_no_resumption() -> None:
    pair = standing()
    sa = IkeSa.initiator_of(pair.a, pair.a.connections[0], pair.a.endpoint, pair.b.endpoint, pair.now)
    pair.a.sas[sa.spi_local] = sa
    pair.a.run(sa, sa.initiate(pair.now, resume=False), pair.now)
    pair.settle()
    assert in_full(pair)


def test_a_responder_that_gives_none_says_so() -> None:
    pair = standing()
    pair.b.connections[0] = replace(pair.b.connections[0], resumption=False)
    pair.a.run(pair.a.sa, pair.a.sa.delete(pair.now), pair.now)
    pair.settle()
    pair.connect()
    agree(pair, 1)
    assert pair.a.resumption.wallet.take("to-b", pair.now) is None


def test_off_by_default() -> None:
    pair = standing(resumption=False)
    assert pair.a.resumption.wallet.take("to-b", pair.now) is None
    assert not pair.b.sa.ticket_id


def test_a_nack_that_names_other_spis_changes_nothing() -> None:
    pair = standing()
    lose(pair)
    pair.a.start(pair.b.endpoint, pair.now)
    request = parse_init_request(pair.flight[0].data)
    assert request is not None
    forged = replace(request.header, initiator_spi=type(request.header.initiator_spi)(b"stranger"))
    assert isinstance(forged, Header)
    pair.deliver(Datagram("b", pair.b.endpoint, pair.a.endpoint, stateless_reply(forged, NotifyType.TICKET_NACK)))
    pair.settle()
    agree(pair, 1)
    assert not in_full(pair)


# The office and the wallet


def state(**options: Any) -> Resumable:
    (proposal,) = parse_proposals(ProtocolId.IKE, "aes128gcm16-prfsha256-x25519")
    known = Resumable("gw", Identity.parse("b.example"), Identity.parse("a.example"), proposal, Secret(b"d" * 32), True, 100.0, 5000.0)
    return replace(known, **options)


def test_what_is_sealed_opens_until_it_expires() -> None:
    office = TicketOffice(random.Random(1).randbytes)
    ticket_id, ticket = office.seal(state(), 1000.0)
    assert office.open(ticket, 4999.0) == state(id=ticket_id)
    assert office.open(ticket, 5000.0) is None
    assert b"a.example" not in ticket
    assert b"d" * 32 not in ticket
    assert "dddd" not in repr(office.open(ticket, 1001.0))


def test_keys_change_and_the_last_one_still_opens() -> None:
    office = TicketOffice(random.Random(1).randbytes)
    _, ticket = office.seal(state(expires=1e9), 0.0)
    assert office.open(ticket, LIFETIME + 1) is not None
    assert office.open(ticket, 2 * LIFETIME + 2) is None


def test_a_key_that_nobody_used_for_long_is_gone_at_once() -> None:
    office = TicketOffice(random.Random(1).randbytes)
    _, ticket = office.seal(state(expires=1e9), 0.0)
    assert office.open(ticket, 3 * LIFETIME) is None


def test_what_is_remembered_of_used_tickets_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumption, "MAX_SPENT", 3)
    office = TicketOffice(random.Random(1).randbytes)
    tickets = [office.seal(state(), 1.0) for _ in range(5)]
    assert [office.spend(ticket_id, 1.0) for ticket_id, _ in tickets[:3]] == [True] * 3
    assert not office.spend(tickets[0][0], 1.0)
    assert office.open(tickets[3][1], 1.0) is not None
    assert office.spend(tickets[3][0], 1.0)
    # room was made by new keys: no ticket opens any more, used or not
    assert [office.open(ticket, 1.0) for _, ticket in tickets] == [None] * 5


def test_used_tickets_are_forgotten_once_they_would_have_expired() -> None:
    office = TicketOffice(random.Random(1).randbytes)
    tracemalloc.start()
    try:
        for number in range(30_000):
            assert office.spend(number.to_bytes(16, "big"), LIFETIME / 100 * number)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1_000_000


@given(st.binary(max_size=200), st.integers(0, 400))
@settings(max_examples=100)
def test_nothing_but_our_own_tickets_opens(noise: bytes, at: int) -> None:
    office = TicketOffice(random.Random(1).randbytes)
    _, ticket = office.seal(state(), 1.0)
    assert office.open(noise, 1.0) is None
    cut = at % len(ticket)
    assert office.open(ticket[:cut], 1.0) is None
    assert office.open(ticket[:cut] + bytes((ticket[cut] ^ 1,)) + ticket[cut + 1 :], 1.0) is None
    assert TicketOffice(random.Random(2).randbytes).open(ticket, 1.0) is None


def test_a_wallet_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumption, "MAX_TICKETS", 2)
    wallet = Wallet()
    for name in ("one", "two", "three"):
        wallet.keep(Ticket(b"t", state(connection=name)))
    wallet.keep(Ticket(bytes(MAX_TICKET + 1), state(connection="long")))
    assert [wallet.take(name, 1.0) is not None for name in ("one", "two", "three", "long")] == [False, True, True, False]
    assert wallet.take("two", 1.0) is None
    wallet.keep(Ticket(b"t", state()))
    assert wallet.take("gw", 5000.0) is None


def test_a_ppk_stays_mixed_in() -> None:
    config = child()
    name = Identity.parse("ppk.example")
    pair = Pair(
        connection("to-b", psk("a"), psk("b"), [config], resumption=True, ppk_id=name, ppk_required=True),
        connection("to-a", psk("b"), psk("a"), [mirrored(config)], resumption=True, ppk_required=True),
    )
    for peer in pair.peers:
        peer.credentials.load_shared(SharedSecret("ppk", b"p" * 32, (name,), ppk=True))
    pair.connect()
    lose(pair)
    pair.connect()
    agree(pair, 1)
    assert not in_full(pair)
    assert pair.a.sa.ppk
    assert pair.b.sa.ppk
