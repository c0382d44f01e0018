"""Two shims as PE routers with fixed keys: three customers of the same addresses, each in its own VRF."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import pytest
from lab.capture import Capture
from lab.process import wait_until
from lab.providers import CUSTOMERS, Provider, Providers, providers
from lab.topology import WAN
from lab.traffic import ping, tcp_bulk, tcp_server
from shim_rig import Shim, associations, host, host_state, install, policies, spis

from kernel_shim.model import KernelError, Mode
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.labels import Label, LabelRange, LabelSet
from kernel_shim.mpls.lfib import Nhlfe, Peer, ToInterface, ToPeer, TtlModel
from kernel_shim.mpls.node import LabelBinding, NodeEntry, Tunnel, Vrf, VrfRoute

pytestmark = pytest.mark.pair


def entries(near: Provider, far: Provider, peer: str, encapsulation: Encapsulation) -> list[NodeEntry]:
    found: list[NodeEntry] = [
        Tunnel(peer, near.wan4, far.wan4, encapsulation),
        Peer(peer, LabelSet([LabelRange(Label(100), Label(199))])),
    ]
    for number, name in enumerate(CUSTOMERS):
        label = Label(100 + number)
        mine, theirs = near.customers[name], far.customers[name]
        found.append(Vrf(name, f"vpn-{name}", 101 + number, (mine.member,)))
        found.append(LabelBinding(label, (Nhlfe(ToInterface(name), ttl=TtlModel.PIPE),)))
        for net in (theirs.net4, theirs.net6):
            found.append(VrfRoute(name, net, (Nhlfe(ToPeer(peer), (label,), TtlModel.PIPE),)))
    return found


@dataclass
class Edges:
    lab: Providers
    a: Shim
    b: Shim
    wire: Capture

    async def connect(self, encapsulation: Encapsulation = Encapsulation.GRE, round_number: int = 0) -> None:
        one, other = spis(round_number)
        for shim, near, far, keys in ((self.a, self.lab.a, self.lab.b, (one, other)), (self.b, self.lab.b, self.lab.a, (other, one))):
            wanted = policies(near.wan4, far.wan4, host(near.wan4), host(far.wan4), mode=Mode.TRANSPORT, protocol=encapsulation)
            async with shim.channel() as channel:
                await channel.put_labels(entries(near, far, "pe", encapsulation))
                await install(channel, near.wan4, wanted, associations(near.wan4, far.wan4, *keys, Mode.TRANSPORT))

    def lost(self, name: str, timeout: float = 10.0) -> int:
        near, far = self.lab.a.customers[name], self.lab.b.customers[name]
        return ping(near.host, far.host4, count=2, timeout=timeout).lost + ping(near.host, far.host6, count=2, timeout=timeout).lost


@pytest.fixture
def edges() -> Iterator[Edges]:
    with providers() as lab, contextlib.ExitStack() as stack:
        a, b = Shim(lab.lab, lab.a.gateway), Shim(lab.lab, lab.b.gateway)
        yield Edges(lab, a, b, stack.enter_context(Capture(lab.a.gateway, WAN)))


@pytest.mark.parametrize("encapsulation", Encapsulation)
async def test_customers_of_the_same_addresses_reach_their_own(edges: Edges, encapsulation: Encapsulation) -> None:
    await edges.connect(encapsulation)
    for name in CUSTOMERS:
        assert edges.lost(name) == 0, name
    far = edges.lab.b
    # Only green answers here: what reached another customer's host of the same address would be refused by it.
    with tcp_server(far.customers["green"].host, far.customers["green"].host4, 7000) as port:
        for name in CUSTOMERS:
            near = edges.lab.a.customers[name]
            if name == "green":
                assert tcp_bulk(near.host, far.customers[name].host4, port, size=8 << 20).intact
            else:
                done = near.host.run(["bash", "-c", f"exec 3<>/dev/tcp/{far.customers[name].host4}/{port}"], check=False)
                assert "refused" in done.stderr
    assert len(edges.wire.esp()) > 100
    assert edges.wire.clear_packets((edges.lab.a.customers["red"].net4, edges.lab.a.customers["red"].net6)) == []


async def test_what_is_too_big_is_told_within_the_vrf(edges: Edges) -> None:
    await edges.connect()
    near, far = edges.lab.a.customers["red"], edges.lab.b.customers["red"]
    assert ping(near.host, far.host4, size=4000).lost == 0
    done = near.host.run(["ping", "-M", "do", "-s", "1460", "-c", "1", "-W", "20", str(far.host4)], check=False)
    assert "mtu" in (done.stdout + done.stderr).lower()


async def test_a_dead_shim_lets_no_customer_out(edges: Edges) -> None:
    await edges.connect()
    assert edges.lost("red") == 0
    edges.a.kill()
    state = host_state(edges.lab.a.gateway)
    assert "lookup 101" in state["rules"]
    assert edges.lost("red", timeout=0.5) == 4
    edges.a.restart()
    await edges.connect(round_number=1)
    for name in CUSTOMERS:
        assert edges.lost(name) == 0


async def test_a_vrf_is_taken_away_whole(edges: Edges) -> None:
    await edges.connect()
    async with edges.a.channel() as channel:
        await channel.delete_labels(await channel.labels())
        assert list(await channel.labels()) == []
    after = host_state(edges.lab.a.gateway)
    assert "vpn-red" not in after["links"]
    assert "lookup 10" not in after["rules"]
    assert "table 101" not in after["routes"]


async def test_the_orderly_end_leaves_the_host_as_it_was(edges: Edges) -> None:
    await edges.connect()
    assert edges.a.stop() == 0
    state = host_state(edges.lab.a.gateway)
    assert "lookup 10" not in state["rules"]
    assert "table 10" not in state["routes"]
    assert "vpn-" not in state["links"]


async def test_an_interface_that_is_taken_is_refused_and_nothing_stands(edges: Edges) -> None:
    async with edges.a.channel() as channel:
        with pytest.raises(KernelError, match="interface"):
            await channel.put_labels([Vrf("red", WAN, 101, ("ce-red",))])
        assert list(await channel.labels()) == []
    assert "lookup 101" not in host_state(edges.lab.a.gateway)["rules"]


def answers(captures: Mapping[str, Capture], addresses: Collection[object]) -> dict[str, int]:
    """Who saw how many ICMP messages from these addresses."""
    return {name: sum(packet.source in addresses and packet.protocol in (1, 58) for packet in capture.packets()) for name, capture in captures.items()}


async def test_the_host_answers_each_customer_and_no_other(edges: Edges) -> None:
    """All PEs' addresses are the same in each VRF: by its main table the host would answer whoever stands first there."""
    await edges.connect()
    for name in CUSTOMERS:
        near, far = edges.lab.a.customers[name], edges.lab.b.customers[name]
        with contextlib.ExitStack() as stack:
            seen = {it: stack.enter_context(Capture(edges.lab.a.customers[it].host, "lan", outgoing=False)) for it in CUSTOMERS}
            for address in (near.net4[1], far.net4[1], near.net6[1], far.net6[1]):
                assert ping(near.host, address, count=2).lost == 0, (name, address)
            for address in (far.host4, far.host6):
                near.host.run(["ping", "-t", "1", "-c", "2", "-i", "0.2", "-W", "1", str(address)], check=False)
                near.host.run(["ping", "-t", "2", "-c", "2", "-i", "0.2", "-W", "1", str(address)], check=False)
            gateways = {near.net4[1], near.net6[1], far.net4[1], far.net6[1]}
            wait_until(lambda: answers(seen, gateways)[name] >= 16, "every answer")  # noqa: B023
            errors = answers(seen, gateways)
            assert {it: number for it, number in errors.items() if it != name and it} == dict.fromkeys(set(CUSTOMERS) - {name}, 0)
        done = near.host.run(["bash", "-c", f"exec 3<>/dev/tcp/{near.net4[1]}/99"], check=False)
        assert "refused" in done.stderr


