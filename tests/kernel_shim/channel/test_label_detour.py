"""The way of labelled IPv6 packets to the kernel's hold queue, and what keeps them from any other."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from ipaddress import ip_address

import pytest
from lab.capture import Capture
from lab.namespaces import Lab, Namespace
from lab.process import wait_until

from kernel_shim.channel.linux_mpls import detour
from kernel_shim.channel.linux_mpls.shield import is_raised, raise_shield
from kernel_shim.channel.route_socket import RouteSocket
from kernel_shim.mpls.node import Tunnel

pytestmark = pytest.mark.root

TUNNEL = Tunnel("pe", ip_address("2001:db8::1"), ip_address("2001:db8::2"))
OTHER = Tunnel("other", ip_address("2001:db8::1"), ip_address("2001:db8::3"))
GRE = 47


@pytest.fixture
def here() -> Iterator[Namespace]:
    with Lab() as lab:
        found, there = lab.namespace("here"), lab.namespace("there")
        lab.veth(found, "wan", there, "wan")
        found.sysctl(ipv6__conf__all__forwarding=1)
        found.ip("addr add 2001:db8::1/64 dev wan nodad")
        there.ip("addr add 2001:db8::2/64 dev wan nodad", "addr add 2001:db8::3/64 dev wan nodad")
        yield found


def in_it(here: Namespace, *steps: Callable[[], Awaitable[object]]) -> list[object]:
    async def body() -> list[object]:
        return [await step() for step in steps]

    return here.call(lambda: asyncio.run(body()))


async def lies() -> bool:
    async with RouteSocket("test") as route:
        return await detour.lies(route)


async def lay() -> None:
    async with RouteSocket("test") as route:
        await detour.lay(route)


async def take_up() -> None:
    async with RouteSocket("test") as route:
        await detour.take_up(route)


def state(here: Namespace) -> str:
    commands = ("-brief link", "-6 rule", "-6 route show table all")
    return "".join(here.run(["ip", *command.split()]).stdout for command in commands) + here.run(["nft", "list", "tables"]).stdout


@pytest.mark.parametrize(
    "damage",
    [
        "link del mplsdetour0",
        "link set mplsdetour1 down",
        "link set mplsdetour0 down",
        "-6 rule del pref 178",
        f"-6 route del default dev mplsdetour0 table {detour.TABLE}",
        f"-6 route del unreachable default table {detour.TABLE}",
    ],
)
def test_what_is_damaged_is_seen_and_laid_again(here: Namespace, damage: str) -> None:
    assert in_it(here, lies, lay, lies, lay, lies) == [False, None, True, None, True]
    whole = here.run(["ip", "-6", "rule"]).stdout
    here.run(["ip", *damage.split()])
    assert in_it(here, lies, lay, lies) == [False, None, True]
    assert here.run(["ip", "-6", "rule"]).stdout == whole
    in_it(here, take_up, take_up)
    assert [line for line in state(here).splitlines() if any(word in line for word in ("mplsdetour", "fwmark", str(detour.TABLE)))] == []


def test_a_shield_is_over_the_tunnels_that_there_are(here: Namespace) -> None:
    async def raised(*tunnels: Tunnel) -> bool:
        return await is_raised(tunnels)

    async def over(*tunnels: Tunnel) -> None:
        await raise_shield(tunnels)

    found = in_it(
        here,
        lambda: raised(),
        lambda: raised(TUNNEL),
        lambda: over(TUNNEL, OTHER),
        lambda: raised(TUNNEL, OTHER),
        lambda: over(OTHER),
        lambda: raised(OTHER),
        lambda: raised(TUNNEL),
    )
    assert found == [True, False, None, True, None, True, False]
    here.run(["nft", "flush", "chain", "ip6", "vpnd-labels", "leaving"])
    assert in_it(here, lambda: raised(OTHER), lambda: over(OTHER), lambda: raised(OTHER)) == [False, None, True]
    in_it(here, over, over)
    assert "vpnd-labels" not in state(here)


def test_what_has_the_mark_comes_out_and_is_forwarded_and_nothing_else_leaves(here: Namespace) -> None:
    def send(tunnel: Tunnel, payload: bytes, mark: int) -> None:
        with here.socket(socket.AF_INET6, socket.SOCK_RAW, GRE) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            sock.bind((str(tunnel.local), 0))
            with suppress(OSError):  # it may be told that it is dropped
                sock.sendto(bytes(4) + payload, (str(tunnel.remote), 0))

    def seen(payload: bytes) -> bool:
        return any(packet.protocol == GRE and payload in packet.payload for packet in wire.packets())

    async def shield() -> None:
        await raise_shield([TUNNEL])

    in_it(here, lay, shield)
    with Capture(here, "wan", outgoing=True) as wire:
        send(TUNNEL, b"without the mark", 0)
        send(OTHER, b"of another", 0)
        wait_until(lambda: seen(b"of another"), "what is no tunnel's leaves", 10.0)
        # A veth pair hands the mark of a packet on; a device's own lookups, as those of a tunnel, leave none.
        here.run(["nft", "add table ip6 unmark; add chain ip6 unmark c { type filter hook postrouting priority 0; }; add rule ip6 unmark c meta mark set 0"])
        send(TUNNEL, b"with the mark", detour.MARK)
        wait_until(lambda: seen(b"with the mark"), "the detour leads out", 10.0)
        here.ip("link del mplsdetour0")
        send(TUNNEL, b"without the pair", detour.MARK)
        here.run(["ip", "-6", "rule", "del", "pref", "178"])
        send(TUNNEL, b"without the rule", detour.MARK)
        send(OTHER, b"the last", 0)
        wait_until(lambda: seen(b"the last"), "what is no tunnel's leaves", 10.0)
        assert not any(seen(text) for text in (b"without the mark", b"without the pair", b"without the rule"))
