"""Every IKE cipher suite and key exchange method that charon knows too: an IKE SA set up by hand, message by message."""

from __future__ import annotations

import hmac
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from lab.namespaces import Lab, Namespace
from lab.process import PATIENCE
from lab.strongswan import StrongSwan
from sk_messages import open_message, seal_message

from kernel_shim.model import AddressRange, TrafficSelector
from vpnd.ike.crypto.groups import group
from vpnd.ike.crypto.sk import SkCipher
from vpnd.ike.iana import AuthenticationMethod, Exchange, NotifyType, ProtocolId
from vpnd.ike.identity import Identity
from vpnd.ike.keymat import IkeKeys, IkeSuite, ike_keys, shared_key_auth, signed_octets, skeyseed
from vpnd.ike.proposal import Proposal, accept, number_proposals, parse_proposals
from vpnd.ike.wire.header import NO_SPI, Header, IkeSpi, MessageId
from vpnd.ike.wire.message import Message, decode_message, encode_message
from vpnd.ike.wire.payloads import (
    AuthPayload,
    DeletePayload,
    IdiPayload,
    IdrPayload,
    KePayload,
    NoncePayload,
    Payload,
    SaPayload,
    TsiPayload,
    TsrPayload,
)

pytestmark = pytest.mark.interop

LOCALHOST = "127.0.0.1"
SECRET = b"correct horse battery staple"
SUITES = (
    "aes128gcm16-prfsha256-x25519",
    "aes256gcm16-prfsha384-ecp384",
    "aes256gcm8-prfsha512-ecp256",
    "aes192gcm12-prfsha256-x448",
    "chacha20poly1305-prfsha256-x25519",
    "aes128-sha256-modp2048",
    "aes256-sha384-ecp521",
    "aes192-sha512-modp3072",
    "aes128-sha1-modp4096",
    "aes128ctr-sha256-ecp256",
    "aes256ccm16-prfsha384-modp6144",
)
EVERYTHING = (TrafficSelector(AddressRange.host(IPv4Address(LOCALHOST))),)


@pytest.fixture(scope="module")
def charon() -> Iterator[Namespace]:
    with Lab() as lab:
        namespace = lab.namespace("peer")
        namespace.ip("link set lo up")
        config = Path(lab.directory, "charon", "swanctl.conf")
        config.parent.mkdir()
        config.write_text(
            f"""connections {{
  any {{
    version = 2
    proposals = {", ".join(SUITES)}
    unique = never
    local {{
      auth = psk
      id = sun.example.org
    }}
    remote {{
      auth = psk
      id = *@example.org
    }}
    children {{
      any {{
        esp_proposals = aes128gcm16
      }}
    }}
  }}
}}
secrets {{
  ike-any {{
    secret = "{SECRET.decode()}"
  }}
}}
"""
        )
        daemon = StrongSwan(namespace, config)
        daemon.start()
        try:
            yield namespace
        finally:
            daemon.stop()


@dataclass(slots=True)
class Initiator:
    """As much of an initiator as it takes to be believed."""

    endpoint: socket.socket
    suite: IkeSuite
    spi_i: IkeSpi
    spi_r: IkeSpi
    keys: IkeKeys
    send: SkCipher
    receive: SkCipher
    request: bytes
    answer: bytes
    nonce_i: bytes
    nonce_r: bytes

    def exchange(self, kind: Exchange, number: int, payloads: tuple[Payload, ...]) -> Message:
        header = Header(self.spi_i, self.spi_r, kind, MessageId(number), initiator=True, response=False)
        data = ask(self.endpoint, seal_message(header, payloads, self.send, os.urandom))
        return open_message(data, decode_message(data), self.receive)


def ask(endpoint: socket.socket, data: bytes) -> bytes:
    endpoint.sendto(data, (LOCALHOST, 500))
    return endpoint.recv(65535)


