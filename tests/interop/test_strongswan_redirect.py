"""Redirection (RFC 5685) with Debian's strongSwan: a client is sent to another address of its gateway, and round and round."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab.daemon import NegotiationFailed
from lab.gateway import Gateway
from lab.namespaces import Namespace
from lab.pairing import OURS, STRONGSWAN, Pair, facing, pair
from lab.process import wait_until
from lab.strongswan import StrongSwan
from lab.tunnel import CONNECTION, Side, Tunnel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

OTHER = "192.0.2.82"  # B's second address
# strongSwan 5.9.8's client ends with a fault of its own when it is redirected in IKE_AUTH
CLIENTS = [
    pytest.param(OURS, "init", id="our client, IKE_SA_INIT"),
    pytest.param(OURS, "auth", id="our client, IKE_AUTH"),
    pytest.param(STRONGSWAN, "init", id="strongSwan's client, IKE_SA_INIT"),
]


def prepared(link: Pair) -> None:
    link.sites.b.gateway.ip(f"addr add {OTHER}/24 dev wan")


def arrived(link: Pair) -> bool:
    return [sa.remote_host for sa in link.a.ike_sas() if sa.state == "ESTABLISHED" and sa.children] == [OTHER]


@pytest.mark.parametrize("ours", [pytest.param(Side.A, id="our client"), pytest.param(Side.B, id="our gateway")])
def test_a_client_is_sent_away_during_its_session(ours: Side) -> None:
    options = {"mobike": "no", "local_addrs": "%any"}
    with facing(ours, Tunnel(connection_options=options)) as link:
        prepared(link)
        link.a.initiate()
        link.carries_again()
        if isinstance(link.b, Gateway):
            wait_until(lambda: OTHER in link.b.log(), "the new address has sockets")
            assert "1 redirected" in link.b.vpnctl("redirect", OTHER, "--ike", CONNECTION)
        else:
            assert isinstance(link.b, StrongSwan)
            link.b.swanctl("--redirect", "--ike", CONNECTION, "--gateway", OTHER)
        wait_until(lambda: arrived(link), "the client is at the other address", interval=0.1)
        wait_until(lambda: len(link.b.ike_sas()) == 1, "the old IKE SA is gone", interval=0.1)
        link.carries_again()


@pytest.mark.parametrize(("client", "when"), CLIENTS)
def test_round_and_round(client: type[Gateway] | type[StrongSwan], when: str) -> None:
    """The gateway sends everybody to itself: a client follows some times, and gives up."""

    def gateway(namespace: Namespace, config: Path) -> Gateway:
        text = config.read_text()
        config.write_text(text.replace("version = 2", f"version = 2\n    redirect = {OTHER}\n    redirect_in = {when}", 1))
        return Gateway(namespace, config)

    with pair(client, gateway, Tunnel(connection_options={"mobike": "no", "local_addrs": "%any"})) as link:
        prepared(link)
        wait_until(lambda: OTHER in link.b.log(), "the new address has sockets")
        with pytest.raises(NegotiationFailed):
            link.a.initiate()
        if client is OURS:
            link.a.wait_gone()
        wait_until(lambda: not link.b.ike_sas(), "nothing is left", 45.0, 0.2)
        if client is OURS:
            assert link.a.log().count("is redirected to") == 5
