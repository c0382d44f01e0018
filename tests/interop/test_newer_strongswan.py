"""The strongSwan of a newer Debian: additional key exchanges (RFC 9242, RFC 9370) with ML-KEM, in each exchange that makes keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from lab.certs import KeyKind
from lab.daemon import NegotiationFailed
from lab.gateway import Gateway
from lab.namespaces import Namespace
from lab.pairing import NEWER_STRONGSWAN, OURS, Pair, carries_a_little, facing, pair, rekey_at_once, rekey_in_turn
from lab.relay import RelaySettings
from lab.strongswan import NewerStrongSwan
from lab.tunnel import CHILD, CONNECTION, PPK_NAME, Credentials, Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.newer, pytest.mark.timeout(180)]

CREATE_CHILD_SA = 36
IKE_INTERMEDIATE = 43
SKF = 53
SIZE = 600  # octets of an IP packet; a public value of ML-KEM-768 alone has 1184
OUR_SIDES = [pytest.param(Side.A, id="initiator"), pytest.param(Side.B, id="responder")]
HYBRID = ("CURVE_25519", "ML_KEM_768")
BOTH = Tunnel(proposals="aes256gcm16-prfsha384-x25519-ke1_mlkem768", esp_proposals="aes256gcm16-x25519-ke1_mlkem768")


def used(link: Pair) -> tuple[str, ...]:
    """The key exchanges of the IKE SA, of which both sides say the same."""
    ((ours,), (theirs,)) = link.a.ike_sas(), link.b.ike_sas()
    assert ours.key_exchanges == theirs.key_exchanges
    return ours.key_exchanges


def used_by_child(link: Pair) -> tuple[str, ...]:
    ours, theirs = link.children()
    assert ours.key_exchanges == theirs.key_exchanges
    return ours.key_exchanges


@pytest.mark.parametrize(
    ("ike", "exchanges"),
    [
        ("ecp384-ke1_mlkem1024-ke2_x448-ke3_x25519", ("ECP_384", "ML_KEM_1024", "CURVE_448", "CURVE_25519")),
        ("x25519-ke3_mlkem1024-ke5_mlkem768", ("CURVE_25519", "ML_KEM_1024", "ML_KEM_768")),
        ("mlkem768", ("ML_KEM_768",)),
    ],
)
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_key_exchanges_of_the_ike_sa(ours: Side, ike: str, exchanges: tuple[str, ...]) -> None:
    with facing(ours, Tunnel(proposals=f"aes256gcm16-prfsha384-{ike}"), theirs=NEWER_STRONGSWAN) as link:
        link.a.initiate()
        assert used(link) == exchanges
        carries_a_little(link)


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_rekeying_under_traffic(ours: Side) -> None:
    """IKE_FOLLOWUP_KE for CHILD_SAs and the IKE SA, from either side."""
    with facing(ours, BOTH, theirs=NEWER_STRONGSWAN) as link:
        link.a.initiate()
        with link.datagrams_all_the_while():
            rekey_in_turn(link)
        assert used(link) == used_by_child(link) == HYBRID
        carries_a_little(link)


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_both_sides_rekey_at_once(ours: Side) -> None:
    with facing(ours, BOTH, theirs=NEWER_STRONGSWAN) as link:
        link.a.initiate()
        with link.datagrams_all_the_while():
            rekey_at_once(link, rounds=2)
        assert used(link) == used_by_child(link) == HYBRID
        carries_a_little(link)


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_ml_kem_alone_in_rekeying(ours: Side) -> None:
    with facing(ours, Tunnel(proposals="aes128-sha256-mlkem768", esp_proposals="aes128gcm16-mlkem1024"), theirs=NEWER_STRONGSWAN) as link:
        link.a.initiate()
        rekey_in_turn(link)
        assert used(link) == ("ML_KEM_768",)
        assert used_by_child(link) == ("ML_KEM_1024",)
        carries_a_little(link)


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_fragments_of_key_exchanges(ours: Side) -> None:
    """Signatures cover them, too."""

    def mine(namespace: Namespace, config: Path) -> Gateway:
        return Gateway(namespace, config, settings={"fragment_size": str(SIZE)})

    def theirs(namespace: Namespace, config: Path) -> NewerStrongSwan:
        return NewerStrongSwan(namespace, config, f"fragment_size = {SIZE}")

    with facing(ours, replace(BOTH, credentials=Credentials.make(KeyKind.RSA)), mine=mine, theirs=theirs) as link:
        link.a.initiate()
        rekey_in_turn(link)
        assert used_by_child(link) == HYBRID
        for site in (link.sites.a, link.sites.b):
            sent = [packet for packet in link.capture.ike() if packet.source == site.wan4 and packet.length > SIZE - 100]
            assert any(packet.ike_exchange == (IKE_INTERMEDIATE, site is link.sites.b) and packet.payload[12 + 16] == SKF for packet in sent)
            assert max(packet.length for packet in sent) <= SIZE
        carries_a_little(link)


# What is chosen


@pytest.mark.parametrize("theirs", ["aes256gcm16-prfsha384-x25519-ke1_mlkem768,default", "default,aes256gcm16-prfsha384-x25519-ke1_mlkem768"])
def test_our_defaults_take_ml_kem_wherever_it_stands_in_an_offer(theirs: str) -> None:
    with facing(Side.B, Tunnel(proposals=theirs, proposals_b="default"), theirs=NEWER_STRONGSWAN) as link:
        link.a.initiate()
        assert used(link) == HYBRID


def test_our_defaults_offer_ml_kem_first() -> None:
    """Of the peer's defaults no proposal has it: what it prefers itself must name it."""
    with facing(Side.A, Tunnel(proposals="default", proposals_b="aes256gcm16-prfsha384-x25519-ke1_mlkem768,default"), theirs=NEWER_STRONGSWAN) as link:
        link.a.initiate()
        assert used(link) == HYBRID


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_both_defaults(ours: Side) -> None:
    with facing(ours, Tunnel(proposals="default", esp_proposals="default"), theirs=NEWER_STRONGSWAN) as link:
        link.a.initiate()
        rekey_in_turn(link)
        assert len(used_by_child(link)) == 1  # it may be left out, and is not
        carries_a_little(link)


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_we_insist_on_ml_kem(ours: Side) -> None:
    hybrid, plain = BOTH.proposals, "aes256gcm16-prfsha384-x25519"
    with facing(ours, Tunnel(proposals=hybrid if ours is Side.A else plain, proposals_b=hybrid if ours is Side.B else plain), theirs=NEWER_STRONGSWAN) as link:
        with pytest.raises(NegotiationFailed):
            link.a.initiate()
        link.a.wait_gone()
        link.b.wait_gone()


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_who_takes_ml_kem_out_of_an_offer_on_its_way_is_found_out(ours: Side) -> None:
    """An additional key exchange becomes a transform of a type that nobody knows, so the responder chooses the proposal without it."""
    relay = RelaySettings(genuine="000806000024", forged="0008f0000024")
    makers = (OURS, NEWER_STRONGSWAN) if ours is Side.A else (NEWER_STRONGSWAN, OURS)
    with pair(*makers, Tunnel(proposals=f"{BOTH.proposals},aes256gcm16-prfsha384-x25519"), relay=relay) as link:
        with pytest.raises(NegotiationFailed):
            link.a.initiate()
        assert "selected proposal: IKE:AES_GCM_16_256/PRF_HMAC_SHA2_384/CURVE_25519\n" in link.daemon(Side.B if ours is Side.A else Side.A).log()
        link.a.wait_gone()
        link.b.wait_gone()
        assert link.sites.relay is not None
        link.sites.relay.change(RelaySettings())
        link.a.initiate()
        assert used(link) == HYBRID


