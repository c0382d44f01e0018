"""Two shims over wires that real ones look like, and over what an earlier shim left."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from lab.capture import Capture
from lab.process import wait_until
from lab.topology import WAN, sites
from lab.traffic import ping, tcp_bulk, tcp_server
from shim_rig import Shim, associations, connect, host, host_state, install, policies, spis

from kernel_shim.model import Direction, IPNetwork, Mode

pytestmark = pytest.mark.pair

EVERY_SITE: IPNetwork = ip_network("10.0.0.0/8")


async def test_a_network_card_without_offloads() -> None:
    with sites(offloads=False) as both:
        a, b = Shim(both.lab, both.a.gateway), Shim(both.lab, both.b.gateway)
        await connect(a, b, both.a, both.b)
        with Capture(both.a.gateway, WAN) as wire:
            for near, far in ((both.a, both.b), (both.b, both.a)):
                with tcp_server(far.host, far.host4) as port:
                    assert tcp_bulk(near.host, far.host4, port, size=8 << 20).intact
            # What comes in is captured behind GRO, what goes out as it is on the wire.
            assert max(packet.length for packet in wire.esp() if packet.source == both.a.wan4) == 1500, "full frames, none above"
            assert wire.clear_packets(both.inner_networks) == []
        assert a.counters().get("io.internal-errors", 0) == b.counters().get("io.internal-errors", 0) == 0


async def test_a_path_narrower_than_the_tun_is_learned_and_told_to_the_sender() -> None:
    with sites(mtu=1400) as both:
        a, b = Shim(both.lab, both.a.gateway), Shim(both.lab, both.b.gateway)
        await connect(a, b, both.a, both.b)
        with Capture(both.a.gateway, WAN) as wire, tcp_server(both.b.host, both.b.host4) as port:
            assert tcp_bulk(both.a.host, both.b.host4, port, size=4 << 20).intact
            assert wire.clear_packets(both.inner_networks) == []
        assert ping(both.a.host, both.b.host4, size=1430 - 28, dont_fragment=True, count=2).received == 0
        route = both.a.host.run(["ip", "route", "get", str(both.b.host4)]).stdout
        mtu = int(route.split("mtu ")[1].split()[0])
        assert 1300 < mtu < 1400
        assert ping(both.a.host, both.b.host4, size=mtu - 28, dont_fragment=True, count=2).lost == 0


async def test_a_decrypted_packet_for_another_site_is_protected_again() -> None:
    with sites() as both:
        hub, spoke = both.a, both.b
        a, b = Shim(both.lab, hub.gateway), Shim(both.lab, spoke.gateway)
        one, other = spis(0)
        # The hub knows the spoke's network and 10.3.0.0/16, both behind the spoke; the spoke sends everything to the hub.
        async with a.channel() as channel:
            wanted = [policy for remote in (spoke.net4, ip_network("10.3.0.0/16")) for policy in policies(hub.wan4, spoke.wan4, EVERY_SITE, remote)]
            await install(channel, hub.wan4, wanted, associations(hub.wan4, spoke.wan4, one, other))
        async with b.channel() as channel:
            await install(channel, spoke.wan4, policies(spoke.wan4, hub.wan4, spoke.net4, EVERY_SITE), associations(spoke.wan4, hub.wan4, other, one))
        with Capture(hub.gateway, WAN) as wire:
            ping(spoke.host, ip_network("10.3.0.0/16")[7], count=3, timeout=0.5)
            wait_until(lambda: sum(packet.source == hub.wan4 for packet in wire.esp()) >= 3, "the hub sends them back")
            async with a.channel() as channel:
                status = {one.sa.direction: one.packets for one in await channel.sas()}
            assert status[Direction.IN] >= 3
            assert status[Direction.OUT] >= 3
            assert wire.clear_packets(["10.3.0.0/16"]) == []


async def test_addresses_that_come_and_go_are_followed() -> None:
    with sites() as both:
        gateway = both.a.gateway
        shim = Shim(both.lab, gateway)
        async with shim.channel() as channel:
            for policy in policies(both.a.wan4, both.b.wan4, ip_network("10.77.0.0/16"), both.b.net4):
                await channel.add_policy(policy)

        def routed() -> str:
            return gateway.run(["ip", "route", "get", str(both.b.host4)]).stdout

        assert "dev wan" in routed()
        gateway.ip("addr add 10.77.0.1/32 dev lo")
        wait_until(lambda: "dev vpn0" in routed() and "src 10.77.0.1" in routed(), "the new address is preferred")
        gateway.ip("addr del 10.77.0.1/32 dev lo")
        wait_until(lambda: "dev wan" in routed(), "the host's own packets are no longer captured")
        assert "dev vpn0" in gateway.run(["ip", "route", "get", str(both.b.host4), "from", "10.77.0.9", "iif", "lan"]).stdout


@pytest.mark.parametrize("options", [("--table", "7000", "--rule-priority", "400"), ("--mark", "0x77"), ()])
async def test_what_a_shim_of_other_settings_left_is_found_and_taken_away(options: tuple[str, ...]) -> None:
    with sites() as both:
        gateway = both.a.gateway
        before = host_state(gateway)
        shim = Shim(both.lab, gateway, *options)
        wanted = policies(both.a.wan4, both.b.wan4, both.a.net4, both.b.net4)
        async with shim.channel() as channel:
            for policy in wanted:
                await channel.add_policy(policy)
        shim.kill()
        successor = Shim(both.lab, gateway)
        assert ping(both.a.host, both.b.host4, count=1, timeout=0.3).received == 0
        assert successor.stop() == 0
        assert host_state(gateway) == before


async def test_a_broken_state_file_costs_nothing_but_what_only_it_knew() -> None:
    with sites() as both:
        gateway = both.a.gateway
        before = host_state(gateway)
        shim = Shim(both.lab, gateway)
        async with shim.channel() as channel:
            for policy in policies(both.a.wan4, both.b.wan4, both.a.net4, both.b.net4):
                await channel.add_policy(policy)
        shim.kill()
        for text in ("", "[]", '{"version": 1}', '{"version": 1, "sysctls": 3, "table": "x"}'):
            shim.socket.with_name(shim.socket.name + ".state").write_text(text)
            shim.restart()
            shim.kill()
        shim.restart()
        assert shim.stop() == 0
        assert host_state(gateway) == before


@pytest.mark.parametrize("offloads", [True, False])
@pytest.mark.parametrize("version", [4, 6])
async def test_large_datagrams_pass_from_host_to_host_in_transport_mode(version: int, offloads: bool) -> None:
    with sites(offloads=offloads) as both:
        near, far = (both.a.wan4, both.b.wan4) if version == 4 else (both.a.wan6, both.b.wan6)
        a, b = Shim(both.lab, both.a.gateway), Shim(both.lab, both.b.gateway)
        one, other = spis(0)
        for shim, here, there, keys in ((a, near, far, (one, other)), (b, far, near, (other, one))):
            async with shim.channel() as channel:
                wanted = policies(here, there, host(here), host(there), mode=Mode.TRANSPORT)
                await install(channel, here, wanted, associations(here, there, *keys, mode=Mode.TRANSPORT))
        with Capture(both.a.gateway, WAN) as wire:
            for size in (1430, 3000, 20_000, 60_000):
                assert ping(both.a.gateway, far, size=size, count=3).lost == 0, size
            echoes = [
                packet for packet in wire.packets() if (packet.protocol, packet.payload[:1]) in ((1, b"\x08"), (1, b"\x00"), (58, b"\x80"), (58, b"\x81"))
            ]
            assert echoes == []
