"""Which addresses this host has, and which one it would use towards a peer."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Final

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kernel_shim.model import PORT_IKE, ROUTE_PROTOCOL, IPAddress

MAXIMUM_ADDRESSES: Final = 256  # sockets are opened for each one
RTMGRP_WATCHED: Final = 0x01 | 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE
IFA_F_UNUSABLE: Final = 0x08 | 0x40 | 0x20  # DADFAILED | TENTATIVE | DEPRECATED
RT_SCOPE_LINK: Final = 253
IP_MTU: Final = 14  # linux/in.h
IPV6_MTU: Final = 24  # linux/in6.h


@asynccontextmanager
async def _netlink() -> AsyncIterator[AsyncIPRoute]:
    try:
        async with AsyncIPRoute() as route:
            yield route
    except NetlinkError as error:
        raise OSError(error.code, str(error)) from error


def usable(address: IPAddress) -> bool:
    return not (address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified)


async def local_addresses() -> list[IPAddress]:
    """The addresses on which a peer can reach this host, at most `MAXIMUM_ADDRESSES`. OSError when they cannot be read."""
    found: list[IPAddress] = []
    async with _netlink() as route:
        async for message in await route.get_addr():
            text = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
            if text is None or message["scope"] >= RT_SCOPE_LINK or (message.get("IFA_FLAGS") or message["flags"]) & IFA_F_UNUSABLE:
                continue
            address = ip_address(text)
            if usable(address) and address not in found:
                found.append(address)
    return found[:MAXIMUM_ADDRESSES]


async def watch_addresses(changed: Callable[[], None]) -> None:
    """Call `changed` for every change of the host's addresses, links and routes (but those of ours), until cancelled, and first when it begins to watch.

    Messages are only a hint to look again. OSError when some were lost.
    """
    async with _netlink() as route:
        await route.bind(RTMGRP_WATCHED)
        changed()  # who looked before may have missed something
        while True:
            async for message in route.get():
                if message.get("proto") != ROUTE_PROTOCOL:
                    changed()


def source_towards(remote: IPAddress, mark: int) -> IPAddress | None:
    """The source address that the host's routing chooses for `remote`, with our own mark, so that capture routes do not count."""
    family = socket.AF_INET if remote.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            probe.connect((str(remote), PORT_IKE))
            return ip_address(probe.getsockname()[0].partition("%")[0])
    except OSError:
        return None


def path_mtu(local: IPAddress, remote: IPAddress, mark: int) -> int:
    """The longest IP packet, in octets, that the host knows to pass to `remote`: what ICMP taught it, or its interface's MTU; 0 without a route."""
    family, level, option = (socket.AF_INET, socket.IPPROTO_IP, IP_MTU) if remote.version == 4 else (socket.AF_INET6, socket.IPPROTO_IPV6, IPV6_MTU)
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            probe.bind((str(local), 0))
            probe.connect((str(remote), PORT_IKE))
            return probe.getsockopt(level, option)
    except OSError:
        return 0


async def resolve(host: str) -> IPAddress | None:
    """The first address of a host name or address text; None when there is none."""
    try:
        return ip_address(host)
    except ValueError:
        pass
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, PORT_IKE, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):  # UnicodeError: no host could have that name
        return None
    return ip_address(found[0][4][0]) if found else None
