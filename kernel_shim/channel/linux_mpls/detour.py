"""How labelled packets over IPv6 come by the kernel's hold queue.

Linux's IPv6 tunnel devices look the SA up without XFRM_LOOKUP_QUEUE (net/ipv6/ip6_tunnel.c, ip6_tnl_xmit): what they send while there is none is
lost. What is forwarded is held (net/xfrm/xfrm_policy.c, __xfrm_route_forward). So it leaves a tunnel's device unprotected, into one end of a veth
pair, comes in at the other, and is forwarded as a stranger's packet would be: there it meets the policy that protects it, and waits.

1. The tunnel's device looks up routes and policies with `MARK`, which no packet bears.
2. A policy lets pass what has that mark (`vpnd.mpls.guard`).
3. A rule leads what has that mark to a table, in which there is the pair, and beneath it `unreachable`: nothing has that mark and leaves otherwise.

A kernel that looks up labelled packets without the device's mark (net/ipv6/ip6_gre.c, ip6gre_xmit_other) sends them as it would without all this.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kernel_shim.channel.route_socket import ALIAS, alias, kind, link_named, make_link

MARK: Final = 0x76706E64  # "vpnd"; whole
TABLE: Final = MARK
RULE_PRIORITY: Final = 178  # before those of VRF devices (1000) and of the main table
NEAR, FAR = "mplsdetour0", "mplsdetour1"  # where packets go in, and where they come out

_AF_INET6: Final = 10
_EVERYTHING: Final = "::/0"
_FIRST, _LAST = 1, 0xFFFFFFFE  # metrics
_RTN_UNREACHABLE: Final = 7
_RTPROT_KERNEL: Final = 2  # programs that take away rules which are not theirs leave such alone
_MTU: Final = 65535
_ETHERNET: Final = "02:00:00:00:00:01"  # of both ends: nobody asks whose it is
_ALIAS: Final = f"{ALIAS} detour"
_NO_ADDRESS: Final = 1  # addr_gen_mode: no link-local one


async def lay(route: AsyncIPRoute) -> None:
    """What is there already stays. NetlinkError."""
    if await _pair(route) is None:
        with suppress(NetlinkError):
            await route.link("del", ifname=NEAR)
        await make_link(route, ifname=NEAR, kind="veth", address=_ETHERNET, peer={"ifname": FAR, "address": _ETHERNET})
        for name in (NEAR, FAR):
            _prepare(name)
            link = await link_named(route, name)
            assert link is not None
            await route.link("set", index=link["index"], ifalias=_ALIAS, mtu=_MTU, arp=False, state="up")
    near = await link_named(route, NEAR)
    assert near is not None
    await route.route("replace", **_route(_LAST), type=_RTN_UNREACHABLE)
    await route.route("replace", **_route(_FIRST), oif=near["index"])
    if not await _rules(route):
        await route.rule("add", **_RULE)


async def lies(route: AsyncIPRoute) -> bool:
    """Whether all of it is there."""
    near = await _pair(route)
    if near is None or not await _rules(route):
        return False
    found = [message async for message in await route.get_routes(family=_AF_INET6, table=TABLE)]
    metrics = {message.get("RTA_PRIORITY"): message.get("RTA_OIF") for message in found if message.get("RTA_TABLE") == TABLE}
    return metrics.get(_FIRST) == near and _LAST in metrics


async def take_up(route: AsyncIPRoute) -> None:
    """Its end, when no device has the mark any more."""
    for _ in await _rules(route):
        with suppress(NetlinkError):
            await route.rule("del", **_RULE)
    for metric in (_FIRST, _LAST):
        with suppress(NetlinkError):
            await route.route("del", **_route(metric))
    link = await link_named(route, NEAR)
    if link is not None and alias(link) == _ALIAS:
        await route.link("del", index=link["index"])


def _prepare(name: str) -> None:
    """IPv6, whatever devices have by default, and no address of its own."""
    for setting, value in (("disable_ipv6", 0), ("addr_gen_mode", _NO_ADDRESS)):
        with suppress(OSError):
            Path(f"/proc/sys/net/ipv6/conf/{name}/{setting}").write_text(str(value))


async def _pair(route: AsyncIPRoute) -> int | None:
    """The index of the near end, when both are there and up."""
    ends = [await link_named(route, name) for name in (NEAR, FAR)]
    if any(link is None or kind(link) != "veth" or alias(link) != _ALIAS or link.get("IFLA_OPERSTATE") != "UP" for link in ends):
        return None
    assert ends[0] is not None
    return int(ends[0]["index"])


_RULE: Final[dict[str, Any]] = {
    "family": _AF_INET6,
    "priority": RULE_PRIORITY,
    "protocol": _RTPROT_KERNEL,
    "table": TABLE,
    "iifname": "lo",  # what this host sends, and not what comes out at the far end
    "fwmark": MARK,
    "fwmask": 0xFFFFFFFF,
}


def _route(metric: int) -> dict[str, Any]:
    return {"family": _AF_INET6, "dst": _EVERYTHING, "table": TABLE, "priority": metric}


async def _rules(route: AsyncIPRoute) -> Sequence[object]:
    rules = [message async for message in await route.get_rules(family=_AF_INET6)]
    return [rule for rule in rules if rule.get("FRA_PRIORITY") == RULE_PRIORITY and rule.get("FRA_FWMARK") == MARK and rule.get("FRA_TABLE") == TABLE]
