"""Labels leave in SAs alone on a kernel that does not see to it itself: policies of Linux' own, beside those of a child for the same tunnel."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address

import pytest
from lab.namespaces import Lab

from kernel_shim.channel.api import KernelChannel
from kernel_shim.channel.linux_mpls.detour import MARK
from kernel_shim.channel.xfrm import XfrmChannel
from kernel_shim.model import NO_MARK, Action, AddressRange, Direction, Mark, Mode, ReqId, TrafficSelector
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.node import Tunnel
from vpnd.daemon.kernel_side import KernelSide
from vpnd.daemon.mpls import Mpls
from vpnd.mpls.guard import without_sa
from vpnd.mpls.model import MplsConfig, PeerConfig
from vpnd.policies import PolicySpec, policies_for
from vpnd.telemetry.counters import Counters

NEAR, FAR = ip_address("192.0.2.1"), ip_address("192.0.2.2")


def test_a_managed_network_needs_none() -> None:
    assert len(list(without_sa(Tunnel("pe", NEAR, FAR)))) == 2
    assert list(without_sa(Tunnel("pe", NEAR, FAR, managed=True))) == []


def test_over_ipv6_what_makes_the_detour_passes_once() -> None:
    """With the mark, which only the tunnel's device looks up; coming back it has none, and meets the others."""
    near, far = ip_address("2001:db8::1"), ip_address("2001:db8::2")
    detour, *blocks = without_sa(Tunnel("pe", near, far))
    assert (detour.action, detour.direction, detour.priority) == (Action.BYPASS, Direction.OUT, 0)
    assert detour.selector.mark == Mark(MARK, 0xFFFFFFFF)
    assert (detour.selector.source.first, detour.selector.destination.first, detour.selector.protocol) == (near, far, 47)
    assert [(policy.action, policy.selector.mark) for policy in blocks] == [(Action.DISCARD, NO_MARK)] * 2
    assert list(without_sa(Tunnel("pe", near, far, managed=True))) == [detour]


def tunnel_to(far: str = "192.0.2.2", encapsulation: Encapsulation = Encapsulation.GRE) -> MplsConfig:
    return MplsConfig(peers={"pe": PeerConfig("pe", NEAR, ip_address(far), encapsulation)})


@pytest.mark.root
def test_what_no_child_protects_is_dropped() -> None:
    def told() -> list[str]:
        return [" ".join(line.replace("\\", "").split()) for line in host.run(["ip", "-o", "xfrm", "policy"]).stdout.splitlines()]

    async def connect() -> KernelChannel:
        channel = XfrmChannel(require_esp=False)
        await channel.open()
        return channel

    async def body() -> None:
        kernel = KernelSide(connect, Counters())
        mpls = Mpls(kernel, guards=True)
        await mpls.load(tunnel_to())  # before there is a kernel
        await kernel.open()
        spec = PolicySpec(Action.PROTECT, Mode.TRANSPORT, ReqId(7), NEAR, FAR)
        near, far = (TrafficSelector(AddressRange(end, end), int(Encapsulation.GRE)) for end in (NEAR, FAR))
        await kernel.claim("child", list(policies_for(spec, [near], [far])))
        lines = await asyncio.to_thread(told)
        assert any("dst 192.0.2.2/32 proto gre key 0 dir out action block" in line for line in lines), lines
        assert any("dst 192.0.2.2/32 proto gre dir out" in line and "proto esp" in line for line in lines), lines
        assert any("dir in action block" in line for line in lines), lines
        await mpls.load(tunnel_to("192.0.2.3", Encapsulation.IP))
        blocks = [line for line in await asyncio.to_thread(told) if "action block" in line]
        assert blocks
        assert all("192.0.2.3/32" in line and "proto gre" not in line for line in blocks), blocks
        await mpls.load(MplsConfig())
        assert "action block" not in "".join(await asyncio.to_thread(told))
        await kernel.close()

    with Lab() as lab:
        host = lab.namespace("host")
        host.call(lambda: asyncio.run(body()))
