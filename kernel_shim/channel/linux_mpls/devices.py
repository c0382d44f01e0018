"""The devices of label entries: a VRF device for each VRF, a GRE or IP tunnel device for each peer.

Ours bear an alias that names the entry, by which a later run reads it. A VRF device that somebody else made is used as it is, and stays.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, Self
from zlib import crc32

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from kernel_shim.channel.linux_mpls import detour
from kernel_shim.channel.linux_mpls.mtu import device_mtu, outer_mtu
from kernel_shim.channel.route_socket import ALIAS, Link, alias, all_links, data, kind, link_named, make_link
from kernel_shim.model import KernelError
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.node import Tunnel, Vrf

IPPROTO_MPLS: Final = 137

_VRF: Final = f"{ALIAS} vrf "
_TUNNEL: Final = f"{ALIAS} tunnel "
_ENCAPSULATIONS: Final = {"gre": Encapsulation.GRE, "ip6gre": Encapsulation.GRE, "ipip": Encapsulation.IP}
_NO_ENCAPSULATION_LIMIT: Final = 1  # linux/ip6_tunnel.h, IP6_TNL_F_IGN_ENCAP_LIMIT: no destination option before GRE

# Choices of this implementation
TUNNEL_TTL: Final = 64


class _Ip6Gre(ifinfmsg.ifinfo.ip6gre_data):  # type: ignore[misc]
    """pyroute2's, which ends before the last of linux/if_tunnel.h."""

    nla_map = (
        *ifinfmsg.ifinfo.ip6gre_data.nla_map,
        ("IFLA_IP6GRE_COLLECT_METADATA", "flag"),
        ("IFLA_IP6GRE_IGNORE_DF", "uint8"),
        ("IFLA_IP6GRE_FWMARK", "uint32"),
    )


ifinfmsg.ifinfo.register_link_kind(module={"ip6gre": _Ip6Gre})


def tunnel_device(peer: str) -> str:
    """Names of peers may be longer than those of devices."""
    return f"mpls{crc32(peer.encode()):08x}"


@dataclass(frozen=True, slots=True)
class Devices:
    """The links of a moment, and what label entries they are."""

    indexes: Mapping[str, int]  # of all links, by name
    members: Mapping[str, frozenset[str]]  # of each VRF device, ours or not, by its name
    tables: Mapping[str, int]  # likewise
    vrfs: Mapping[str, Vrf]  # ours
    tunnels: Mapping[str, Tunnel]  # by the peer
    mtus: Mapping[int, int]  # of all links, by index
    unmarked: frozenset[str]  # IPv6 tunnels whose device does not send by the detour

    @classmethod
    async def read(cls, route: AsyncIPRoute) -> Self:
        links = await all_links(route)
        names = {link["index"]: str(link.get("IFLA_IFNAME")) for link in links}
        devices = [(names[link["index"]], link) for link in links if kind(link) == "vrf"]
        members = {name: frozenset(names[it["index"]] for it in links if it.get("IFLA_MASTER") == link["index"]) for name, link in devices}
        tables = {name: int(data(link, "IFLA_VRF_TABLE")) for name, link in devices}
        vrfs = {}
        for device, link in devices:
            if (name := alias(link).removeprefix(_VRF)) != alias(link):
                vrfs[name] = Vrf(name, device, tables[device], tuple(sorted(members[device])))
        tunnels = {tunnel.peer: tunnel for link in links if (tunnel := _tunnel(link)) is not None}
        mtus = {link["index"]: int(link.get("IFLA_MTU")) for link in links}
        unmarked = frozenset(alias(link).removeprefix(_TUNNEL) for link in links if kind(link) == "ip6gre" and data(link, "IFLA_IP6GRE_FWMARK") != detour.MARK)
        return cls({name: index for index, name in names.items()}, members, tables, vrfs, tunnels, mtus, unmarked)

    def stands(self, vrf: Vrf) -> bool:
        """Whether there is such a device, with those of the members that exist, and with no others if it is ours."""
        if self.tables.get(vrf.interface) != vrf.table:
            return False
        there, wanted = self.members[vrf.interface], {name for name in vrf.members if name in self.indexes}
        return wanted == there if vrf.name in self.vrfs else wanted <= there

    async def fits(self, route: AsyncIPRoute, tunnel: Tunnel) -> bool:
        """Whether its device has the MTU of the route to the peer, and the mark of the detour if it needs it."""
        return tunnel.peer not in self.unmarked and self.mtus[self.indexes[tunnel_device(tunnel.peer)]] == device_mtu(
            tunnel, await outer_mtu(route, tunnel, self.mtus)
        )


def _tunnel(link: Link) -> Tunnel | None:
    peer, device = alias(link).removeprefix(_TUNNEL), kind(link)
    if peer == alias(link) or device not in _ENCAPSULATIONS or link.get("IFLA_IFNAME") != tunnel_device(peer):
        return None  # another's, or renamed by hand: then it is known no longer, and missing
    local, remote = (ip_address(data(link, f"IFLA_{device.upper()}_{end}")) for end in ("LOCAL", "REMOTE"))
    return Tunnel(peer, local, remote, _ENCAPSULATIONS[device])


