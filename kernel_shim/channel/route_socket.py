"""A route socket (pyroute2) whose errors are ours, and links as it tells them."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any, Final

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kernel_shim.model import KernelError

ALIAS: Final = "vpnd"  # how the alias of every link of ours begins; `ip link` shows it

Link = Any
"""A message of pyroute2: attributes by `get`, those of its header by name."""


class RouteSocket:
    """In the network namespace of the calling thread. A NetlinkError that leaves the block becomes a KernelError that begins with `subject`."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._route = AsyncIPRoute()

    async def __aenter__(self) -> AsyncIPRoute:
        return await self._route.__aenter__()

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        await self._route.__aexit__(None, None, None)
        if isinstance(error, NetlinkError):
            raise KernelError(error.code, f"{self._subject}: {error}") from error


async def all_links(route: AsyncIPRoute) -> Sequence[Link]:
    return [message async for message in await route.get_links()]


async def link_named(route: AsyncIPRoute, name: str) -> Link | None:
    try:
        return next(iter(await route.link("get", ifname=name)), None)
    except NetlinkError as error:
        if error.code != errno.ENODEV:
            raise
        return None


async def make_link(route: AsyncIPRoute, **options: Any) -> Link:
    """`options` as pyroute2 takes them, `ifname` among them."""
    await route.link("add", **options)
    link = await link_named(route, options["ifname"])
    if link is None:
        raise KernelError(errno.ENODEV, f"interface {options['ifname']} went as it came")
    return link


def alias(link: Link) -> str:
    return str(link.get("IFLA_IFALIAS") or "")


def kind(link: Link) -> str:
    """`vrf`, `gre`, ...; nothing of a device of hardware."""
    information = link.get("IFLA_LINKINFO")
    return str(information.get("IFLA_INFO_KIND")) if information else ""


def data(link: Link, attribute: str) -> Any:
    """What its kind has beyond other links; None for what is not there."""
    information = link.get("IFLA_LINKINFO")
    found = information.get("IFLA_INFO_DATA") if information else None
    return found.get(attribute) if found is not None else None
