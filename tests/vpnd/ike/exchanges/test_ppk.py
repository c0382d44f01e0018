"""Post-quantum pre-shared keys (RFC 8784): who has one, who demands one, and what comes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lab.ike_pair import Pair, agree, child, connection, mirrored, psk
from vpnd_certificates import Authority, key, source

from vpnd.config.model import AuthMethod, AuthRound, SharedSecret
from vpnd.ike.effects import Reason
from vpnd.ike.exchanges import ike_auth
from vpnd.ike.iana import NotifyType
from vpnd.ike.identity import Identity
from vpnd.ike.wire.message import Message, decode_message, encode_message
from vpnd.ike.wire.payloads import NotifyPayload

ID = Identity.parse("ppk.example")
PPK = b"a post-quantum pre-shared key of 256 bits at least"


def pair_of(*, a: bytes | None = PPK, b: bytes | None = PPK, a_required: bool = False, b_required: bool = False, ike: str = "aes128-sha256-x25519") -> Pair:
    config = child(esp="aes128gcm16-x25519")
    pair = Pair(
        connection("to-b", psk("a.example"), psk("b.example"), [config], ike, ppk_id=ID, ppk_required=a_required),
        connection("to-a", psk("b.example"), psk("a.example"), [mirrored(config)], ike, ppk_required=b_required),
    )
    for peer, data in ((pair.a, a), (pair.b, b)):
        if data is not None:
            peer.credentials.load_shared(SharedSecret("ppk", data, (ID,), ppk=True))
    return pair


@pytest.mark.parametrize("ike", ["aes128-sha256-x25519", "aes256gcm16-sha384-x25519-ke1_mlkem768"])
@pytest.mark.parametrize(("a_required", "b_required"), [(False, False), (True, False), (False, True), (True, True)])
def test_both_have_it(a_required: bool, b_required: bool, ike: str) -> None:
    # IKE_SA_INIT { ..., N(USE_PPK) } -->   <-- IKE_SA_INIT { ..., N(USE_PPK) }
    # IKE_AUTH { IDi, AUTH, ..., N(PPK_IDENTITY) [, N(NO_PPK_AUTH)] } -->   <-- IKE_AUTH { IDr, AUTH, ..., N(PPK_IDENTITY) }
    pair = pair_of(a_required=a_required, b_required=b_required, ike=ike)
    pair.connect()
    agree(pair, 1)
    assert pair.a.sa.ppk
    assert pair.b.sa.ppk
    assert pair.a.sa.keys.keys == pair.b.sa.keys.keys
    # what is made from these keys has it, too
    for act in (lambda sa: sa.rekey(pair.now), lambda sa: sa.rekey_child(min(sa.children), pair.now)):
        pair.a.run(pair.a.sa, act(pair.a.sa), pair.now)
        pair.settle()
    pair.wait(10.0)
    agree(pair, 1)
    assert pair.a.sa.ppk
    assert pair.b.sa.ppk


def test_it_changes_the_keys_of_the_child() -> None:
    keys = []
    for ppk in (PPK, None):
        pair = pair_of(a=ppk, b=ppk)
        pair.connect()
        agree(pair, 1)
        keys.append({sa.encryption_key for sa in pair.a.sad.values()})
    assert not keys[0] & keys[1]


def test_optional_on_both_sides_and_missing_at_one() -> None:
    for ours, theirs in ((PPK, None), (None, PPK)):
        pair = pair_of(a=ours, b=theirs)
        pair.connect()
        agree(pair, 1)
        assert not pair.a.sa.ppk
        assert not pair.b.sa.ppk


def test_another_ppk_of_the_responder_leaves_the_auth_without_it() -> None:
    """N(USE_PPK) both ways, but no PPK of that id: N(NO_PPK_AUTH) is what counts."""
    pair = pair_of()
    pair.b.credentials.load_shared(SharedSecret("ppk", PPK, (Identity.parse("another.example"),), ppk=True))
    pair.connect()
    agree(pair, 1)
    assert not pair.a.sa.ppk
    # the initiator demands it
    pair = pair_of(a_required=True)
    pair.b.credentials.load_shared(SharedSecret("ppk", PPK, (Identity.parse("another.example"),), ppk=True))
    pair.connect()
    assert pair.b.closed is Reason.AUTHENTICATION_FAILED
    assert pair.a.closed is Reason.PEER_AUTHENTICATION_FAILED
    agree(pair, 0)


def test_a_ppk_that_the_connection_does_not_want_is_not_used() -> None:
    pair = pair_of()
    pair.b.connections[0] = replace(pair.b.connections[0], ppk_id=Identity.parse("*.example.org"))
    pair.connect()
    agree(pair, 1)
    assert not pair.b.sa.ppk
    pair = pair_of()
    pair.b.connections[0] = replace(pair.b.connections[0], ppk_id=Identity.parse("*.example"))
    pair.connect()
    assert pair.b.sa.ppk


def test_the_initiator_demands_one_that_the_responder_has_not() -> None:
    pair = pair_of(b=None, a_required=True)
    pair.connect()
    assert pair.a.closed is Reason.NO_CREDENTIALS
    assert not any("IKE_AUTH" in line for line in pair.log)


def test_a_responder_that_proves_itself_without_the_ppk_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the shared key, and not the PPK that the initiator demands: it says nothing of a PPK and believes anything."""
    pair = pair_of(a_required=True)
    monkeypatch.setattr(ike_auth.postquantum, "of_responder", lambda _session, _request, auth: (None, auth))
    checked = ike_auth.check
    monkeypatch.setattr(ike_auth, "check", lambda session, *rest: checked(session, *rest) if session.initiator else None)
    pair.connect()
    assert pair.a.closed is Reason.AUTHENTICATION_FAILED
    assert pair.b.closed is Reason.PEER_AUTHENTICATION_FAILED
    agree(pair, 0)


