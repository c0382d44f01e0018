"""Two `kernel-shim serve` processes with fixed keys: real packets, fail closed, and what is left in the host."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

import pytest
from lab.capture import Capture
from lab.process import PATIENCE, LabError
from lab.topology import LAN, WAN, Sites, sites
from lab.traffic import ping, tcp_bulk, tcp_server
from shim_rig import ANYWHERE, Shim, associations, connect, host, host_state, install, policies, spis

from kernel_shim.io.main import main
from kernel_shim.model import Direction, KernelError, Mode

pytestmark = pytest.mark.pair


@dataclass
class Gateways:
    """Two sites, a shim on each gateway, and a capture of the wire between them."""

    sites: Sites
    a: Shim
    b: Shim
    wire: Capture

    async def connect(self, **shape: Any) -> None:
        await connect(self.a, self.b, self.sites.a, self.sites.b, **shape)

    def leaks(self) -> list[str]:
        return [str(packet) for packet in self.wire.clear_packets(self.sites.inner_networks)]

    def ping(self, count: int = 3, timeout: float = 10.0) -> int:
        return ping(self.sites.a.host, self.sites.b.host4, count=count, timeout=timeout).lost


@pytest.fixture
def gateways() -> Iterator[Gateways]:
    with sites() as both, contextlib.ExitStack() as stack:
        a, b = Shim(both.lab, both.a.gateway), Shim(both.lab, both.b.gateway)
        wire = stack.enter_context(Capture(both.a.gateway, WAN))
        yield Gateways(both, a, b, wire)


async def test_hosts_talk_through_the_tunnel_and_nothing_is_in_clear(gateways: Gateways) -> None:
    await gateways.connect()
    near, far = gateways.sites.a, gateways.sites.b
    assert gateways.ping() == 0
    assert ping(near.gateway, far.host4).lost == 0, "the gateway itself gets a source that the policy covers"
    with tcp_server(far.host, far.host4) as port:
        assert tcp_bulk(near.host, far.host4, port, size=8 << 20).intact
    assert ping(near.host, far.host4, size=1438 - 28, dont_fragment=True).lost == 0
    assert ping(near.host, far.host4, size=4000).lost == 0
    assert gateways.leaks() == []
    assert len(gateways.wire.esp()) > 100
    async with gateways.a.channel() as channel:
        status = {one.sa.direction: one for one in await channel.sas()}
    assert status[Direction.OUT].octets > 8 << 20
    assert status[Direction.IN].packets > 0


async def test_ipv6_through_an_ipv6_outer(gateways: Gateways) -> None:
    near, far = gateways.sites.a, gateways.sites.b
    one, other = spis(0)
    for shim, mine, theirs, keys in ((gateways.a, near, far, (one, other)), (gateways.b, far, near, (other, one))):
        async with shim.channel() as channel:
            await install(channel, mine.wan6, policies(mine.wan6, theirs.wan6, mine.net6, theirs.net6), associations(mine.wan6, theirs.wan6, *keys))
    assert ping(near.host, far.host6).lost == 0
    assert ping(near.gateway, far.host6).lost == 0
    with tcp_server(far.host, far.host6) as port:
        assert tcp_bulk(near.host, far.host6, port, size=4 << 20).intact
    assert gateways.leaks() == []


async def test_a_killed_shim_lets_nothing_out_or_in_and_the_next_one_takes_over(gateways: Gateways) -> None:
    await gateways.connect()
    assert gateways.ping() == 0
    near, far = gateways.sites.a, gateways.sites.b
    gateways.a.kill()
    assert gateways.ping(timeout=0.5) == 3
    assert "No route to host" in _route_of_a_forwarded_packet(gateways)
    assert _clear_ping_from_the_wire(gateways) == 3
    gateways.a.restart()
    assert gateways.ping(timeout=0.5) == 3, "closed until the key manager is back"
    assert _clear_ping_from_the_wire(gateways) == 3
    await gateways.connect(round_number=1)
    assert gateways.ping() == 0
    assert [leak for leak in gateways.leaks() if not leak.startswith(str(far.host4))] == []
    async with gateways.a.channel() as channel:
        await channel.flush_policies()
    state = host_state(near.gateway)
    assert "unreachable" not in state["routes"]
    assert state["nftables"].count("table inet") == 1


def _route_of_a_forwarded_packet(gateways: Gateways) -> str:
    near, far = gateways.sites.a, gateways.sites.b
    done = near.gateway.run(["ip", "route", "get", str(far.host4), "from", str(near.host4), "iif", LAN], check=False)
    return done.stdout + done.stderr


def _clear_ping_from_the_wire(gateways: Gateways, patience: float = 0.3) -> int:
    """Pings in clear from the far site's address, as an attacker on the wire sends them; how many stayed without an answer."""
    near, far = gateways.sites.a, gateways.sites.b
    with (
        far.gateway.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw,
        near.host.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as seen,
    ):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x49500000)  # past the far gateway's own capture
        raw.setsockopt(socket.IPPROTO_IP, 19, 1)  # IP_TRANSPARENT: a source that is not the gateway's
        raw.bind((str(far.host4), 0))
        seen.settimeout(patience)
        unanswered = 0
        for number in range(3):
            raw.sendto(bytes.fromhex("0800") + _checksum(number) + b"\x12\x34" + number.to_bytes(2, "big"), (str(near.host4), 0))
            try:
                while not seen.recv(2048)[20:].startswith(b"\x08\x00"):
                    pass
            except TimeoutError:
                unanswered += 1
        return unanswered