@pytest.mark.parametrize("by", [pytest.param(Side.A, id="ours asks"), pytest.param(Side.B, id="the peer asks")])
def test_we_rekey_no_child_without_ml_kem(by: Side) -> None:
    """That the peer's proposals for the CHILD_SA lack it shows when there is a key exchange at all."""
    tunnel = Tunnel(esp_proposals=BOTH.esp_proposals, esp_proposals_b="aes256gcm16-x25519")
    with facing(Side.A, tunnel, theirs=NEWER_STRONGSWAN) as link:
        link.a.initiate()
        before = link.children()
        link.daemon(by).rekey(child=CHILD)
        link.capture.wait_for(lambda packet: packet.ike_exchange == (CREATE_CHILD_SA, True), "it is refused")
        link.settled()
        carries_a_little(link)
        assert [child.spi_in for child in link.children()] == [child.spi_in for child in before]


# With what else changes the keys

PPK = "a post-quantum pre-shared key of the laboratory"


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_ppk_beside_ml_kem(ours: Side) -> None:
    options = {"ppk_id": PPK_NAME, "ppk_required": "yes"}
    with facing(ours, Tunnel(proposals=BOTH.proposals, connection_options=options, ppk_a=PPK, ppk_b=PPK), theirs=NEWER_STRONGSWAN) as link:
        link.a.initiate()
        done = link.rekeyed(children=False)
        link.a.rekey(ike=CONNECTION)
        done()
        assert used(link) == HYBRID
        carries_a_little(link)


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_a_wrong_ppk_beside_ml_kem(ours: Side) -> None:
    tunnel = Tunnel(proposals=BOTH.proposals, connection_options={"ppk_id": PPK_NAME}, ppk_a=PPK, ppk_b="another")
    with facing(ours, tunnel, theirs=NEWER_STRONGSWAN) as link, pytest.raises(NegotiationFailed):
        link.a.initiate()


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_childless_with_ml_kem(ours: Side) -> None:
    """The first CHILD_SA comes with key exchanges of its own."""
    with facing(
        ours, Tunnel(proposals=BOTH.proposals, esp_proposals=BOTH.esp_proposals, connection_options={"childless": "force"}), theirs=NEWER_STRONGSWAN
    ) as link:
        link.a.initiate()
        assert used_by_child(link) == HYBRID
        carries_a_little(link)
