"""A peer that is known by its name and gets another address."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from vpnd_nodes import A, B, Network, Node, config, mirrored, until

from kernel_shim.model import Direction, IPAddress
from vpnd.daemon import endpoints

pytestmark = pytest.mark.virtual_time

ELSEWHERE = ip_address("127.0.0.14")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[IPAddress]:
    found: list[IPAddress] = [B]

    async def resolve(_host: str) -> IPAddress:
        return found[-1]

    monkeypatch.setattr(endpoints, "resolve", resolve)
    monkeypatch.setattr(endpoints, "REFRESH", 0.02)
    return found


def outer(node: Node) -> set[object]:
    return {policy.templates[0].destination for policy in node.kernel.policies.values() if policy.direction is Direction.OUT and policy.templates}


async def test_its_traps_follow_it(answers: list[IPAddress]) -> None:
    a = Node(Network(), config("a", "trap").replace(f"remote_addrs = {B}", "remote_addrs = b.example"), A)
    await a.start()
    await until(lambda: outer(a) == {B})
    answers.append(ELSEWHERE)
    await until(lambda: outer(a) == {ELSEWHERE})
    assert any(f"b.example of connection 'site' is at {ELSEWHERE} now" in line for line in a.lines)


async def test_it_is_recognised_when_it_asks(answers: list[IPAddress]) -> None:
    network = Network()
    a = Node(network, config("a").replace(f"remote_addrs = {B}", "remote_addrs = b.example"), A)
    await a.start()
    answers.append(ELSEWHERE)
    await until(lambda: a.manager.resolved.get("b.example") == ELSEWHERE)
    b = Node(network, config("b").replace(f"local_addrs = {B}", f"local_addrs = {ELSEWHERE}"), ELSEWHERE)
    await b.start()
    await b.up()
    await until(lambda: mirrored(a, b))