def _checksum(number: int) -> bytes:
    return (0xFFFF - (0x0800 + 0x1234 + number) % 0xFFFF).to_bytes(2, "big")


async def test_clear_packets_from_the_wire_are_dropped_and_counted(gateways: Gateways) -> None:
    assert _clear_ping_from_the_wire(gateways, PATIENCE) == 0, "without a policy they pass"
    await gateways.connect()
    assert _clear_ping_from_the_wire(gateways) == 3
    assert gateways.a.counters()["guard.clear-dropped.packets"] == 3


async def test_an_orderly_stop_leaves_the_host_as_it_was() -> None:
    with sites() as both:
        gateway = both.a.gateway
        before = host_state(gateway)
        shim = Shim(both.lab, gateway)
        async with shim.channel() as channel:
            for local, remote in ((both.a.net4, both.b.net4), (both.a.net4, ANYWHERE), (both.a.net6, both.b.net6)):
                for policy in policies(both.a.wan4, both.b.wan4, local, remote):
                    await channel.add_policy(policy)
            for descriptor in await channel.bind(both.a.wan4):
                os.close(descriptor)
        assert host_state(gateway) != before
        assert shim.stop() == 0
        assert host_state(gateway) == before
        assert not shim.socket.exists()
        assert list(shim.socket.parent.glob("*.state*")) == []


async def test_policies_that_share_prefixes_are_counted(gateways: Gateways) -> None:
    near, far = gateways.sites.a, gateways.sites.b
    wanted = policies(near.wan4, far.wan4, near.net4, far.net4)
    shared = policies(near.wan4, far.wan4, near.net4, far.net4, protocol=6, remote_port=80)
    empty = host_state(near.gateway)
    async with gateways.a.channel() as channel:
        for policy in wanted:
            await channel.add_policy(policy)
        alone = host_state(near.gateway)["routes"]
        for policy in shared:
            await channel.add_policy(policy)
        for policy in wanted:
            await channel.delete_policy(policy.direction, policy.selector)
        assert host_state(near.gateway)["routes"] == alone
        for policy in shared:
            await channel.delete_policy(policy.direction, policy.selector)
    after = host_state(near.gateway)
    assert after["routes"] == empty["routes"]
    assert after["rules"] == empty["rules"]


async def test_everything_through_the_tunnel_and_the_lan_still_answers(gateways: Gateways) -> None:
    near = gateways.sites.a
    async with gateways.a.channel() as channel:
        for address in (near.net4[1], near.wan4):  # a key manager listens on the inside too
            for descriptor in await channel.bind(address):
                os.close(descriptor)
    await gateways.connect(remote=ANYWHERE)
    assert gateways.ping() == 0
    assert ping(near.gateway, near.host4).lost == 0
    assert ping(near.host, near.net4[1]).lost == 0
    assert ping(near.gateway, IPv4Address("127.0.0.1")).lost == 0
    assert ping(near.host, gateways.sites.b.host4, size=1439 - 28, dont_fragment=True, count=2).received == 0, "and learns the MTU from an ICMP error"
    assert "mtu 1438" in near.host.run(["ip", "route", "get", str(gateways.sites.b.host4)]).stdout
    gateways.a.kill()
    assert gateways.ping(timeout=0.5) == 3
    assert ping(near.host, near.net4[1]).lost == 0
    assert gateways.leaks() == []


async def test_a_selector_with_a_port_leaves_the_rest_in_clear(gateways: Gateways) -> None:
    near, far = gateways.sites.a, gateways.sites.b
    await gateways.connect(protocol=6, remote_port=8080)
    assert gateways.ping() == 0
    with tcp_server(far.host, far.host4, 8080) as port:
        assert tcp_bulk(near.host, far.host4, port, size=1 << 20).intact
    with tcp_server(far.host, far.host4, 8081) as port:
        assert tcp_bulk(near.host, far.host4, port, size=1 << 20).intact
    clear = gateways.wire.clear_packets(gateways.sites.inner_networks)
    assert {packet.protocol for packet in clear} == {1, 6}
    assert all(8080 not in (packet.source_port, packet.destination_port) for packet in clear)
    gateways.a.kill()
    before = len(gateways.wire.clear_packets(gateways.sites.inner_networks))
    assert gateways.ping(timeout=0.5) == 3
    assert len(gateways.wire.clear_packets(gateways.sites.inner_networks)) == before


