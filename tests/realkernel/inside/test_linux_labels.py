"""PE routers whose labels Linux forwards: VRF devices, GRE, the label table and encapsulating routes, programmed from the `mpls` section."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Iterable
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TypeVar

import pytest
from lab.capture import Capture
from lab.gateway import KERNEL_SHIM, Gateway
from lab.namespaces import Lab
from lab.process import wait_until
from lab.provider_edges import Edges, MakeGateway, configuration, provider_edges
from lab.providers import CUSTOMERS, Provider
from lab.topology import WAN
from lab.traffic import ping
from realkernel.kernel_gateways import xfrm

from kernel_shim.channel.linux_mpls.devices import tunnel_device
from kernel_shim.channel.linux_mpls.node import LinuxLabels
from kernel_shim.channel.linux_mpls.routes import SLICE
from kernel_shim.channel.linux_mpls.tables import BATCH
from kernel_shim.channel.sysctl import Sysctls
from kernel_shim.model import KernelError
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.labels import Label, LabelRange, LabelSet
from kernel_shim.mpls.lfib import Key, Nhlfe, Peer, ToInterface, ToPeer, ToVrf, TtlModel
from kernel_shim.mpls.node import LabelBinding, NodeEntry, Tunnel, Vrf, VrfRoute

pytestmark = pytest.mark.realkernel

T = TypeVar("T")


def links(gateway: Gateway) -> dict[str, int]:
    return {str(link["ifname"]): int(link["ifindex"]) for link in json.loads(gateway.namespace.run(["ip", "-json", "link"]).stdout)}


def counters(gateway: Gateway) -> dict[str, int]:
    """As `kernel-shim stats --kernel xfrm` shows them."""
    found: dict[str, int] = json.loads(gateway.namespace.run([*KERNEL_SHIM, "stats", "--kernel", "xfrm", "--json"]).stdout)
    return found


def state(gateway: Gateway) -> str:
    """What labels leave in a host."""
    run = gateway.namespace.run
    told = [run(["ip", "-brief", "link"]).stdout, run(["ip", "-f", "mpls", "route"]).stdout, run(["ip", "route", "show", "table", "all"]).stdout]
    return "".join(told) + run(["sysctl", "net.mpls.platform_labels"]).stdout


PIPE = Nhlfe(ToPeer("pe"), (Label(300), Label(400)), TtlModel.PIPE)
BOTH = (Nhlfe(ToPeer("pe"), (Label(200),)), Nhlfe(ToPeer("other"), (Label(201),)))
ENTRIES: list[NodeEntry] = [
    Vrf("red", "vpn-red", 101, ("ce-red", "not-there-yet")),
    Vrf("blue", "vpn-blue", 102, ("ce-blue",)),
    Tunnel("pe", ip_address("192.0.2.1"), ip_address("192.0.2.2")),
    Tunnel("six", ip_address("2001:db8::1"), ip_address("2001:db8::2")),
    Tunnel("other", ip_address("192.0.2.1"), ip_address("192.0.2.3"), Encapsulation.IP, managed=True),
    Peer("pe", LabelSet([LabelRange(Label(16), Label(99)), LabelRange(Label(101), Label(101))])),
    Peer("other", LabelSet()),
    LabelBinding(Label(100), (Nhlfe(ToInterface("red"), ttl=TtlModel.SHORT_PIPE),)),
    LabelBinding(Label(101), (PIPE,)),
    LabelBinding(Label(102), BOTH),
    LabelBinding(Label(103), (Nhlfe(ToPeer("pe")),)),
    VrfRoute("red", ip_network("10.9.0.0/24"), (PIPE,)),
    VrfRoute("red", ip_network("fd00:9::/64"), (PIPE,)),
    VrfRoute("red", ip_network("10.8.0.0/24"), BOTH),
    VrfRoute("red", ip_network("10.7.0.0/24"), (Nhlfe(ToVrf("blue")),)),
    VrfRoute("red", ip_network("0.0.0.0/0"), (PIPE,)),
    VrfRoute("red", ip_network("::/0"), (PIPE,)),
    VrfRoute("red", ip_network("10.1.0.0/24"), (Nhlfe(ToInterface("red")),)),
]
REFUSED: list[NodeEntry] = [
    Vrf("green", "vpn-green"),
    Vrf("green", "ce-red", 103),
    Tunnel("udp", ip_address("192.0.2.1"), ip_address("192.0.2.4"), Encapsulation.UDP),
    Peer("pe", LabelSet([LabelRange(Label(100), Label(100))]), space="pe"),
    LabelBinding(Label(104), (Nhlfe(ToPeer("pe"), (Label(200),), entropy=True),)),
    LabelBinding(Label(105), (Nhlfe(ToPeer("pe")), Nhlfe(ToPeer("other"), ttl=TtlModel.PIPE))),
    VrfRoute("nobody", ip_network("10.9.0.0/24"), (PIPE,)),
    # Another program's
    LabelBinding(Label(999), (Nhlfe(ToPeer("pe")),)),
    VrfRoute("red", ip_network("10.6.0.0/24"), (PIPE,)),
]


def keyed(entries: Iterable[NodeEntry]) -> dict[Key, NodeEntry]:
    return {entry.key: entry for entry in entries}


def test_entries_come_are_read_and_go() -> None:
    async def ip(command: str) -> str:
        return (await asyncio.to_thread(here.run, ["ip", *command.split()])).stdout

    async def body() -> None:
        sysctls = Sysctls()
        kernel = LinuxLabels(sysctls)
        await kernel.put_labels(ENTRIES)
        assert keyed(await kernel.labels()) == keyed(ENTRIES)
        await asyncio.to_thread(here.sysctl, ipv6__conf__all__forwarding=0)
        with pytest.raises(KernelError, match="forwarding is 0"):
            await kernel.put_labels([ENTRIES[3]])
        await asyncio.to_thread(here.sysctl, ipv6__conf__all__forwarding=1)
        assert "disabled" in await ip("-f mpls route show 101")
        assert "enabled" in await ip("-f mpls route show 103")
        await ip("-f mpls route add 999 dev vpn-blue")
        await ip("route add 10.6.0.0/24 dev vpn-red table 101")
        await kernel.put_labels(ENTRIES)  # again is harmless
        for entry in REFUSED:
            with pytest.raises(KernelError):
                await kernel.put_labels([entry])
        assert keyed(await kernel.labels()) == keyed(ENTRIES)
        # Another run reads what stands, as far as Linux tells it, and takes over the rest as it is.
        successor = LinuxLabels(sysctls)
        read = keyed(await successor.labels())
        told = {key: entry for key, entry in keyed(ENTRIES).items() if key.kind in ("peer", "route") and entry != ENTRIES[-1]}
        assert {key: read[key] for key in told} == told
        assert {*read} == {*keyed(ENTRIES)} - {ENTRIES[-1].key}
        await successor.put_labels(ENTRIES)
        assert keyed(await successor.labels()) == keyed(ENTRIES)
        # What somebody took away, or changed, is noticed.
        for command in ("-f mpls route del 101", "link set ce-red nomaster", "route replace 10.7.0.0/24 dev vpn-red table 101 proto 178"):
            await ip(command)
        found = keyed(await successor.labels())
        wrong = {key for key, entry in keyed(ENTRIES).items() if found.get(key) != entry}
        assert wrong == {ENTRIES[8].key, ENTRIES[0].key, ENTRIES[14].key}
        await successor.put_labels([ENTRIES[0], ENTRIES[8], ENTRIES[14]])
        assert keyed(await successor.labels()) == keyed(ENTRIES)
        # So is what lies under a tunnel: the detour of IPv6, and the MTU of the way to the peer.
        assert mtu_of("pe") == 1500 - 20 - 4 - 81
        await ip("link set wan mtu 9000")
        await ip("link del mplsdetour0")
        found = keyed(await successor.labels())
        await asyncio.to_thread(here.run, ["nft", "flush", "chain", "ip6", "vpnd-labels", "leaving"])
        assert keyed(await successor.labels()) == found
        assert {key for key, entry in keyed(ENTRIES).items() if found.get(key) != entry} == {entry.key for entry in ENTRIES[2:5]}
        await successor.put_labels(ENTRIES[2:5])
        assert keyed(await successor.labels()) == keyed(ENTRIES)
        assert (mtu_of("pe"), mtu_of("six"), mtu_of("other")) == (9000 - 20 - 4 - 81, 9000 - 40 - 4 - 81, 9000 - 20 - 81)
        await ip("link set wan mtu 1500")
        await successor.put_labels(ENTRIES[2:5])
        await ip("link del vpn-red")
        assert {entry.key.name[0] for entry in ENTRIES if entry not in await successor.labels()} >= {"red", ""}
        await successor.put_labels(ENTRIES)
        assert keyed(await successor.labels()) == keyed(ENTRIES)
        # Other ends are changed in place; another encapsulation makes the device anew, with all that rests upon it.
        for tunnel in (
            Tunnel("pe", ip_address("192.0.2.1"), ip_address("192.0.2.9")),
            Tunnel("pe", ip_address("192.0.2.1"), ip_address("192.0.2.9"), Encapsulation.IP),
            Tunnel("pe", ip_address("2001:db8::1"), ip_address("2001:db8::9")),
        ):
            await successor.put_labels([tunnel])
            assert keyed(await successor.labels()) == keyed(ENTRIES) | {tunnel.key: tunnel}
        other = Vrf("red", "vpn-red", 111, ("ce-red",))
        await successor.put_labels([other])
        assert keyed(await successor.labels()) == keyed(ENTRIES) | {tunnel.key: tunnel, other.key: other}
        fewer = Peer("pe", LabelSet([LabelRange(Label(50), Label(120))]))
        await successor.put_labels([fewer])
        assert fewer in await successor.labels()
        await successor.delete_labels(list(reversed(ENTRIES)))
        assert list(await successor.labels()) == []
        sysctls.restore()

    def mtu_of(peer: str) -> int:
        (link,) = json.loads(here.run(["ip", "-json", "link", "show", tunnel_device(peer)]).stdout)
        return int(link["mtu"])

    with Lab() as lab:
        here, there = lab.namespace("here"), lab.namespace("there")
        here.sysctl(ipv6__conf__all__forwarding=1)
        lab.veth(here, "wan", there, "wan")
        here.ip("addr add 192.0.2.1/24 dev wan", "addr add 2001:db8::1/64 dev wan nodad")
        lab.veth(here, "ce-red", there, "red")
        lab.veth(here, "ce-blue", there, "blue")
        here.ip("addr add 10.1.0.1/24 dev ce-red", "addr add fd00:1::1/64 dev ce-blue nodad")
        here.call(lambda: asyncio.run(body()))
        told = "".join(here.run(["ip", *words.split()]).stdout for words in ("-brief link", "-f mpls route", "route show table all", "-6 route show table all"))
        assert "vpn-" not in told
        assert "proto 178" not in told
        assert tunnel_device("pe") not in told
        assert "mplsdetour" not in told
        assert "mplsdetour" not in here.run(["ip", "-6", "rule"]).stdout
        assert "fwmark" not in here.run(["ip", "-6", "rule"]).stdout
        assert "fd00:1::/64 dev ce-blue" in told  # leaving a VRF costs no address


MANY = 1000  # of routes, and of labels: many batches, and many slices of a dump


def test_thousands_are_put_read_and_go() -> None:
    """Without the loop's other work having to wait: no more than a slice of them at a time."""
    path = (Nhlfe(ToPeer("pe"), (Label(300), Label(400)), TtlModel.PIPE),)
    base: list[NodeEntry] = [Vrf("red", "vpn-red", 101), Tunnel("pe", ip_address("192.0.2.1"), ip_address("192.0.2.2"))]
    many: list[NodeEntry] = [LabelBinding(Label(1000 + number), path) for number in range(MANY)]
    many += [VrfRoute("red", ip_network((0x0A000000 + number, 32)), path) for number in range(MANY)]

    async def body() -> None:
        kernel, turns = LinuxLabels(Sysctls()), 0

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        async def timed(name: str, work: Awaitable[T], steps: int) -> T:
            nonlocal turns
            turns, begin = 0, time.monotonic()
            found = await work
            print(f"{name}: {time.monotonic() - begin:.2f} s, {turns} turns")
            assert turns >= steps
            return found

        await kernel.put_labels(base)
        task = asyncio.create_task(others())
        await timed("put", kernel.put_labels(many), 2 * MANY // BATCH)
        found = await timed("read", kernel.labels(), 2 * MANY // SLICE)
        assert keyed(found) == keyed([*base, *many])
        successor = LinuxLabels(Sysctls())
        assert keyed(await successor.labels()) == keyed([*base, *many])
        await timed("put again", successor.put_labels(many), 2 * MANY // BATCH)
        # A tunnel that is made anew takes all of it along.
        anew = Tunnel("pe", ip_address("192.0.2.1"), ip_address("192.0.2.2"), Encapsulation.IP)
        await timed("anew", successor.put_labels([anew]), 2 * MANY // BATCH)
        assert keyed(await successor.labels()) == keyed([base[0], anew, *many])
        await timed("gone", successor.delete_labels([*reversed(many), anew, base[0]]), 2 * MANY // BATCH)
        assert list(await successor.labels()) == []
        task.cancel()

    with Lab() as lab:
        lab.namespace("here").call(lambda: asyncio.run(body()))


@pytest.mark.parametrize("far", [xfrm, Gateway], ids=["linux", "userspace"])
def test_customers_of_the_same_addresses_reach_their_own(tmp_path: Path, far: MakeGateway) -> None:
    with provider_edges(tmp_path, make_a=xfrm, make_b=far) as edges, Capture(edges.lab.a.gateway, WAN, outgoing=True) as sent:
        a, b = edges.lab.a, edges.lab.b

        def answers(customer: str, count: int = 1, timeout: float = 20.0, near: Provider = a, far: Provider = b) -> int:
            return ping(near.customers[customer].host, far.customers[customer].host4, count=count, timeout=timeout).received

        def until_forbidden(count: int) -> None:
            wait_until(lambda: counters(edges.a).get("drop_mpls_label_forbidden") == count, f"{count} packets are dropped")

        # The very first packet waits for its SA, and is not lost.
        assert answers("red") == 1
        for name in CUSTOMERS:
            edges.reaches(name)
            assert edges.lost(name, timeout=20.0) == 0, name
        # Another customer's label, which this peer was never told, in its own SA.
        edges.a.config.write_text(configuration(a, b, remote={"red": 100, "blue": 101}))
        edges.b.config.write_text(configuration(b, a, remote={"red": 102, "blue": 101}))
        device = links(edges.a)[tunnel_device("pe")]
        for gateway in (edges.a, edges.b):
            gateway.vpnctl("reload")
        assert answers("red", count=3, timeout=2.0, near=b, far=a) == 0
        until_forbidden(3)
        if far is xfrm:  # Without a label, too: the host's own tables would route it.
            edges.a.namespace.ip("addr add 203.0.113.1/32 dev lo")
            edges.b.namespace.ip(f"route add 203.0.113.1/32 dev {tunnel_device('pe')}")
            assert ping(edges.b.namespace, ip_address("203.0.113.1"), count=2, timeout=2.0).received == 0
            until_forbidden(5)
        edges.reaches("blue")
        if far is xfrm:  # What follows is this side's alone.
            outlives_its_key_manager(edges, device)
        assert [str(packet) for packet in sent.packets() if not (packet.is_esp or packet.is_ike)] == []
        edges.a.stop()
        assert [line for line in state(edges.a).splitlines() if "vpn-" in line or tunnel_device("pe") in line or "proto 178" in line] == []
        assert "platform_labels = 0" in state(edges.a)


def outlives_its_key_manager(edges: Edges, device: int) -> None:
    a, b = edges.lab.a, edges.lab.b
    # A key manager that is killed leaves all as it is, and the next one finds it.
    edges.a.kill_vpnd()
    edges.reaches("blue")
    edges.a.start_vpnd()
    edges.reaches("blue")
    assert links(edges.a)[tunnel_device("pe")] == device
    assert " missing" not in edges.a.vpnctl("mpls", "lfib")
    # Without the policy that protects them labels stay where they are.
    edges.a.namespace.run(["ip", "xfrm", "policy", "delete", "dir", "out", "src", str(a.wan4), "dst", str(b.wan4), "proto", "gre"])
    assert edges.lost("blue", count=1, timeout=2.0) == 2


@pytest.mark.parametrize("far", [xfrm, Gateway], ids=["linux", "userspace"])
def test_the_first_packet_over_ipv6_waits_for_its_sa(tmp_path: Path, far: MakeGateway) -> None:
    with provider_edges(tmp_path, make_a=xfrm, make_b=far, outer=6) as edges, Capture(edges.lab.a.gateway, WAN, outgoing=True) as sent:
        a, b = edges.lab.a, edges.lab.b
        assert ping(a.customers["red"].host, b.customers["red"].host4, count=2, interval=0.2, timeout=20.0).lost == 0
        for name in CUSTOMERS:
            assert edges.lost(name, timeout=20.0) == 0, name
        assert counters(edges.a)["XfrmOutNoStates"] == 0
        # As large as the device says, without fragments.
        assert ping(a.customers["blue"].host, b.customers["blue"].host4, count=1, size=1500 - 40 - 4 - 81 - 4 - 28, timeout=20.0, dont_fragment=True).lost == 0
        if far is xfrm:  # Without the detour, or the rule that leads there, nothing leaves, least of all in clear.
            edges.a.namespace.run(["ip", "-6", "rule", "del", "pref", "178"])
            assert edges.lost("red", count=1, timeout=2.0) == 2
            assert "counter packets 0" not in edges.a.namespace.run(["nft", "list", "table", "ip6", "vpnd-labels"]).stdout
            edges.a.namespace.ip("link del mplsdetour0")
            assert edges.lost("red", count=1, timeout=2.0) == 2
        assert [str(packet) for packet in sent.packets() if packet.protocol == Encapsulation.GRE] == []
        assert sent.labelled() == 0
        edges.a.stop()
        assert "fwmark" not in edges.a.namespace.run(["ip", "-6", "rule"]).stdout
        assert "vpnd-labels" not in edges.a.namespace.run(["nft", "list", "tables"]).stdout