def test_the_responder_demands_one_that_the_initiator_has_not() -> None:
    pair = pair_of(a=None, b_required=True)
    pair.connect()
    assert pair.b.closed is Reason.AUTHENTICATION_FAILED
    assert pair.a.closed is Reason.PEER_AUTHENTICATION_FAILED
    agree(pair, 0)


def test_a_wrong_ppk_fails_and_is_never_shown() -> None:
    for required in (False, True):
        pair = pair_of(b=b"another post-quantum pre-shared key altogether", a_required=required)
        pair.connect()
        assert pair.b.closed is Reason.AUTHENTICATION_FAILED
        assert pair.a.closed is Reason.PEER_AUTHENTICATION_FAILED
        everything = repr(pair.a.events) + repr(pair.b.events) + repr(vars(pair.a.sa)) + repr(vars(pair.b.sa)) + repr(pair.a.credentials.ppk(ID.data))
        assert "altogether" not in everything
        assert PPK.decode() not in everything
        agree(pair, 0)


def test_a_notification_taken_away_in_between_is_found_by_auth() -> None:
    pair = pair_of()
    pair.a.start(pair.b.endpoint, pair.now)
    request = pair.take()
    message = decode_message(request.data)
    payloads = tuple(payload for payload in message.payloads if not (isinstance(payload, NotifyPayload) and payload.type == NotifyType.USE_PPK))
    assert len(payloads) == len(message.payloads) - 1
    pair.deliver(replace(request, data=encode_message(Message(message.header, payloads))))
    pair.settle()
    assert pair.b.closed is Reason.AUTHENTICATION_FAILED
    agree(pair, 0)


@pytest.mark.parametrize("known", [True, False])
def test_with_certificates(known: bool) -> None:
    """N(NO_PPK_AUTH) is a signature then as well."""
    authority, config = Authority(), child()
    a, b = (AuthRound(AuthMethod.PUBKEY, Identity.parse(f"{name}.example")) for name in "ab")
    pair = Pair(connection("to-b", a, b, [config], ppk_id=ID), connection("to-a", b, a, [mirrored(config)]))
    for peer in pair.peers:
        own = key("ecdsa256", ord(peer.name))
        peer.credentials.clear()
        peer.credentials.load_key(source(own))
        peer.credentials.load_certificate(authority.issue(f"{peer.name}.example", own, [f"{peer.name}.example"]), authority=False)
        peer.credentials.load_certificate(authority.der, authority=True)
        peer.credentials.load_shared(SharedSecret("ppk", PPK, (ID if known or peer is pair.a else Identity.parse("another.example"),), ppk=True))
    pair.connect()
    agree(pair, 1)
    assert pair.a.sa.ppk is pair.b.sa.ppk is known


def test_a_ppk_is_no_shared_key_for_authentication() -> None:
    pair = pair_of()
    for peer in pair.peers:
        peer.credentials.unload_shared("all")
    pair.connect()
    assert pair.a.closed is Reason.NO_CREDENTIALS
