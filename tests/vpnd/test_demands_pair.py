"""A CHILD_SA that is wanted is asked for once, whoever wants it and whatever else brings it up meanwhile."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address

import pytest
from vpnd_nodes import A, B, Network, Node, config, mirrored, pair, until

from kernel_shim.model import Acquire, AcquireSequence, Direction, Endpoint, Flow, Mode, PolicyIndex, SaId
from vpnd.control.backend import ControlError
from vpnd.daemon.entry import Entry
from vpnd.ike.context import Retransmission
from vpnd.ike.effects import Reason
from vpnd.ike.iana import Exchange
from vpnd.ike.wire.header import FLAG_RESPONSE

pytestmark = pytest.mark.virtual_time

PATIENT = Retransmission(30.0)


class Held:
    """The requests of a node, which leave when it is released; its answers leave at once."""

    def __init__(self, node: Node) -> None:
        self.node, self.requests, self._send = node, list[tuple[Endpoint, Endpoint, bytes]](), node.send
        node.send = self.send  # type: ignore[method-assign]

    def send(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        if data[19] & FLAG_RESPONSE:
            self._send(local, remote, data)
        else:
            self.requests.append((local, remote, data))

    def release(self) -> None:
        self.node.send = self._send  # type: ignore[method-assign]
        for request in self.requests:
            self._send(*request)


async def childless_pair(start: str = "none") -> tuple[Node, Node, Network, Entry]:
    """Its IKE SA stands, and nobody retransmits."""
    a, b, network = await pair(start, connection="childless = allow", retransmission=PATIENT)
    async for _line in a.operations.initiate(child=None, ike="site", timeout=5.0):
        pass
    (entry,) = a.manager.entries()
    await until(lambda: all(each.sa.established_at is not None for each in b.manager.entries()))
    return a, b, network, entry


def now() -> float:
    return asyncio.get_running_loop().time()


def asked(network: Network) -> int:
    """Requests for a CHILD_SA, outside IKE_AUTH."""
    return sum(data[18] == Exchange.CREATE_CHILD_SA and not data[19] & FLAG_RESPONSE for data in network.sent)


def acquire(node: Node, number: int) -> None:
    policy = next(policy for policy in node.kernel.policies.values() if policy.direction is Direction.OUT)
    flow = Flow(IPv4Address("10.1.0.1"), IPv4Address("10.2.0.9"), 17, 1, 2)
    node.channels[-1].event(Acquire(AcquireSequence(number), PolicyIndex(8), policy.templates[0].reqid, Mode.TUNNEL, A, B, policy.selector, flow))


async def test_what_the_peer_brings_up_meanwhile_is_not_asked_for() -> None:
    a, b, network, entry = await childless_pair()
    held = Held(a)
    a.manager.run(entry, entry.sa.probe(now()))
    up = asyncio.create_task(a.up())
    await until(lambda: entry.sa.tasks_queued == ("CHILD_CREATE",))
    await b.up()
    await up
    assert entry.sa.tasks_queued == ()
    held.release()
    await until(lambda: not entry.sa.tasks_active and mirrored(a, b))
    assert asked(network) == 1


async def test_what_the_peer_was_asked_for_already_is_waited_for() -> None:
    a, b, network, entry = await childless_pair("trap")
    held = Held(a)
    acquire(a, 77)
    await until(lambda: held.requests)
    await b.up()
    await until(lambda: mirrored(a, b))
    # the demand has come to its end, and what it asked for has not
    await b.down(child="net")
    await until(lambda: not a.kernel.sas)
    acquire(a, 78)
    up = asyncio.create_task(a.up())
    await until(lambda: sum("creating acquire job" in line for line in a.lines) == 2)
    held.release()
    await up
    await until(lambda: mirrored(a, b) and not entry.sa.tasks_active)
    assert asked(network) == 2  # a's and b's


async def test_of_two_that_are_the_same_one_is_reauthenticated() -> None:
    a, b, network, entry = await childless_pair()
    await a.up()
    config = a.configuration.connections["site"].children["net"]
    a.manager.run(entry, entry.sa.create_child(config, now(), reqid=1))
    await until(lambda: mirrored(a, b, 2))
    network.sent.clear()
    a.operations.rekey(ike="site", reauth=True)
    await until(lambda: mirrored(a, b) and len(a.manager) == len(b.manager) == 1)
    assert asked(network) == 0, "IKE_AUTH makes the only one"


async def test_a_demand_goes_on_with_the_ike_sa_that_stays() -> None:
    a, _, _, first = await childless_pair()
    second = a.manager.add_initiator(first.sa.connection, first.sa.local, first.sa.remote)
    a.manager.run(second, second.sa.initiate(now(), childless=True))
    await until(lambda: second.sa.established_at is not None)
    held = Held(a)
    up = asyncio.create_task(a.up())
    await until(lambda: held.requests)
    doomed, other = (second, first) if second.sa.tasks_active else (first, second)
    a.manager.run(doomed, doomed.sa.abort(now(), Reason.REPLACED))
    await until(lambda: other.sa.tasks_active)
    del held.requests[0]
    held.release()
    await up
    assert other.sa.children


async def test_a_refusal_that_the_kernel_holds_up_ends_the_demand_though_the_ike_sa_was_rekeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    network, childless = Network(), "childless = allow"
    a = Node(network, config("a", connection=childless), A, retransmission=PATIENT)
    b = Node(network, config("b", connection=childless).replace("10.1.0.0/16", "10.9.0.0/16"), B, retransmission=PATIENT)
    for node in (b, a):
        await node.start()
    async for _line in a.operations.initiate(child=None, ike="site", timeout=5.0):
        pass
    delete, slow = a.channels[-1].delete_sa, asyncio.Event()

    async def delete_slowly(sa: SaId) -> None:
        await slow.wait()
        await delete(sa)

    monkeypatch.setattr(a.channels[-1], "delete_sa", delete_slowly)
    up = asyncio.create_task(a.up())
    await until(lambda: any("request for a CHILD_SA denied" in line for line in b.lines))
    b.operations.rekey(ike="site")
    await until(lambda: any("rekeyed from" in line for line in a.lines))
    slow.set()
    with pytest.raises(ControlError, match="traffic selectors"):
        await up
