"""IKE_SA_INIT and IKE_AUTH with a pre-shared key: the ordinary course, and what goes wrong in it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lab.ike_pair import KEY, Datagram, Pair, agree, child, connection, mirrored, psk, psk_pair, same_selectors

from kernel_shim.model import Direction, Endpoint, Lifetime, Mode
from vpnd.config.model import SharedSecret
from vpnd.ike.context import IkeSettings, Retransmission
from vpnd.ike.cookie import CookieJar, cookie_reply, parse_init_request, stateless_reply
from vpnd.ike.effects import AuthenticationRejected, ChildDenied, InitialContact, Reason
from vpnd.ike.iana import Exchange, NotifyType
from vpnd.ike.sa import IkeSaState
from vpnd.ike.transport import UNPROTECTED_ERROR_GRACE


def test_two_messages_each_bring_up_ike_and_child() -> None:
    pair = psk_pair()
    # IKE_SA_INIT { SA, KE, Ni, N... } -->
    pair.a.start(pair.b.endpoint, pair.now)
    assert pair.a.sa.state is IkeSaState.CONNECTING
    pair.step()
    assert pair.b.sa.half_open
    # <-- IKE_SA_INIT { SA, KE, Nr, N... }
    pair.step()
    # IKE_AUTH { IDi, N(INITIAL_CONTACT), IDr, AUTH, SA, TSi, TSr } -->
    pair.step()
    assert pair.b.established()
    assert not pair.a.established()
    agree_one_side = len(pair.b.sad)
    assert agree_one_side == 2
    # <-- IKE_AUTH { IDr, AUTH, SA, TSi, TSr }
    pair.step()
    assert not pair.flight
    agree(pair, 1)
    same_selectors(pair, "10.1.0.0/16", "10.2.0.0/16")
    assert str(pair.a.sa.local_id) == str(pair.b.sa.remote_id) == "a.example"
    assert str(pair.b.sa.local_id) == str(pair.a.sa.remote_id) == "b.example"
    assert pair.a.sa.spi_initiator == pair.b.sa.spi_initiator != 0
    assert pair.a.sa.spi_responder == pair.b.sa.spi_responder != 0
    assert pair.b.happened(InitialContact)
    assert pair.a.sa.proposal is not None
    assert pair.a.sa.tasks_active == pair.a.sa.tasks_queued == ()


def test_the_responder_installs_inbound_before_it_answers_and_outbound_after() -> None:
    pair = psk_pair()
    pair.a.start(pair.b.endpoint, pair.now)
    pair.step()
    pair.step()
    order = []
    original = pair.b.refuse_install
    pair.b.refuse_install = lambda sa: order.append((sa.direction, len(pair.flight))) or original(sa)  # type: ignore[func-returns-value]
    pair.step()
    assert order == [(Direction.IN, 0), (Direction.OUT, 1)]


def test_initial_contact_is_said_only_when_it_is_true() -> None:
    pair = psk_pair()
    pair.a.contacts = False
    pair.connect()
    agree(pair, 1)
    assert not pair.b.happened(InitialContact)


@pytest.mark.parametrize(
    "ike",
    [
        "aes128gcm16-prfsha256-x25519",
        "aes256gcm16-prfsha384-ecp384",
        "aes256-sha512-modp2048",
        "aes128-sha256-ecp256",
        "chacha20poly1305-prfsha256-x25519",
    ],
)
@pytest.mark.parametrize("esp", ["aes256gcm16", "chacha20poly1305", "aes256-sha256", "aes128-sha512-esn"])
def test_suites(ike: str, esp: str) -> None:
    config = child(esp=esp)
    pair = Pair(connection("to-b", psk("a"), psk("b"), [config], ike), connection("to-a", psk("b"), psk("a"), [mirrored(config)], ike))
    pair.connect()
    agree(pair, 1)
    assert all(sa.esn == ("esn" in esp) for sa in pair.a.sad.values())


def test_lifetimes_and_window_come_from_the_configuration() -> None:
    config = child(rekey_time=100.0, rand_time=0.0, life_time=120.0, life_bytes=5000, rekey_packets=7, rand_packets=0, replay_window=128)
    pair = psk_pair(config)
    pair.connect()
    for sa in pair.a.sad.values():
        assert sa.soft == Lifetime(100, 0, 7)
        assert sa.hard == Lifetime(120, 5000, 0)
        assert sa.replay_window == 128


def test_the_kernel_bounds_the_window() -> None:
    pair = psk_pair(child(replay_window=256))
    pair.b.capabilities = replace(pair.b.capabilities, maximum_replay_window=32)
    pair.connect()
    assert {sa.replay_window for sa in pair.b.sad.values()} == {32}
    assert {sa.replay_window for sa in pair.a.sad.values()} == {256}


def test_a_wrong_key_ends_in_authentication_failed_and_never_shows_it() -> None:
    pair = psk_pair()
    pair.b.credentials.load_shared(SharedSecret("all", b"another secret altogether"))
    pair.connect()
    # IKE_AUTH { ... } -->  <-- IKE_AUTH { N(AUTHENTICATION_FAILED) }
    assert pair.a.closed is Reason.PEER_AUTHENTICATION_FAILED
    assert pair.b.closed is Reason.AUTHENTICATION_FAILED
    (rejected,) = pair.b.happened(AuthenticationRejected)
    assert isinstance(rejected, AuthenticationRejected)
    assert (rejected.connection, str(rejected.peer)) == ("to-a", "a.example")
    assert "192.0.2.1" in rejected.why
    everything = repr(pair.a.events) + repr(pair.b.events) + repr(pair.a.sa) + repr(vars(pair.b.sa))
    assert KEY.decode() not in everything
    assert "altogether" not in everything
    agree(pair, 0)
    assert pair.a.failed == [Reason.PEER_AUTHENTICATION_FAILED]


def test_an_initiator_refuses_a_responder_that_cannot_prove_itself() -> None:
    # the responder's secret for a.example is right, but it says that it is someone else
    pair = Pair(connection("to-b", psk("a.example"), psk("b.example"), [child()]), connection("to-a", psk("c.example"), psk("a.example"), [mirrored(child())]))
    pair.connect()
    assert pair.b.closed is Reason.NO_MATCHING_CONNECTION  # IDr named b.example
    pair = Pair(
        connection("to-b", psk("a.example"), psk("*.b.example"), [child()]), connection("to-a", psk("c.example"), psk("a.example"), [mirrored(child())])
    )
    pair.connect()
    # <-- IKE_AUTH { IDr(c.example), AUTH ... }   INFORMATIONAL { N(AUTHENTICATION_FAILED) } -->
    assert pair.a.closed is Reason.AUTHENTICATION_FAILED
    assert pair.b.closed is Reason.PEER_AUTHENTICATION_FAILED
    agree(pair, 0)


def test_no_shared_key() -> None:
    pair = psk_pair()
    pair.a.credentials.clear()
    pair.connect()
    assert pair.a.closed is Reason.NO_CREDENTIALS
    pair = psk_pair()
    pair.b.credentials.clear()
    pair.connect()
    assert pair.b.closed is Reason.NO_CREDENTIALS
    assert pair.a.closed is Reason.PEER_AUTHENTICATION_FAILED


def test_the_connection_is_chosen_by_identity_among_those_that_the_addresses_fit() -> None:
    other = connection("for-c", psk("b.example"), psk("c.example"), [mirrored(child("c"))])
    wild = connection("for-all", psk(None), psk("*.example"), [mirrored(child("wild"))])
    exact = connection("for-a", psk("b.example"), psk("a.example"), [mirrored(child("exact"))])
    for order in ([other, wild, exact], [exact, wild, other]):
        pair = Pair(connection("to-b", psk("a.example"), psk("b.example"), [child()]), order)
        pair.connect()
        assert pair.b.sa.connection is exact
        assert pair.b.up == ["exact"]
    pair = Pair(connection("to-b", psk("z.example"), psk("b.example"), [child()]), [other, wild, exact])
    pair.connect()
    assert pair.b.sa.connection is wild


def test_no_common_proposal_for_ike() -> None:
    config = child()
    pair = Pair(
        connection("to-b", psk("a"), psk("b"), [config], "aes128-sha256-x25519"),
        connection("to-a", psk("b"), psk("a"), [mirrored(config)], "aes256-sha512-x25519"),
    )
    pair.connect()
    # <-- IKE_SA_INIT { N(NO_PROPOSAL_CHOSEN) }: anybody could say that, so it is believed a little later
    assert pair.a.closed is None
    assert not pair.b.sas
    pair.wait(UNPROTECTED_ERROR_GRACE)
    assert pair.a.closed is Reason.NO_PROPOSAL_CHOSEN
    assert pair.a.failed == [Reason.NO_PROPOSAL_CHOSEN]


def test_an_off_path_error_does_not_end_an_exchange_that_goes_well() -> None:
    pair = psk_pair()
    pair.a.start(pair.b.endpoint, pair.now)
    request = parse_init_request(pair.flight[0].data)
    assert request is not None
    for notify in (NotifyType.NO_PROPOSAL_CHOSEN, NotifyType.INVALID_SYNTAX, NotifyType.AUTHENTICATION_FAILED, 4711):
        pair.flight.insert(0, Datagram("b", pair.b.endpoint, pair.a.endpoint, stateless_reply(request.header, notify)))
    pair.settle()
    agree(pair, 1)


def test_a_group_that_the_responder_refuses_is_replaced_by_the_one_it_wants() -> None:
    config = child()
    pair = Pair(
        connection("to-b", psk("a"), psk("b"), [config], "aes128-sha256-x25519-ecp384"),
        connection("to-a", psk("b"), psk("a"), [mirrored(config)], "aes128-sha256-ecp384"),
    )
    pair.connect()
    # IKE_SA_INIT { KE(x25519) } -->  <-- IKE_SA_INIT { N(INVALID_KE_PAYLOAD, ecp384) }  IKE_SA_INIT { KE(ecp384) } -->
    assert pair.log[:4] == ["a: IKE_SA_INIT request 0", "b: IKE_SA_INIT response 0"] * 2
    agree(pair, 1)


def test_a_group_that_we_did_not_propose_is_not_taken() -> None:
    pair = psk_pair()
    pair.a.start(pair.b.endpoint, pair.now)
    request = parse_init_request(pair.take().data)
    assert request is not None
    # <-- IKE_SA_INIT { N(INVALID_KE_PAYLOAD, modp768) }
    reply = stateless_reply(request.header, NotifyType.INVALID_KE_PAYLOAD, b"\x00\x01")
    pair.deliver(Datagram("b", pair.b.endpoint, pair.a.endpoint, reply))
    assert not pair.flight
    pair.wait(UNPROTECTED_ERROR_GRACE)
    assert pair.a.closed is Reason.INVALID_KE_PAYLOAD


def test_a_cookie_is_returned_with_everything_else_unchanged() -> None:
    pair = psk_pair()
    jar = CookieJar(pair.b.entropy)
    pair.a.start(pair.b.endpoint, pair.now)
    first = pair.take()
    request = parse_init_request(first.data)
    assert request is not None
    assert request.cookie is None
    cookie = jar.make(request.nonce, first.local.address, request.header.initiator_spi, pair.now)
    # <-- IKE_SA_INIT { N(COOKIE) }, twice
    answer = Datagram("b", pair.b.endpoint, pair.a.endpoint, cookie_reply(request, cookie))
    pair.deliver(answer)
    pair.deliver(answer)
    # IKE_SA_INIT { N(COOKIE), SA, KE, Ni } -->
    (second,) = pair.flight
    again = parse_init_request(second.data)
    assert again is not None
    assert again.cookie == cookie
    assert again.nonce == request.nonce
    assert again.spi == request.spi
    assert jar.check(again.cookie, again.nonce, second.local.address, again.header.initiator_spi, pair.now)
    pair.settle()
    agree(pair, 1)


def test_endless_cookies_are_not_followed() -> None:
    pair = psk_pair()
    pair.a.start(pair.b.endpoint, pair.now)
    for number in range(20):
        if not pair.flight:
            break
        request = parse_init_request(pair.take().data)
        assert request is not None
        pair.deliver(Datagram("b", pair.b.endpoint, pair.a.endpoint, cookie_reply(request, b"cookie %d" % number)))
    assert number < 10
    assert not pair.flight


def test_a_half_open_ike_sa_ends_after_its_time() -> None:
    pair = psk_pair()
    pair.a.start(pair.b.endpoint, pair.now)
    pair.step()
    pair.flight.clear()
    pair.wait(pair.b.settings.half_open_timeout - 1, drop=lambda datagram: True)
    assert pair.b.closed is None
    pair.wait(1, drop=lambda datagram: True)
    assert pair.b.closed is Reason.HALF_OPEN_TIMEOUT
    assert pair.b.sa.next_deadline() is None


def test_a_silent_peer_is_given_up_on_after_the_schedule() -> None:
    pair = psk_pair()
    pair.a.settings = IkeSettings(retransmission=Retransmission(timeout=2.0, base=2.0, tries=3, limit=0.0))
    pair.a.start(pair.b.endpoint, pair.now, child())
    sent: list[tuple[float, bytes]] = []
    pair.wait(29.0, drop=lambda datagram: sent.append((pair.now - 1000.0, datagram.data)) or True)  # type: ignore[func-returns-value]
    assert pair.a.closed is None
    pair.wait(1.0, drop=lambda datagram: True)
    assert pair.a.closed is Reason.PEER_SILENT
    assert [round(when) for when, _ in sent] == [0, 2, 6, 14]
    assert len({data for _, data in sent}) == 1
    assert pair.a.failed == [Reason.PEER_SILENT]


def test_a_child_that_the_responder_refuses_leaves_the_ike_sa() -> None:
    pair = Pair(
        connection("to-b", psk("a"), psk("b"), [child(esp="aes128gcm16")]),
        connection("to-a", psk("b"), psk("a"), [mirrored(child(esp="aes256-sha256"))]),
    )
    pair.connect()
    # <-- IKE_AUTH { IDr, AUTH, N(NO_PROPOSAL_CHOSEN) }
    assert pair.a.established()
    assert pair.b.established()
    assert pair.a.closed is pair.b.closed is None
    assert pair.a.failed == [Reason.NO_PROPOSAL_CHOSEN]
    assert pair.b.happened(ChildDenied)
    agree(pair, 0)


def test_transport_mode() -> None:
    pair = psk_pair(child(local="dynamic", remote="dynamic", mode=Mode.TRANSPORT))
    pair.connect()
    # IKE_AUTH { ..., N(USE_TRANSPORT_MODE) } -->  <-- IKE_AUTH { ..., N(USE_TRANSPORT_MODE) }
    agree(pair, 1)
    same_selectors(pair, "192.0.2.1/32", "192.0.2.2/32")
    assert {sa.mode for sa in pair.a.sad.values()} == {Mode.TRANSPORT}


@pytest.mark.parametrize("transport_at", ["a", "b"])
def test_one_side_in_transport_mode_only_comes_to_nothing(transport_at: str) -> None:
    transport = child(local="dynamic", remote="dynamic", mode=Mode.TRANSPORT)
    tunnel = child(local="dynamic", remote="dynamic")
    ours, theirs = (transport, tunnel) if transport_at == "a" else (tunnel, transport)
    pair = Pair(connection("to-b", psk("a"), psk("b"), [ours]), connection("to-a", psk("b"), psk("a"), [mirrored(theirs)]))
    pair.connect()
    assert pair.a.failed == [Reason.NO_PROPOSAL_CHOSEN]
    agree(pair, 0)
    assert pair.a.closed is None


def test_a_connection_that_has_no_candidate_is_refused_without_state() -> None:
    pair = psk_pair()
    pair.b.connections.clear()
    pair.connect()
    assert not pair.b.sas
    pair.wait(UNPROTECTED_ERROR_GRACE)
    assert pair.a.closed is Reason.NO_PROPOSAL_CHOSEN


def test_messages_with_foreign_spis_or_ids_change_nothing() -> None:
    pair = psk_pair()
    pair.a.start(pair.b.endpoint, pair.now)
    pair.step()
    response = pair.take()
    for at, value in ((0, 0xFF), (18, Exchange.IKE_AUTH), (19, 0x08), (20, 1), (23, 9)):
        forged = bytearray(response.data)
        forged[at] = value
        assert pair.a.sa.receive(bytes(forged), pair.a.endpoint, pair.b.endpoint, pair.now) == []
    pair.deliver(response)
    pair.settle()
    agree(pair, 1)
    stranger = Endpoint(pair.b.endpoint.address, 9)
    assert pair.b.sa.receive(response.data, pair.b.endpoint, stranger, pair.now) == []


@pytest.mark.parametrize("ike", ["aes128gcm16-prfsha256-mlkem768-x25519", "aes128gcm16-prfsha256-x25519-modp2048"])
def test_nobody_talks_both_sides_into_their_weaker_key_exchange(ike: str) -> None:
    """RFC 7296 section 1.2: an INVALID_KE_PAYLOAD is anybody's. It may cost the attempt, never its strength."""
    pair = Pair(connection("to-b", psk("a"), psk("b"), [child()], ike), connection("to-a", psk("b"), psk("a"), [mirrored(child())], ike))
    preferred, weaker = pair.a.connections[0].proposals[0].groups
    pair.a.start(pair.b.endpoint, pair.now)
    request = parse_init_request(pair.take().data)
    assert request is not None
    pair.deliver(Datagram("b", pair.b.endpoint, pair.a.endpoint, stateless_reply(request.header, NotifyType.INVALID_KE_PAYLOAD, weaker.to_bytes(2, "big"))))
    pair.wait(30.0)
    assert not pair.b.established()
    pair.connect()
    assert pair.a.sa.proposal is not None
    assert pair.a.sa.proposal.groups == (preferred,)
    agree(pair, 1)
