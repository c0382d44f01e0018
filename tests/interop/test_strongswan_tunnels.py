"""Tunnels between our gateway and Debian's strongSwan: who begins, how they authenticate, which ciphers, all traffic."""

from __future__ import annotations

import pytest
from lab.certs import KeyKind
from lab.pairing import carries_a_little, carries_everything, facing
from lab.tunnel import CHILD, Credentials, Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

OUR_SIDES = [pytest.param(Side.A, id="initiator"), pytest.param(Side.B, id="responder")]


@pytest.mark.parametrize("esp", ["aes128gcm16", "chacha20poly1305"])
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_all_traffic_with_psk(ours: Side, esp: str) -> None:
    with facing(ours, Tunnel(esp_proposals=esp)) as link:
        link.a.initiate()
        carries_everything(link)


@pytest.mark.parametrize("kind", list(KeyKind), ids=lambda kind: kind.value)
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_certificates(ours: Side, kind: KeyKind) -> None:
    with facing(ours, Tunnel(credentials=Credentials.make(kind), esp_proposals="chacha20poly1305")) as link:
        link.a.initiate()
        carries_a_little(link)


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_all_traffic_with_certificates(ours: Side) -> None:
    with facing(ours, Tunnel(credentials=Credentials.make(KeyKind.RSA, KeyKind.ECDSA), esp_proposals="aes256gcm16")) as link:
        link.a.initiate()
        carries_everything(link)


@pytest.mark.parametrize(
    ("ike", "esp"),
    [
        ("aes256-sha512-modp2048", "aes256-sha512"),
        ("aes128-sha256-ecp256", "aes128-sha256"),
        ("aes256gcm16-prfsha384-ecp384", "aes256-sha384"),
    ],
)
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_algorithms(ours: Side, ike: str, esp: str) -> None:
    with facing(ours, Tunnel(proposals=ike, esp_proposals=esp)) as link:
        link.a.initiate()
        carries_a_little(link)


ESP_CIPHERS = ["aes192gcm16", "aes256gcm12", "aes128gcm8", "aes128ccm16", "aes192ccm12", "aes256ccm8", "aes128ctr-sha256", "aes192-sha384", "aes128-sha1"]


@pytest.mark.parametrize("esp", ESP_CIPHERS)
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_esp_ciphers(ours: Side, esp: str) -> None:
    with facing(ours, Tunnel(esp_proposals=esp)) as link:
        link.a.initiate()
        carries_a_little(link)


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_key_exchange_guessed_wrong(ours: Side) -> None:
    """The initiator's first group is not the responder's: INVALID_KE_PAYLOAD (RFC 7296 section 1.2)."""
    offers = "aes128-sha256-x25519-ecp256"
    wants = "aes128-sha256-ecp256"
    with facing(ours, Tunnel(proposals=offers, proposals_b=wants)) as link:
        link.a.initiate()
        carries_a_little(link)


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_ipv6_inside_and_outside(ours: Side) -> None:
    with facing(ours, Tunnel(inner_version=6, outer_version=6)) as link:
        link.a.initiate()
        carries_a_little(link)


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_all_traffic_with_offloads_off(ours: Side) -> None:
    with facing(ours, Tunnel(), offloads=False) as link:
        link.a.initiate()
        carries_everything(link)


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_traffic_selectors_are_narrowed(ours: Side) -> None:
    with facing(ours, Tunnel(ts_a="10.1.0.0/16", ts_b="10.0.0.0/8", ts_b_at_b="10.2.0.0/16")) as link:
        link.a.initiate()
        for child in link.children():
            assert {*child.local_ts, *child.remote_ts} == {"10.1.0.0/16", "10.2.0.0/16"}
        carries_a_little(link)


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_trapped_first_packets_are_not_lost(ours: Side) -> None:
    """Only our side can trap: strongSwan's userspace ESP installs none in this version."""
    tunnel = Tunnel(start_a="trap") if ours is Side.A else Tunnel(start_b="trap")
    with facing(ours, tunnel) as link:
        assert link.ping(ours, count=5).lost == 0
        assert link.daemon(ours).child(CHILD).packets_out >= 5
        assert link.leaks() == []
