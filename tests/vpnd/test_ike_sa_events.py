"""What listeners hear of IKE SAs besides up and down, and IKE SAs that are wanted without a child."""

from __future__ import annotations

import pytest
from vpnd_nodes import A, B, Network, Node, config, mirrored, pair, until

from kernel_shim.model import Direction, Endpoint, NewMapping
from vpnd.control.backend import Alert, ControlError, DaemonEvent, IkeUpdated
from vpnd.control.vici.formats import alert_event, ike_update_event

pytestmark = pytest.mark.virtual_time


async def test_listeners_hear_of_new_addresses_and_of_what_went_wrong() -> None:
    a, b, _ = await pair(connection="mobike = no")
    events: list[DaemonEvent] = []
    b.manager.news.subscribe(events.append)
    await a.up()
    await until(lambda: mirrored(a, b))
    inbound = next(sa for sa in b.kernel.sas.values() if sa.direction is Direction.IN)
    b.channels[-1].event(NewMapping(inbound.id, inbound.reqid, Endpoint(A, 4500), Endpoint(A, 61000)))
    await until(lambda: any(isinstance(event, IkeUpdated) for event in events))
    (moved,) = [event for event in events if isinstance(event, IkeUpdated)]
    assert (moved.ike.remote, moved.remote, moved.local) == (Endpoint(A, 4500), Endpoint(A, 61000), moved.ike.local)
    told = ike_update_event(moved.ike, moved.local, moved.remote).plain()
    assert (told["remote-port"], told["site"]["remote-port"]) == ("61000", "4500")  # type: ignore[index]
    counted = b.manager.exchanges.of("site")
    assert counted is not None
    assert {name: counted[name] for name in ("ike-init-in-req", "ike-init-out-resp", "ike-auth-in-req", "ike-auth-out-resp", "ike-init-out-req")} == {
        "ike-init-in-req": 1,
        "ike-init-out-resp": 1,
        "ike-auth-in-req": 1,
        "ike-auth-out-resp": 1,
        "ike-init-out-req": 0,
    }


async def test_an_alert_says_which_ike_sa_failed() -> None:
    a, b, _ = await pair(secret_b="another")
    alerts: list[tuple[str, Alert]] = []
    for name, node in (("a", a), ("b", b)):
        node.manager.news.subscribe(lambda event, name=name: alerts.append((name, event)) if isinstance(event, Alert) else None)
    with pytest.raises(ControlError):
        await a.up()
    await until(lambda: len(alerts) == 2)
    assert {(name, alert.kind) for name, alert in alerts} == {("a", "local-auth-failed"), ("b", "peer-auth-failed")}
    (mine,) = (alert for name, alert in alerts if name == "a")
    section = alert_event(mine.kind, mine.ike).plain()
    assert section["type"] == "local-auth-failed"
    assert list(section["ike-sa"]) == ["site"]  # type: ignore[call-overload]


async def test_an_ike_sa_is_brought_up_without_a_child() -> None:
    a, b, _ = await pair(connection="childless = allow")

    async def up() -> list[str]:
        return [line.text async for line in a.operations.initiate(child=None, ike="site", timeout=5.0)]

    assert any("established" in line for line in await up())
    assert any("stands already" in line for line in await up())
    assert len(a.manager) == 1
    assert not a.kernel.sas
    await a.up()
    await until(lambda: mirrored(a, b))
    with pytest.raises(ControlError, match="'other' not found"):
        [line async for line in a.operations.initiate(child=None, ike="other", timeout=5.0)]


async def test_a_peer_that_takes_no_ike_sa_without_a_child_is_named() -> None:
    network = Network()
    a, b = Node(network, config("a"), A), Node(network, config("b", connection="childless = never"), B)
    for node in (a, b):
        await node.start()
    with pytest.raises(ControlError, match="takes no IKE SA without a CHILD_SA"):
        [line async for line in a.operations.initiate(child=None, ike="site", timeout=5.0)]
    with pytest.raises(ControlError, match="childless = never"):
        [line async for line in b.operations.initiate(child=None, ike="site", timeout=5.0)]