def initiate(endpoint: socket.socket, offer: tuple[Proposal, ...]) -> Initiator:
    spi_i, nonce_i = IkeSpi(os.urandom(8)), os.urandom(32)
    ours = group(offer[0].groups[0]).initiate(os.urandom)
    header = Header(spi_i, NO_SPI, Exchange.IKE_SA_INIT, MessageId(0), initiator=True, response=False)
    request = encode_message(Message(header, (SaPayload(offer), KePayload(ours.group, ours.public), NoncePayload(nonce_i))))
    answer = ask(endpoint, request)
    message = decode_message(answer)
    assert message.error is None, message.error
    assert encode_message(message) == answer
    chosen = accept(offer, message.first(SaPayload).proposals)
    assert chosen is not None
    suite, nonce_r, spi_r = IkeSuite.of(chosen), message.first(NoncePayload).data, message.header.responder_spi
    shared = ours.complete(message.first(KePayload).data)
    keys = ike_keys(suite, skeyseed(suite.prf, nonce_i, nonce_r, shared), nonce_i, nonce_r, spi_i, spi_r)
    return Initiator(endpoint, suite, spi_i, spi_r, keys, *keys.ciphers(suite, initiator=True), request, answer, nonce_i, nonce_r)


@pytest.mark.parametrize("text", SUITES)
def test_charon_and_our_cryptography_agree(charon: Namespace, text: str) -> None:
    me = Identity.parse("moon@example.org")
    with charon.socket(socket.AF_INET, socket.SOCK_DGRAM) as endpoint:
        endpoint.settimeout(PATIENCE)

        # IKE_SA_INIT { SA, KE, Ni } -->  <-- { SA, KE, Nr, ... }
        peer = initiate(endpoint, parse_proposals(ProtocolId.IKE, text))
        prf = peer.suite.prf

        # IKE_AUTH { IDi, AUTH, SA, TSi, TSr } -->
        auth = shared_key_auth(prf, SECRET, signed_octets(prf, peer.keys.pi, peer.request, peer.nonce_r, me))
        esp = number_proposals(parse_proposals(ProtocolId.ESP, "aes128gcm16"), os.urandom(4))
        reply = peer.exchange(
            Exchange.IKE_AUTH,
            1,
            (
                IdiPayload(me),
                AuthPayload(AuthenticationMethod.SHARED_KEY, auth),
                SaPayload(esp),
                TsiPayload(EVERYTHING),
                TsrPayload(EVERYTHING),
            ),
        )

        # <-- { IDr, AUTH, SA, TSi, TSr }, or without the CHILD_SA where charon's userspace ESP does not take it
        assert reply.notify(NotifyType.AUTHENTICATION_FAILED) is None
        them = reply.first(IdrPayload).identity
        assert str(them) == "sun.example.org"
        expected = shared_key_auth(prf, SECRET, signed_octets(prf, peer.keys.pr, peer.answer, peer.nonce_i, them))
        assert hmac.compare_digest(reply.first(AuthPayload).data, expected)

        # INFORMATIONAL { D } -->  <-- {}
        assert peer.exchange(Exchange.INFORMATIONAL, 2, (DeletePayload(ProtocolId.IKE),)).payloads == ()


def test_charon_tells_a_wrong_secret(charon: Namespace) -> None:
    me = Identity.parse("moon@example.org")
    with charon.socket(socket.AF_INET, socket.SOCK_DGRAM) as endpoint:
        endpoint.settimeout(PATIENCE)
        peer = initiate(endpoint, parse_proposals(ProtocolId.IKE, SUITES[0]))
        auth = shared_key_auth(peer.suite.prf, b"wrong", signed_octets(peer.suite.prf, peer.keys.pi, peer.request, peer.nonce_r, me))
        # IKE_AUTH { IDi, AUTH } -->  <-- { N(AUTHENTICATION_FAILED) }
        reply = peer.exchange(Exchange.IKE_AUTH, 1, (IdiPayload(me), AuthPayload(AuthenticationMethod.SHARED_KEY, auth)))
        assert reply.error is not None
        assert reply.error.type == NotifyType.AUTHENTICATION_FAILED