async def test_an_answer_that_lost_its_mark_reaches_nobody(edges: Edges) -> None:
    await edges.connect()
    edges.lab.a.gateway.sysctl(ipv4__fwmark_reflect=0)
    near = edges.lab.a.customers["blue"]
    assert ping(near.host, near.net4[1], count=2, timeout=0.5).received == 0
    async with edges.a.channel() as channel:
        assert (await channel.statistics())["guard.vrf-errors-dropped.packets"] == 2


async def test_strict_reverse_paths_and_policies_of_the_host_leave_customers_alone(edges: Edges) -> None:
    for name in CUSTOMERS:
        edges.lab.a.gateway.sysctl(**{f"ipv4__conf__ce-{name}__rp_filter": 1})
    edges.lab.a.gateway.sysctl(ipv4__conf__default__rp_filter=1)
    await edges.connect()
    red, other = edges.lab.a.customers["red"], edges.lab.b.customers["red"]
    async with edges.a.channel() as channel:
        for policy in policies(edges.lab.a.wan4, edges.lab.b.wan4, red.net4, other.net4):
            await channel.add_policy(policy)
    for name in CUSTOMERS:
        assert edges.lost(name) == 0, name
    assert edges.a.stop() == 0
    assert edges.lab.a.gateway.run(["cat", "/proc/sys/net/ipv4/conf/ce-red/rp_filter"]).stdout.strip() == "1"


async def test_an_interface_of_a_vrf_goes_and_comes_again(edges: Edges) -> None:
    await edges.connect()
    lab, near = edges.lab.lab, edges.lab.a.customers["red"]
    edges.lab.a.gateway.ip("link del ce-red")
    assert edges.lost("blue") == 0
    lab.veth(near.host, "lan", edges.lab.a.gateway, "ce-red")
    edges.lab.a.gateway.ip(f"addr add {near.net4[1]}/{near.net4.prefixlen} dev ce-red")
    edges.lab.a.gateway.sysctl(**{"ipv4__conf__ce-red__proxy_arp": 1})
    near.host.ip(f"addr add {near.host4}/24 dev lan")
    far = edges.lab.b.customers["red"]
    wait_until(lambda: ping(near.host, far.host4, count=1, timeout=1.0).received, "red is back", interval=0.2)


async def test_a_member_more_does_not_stop_the_others(edges: Edges) -> None:
    await edges.connect()
    before = edges.lab.a.gateway.run(["cat", "/sys/class/net/vpn-red/ifindex"]).stdout
    async with edges.a.channel() as channel:
        await channel.put_labels([Vrf("red", "vpn-red", 101, ("ce-red", "ce-more"))])
        assert edges.lost("red") == 0
        assert "ce-more" in host_state(edges.lab.a.gateway)["rules"]
        await channel.put_labels([Vrf("red", "vpn-red", 101, ("ce-red",))])
    assert edges.lost("red") == 0
    assert "ce-more" not in host_state(edges.lab.a.gateway)["rules"]
    assert edges.lab.a.gateway.run(["cat", "/sys/class/net/vpn-red/ifindex"]).stdout == before