async def test_a_host_that_is_no_router_still_gets_its_bypassed_packets_out(gateways: Gateways) -> None:
    near, far = gateways.sites.a, gateways.sites.b
    assert gateways.a.stop() == 0
    near.gateway.sysctl(ipv4__ip_forward=0, ipv6__conf__all__forwarding=0)
    gateways.a.restart()
    await gateways.connect(protocol=6, remote_port=8080)
    async with gateways.a.channel() as channel:
        for policy in policies(near.wan6, far.wan6, near.net6, far.net6, protocol=6, remote_port=8080):
            await channel.add_policy(policy)
    assert ping(near.gateway, far.host4).lost == 0
    assert ping(near.gateway, far.host6).lost == 0
    with tcp_server(far.host, far.host4, 8081) as port:
        assert tcp_bulk(near.gateway, far.host4, port, size=1 << 20).intact


async def test_host_to_host_transport_does_not_loop(gateways: Gateways) -> None:
    near, far = gateways.sites.a, gateways.sites.b
    await gateways.connect(local=host(near.wan4), remote=host(far.wan4), mode=Mode.TRANSPORT)
    assert ping(near.gateway, far.wan4).lost == 0
    with tcp_server(far.gateway, far.wan4) as port:
        assert tcp_bulk(near.gateway, far.wan4, port, size=4 << 20).intact
    clear = [packet for packet in gateways.wire.packets() if packet.source.version == 4 and not packet.is_esp]
    assert clear == []
    gateways.a.kill()
    with near.gateway.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender, pytest.raises(OSError, match="No route to host"):
        sender.sendto(b"in clear?", (str(far.wan4), 9))
    assert [packet for packet in gateways.wire.packets() if packet.source.version == 4 and not packet.is_esp] == []


async def test_strict_reverse_path_checks_do_not_break_the_tunnel() -> None:
    with sites() as both:
        for site in (both.a, both.b):
            site.gateway.sysctl(ipv4__conf__all__rp_filter=1)
        a, b = Shim(both.lab, both.a.gateway), Shim(both.lab, both.b.gateway)
        await connect(a, b, both.a, both.b, local=host(both.a.wan4), remote=host(both.b.wan4), mode=Mode.TRANSPORT)
        await connect(a, b, both.a, both.b, round_number=1)
        assert ping(both.a.host, both.b.host4).lost == 0
        assert ping(both.a.gateway, both.b.wan4).lost == 0
        assert a.stop() == 0
        assert both.a.gateway.run(["sysctl", "-n", "net.ipv4.conf.all.src_valid_mark"]).stdout == "0\n"


async def test_sockets_outlive_the_key_manager(gateways: Gateways) -> None:
    address = gateways.sites.a.wan4
    async with gateways.a.channel() as channel:
        first = await channel.bind(address)
    async with gateways.a.channel() as channel:
        second = await channel.bind(address)
    assert [os.fstat(descriptor).st_ino for descriptor in first] == [os.fstat(descriptor).st_ino for descriptor in second]
    with socket.socket(fileno=second[1]) as ike, gateways.sites.b.gateway.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(bytes(4) + b"a message of IKE", (str(address), 4500))
        ike.settimeout(PATIENCE)
        assert ike.recv(100) == bytes(4) + b"a message of IKE"
    for descriptor in (*first, second[0]):
        os.close(descriptor)


async def test_one_kernel_a_socket_and_only_its_owner_gets_in(gateways: Gateways) -> None:
    assert stat.S_IMODE(gateways.a.socket.stat().st_mode) == 0o600
    with pytest.raises(LabError, match="status 1"):
        gateways.a.restart()
    assert gateways.a.counters()["pfkey.clients"] == 1, "the first one goes on"
    done = gateways.a.namespace.run(["setpriv", "--reuid=1000", "--clear-groups", "cat", str(gateways.a.socket)], check=False)
    assert done.returncode != 0


async def test_it_runs_with_three_capabilities(gateways: Gateways) -> None:
    status = gateways.a.namespace.run(["cat", f"/proc/{gateways.a.process.pid}/status"]).stdout
    assert "CapEff:\t0000000000003400" in status
    await gateways.connect()
    assert gateways.ping() == 0


async def test_a_request_that_the_host_refuses_changes_nothing(gateways: Gateways) -> None:
    near, far = gateways.sites.a, gateways.sites.b
    wanted = policies(near.wan4, far.wan4, near.net4, far.net4)
    async with gateways.a.channel() as channel:
        await channel.add_policy(wanted[0])
        before = host_state(near.gateway)
        with pytest.raises(KernelError):
            await channel.add_policy(wanted[0])
        assert host_state(near.gateway) == before
        with pytest.raises(KernelError):
            await channel.bind(IPv4Address("203.0.113.9"))


def test_stats_without_a_kernel_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--socket", "/nonexistent/kernel.sock"]) == 1
    assert "no kernel answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--tun", "a name"], "not an interface name of at most 9 letters: 'a name'"),
        (["--mark", "zz"], "argument --mark: 'zz' is not a number"),
        (["--egress-mtu", "70000"], "an egress MTU of 70000 is outside 1280-65535"),
        (["--mtu", "100"], "an MTU of 100 is outside 1280-65535"),
        (["--egress-mtu", "1280", "--table", "0"], "tables from 0 on are not all free for us"),
    ],
)
def test_a_setting_that_cannot_work_is_a_usage_error(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", *arguments])
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err
