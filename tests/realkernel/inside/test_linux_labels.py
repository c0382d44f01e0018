"""PE routers whose labels Linux forwards: VRF devices, GRE, the label table and encapsulating routes, programmed from the `mpls` section."""

from __future__ import annotations

import asyncio
import re
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from lab.gateway import Gateway
from lab.namespaces import Lab
from lab.provider_edges import MakeGateway, configuration, provider_edges
from lab.providers import CUSTOMERS
from lab.traffic import ping
from realkernel.kernel_gateways import XfrmGateway, xfrm

from kernel_shim.channel.linux_labels import LinuxLabels, tunnel_device
from kernel_shim.channel.sysctl import Sysctls
from kernel_shim.model import KernelError
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.labels import Label, LabelRange, LabelSet
from kernel_shim.mpls.lfib import Nhlfe, Peer, ToInterface, ToPeer, ToVrf, TtlModel
from kernel_shim.mpls.node import LabelBinding, NodeEntry, Tunnel, Vrf, VrfRoute

pytestmark = pytest.mark.realkernel


def state(gateway: Gateway) -> str:
    """What labels leave in a host."""
    run = gateway.namespace.run
    told = [run(["ip", "-brief", "link"]).stdout, run(["ip", "-f", "mpls", "route"]).stdout, run(["ip", "route", "show", "table", "all"]).stdout]
    return "".join(told) + run(["sysctl", "net.mpls.platform_labels"]).stdout


def test_entries_come_are_read_and_go() -> None:
    paths = (Nhlfe(ToPeer("pe"), (Label(300), Label(400)), TtlModel.PIPE),)
    both = (Nhlfe(ToPeer("pe"), (Label(200),)), Nhlfe(ToPeer("other"), (Label(201),)))
    entries: list[NodeEntry] = [
        Vrf("red", "vpn-red", 101, ("ce-red",)),
        Vrf("blue", "vpn-blue", 102),
        Tunnel("pe", ip_address("192.0.2.1"), ip_address("192.0.2.2")),
        Tunnel("six", ip_address("2001:db8::1"), ip_address("2001:db8::2")),
        Tunnel("other", ip_address("192.0.2.1"), ip_address("192.0.2.3"), Encapsulation.IP),
        Peer("pe", LabelSet([LabelRange(Label(16), Label(99)), LabelRange(Label(101), Label(101))])),
        LabelBinding(Label(100), (Nhlfe(ToVrf("red"), ttl=TtlModel.PIPE),)),
        LabelBinding(Label(101), paths),
        LabelBinding(Label(102), both),
        LabelBinding(Label(103), (Nhlfe(ToPeer("pe")),)),
        VrfRoute("red", ip_network("10.9.0.0/24"), paths),
        VrfRoute("red", ip_network("fd00:9::/64"), paths),
        VrfRoute("red", ip_network("10.8.0.0/24"), both),
        VrfRoute("red", ip_network("10.7.0.0/24"), (Nhlfe(ToVrf("blue")),)),
        VrfRoute("red", ip_network("10.1.0.0/24"), (Nhlfe(ToInterface("red")),)),
    ]
    refused: list[NodeEntry] = [
        Vrf("green", "vpn-green"),
        Tunnel("udp", ip_address("192.0.2.1"), ip_address("192.0.2.4"), Encapsulation.UDP),
        Peer("pe", LabelSet([LabelRange(Label(100), Label(100))]), space="pe"),
        LabelBinding(Label(104), (Nhlfe(ToPeer("pe"), (Label(200),), entropy=True),)),
        VrfRoute("nobody", ip_network("10.9.0.0/24"), paths),
    ]

    async def body() -> None:
        sysctls = Sysctls()
        kernel = LinuxLabels(sysctls)
        await kernel.put_labels(entries)
        assert list(await kernel.labels()) == entries
        await kernel.put_labels(entries)  # again is harmless
        for entry in refused:
            with pytest.raises(KernelError):
                await kernel.put_labels([entry])
        assert list(await kernel.labels()) == entries
        # Another run takes over what it wants and removes the rest.
        successor = LinuxLabels(sysctls)
        await successor.put_labels(entries[:-1])
        await asyncio.to_thread(here.run, ["ip", "-f", "mpls", "route", "del", "101"])
        assert entries[7] not in await successor.labels()
        await successor.put_labels([entries[7]])
        await successor.delete_labels(list(reversed(entries)))
        assert list(await successor.labels()) == []
        sysctls.restore()

    with Lab() as lab:
        here, there = lab.namespace("here"), lab.namespace("there")
        lab.veth(here, "ce-red", there, "wire")
        here.ip("addr add 10.1.0.1/24 dev ce-red", "addr add fd00:1::1/64 dev ce-red nodad")
        here.call(lambda: asyncio.run(body()))
        told = "".join(here.run(["ip", *words.split()]).stdout for words in ("-brief link", "-f mpls route", "route show table all", "-6 route show table all"))
        assert "vpn-" not in told
        assert "proto 178" not in told
        assert tunnel_device("pe") not in told
        assert "fd00:1::/64 dev ce-red" in told


@pytest.mark.parametrize("far", [xfrm, Gateway], ids=["linux", "userspace"])
def test_customers_of_the_same_addresses_reach_their_own(tmp_path: Path, far: MakeGateway) -> None:
    with provider_edges(tmp_path, make_a=xfrm, make_b=far) as edges:
        try:
            for name in CUSTOMERS:
                edges.reaches(name)
                assert edges.lost(name, timeout=20.0) == 0, name
        except Exception:
            print(state(edges.a), edges.a.log()[-5000:], edges.b.account()[-5000:], edges.a.namespace.run(["ip", "xfrm", "policy"]).stdout)
            print(edges.a.namespace.run(["tc", "-s", "filter", "show", "dev", tunnel_device("pe"), "ingress"]).stdout)
            raise
        assert edges.leaks() == []
        # Another customer's label, which this peer was never told, in its own SA.
        edges.b.config.write_text(configuration(edges.lab.b, edges.lab.a, remote={"red": 102, "blue": 101}))
        edges.a.config.write_text(configuration(edges.lab.a, edges.lab.b, remote={"red": 100, "blue": 101}))
        for gateway in (edges.a, edges.b):
            gateway.vpnctl("reload")
        sender, target = edges.lab.b.customers["red"], edges.lab.a.customers["red"]
        assert ping(sender.host, target.host4, count=3, timeout=2.0).received == 0
        edges.reaches("blue")
        filters = edges.a.namespace.run(["tc", "-s", "filter", "show", "dev", tunnel_device("pe"), "ingress"]).stdout
        assert max(map(int, re.findall(r"dropped (\d+)", filters))) >= 3, filters
        assert isinstance(edges.a, XfrmGateway)
        edges.a.stop()
        after = state(edges.a)
        assert "vpn-" not in after
        assert tunnel_device("pe") not in after
        assert "proto 178" not in after
        assert "platform_labels = 0" in after
