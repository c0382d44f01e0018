"""Two key managers in one process: real cores, a kernel in memory each, and a network that is a function call."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import replace
from ipaddress import IPv4Address, ip_address

import pytest
from vpnd_fakes import FakeKernel
from vpnd_nodes import A, B, Network, Node, config, mirrored, pair, until

from kernel_shim.model import Acquire, AcquireSequence, Action, Direction, Endpoint, Expire, Flow, KernelError, Mode, NewMapping, PolicyIndex
from vpnd.control.backend import ChildUpDown, ControlError, LogLine
from vpnd.daemon import background, duplicates, endpoints
from vpnd.gate import GateSettings

pytestmark = pytest.mark.virtual_time


async def test_an_acquire_brings_up_the_child_with_its_sequence_and_policies() -> None:
    a, b, _ = await pair("trap", "trap")
    out = [policy for policy in a.kernel.policies.values() if policy.direction is Direction.OUT]
    flow = Flow(IPv4Address("10.1.0.1"), IPv4Address("10.2.0.9"), 17, 1, 2)
    event = Acquire(AcquireSequence(77), PolicyIndex(8), out[0].templates[0].reqid, Mode.TUNNEL, A, B, out[0].selector, flow)
    a.channels[-1].event(event)
    a.channels[-1].event(event)  # said again while the negotiation is under way
    await until(lambda: mirrored(a, b))
    outbound = next(sa for sa in a.kernel.sas.values() if sa.direction is Direction.OUT)
    assert outbound.acquire == 77
    assert outbound.reqid == out[0].templates[0].reqid
    assert len(a.kernel.policies) == len(b.kernel.policies) == 3
    assert len(a.manager) == len(b.manager) == 1
    peer = next(sa for sa in b.kernel.sas.values() if sa.spi == outbound.spi)
    assert peer.encryption_key == outbound.encryption_key
    assert b.kernel.requests.index("update_sa") < b.kernel.requests.index("add_sa"), "the SA in stands before the SA out"


async def test_initiate_and_terminate_from_the_operator() -> None:
    a, b, _ = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    (status,) = await a.operations.list_sas()
    assert status.state.value == "ESTABLISHED"
    assert [child.name for child in status.children] == ["net"]
    await b.down(child="net")
    await until(lambda: not a.kernel.sas and not b.kernel.sas)
    assert not a.kernel.policies
    assert not b.kernel.policies
    await a.down(ike="site")
    await until(lambda: len(a.manager) == len(b.manager) == 0)
    with pytest.raises(ControlError, match="no matching"):
        await a.down(ike="site")


@pytest.mark.parametrize("arrived", [0, 1, 2, 3])
async def test_what_the_operator_gives_up_while_it_connects_stands_nowhere_and_comes_back_when_asked(arrived: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, network = await pair()
    carry, held = network.carry, list[tuple[Endpoint, Endpoint, bytes]]()
    monkeypatch.setattr(network, "carry", lambda *datagram: held.append(datagram) if len(network.sent) == arrived else carry(*datagram))
    bringing = asyncio.create_task(a.up())
    await until(lambda: held)
    ending = asyncio.create_task(a.down(ike="site"))
    with pytest.raises(ControlError):
        await bringing
    monkeypatch.undo()
    for datagram in held:
        carry(*datagram)
    await ending
    await until(lambda: len(a.manager) == len(b.manager) == 0)
    for node in (a, b):
        assert not node.kernel.sas
        assert not node.kernel.policies
    await a.up()
    await until(lambda: mirrored(a, b))


async def test_a_wrong_secret_fails_on_both_sides_and_says_who() -> None:
    a, b, _network = await pair(secret_b="not ours")
    with pytest.raises(ControlError):
        await a.up()
    await until(lambda: len(a.manager) == len(b.manager) == 0)
    said = "\n".join(b.lines)
    assert "a.example" in said
    assert "site" in said
    for text in (*a.lines, *b.lines):
        assert "between us" not in text
        assert "not ours" not in text
    assert not a.kernel.sas
    assert not b.kernel.sas


async def test_a_failed_negotiation_answers_the_acquire() -> None:
    a, _b, network = await pair("trap")
    network.cut = True
    reqid = next(iter(a.kernel.policies.values())).templates[0].reqid
    a.channels[-1].event(Acquire(AcquireSequence(5), PolicyIndex(8), reqid, Mode.TUNNEL, A, B, None, None))
    await until(lambda: "acquire_failed" in a.kernel.requests)
    assert len(a.manager) == 0


async def test_a_hard_expiry_leads_to_a_new_child() -> None:
    a, b, _ = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    old = next(sa for sa in a.kernel.sas.values() if sa.direction is Direction.OUT)
    del a.kernel.sas[old.id]
    a.channels[-1].event(Expire(old.id, old.reqid, hard=True))
    await until(lambda: mirrored(a, b) and old.spi not in a.spis(Direction.OUT))
    assert len(a.kernel.policies) == 3


async def test_a_soft_expiry_makes_the_successor_before_the_old_one_goes() -> None:
    a, b, _ = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    old = next(sa for sa in a.kernel.sas.values() if sa.direction is Direction.OUT)
    least = []
    a.manager.news.subscribe(lambda _event: least.append(min(len(a.spis(Direction.IN)), len(b.spis(Direction.OUT)))))
    a.channels[-1].event(Expire(old.id, old.reqid, hard=False))
    await until(lambda: mirrored(a, b) and old.spi not in a.spis(Direction.OUT))
    assert min(least) >= 1


async def test_a_kernel_that_lost_its_sas_gets_new_ones_never_the_old_keys() -> None:
    a, b, _ = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    old = set(a.kernel.sas.values())
    fewest = []
    b.manager.news.subscribe(lambda _event: fewest.append(len(b.kernel.policies)))
    a.kernel = FakeKernel(next_spi=0x9000)
    a.channels[-1].die()
    await until(lambda: len(a.channels) == 2 and mirrored(a, b))
    assert not {sa.encryption_key for sa in old} & {sa.encryption_key for sa in a.kernel.sas.values()}
    assert len(a.kernel.policies) == 3
    assert min(fewest) == 3, "the peer is never without the policies"


@pytest.mark.parametrize("standing", [False, True], ids=["two IKE SAs", "two CHILD_SAs"])
async def test_when_both_sides_ask_at_once_one_child_remains(standing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "SETTLE", 0.01)
    a, b, _ = await pair("trap", "trap")
    if standing:
        await a.up()
        await a.down(child="net")
        await until(lambda: not a.kernel.sas and not b.kernel.sas)
    await asyncio.gather(a.up(), b.up())
    await until(lambda: mirrored(a, b))
    await until(lambda: len(a.manager) == len(b.manager) == 1)
    await asyncio.sleep(0.1)
    assert mirrored(a, b)
    assert len(a.manager) == len(b.manager) == 1


async def test_a_nat_that_gives_the_peer_another_port_or_address_is_followed() -> None:
    a, b, _ = await pair(connection="mobike = no")
    await a.up()
    await until(lambda: mirrored(a, b))
    inbound = next(sa for sa in b.kernel.sas.values() if sa.direction is Direction.IN)
    outbound = next(sa for sa in b.kernel.sas.values() if sa.direction is Direction.OUT)
    for port, address in ((61000, A), (62000, A), (63000, ip_address("127.0.0.99"))):
        b.channels[-1].event(NewMapping(inbound.id, inbound.reqid, Endpoint(A, 4500), Endpoint(address, port)))
        moved = replace(outbound, destination=address, encapsulation=replace(outbound.encapsulation, destination_port=port))
        await until(lambda moved=moved: b.kernel.sas.get(moved.id) == moved)
    assert len(b.kernel.sas) == 2
    assert {policy.templates[0].destination for policy in b.kernel.policies.values() if policy.direction is Direction.OUT} == {moved.destination}


async def test_half_open_limits_ask_for_cookies_and_then_refuse() -> None:
    network = Network()
    b = Node(
        network,
        config("b").replace(f"remote_addrs = {A}", "remote_addrs = %any"),
        B,
        gate=GateSettings(cookie_threshold=1, cookie_threshold_ip=0, block_threshold=0, limit=3),
    )
    await b.start()
    nodes = []
    for number in range(8):
        a = Node(network, config("a"), ip_address(f"127.0.1.{number}"))
        await a.start()
        a.network = Network()  # what it sends is taken by hand
        a.demands.demand(a.configuration.connections["site"], a.configuration.connections["site"].children["net"])
        await until(lambda a=a: a.network.sent)
        nodes.append(a)
        b.manager.datagram(Endpoint(B, 500), Endpoint(ip_address(f"127.0.1.{number}"), 500), a.network.sent[0])
    assert b.manager.registry.half_open_total == 1, "from the first on a cookie is asked for, and nobody returned one"
    assert b.manager.counters.snapshot()["ike_cookies_sent"] == 7


async def test_wait_returns_when_somebody_else_brings_it_up() -> None:
    a, b, _ = await pair()
    waiting = asyncio.ensure_future(b.operations.wait("net", 5.0))
    await a.up()
    await waiting
    with pytest.raises(ControlError, match="not found"):
        await b.operations.wait("other", 1.0)


async def test_initial_contact_replaces_what_a_restarted_peer_had() -> None:
    a, b, network = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    reborn = Node(network, config("a"), A)
    reborn.kernel.next_spi = 0x8000
    await reborn.start()
    fewest = []
    b.manager.news.subscribe(lambda _event: fewest.append(len(b.kernel.policies)))
    await reborn.up()
    await until(lambda: mirrored(reborn, b))
    assert len(b.manager) == 1
    assert min(fewest) == 3, "it is never without the policies"


async def test_a_late_packet_of_a_deleted_child_brings_nothing_back() -> None:
    a, b, _ = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    out = next(policy for policy in b.kernel.policies.values() if policy.direction is Direction.OUT)
    await a.down(ike="site")
    await until(lambda: len(b.manager) == 0)
    flow = Flow(IPv4Address("10.2.0.9"), IPv4Address("10.1.0.1"), 17, 1, 2)
    b.channels[-1].event(Acquire(AcquireSequence(9), PolicyIndex(8), out.templates[0].reqid, Mode.TUNNEL, B, A, out.selector, flow))
    await until(lambda: "acquire_failed" in b.kernel.requests)
    assert len(b.manager) == len(a.manager) == 0


async def test_nothing_new_begins_while_the_daemon_stops() -> None:
    a, b, network = await pair("trap", "trap")
    a.demands.stop()
    a.manager.drain()
    policy = next(iter(a.kernel.policies.values()))
    a.channels[-1].event(Acquire(AcquireSequence(6), PolicyIndex(8), policy.templates[0].reqid, Mode.TUNNEL, A, B, policy.selector, None))
    await until(lambda: "acquire_failed" in a.kernel.requests)
    assert not network.sent
    with pytest.raises(ControlError):
        await b.up()
    assert len(a.manager) == 0
    assert a.manager.counters.snapshot()["ike_refused_draining"] > 0


async def test_a_peer_without_address_that_is_tried_for_ever_is_tried_with_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def unresolved(host: str) -> None:
        asked.append(host)

    monkeypatch.setattr(endpoints, "resolve", unresolved)
    network = Network()
    a = Node(network, config("a").replace(f"remote_addrs = {B}", "remote_addrs = nowhere.example\n keyingtries = 0"), A)
    await a.start()
    up = asyncio.ensure_future(a.up())
    for _ in range(200):
        await asyncio.sleep(0)
    assert asked == ["nowhere.example"] * 2, "once for the demand and once to know the peer"
    assert any("no address for nowhere.example" in line for line in a.lines)
    a.demands.stop()
    with pytest.raises(ControlError):
        await up


async def test_unloading_a_connection_ends_its_trying_for_ever() -> None:
    network = Network(cut=True)
    a = Node(network, config("a").replace("proposals", "keyingtries = 0\n proposals", 1), A)
    await a.start()
    up = asyncio.ensure_future(a.up())
    await until(lambda: network.sent)
    await a.operations.unload_connection("site")
    with pytest.raises(ControlError):
        await up
    assert len(a.manager) == 0


async def test_a_client_that_leaves_in_the_middle_leaves_no_task_behind() -> None:
    network = Network(cut=True)
    a = Node(network, config("a"), A)
    await a.start()
    before = asyncio.all_tasks()
    up = asyncio.ensure_future(a.up())
    await until(lambda: network.sent)
    up.cancel()
    await asyncio.gather(up, return_exceptions=True)
    await until(lambda: len(a.manager) == 0)
    await until(lambda: asyncio.all_tasks() <= before)


async def test_a_trap_towards_a_name_waits_for_the_resolver_and_discards_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[object] = [None, None, None]
    gate = asyncio.Event()

    async def resolve(host: str) -> object:
        await gate.wait()
        return answers.pop(0) if answers else B

    monkeypatch.setattr(endpoints, "resolve", resolve)
    monkeypatch.setattr(endpoints, "RETRY_FIRST", 0.01)
    network = Network()
    a, b = Node(network, config("a", "trap").replace(f"remote_addrs = {B}", "remote_addrs = b.example"), A), Node(network, config("b"), B)
    await b.start()
    await a.start()  # although the resolver says nothing
    assert {policy.action for policy in a.kernel.policies.values()} == {Action.DISCARD}
    gate.set()
    await until(lambda: any("is trapped" in line for line in a.lines))
    assert {policy.action for policy in a.kernel.policies.values()} == {Action.PROTECT}
    assert any("b.example" in line and "does not resolve" in line for line in a.lines)
    await a.operations.unload_connection("site")
    await until(lambda: not a.kernel.policies)


async def test_a_trap_that_waits_for_an_address_goes_with_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(host: str) -> None:
        return None

    monkeypatch.setattr(endpoints, "resolve", resolve)
    a = Node(Network(), config("a", "trap").replace(f"remote_addrs = {B}", "remote_addrs = b.example"), A)
    await a.start()
    await until(lambda: a.lines)
    await a.operations.unload_connection("site")
    await until(lambda: not a.kernel.policies)


async def test_a_connection_that_could_not_be_loaded_can_be_loaded_later() -> None:
    a = Node(Network(), config("a", "trap"), A)
    await a.manager.kernel.open()
    site = a.configuration.connections["site"]
    a.kernel.faults["update_policy"] = KernelError(22, "not today")
    with pytest.raises(ControlError, match="not today"):
        await a.operations.load_connection(site)
    assert "site" not in a.operations.connections()
    await a.operations.load_connection(site)
    assert len(a.kernel.policies) == 3


async def test_strangers_who_are_refused_cannot_fill_the_log() -> None:
    network = Network()
    b = Node(network, config("b").replace("x25519", "ecp256"), B)
    await b.start()
    a = Node(network, config("a"), A)
    await a.start()
    with pytest.raises(ControlError):
        await a.up()
    request = next(data for data in network.sent if data[18] == 34 and not data[19] & 0x20)
    said = len(b.lines)
    for number in range(500):
        b.manager.datagram(Endpoint(B, 500), Endpoint(A, 1024 + number), request)
    assert b.manager.counters.snapshot()["ike_init_refused"] > 500
    assert said < len(b.lines) < 50
    assert len(b.manager) == 0


async def test_two_children_do_not_share_a_reqid() -> None:
    a = Node(Network(), config("a"), A)
    await a.start()
    site = a.configuration.connections["site"]
    fixed = replace(site.children["net"], reqid=7)
    other = replace(site, name="other", children={"net": fixed})
    await a.operations.load_connection(other)
    with pytest.raises(ControlError, match="reqid 7 is that of child 'net' of connection 'other'"):
        await a.operations.load_connection(replace(site, name="third", children={"net": fixed}))
    await a.operations.unload_connection("other")
    await a.operations.load_connection(replace(site, name="third", children={"net": fixed}))
    taken = {a.manager.kernel.reqid_for(None) for _ in range(20)}
    assert 7 not in taken


async def test_a_reload_changes_a_reqid() -> None:
    a = Node(Network(), config("a", "trap"), A)
    await a.start()
    site = a.configuration.connections["site"]
    await a.operations.load_connection(replace(site, children={"net": replace(site.children["net"], reqid=77)}))
    assert {template.reqid for policy in a.kernel.policies.values() for template in policy.templates} == {77}


async def test_a_demand_that_waits_for_the_resolver_ends_with_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = asyncio.Event()

    async def resolve(host: str) -> object:
        await gate.wait()
        return None

    monkeypatch.setattr(endpoints, "resolve", resolve)
    failures: list[object] = []
    monkeypatch.setattr(background.log, "error", lambda *_args, **details: failures.append(details))
    a = Node(Network(), config("a").replace(f"remote_addrs = {B}", "remote_addrs = b.example"), A)
    await a.start()
    up = asyncio.ensure_future(a.up())
    for _ in range(5):
        await asyncio.sleep(0)
    a.demands.stop()
    with pytest.raises(ControlError):
        await up
    gate.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not failures
    assert len(a.manager) == 0


async def test_many_acquires_at_once_leave_turns_to_others() -> None:
    network = Network(cut=True)
    text = config("a", "trap")
    start, end = text.index("  site {"), text.index("secrets")
    block = text[start : text.rindex("}", start, end)]
    many = 50
    blocks = "".join(block.replace("site", f"site{n}").replace("10.2.0.0/16", f"10.2.{n}.0/24").replace(str(B), f"127.0.2.{n + 1}") for n in range(many))
    a = Node(network, text[:start] + blocks + "}\n" + text[end:], A)
    await a.start()
    out = [policy for policy in a.kernel.policies.values() if policy.direction is Direction.OUT]
    assert len(out) == many
    for number, policy in enumerate(out, 1):
        reqid = policy.templates[0].reqid
        a.channels[-1].event(Acquire(AcquireSequence(number), PolicyIndex(8), reqid, Mode.TUNNEL, A, policy.templates[0].destination, policy.selector, None))
    turns, most, before = 0, 0, 0
    while len(a.manager) < many:
        await asyncio.sleep(0)
        most, before, turns = max(most, len(a.manager) - before), len(a.manager), turns + 1
    assert most <= 2
    await until(lambda: a.kernel.requests.count("acquire_failed") == many)
    assert len(a.manager) == 0


def children(node: Node) -> list[tuple[int, str]]:
    return [(child.sa.id, child.state.value) for entry in node.manager.entries() for child in entry.sa.children.values()]


@pytest.mark.parametrize("sides", ["a", "b", "ab"])
async def test_a_child_is_rekeyed_by_the_operator(sides: str) -> None:
    a, b, _ = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    old, events = a.spis(Direction.OUT), []
    a.manager.news.subscribe(events.append)
    fewest = []
    b.manager.news.subscribe(lambda _event: fewest.append((len(b.kernel.policies), len(b.spis(Direction.OUT)))))
    for name in sides:
        assert {"a": a, "b": b}[name].operations.rekey(child="net") == 1
    await until(lambda: mirrored(a, b) and not old & a.spis(Direction.OUT) and len(children(a)) == len(children(b)) == 1)
    assert min(fewest) >= (3, 1)
    assert len(a.kernel.policies) == 3
    assert len(a.manager) == len(b.manager) == 1
    assert next(type(event).__name__ for event in events if not isinstance(event, LogLine)) == "ChildRekeyed"
    assert not [event for event in events if isinstance(event, ChildUpDown)]
    await a.down(ike="site")
    await until(lambda: not a.kernel.sas and not b.kernel.sas and not a.kernel.policies and not b.kernel.policies)


@pytest.mark.parametrize("sides", ["a", "b", "ab"])
async def test_the_ike_sa_is_rekeyed_by_the_operator(sides: str) -> None:
    a, b, _ = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    before, events = (a.spis(Direction.OUT), children(a), children(b)), []
    a.manager.news.subscribe(events.append)
    for name in sides:
        assert {"a": a, "b": b}[name].operations.rekey(ike="site") == 1
    await until(lambda: len(a.manager) == len(b.manager) == 1 and any("rekeyed from" in line for line in a.lines))
    assert (a.spis(Direction.OUT), children(a), children(b)) == before, "the children stay as they are"
    (status,) = await a.operations.list_sas()
    assert status.state.value == "ESTABLISHED"
    assert status.unique_id > 1
    assert [type(event).__name__ for event in events if not isinstance(event, LogLine)] == ["IkeRekeyed"]
    assert len(a.kernel.policies) == len(b.kernel.policies) == 3
    # all that the old one could do the new one can: rekey, expire, delete
    spis = a.spis(Direction.OUT)
    b.operations.rekey(child="net")
    await until(lambda: mirrored(a, b) and not spis & a.spis(Direction.OUT))
    old = next(sa for sa in a.kernel.sas.values() if sa.direction is Direction.OUT)
    del a.kernel.sas[old.id]
    a.channels[-1].event(Expire(old.id, old.reqid, hard=True))
    await until(lambda: mirrored(a, b) and old.spi not in a.spis(Direction.OUT))
    await b.down(ike="site")
    await until(lambda: not a.kernel.sas and not b.kernel.sas and len(a.manager) == len(b.manager) == 0)
    assert not a.kernel.policies
    assert not b.kernel.policies


async def test_ike_sas_that_were_rekeyed_are_forgotten_though_their_child_stands() -> None:
    a, b, _ = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    past: list[weakref.ref[object]] = []
    for node in (a, b, a):
        (old,) = node.manager.entries()
        past += [weakref.ref(each.sa) for side in (a, b) for each in side.manager.entries()]
        node.operations.rekey(ike="site")
        await until(lambda old=old: old.sa.closed and len(a.manager) == len(b.manager) == 1)
    del old
    await asyncio.sleep(0)
    gc.collect()
    assert [sa for sa in past if sa() is not None] == []
    inbound = next(sa for sa in b.kernel.sas.values() if sa.direction is Direction.IN)
    assert b.manager.child_with(inbound.id) == (next(b.manager.entries()), children(b)[0][0])


async def test_a_demand_goes_on_under_the_new_ike_sa() -> None:
    a, b, _ = await pair()
    await a.up()
    await a.down(child="net")
    await until(lambda: not a.kernel.sas and not b.kernel.sas)
    a.operations.rekey(ike="site")
    await a.up()
    await until(lambda: mirrored(a, b))
    await until(lambda: len(a.manager) == len(b.manager) == 1)
    assert any("rekeyed from" in line for line in a.lines)


async def test_what_the_kernel_loses_while_it_is_rekeyed_is_replaced_once() -> None:
    a, b, network = await pair()
    await a.up()
    await until(lambda: mirrored(a, b))
    old = next(sa for sa in a.kernel.sas.values() if sa.direction is Direction.OUT)
    network.cut = True
    a.operations.rekey(child="net")
    await until(lambda: children(a)[0][1] == "REKEYING")
    del a.kernel.sas[old.id]
    a.channels[-1].event(Expire(old.id, old.reqid, hard=True))
    network.cut = False
    await until(lambda: mirrored(a, b) and old.spi not in a.spis(Direction.OUT) and len(children(a)) == len(children(b)) == 1)
    assert len(a.kernel.policies) == len(b.kernel.policies) == 3


async def test_a_peer_that_asks_first_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(host: str) -> object:
        return {"a.example": A}[host]

    monkeypatch.setattr(endpoints, "resolve", resolve)
    network = Network()
    a, b = Node(network, config("a"), A), Node(network, config("b").replace(f"remote_addrs = {A}", "remote_addrs = a.example"), B)
    await b.start()
    await a.start()
    await a.up()
    await until(lambda: mirrored(a, b))
