"""A gateway's name that a redirection gave (RFC 5685): what it stands for is the choice of who sent us."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from vpnd_nodes import A, B, Network, Node, config

from kernel_shim.model import IPAddress
from vpnd.daemon import endpoints
from vpnd.daemon.endpoints import Endpoints
from vpnd.daemon.redirects import Redirection
from vpnd.ike.gateway_id import GatewayId

pytestmark = pytest.mark.virtual_time


@pytest.mark.parametrize(
    ("stands_for", "goes_to"), [("203.0.113.9", "203.0.113.9"), ("127.0.0.1", str(B)), ("224.0.0.1", str(B)), ("::", str(B)), (None, str(B))]
)
async def test_a_name_leads_to_other_hosts_only(monkeypatch: pytest.MonkeyPatch, stands_for: str | None, goes_to: str) -> None:
    async def resolve(name: str) -> IPAddress | None:
        assert name == "gateway.example"
        return ip_address(stands_for) if stands_for else None

    monkeypatch.setattr(endpoints, "resolve", resolve)
    node = Node(Network(), config("a"), A)
    await node.start()
    connection = node.configuration.connections["site"]
    node.manager.redirects.sent("site", Redirection(GatewayId.parse("gateway.example"), GatewayId(B)), 0.0)
    assert str(await Endpoints(node.manager, 0).gateway(connection)) == goes_to
