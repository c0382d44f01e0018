"""The way of labelled IPv6 packets to the kernel's hold queue, and what keeps them from any other."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address

import pytest
from lab.capture import Capture
from lab.namespaces import Lab, Namespace
from lab.process import wait_until

from kernel_shim.channel.linux_mpls import detour, shield
from kernel_shim.channel.linux_mpls.devices import Devices, tunnel_device
from kernel_shim.channel.linux_mpls.mtu import device_mtu
from kernel_shim.channel.linux_mpls.node import LinuxLabels
from kernel_shim.channel.linux_mpls.shield import raise_shield, shielded
from kernel_shim.channel.route_socket import RouteSocket
from kernel_shim.channel.sysctl import Sysctls
from kernel_shim.model import KernelError
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
        return await shielded() == {(tunnel.local, tunnel.remote) for tunnel in tunnels}

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
        wait_until(lambda: seen(b"of another"), "what is no tunnel's leaves")
        # A veth pair hands the mark of a packet on; a device's own lookups, as those of a tunnel, leave none.
        here.run(["nft", "add table ip6 unmark; add chain ip6 unmark c { type filter hook postrouting priority 0; }; add rule ip6 unmark c meta mark set 0"])
        send(TUNNEL, b"with the mark", detour.MARK)
        wait_until(lambda: seen(b"with the mark"), "the detour leads out")
        here.ip("link del mplsdetour0")
        send(TUNNEL, b"without the pair", detour.MARK)
        here.run(["ip", "-6", "rule", "del", "pref", "178"])
        send(TUNNEL, b"without the rule", detour.MARK)
        send(OTHER, b"the last", 0)
        wait_until(lambda: seen(b"the last"), "what is no tunnel's leaves")
        assert not any(seen(text) for text in (b"without the mark", b"without the pair", b"without the rule"))


def test_a_host_without_names_of_protocols_has_a_shield(here: Namespace) -> None:
    raise_it = """if True:
        import asyncio, sys
        from ipaddress import ip_address
        from kernel_shim.channel.linux_mpls.shield import raise_shield, shielded
        from kernel_shim.mpls.node import Tunnel
        tunnels = [Tunnel("pe", ip_address("2001:db8::1"), ip_address("2001:db8::2"))]
        asyncio.run(raise_shield(tunnels))
        sys.exit(not asyncio.run(shielded()))
    """
    here.run(["unshare", "-m", "sh", "-c", 'mount --bind /dev/null /etc/protocols && exec "$@"', "sh", sys.executable, "-c", raise_it])

    assert in_it(here, shielded) == [{(TUNNEL.local, TUNNEL.remote)}]  # where they have names it is the same


def test_where_nothing_is_to_be_shielded_nftables_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(commands: str) -> str:
        raise KernelError(errno.ENOSYS, "nftables: neither libnftables nor the nft program is usable")

    monkeypatch.setattr(shield, "_run", run)
    asyncio.run(raise_shield(()))
    with pytest.raises(KernelError, match="nftables"):
        asyncio.run(raise_shield([TUNNEL]))


def test_a_tunnel_that_is_refused_leaves_no_detour(here: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object) -> bool:
        raise KernelError(errno.EOPNOTSUPP, "no module ip6_gre")

    monkeypatch.setattr("kernel_shim.channel.linux_mpls.devices.put_tunnel", refuse)

    async def put() -> None:
        await LinuxLabels(Sysctls()).put_labels([TUNNEL])

    for expected in ("ip6_gre", "forwarding is 0"):
        with pytest.raises(KernelError, match=expected):
            in_it(here, put)
        assert not any(word in state(here) for word in ("mplsdetour", "vpnd-labels", str(detour.TABLE)))
        here.sysctl(ipv6__conf__all__forwarding=0)


def test_a_tunnel_that_leaves_ipv6_takes_the_detour_along(here: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    async def put_tunnel(*_: object) -> bool:
        return False

    monkeypatch.setattr("kernel_shim.channel.linux_mpls.devices.put_tunnel", put_tunnel)
    before, kernel, states = state(here), LinuxLabels(Sysctls()), []

    async def put(*tunnels: Tunnel) -> None:
        await kernel.put_labels(tunnels)
        states.append(await asyncio.to_thread(state, here))

    four = Tunnel("pe", ip_address("192.0.2.1"), ip_address("192.0.2.2"))
    in_it(here, lambda: put(TUNNEL, OTHER), lambda: put(four), lambda: put(replace(four, peer="other")))
    assert [all(word in told for word in ("mplsdetour0", "vpnd-labels")) for told in states] == [True, True, False]
    assert states[-1] == before


@pytest.mark.parametrize("managed", [False, True])
def test_what_stands_otherwise_than_it_should_is_told_so(here: Namespace, monkeypatch: pytest.MonkeyPatch, managed: bool) -> None:
    """Linux does not tell whether a tunnel is managed: the shield does, to one that has not put it."""
    tunnel, device = replace(TUNNEL, managed=managed), tunnel_device("pe")
    indexes, standing, unmarked = {device: 1}, {"pe": TUNNEL}, set[str]()

    async def read(_: object) -> Devices:
        return Devices(indexes, {}, {}, {}, standing, {1: mtu}, frozenset(unmarked))

    async def put_tunnel(*_: object) -> bool:
        return False

    async def put() -> None:
        await kernel.put_labels([tunnel])

    async def told(by: LinuxLabels | None = None) -> object:
        return await (by or LinuxLabels(Sysctls())).labels()

    async def told_again() -> object:
        return await told(kernel)

    mtu = device_mtu(TUNNEL, 1500)
    kernel = LinuxLabels(Sysctls())
    monkeypatch.setattr(Devices, "read", read)
    monkeypatch.setattr("kernel_shim.channel.linux_mpls.devices.put_tunnel", put_tunnel)
    assert in_it(here, put, told_again, told) == [None, [tunnel], [tunnel]]

    def is_wrong() -> bool:
        return all(not set(found) & {TUNNEL, replace(TUNNEL, managed=True)} for found in in_it(here, told_again, told))  # type: ignore[call-overload]

    assert not is_wrong()
    here.ip("link del mplsdetour0")
    assert is_wrong()
    in_it(here, put)
    assert not is_wrong()
    unmarked.add("pe")
    assert is_wrong()
    unmarked.clear()
    in_it(here, lambda: raise_shield([TUNNEL] if managed else ()))
    assert not any(tunnel in found for found in in_it(here, told_again, told))  # type: ignore[operator]
    in_it(here, put)
    assert in_it(here, told_again, told) == [[tunnel], [tunnel]]


def test_a_tunnels_device_takes_nothing_before_it_is_said_what(here: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    shut: list[int] = []

    async def put_tunnel(*_: object) -> bool:
        return True

    async def note(_: object, index: int) -> None:
        shut.append(index)

    monkeypatch.setattr("kernel_shim.channel.linux_mpls.devices.put_tunnel", put_tunnel)
    monkeypatch.setattr("kernel_shim.channel.linux_mpls.ingress.shut", note)
    here.ip(f"link add {tunnel_device('pe')} type veth peer name other")

    async def put() -> None:
        await LinuxLabels(Sysctls()).put_labels([TUNNEL])

    in_it(here, put)
    assert shut == [here.call(lambda: socket.if_nametoindex(tunnel_device("pe")))]