# VRFs


async def put_vrf(route: AsyncIPRoute, vrf: Vrf) -> bool:
    """Whether the device is a new one: what led to it is gone then. KernelError, EEXIST when another link has its name."""
    if not vrf.table:
        raise KernelError(errno.EOPNOTSUPP, f"VRF {vrf.name}: in Linux a VRF needs a table")
    link = await link_named(route, vrf.interface)
    if link is not None and (kind(link) != "vrf" or data(link, "IFLA_VRF_TABLE") != vrf.table):
        if not _ours(link):
            raise KernelError(errno.EEXIST, f"interface {vrf.interface} is no VRF device of table {vrf.table}")
        await route.link("del", index=link["index"])
        link = None
    made = link is None
    if link is None:
        link = await make_link(route, ifname=vrf.interface, kind="vrf", vrf_table=vrf.table)
    await route.link("set", index=link["index"], state="up", **({"ifalias": _VRF + vrf.name} if made or _ours(link) else {}))
    for member in vrf.members:
        found = await link_named(route, member)
        if found is not None and found.get("IFLA_MASTER") != link["index"]:
            await _move(route, found, link["index"])
    if not made and _ours(link):
        await _release(route, link["index"], but=vrf.members)
    return made


async def delete_vrf(route: AsyncIPRoute, vrf: Vrf) -> None:
    link = await link_named(route, vrf.interface)
    if link is None:
        return
    members = await _members(route, link["index"])
    await _release(route, link["index"], but=() if _ours(link) else members.keys() - {*vrf.members})
    if _ours(link):
        await route.link("del", index=link["index"])


async def _members(route: AsyncIPRoute, index: int) -> Mapping[str, Link]:
    return {str(link.get("IFLA_IFNAME")): link for link in await all_links(route) if link.get("IFLA_MASTER") == index}


async def _release(route: AsyncIPRoute, index: int, but: Iterable[str] = ()) -> None:
    for name, member in (await _members(route, index)).items():
        if name not in but:
            await _move(route, member, 0)


async def _move(route: AsyncIPRoute, member: Link, master: int) -> None:
    with _addresses_kept(str(member.get("IFLA_IFNAME"))):
        await route.link("set", index=member["index"], master=master)


@contextmanager
def _addresses_kept(device: str) -> Iterator[None]:
    """A device goes down and up as it enters or leaves a VRF, and would lose its IPv6 addresses."""
    setting = Path(f"/proc/sys/net/ipv6/conf/{device}/keep_addr_on_down")
    before = ""
    with suppress(OSError):
        before = setting.read_text()
        setting.write_text("1")
    yield
    with suppress(OSError):
        setting.write_text(before)


# Tunnels


async def put_tunnel(route: AsyncIPRoute, tunnel: Tunnel) -> bool:
    """Whether the device is a new one: what led through it is gone then, and so is its filter. KernelError."""
    device, ends = _kind_of(tunnel), (str(tunnel.local), str(tunnel.remote))
    options: dict[str, Any] = {"kind": device, f"{device}_local": ends[0], f"{device}_remote": ends[1], f"{device}_ttl": TUNNEL_TTL}
    if device == "ipip":
        options["ipip_proto"] = IPPROTO_MPLS
    if device == "ip6gre":
        options |= {"ip6gre_flags": _NO_ENCAPSULATION_LIMIT, "ip6gre_fwmark": detour.MARK}
    link = await link_named(route, tunnel_device(tunnel.peer))
    if link is not None and kind(link) != device:
        await route.link("del", index=link["index"])
        link = None
    made = link is None
    if link is None:
        link = await make_link(route, ifname=tunnel_device(tunnel.peer), **options)
    elif any(data(link, f"IFLA_{option.upper()}") != value for option, value in options.items() if option != "kind"):
        await route.link("set", index=link["index"], **options)
    mtu = device_mtu(tunnel, await outer_mtu(route, tunnel))
    await route.link("set", index=link["index"], ifalias=_TUNNEL + tunnel.peer, mtu=mtu, state="up")
    return made


def _kind_of(tunnel: Tunnel) -> str:
    if tunnel.encapsulation is Encapsulation.UDP:
        raise KernelError(errno.EOPNOTSUPP, f"peer {tunnel.peer}: in Linux MPLS travels in GRE or IP here, not in UDP")
    if tunnel.encapsulation is Encapsulation.GRE:
        return "gre" if tunnel.local.version == 4 else "ip6gre"
    if tunnel.local.version == 6:
        raise KernelError(errno.EOPNOTSUPP, f"peer {tunnel.peer}: in Linux MPLS in IPv6 needs GRE")
    return "ipip"


async def delete_tunnel(route: AsyncIPRoute, peer: str) -> None:
    link = await link_named(route, tunnel_device(peer))
    if link is not None and _ours(link):
        await route.link("del", index=link["index"])


# Both


def _ours(link: Link) -> bool:
    return alias(link).startswith((_VRF, _TUNNEL))
