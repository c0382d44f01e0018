"""Key exchanges with a strongSwan that knows no additional ones (RFC 9370), and what else changes how keys come about."""

from __future__ import annotations

import pytest
from lab.daemon import NegotiationFailed
from lab.pairing import carries_a_little, facing
from lab.process import wait_until
from lab.tunnel import CONNECTION, PPK_NAME, Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

OUR_SIDES = [pytest.param(Side.A, id="initiator"), pytest.param(Side.B, id="responder")]


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_default_proposals(ours: Side) -> None:
    """Ours begin with ML-KEM; a peer that does not know of it takes the next."""
    with facing(ours, Tunnel(proposals="default", esp_proposals="default")) as link:
        link.a.initiate()
        carries_a_little(link)


@pytest.mark.parametrize(
    "ike",
    ["aes128gcm16-prfsha256-x448", "aes256-sha512-ecp521", "aes192gcm8-prfsha512-modp6144", "aes256ccm12-prfsha384-modp8192", "aes192ctr-sha384-modp3072"],
)
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_further_algorithms(ours: Side, ike: str) -> None:
    with facing(ours, Tunnel(proposals=ike)) as link:
        link.a.initiate()
        carries_a_little(link)


# Post-quantum pre-shared keys (RFC 8784)

PPK = "a post-quantum pre-shared key of the laboratory"
WITH_PPK = {"ppk_id": PPK_NAME}
REQUIRED = {**WITH_PPK, "ppk_required": "yes"}


@pytest.mark.parametrize("options", [WITH_PPK, REQUIRED], ids=["optional", "required"])
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_ppk(ours: Side, options: dict[str, str]) -> None:
    with facing(ours, Tunnel(connection_options=options, ppk_a=PPK, ppk_b=PPK)) as link:
        link.a.initiate()
        carries_a_little(link)
        rekeyed = link.rekeyed(children=False)
        link.a.rekey(ike=CONNECTION)
        rekeyed()
        carries_a_little(link)


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_ppk_that_only_the_initiator_has(ours: Side) -> None:
    with facing(ours, Tunnel(connection_a=WITH_PPK, ppk_a=PPK)) as link:
        link.a.initiate()
        carries_a_little(link)


@pytest.mark.parametrize("ours", OUR_SIDES)
def test_ppk_of_another_name(ours: Side) -> None:
    """The responder has PPKs, and not that one: NO_PPK_AUTH counts, unless it is required."""
    with facing(ours, Tunnel(connection_a=WITH_PPK, ppk_a=PPK, ppk_b=PPK, ppk_name_b="other.example")) as link:
        link.a.initiate()
        carries_a_little(link)


@pytest.mark.parametrize(
    "tunnel",
    [
        pytest.param(Tunnel(connection_options=WITH_PPK, ppk_a=PPK, ppk_b="another"), id="wrong"),
        pytest.param(Tunnel(connection_a=REQUIRED, ppk_a=PPK), id="required-by-the-initiator"),
        pytest.param(Tunnel(connection_b=REQUIRED, ppk_b=PPK), id="required-by-the-responder"),
    ],
)
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_ppk_refused(ours: Side, tunnel: Tunnel) -> None:
    with facing(ours, tunnel) as link:
        with pytest.raises(NegotiationFailed):
            link.a.initiate()
        # one that is half open goes with its time
        wait_until(lambda: not any(ike.state == "ESTABLISHED" for daemon in (link.a, link.b) for ike in daemon.ike_sas()), "no IKE SA stands", interval=0.1)


# Childless IKE SAs (RFC 6023)


@pytest.mark.parametrize(
    ("ours", "a", "b"),
    [
        *((ours, a, b) for ours in Side for a, b in (("force", "allow"), ("force", "force"), ("allow", "never"))),
        (Side.A, "prefer", "allow"),  # this strongSwan does not know the value
        (Side.A, "prefer", "never"),
        (Side.B, "force", "prefer"),
    ],
)
def test_childless(ours: Side, a: str, b: str) -> None:
    with facing(ours, Tunnel(connection_a={"childless": a}, connection_b={"childless": b}, esp_proposals="aes128gcm16-x25519")) as link:
        link.a.initiate()
        carries_a_little(link)


@pytest.mark.parametrize("policies", [("force", "never"), ("allow", "force")])
@pytest.mark.parametrize("ours", OUR_SIDES)
def test_childless_refused(ours: Side, policies: tuple[str, str]) -> None:
    a, b = policies
    with facing(ours, Tunnel(connection_a={"childless": a}, connection_b={"childless": b})) as link, pytest.raises(NegotiationFailed):
        link.a.initiate()
