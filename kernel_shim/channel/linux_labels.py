"""Label entries in Linux's own MPLS (net/mpls/af_mpls.c, mpls_iptunnel.c), in the network namespace of the calling thread.

| entry | in Linux |
|---|---|
| VRF | a VRF device of its interface's name on its table, its members enslaved, a `blackhole` default that ends the table |
| tunnel | a GRE device, or an `ipip` one that carries MPLS |
| peer | `net.mpls.conf.DEVICE.input`, behind a filter at the device's ingress that passes the labels which the peer may send |
| label | a route of the platform's label table |
| route | a route of the VRF's table that encapsulates in labels |

What Linux cannot do is refused. Links bear an alias and routes a protocol number of ours: what an earlier run left is taken over, or goes after the
first entries were put. Linux says nothing of VRFs and peers, so entries are remembered here, and told as long as what they became stands.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kernel_shim.channel.interfaces import ALIAS, ROUTE_PROTOCOL
from kernel_shim.channel.sysctl import Sysctls
from kernel_shim.model import IPNetwork, KernelError
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.labels import LARGEST_TTL, LAST_LABEL, Label, LabelSet
from kernel_shim.mpls.lfib import PLATFORM, Key, Nhlfe, Paths, Peer, ToInterface, ToPeer, ToVrf, TtlModel
from kernel_shim.mpls.node import LabelBinding, NodeEntry, Tunnel, Vrf, VrfRoute

AF_INET: Final = 2
AF_INET6: Final = 10
AF_MPLS: Final = 28
ETH_P_MPLS_UC: Final = 0x8847
IPPROTO_MPLS: Final = 137
LWTUNNEL_ENCAP_MPLS: Final = 1
RTN_BLACKHOLE: Final = 6
INGRESS: Final = 0xFFFF0000
PLATFORM_LABELS: Final = LAST_LABEL  # as many as the kernel takes: it does without the last one
LAST_METRIC: Final = 0xFFFFFFFE  # of the default that ends a VRF's table

# Limits of this implementation
TUNNEL_MTU: Final = 1400  # octets of a label stack with its packet: with GRE, IPv6, ESP and UDP around them within 1500
TUNNEL_TTL: Final = 64
MAX_FILTERS: Final = 4096  # of one peer; a range of labels takes up to 38
LABEL_BITS: Final = 20


def available() -> bool:
    """Whether the kernel has MPLS (module mpls_router)."""
    return Path("/proc/sys/net/mpls").is_dir()


def tunnel_device(peer: str) -> str:
    """Names of peers may be longer than those of devices."""
    return f"mpls{crc32(peer.encode()):08x}"


class LinuxLabels:
    """Implements the part `LabelChannel` of a channel."""

    def __init__(self, sysctls: Sysctls) -> None:
        self._sysctls = sysctls
        self._entries: dict[Key, NodeEntry] = {}
        self._swept = False

    async def put_labels(self, entries: Sequence[NodeEntry]) -> None:
        async with _Netlink() as netlink:
            for entry in entries:
                await self._put(netlink, entry)
                self._entries[entry.key] = entry
            if not self._swept:
                self._swept = True
                await self._sweep(netlink)

    async def delete_labels(self, entries: Sequence[NodeEntry]) -> None:
        async with _Netlink() as netlink:
            for entry in entries:
                known = self._entries.pop(entry.key, None)
                if known is not None:
                    await self._delete(netlink, known)

    async def labels(self) -> Sequence[NodeEntry]:
        """Those that were put and of which nothing was taken away."""
        if not self._entries:
            return []
        async with _Netlink() as netlink:
            links = {str(message.get("IFLA_IFNAME")) for message in await _links(netlink)}
            labels = {route["dst"]: route for route in await _routes(netlink, AF_MPLS)}
            routes = {(family, *key) for family in (AF_INET, AF_INET6) for key in await _routes_of_tables(netlink, family)}

        def stands(entry: NodeEntry) -> bool:
            match entry:
                case Vrf():
                    return entry.interface in links
                case Tunnel() | Peer():
                    return tunnel_device(entry.key.name[0]) in links  # type: ignore[arg-type]
                case LabelBinding():
                    return entry.label in labels
                case VrfRoute():
                    return all(isinstance(path.next_hop, ToInterface) for path in entry.paths) or (
                        (_family(entry.prefix), self._table(entry.vrf), str(entry.prefix)) in routes
                    )
            return True

        self._entries = {key: entry for key, entry in self._entries.items() if stands(entry)}
        return list(self._entries.values())

    # Entries

    async def _put(self, netlink: AsyncIPRoute, entry: NodeEntry) -> None:
        match entry:
            case Vrf():
                await self._put_vrf(netlink, entry)
            case Tunnel():
                await self._put_tunnel(netlink, entry)
            case Peer():
                await self._put_peer(netlink, entry)
            case LabelBinding():
                _require(entry.space == PLATFORM, "Linux has one label space a platform")
                self._sysctls.set("mpls/platform_labels", str(PLATFORM_LABELS))
                ttl = _same(path.ttl is TtlModel.UNIFORM for path in entry.paths)
                await netlink.route(
                    "replace", family=AF_MPLS, dst=int(entry.label), proto=ROUTE_PROTOCOL, ttl_propagate=int(ttl), **_ways(entry.paths, self._label_way)
                )
            case VrfRoute():
                await self._put_route(netlink, entry)
            case _:
                raise KernelError(errno.EOPNOTSUPP, "Linux sets the traffic class of labels that it pushes to 0")

    async def _delete(self, netlink: AsyncIPRoute, entry: NodeEntry) -> None:
        with suppress(NetlinkError):  # it went with a link, or by hand
            match entry:
                case Vrf():
                    await self._release_members(netlink, entry)
                    await self._delete_link(netlink, entry.interface)
                    await self._end_table(netlink, entry.table, "del")
                case Tunnel():
                    await self._delete_link(netlink, tunnel_device(entry.peer))
                case Peer():
                    _gate(tunnel_device(entry.name), "0")
                case LabelBinding():
                    await netlink.route("del", family=AF_MPLS, dst=int(entry.label), proto=ROUTE_PROTOCOL)
                case VrfRoute():
                    await netlink.route("del", family=_family(entry.prefix), dst=str(entry.prefix), table=self._table(entry.vrf), proto=ROUTE_PROTOCOL)

    async def _put_vrf(self, netlink: AsyncIPRoute, vrf: Vrf) -> None:
        _require(bool(vrf.table), f"VRF {vrf.name}: in Linux a VRF needs a table")
        link = await _link(netlink, vrf.interface)
        if link is not None and (_kind(link) != "vrf" or _data(link, "IFLA_VRF_TABLE") != vrf.table):
            _require(link.get("IFLA_IFALIAS") == ALIAS, f"interface {vrf.interface} is no VRF device of table {vrf.table}", errno.EEXIST)
            await netlink.link("del", index=link["index"])
            link = None
        if link is None:
            await netlink.link("add", ifname=vrf.interface, kind="vrf", vrf_table=vrf.table)
            link = await _link(netlink, vrf.interface)
            assert link is not None
            await netlink.link("set", index=link["index"], ifalias=ALIAS)
        await netlink.link("set", index=link["index"], state="up")
        await self._end_table(netlink, vrf.table, "replace")
        for message in await _links(netlink):
            if message.get("IFLA_IFNAME") in vrf.members and message.get("IFLA_MASTER") != link["index"]:
                await _move(netlink, message, link["index"])
        if link.get("IFLA_IFALIAS") == ALIAS:
            await self._release_members(netlink, vrf, but=vrf.members)

    @staticmethod
    async def _release_members(netlink: AsyncIPRoute, vrf: Vrf, but: Sequence[str] = ()) -> None:
        link = await _link(netlink, vrf.interface)
        for message in await _links(netlink) if link is not None else ():
            if message.get("IFLA_MASTER") == link["index"] and message.get("IFLA_IFNAME") not in but:
                await _move(netlink, message, 0)

    @staticmethod
    async def _delete_link(netlink: AsyncIPRoute, name: str) -> None:
        link = await _link(netlink, name)
        if link is not None and link.get("IFLA_IFALIAS") == ALIAS:
            await netlink.link("del", index=link["index"])

    @staticmethod
    async def _end_table(netlink: AsyncIPRoute, table: int, verb: str) -> None:
        """What has no route in the table never falls through to another one."""
        for family, everything in ((AF_INET, "0.0.0.0/0"), (AF_INET6, "::/0")):
            with suppress(NetlinkError) if verb == "del" else nullcontext():
                await netlink.route(verb, family=family, dst=everything, table=table, priority=LAST_METRIC, type=RTN_BLACKHOLE, proto=ROUTE_PROTOCOL)

    async def _put_tunnel(self, netlink: AsyncIPRoute, tunnel: Tunnel) -> None:
        _require(tunnel.encapsulation is not Encapsulation.UDP, f"peer {tunnel.peer}: in Linux MPLS travels in GRE or IP here, not in UDP")
        name, ends = tunnel_device(tunnel.peer), (str(tunnel.local), str(tunnel.remote))
        version, gre = tunnel.local.version, tunnel.encapsulation is Encapsulation.GRE
        _require(gre or version == 4, f"peer {tunnel.peer}: in Linux MPLS in IPv6 needs GRE")
        kind = ("gre" if version == 4 else "ip6gre") if gre else "ipip"
        attribute = f"IFLA_{kind.upper()}"
        link = await _link(netlink, name)
        if link is not None and (_kind(link), _data(link, f"{attribute}_LOCAL"), _data(link, f"{attribute}_REMOTE")) != (kind, *ends):
            await netlink.link("del", index=link["index"])
            link = None
        if link is None:
            options: dict[str, Any] = {f"{kind}_local": ends[0], f"{kind}_remote": ends[1], f"{kind}_ttl": TUNNEL_TTL}
            if not gre:
                options["ipip_proto"] = IPPROTO_MPLS
            await netlink.link("add", ifname=name, kind=kind, **options)
            link = await _link(netlink, name)
            assert link is not None
        await netlink.link("set", index=link["index"], ifalias=ALIAS, mtu=TUNNEL_MTU, state="up")

    async def _put_peer(self, netlink: AsyncIPRoute, peer: Peer) -> None:
        """The filter stands before the device takes any label, and changes behind a closed device."""
        _require(peer.space == PLATFORM, f"peer {peer.name}: Linux has one label space a platform")
        name = tunnel_device(peer.name)
        link = await _link(netlink, name)
        _require(link is not None, f"peer {peer.name} has no tunnel", errno.ENODEV)
        assert link is not None
        matches = list(_matches(peer.accepts))
        _require(len(matches) <= MAX_FILTERS, f"peer {peer.name}: more than {MAX_FILTERS} filters for its labels", errno.ENOSPC)
        _gate(name, "0")
        with suppress(NetlinkError):
            await netlink.tc("del", "ingress", index=link["index"])
        await netlink.tc("add", "ingress", index=link["index"], handle=INGRESS)
        for value, mask in matches:
            key = f"{value << 12:#x}/{mask << 12:#x}+0"
            await netlink.tc("add-filter", "u32", index=link["index"], parent=INGRESS, prio=1, protocol=ETH_P_MPLS_UC, target=0x10001, keys=[key], action="ok")
        await netlink.tc("add-filter", "matchall", index=link["index"], parent=INGRESS, prio=2, protocol=ETH_P_MPLS_UC, action="drop")
        _require(_gate(name, "1"), f"peer {peer.name}: {name} cannot be opened to labels")

    async def _put_route(self, netlink: AsyncIPRoute, route: VrfRoute) -> None:
        """A VRF's own prefixes are its members' and routes of the host in its table."""
        if all(isinstance(path.next_hop, ToInterface) for path in route.paths):
            return
        _require(len(route.paths) == 1 or _family(route.prefix) == AF_INET, f"route to {route.prefix}: of IPv6 one path here")
        await netlink.route(
            "replace",
            family=_family(route.prefix),
            dst=str(route.prefix),
            table=self._table(route.vrf),
            proto=ROUTE_PROTOCOL,
            **_ways(route.paths, self._route_way),
        )

    # Paths

    def _label_way(self, path: Nhlfe) -> dict[str, Any]:
        way: dict[str, Any] = {"oif": self._index(path)}
        if path.labels:
            way["newdst"] = [{"label": int(label), "bos": int(at == len(path.labels) - 1)} for at, label in enumerate(path.labels)]
        return way

    def _route_way(self, path: Nhlfe) -> dict[str, Any]:
        way: dict[str, Any] = {"oif": self._index(path)}
        if path.labels:
            stack = [{"label": int(label), "tc": 0, "bos": int(at == len(path.labels) - 1), "ttl": 0} for at, label in enumerate(path.labels)]
            attributes: list[tuple[str, Any]] = [("MPLS_IPTUNNEL_DST", stack)]
            if path.ttl is not TtlModel.UNIFORM:
                attributes.append(("MPLS_IPTUNNEL_TTL", LARGEST_TTL))
            way |= {"encap_type": LWTUNNEL_ENCAP_MPLS, "encap": {"attrs": attributes}}
        return way

    def _index(self, path: Nhlfe) -> int:
        _require(not path.entropy, "Linux has no entropy labels")
        _require(path.traffic_class is None, "Linux sets the traffic class of labels that it pushes to 0")
        match path.next_hop:
            case ToPeer(peer=peer):
                name = tunnel_device(peer)
            case ToVrf(vrf=vrf) | ToInterface(vrf=vrf):
                known = self._entries.get(Key("vrf", (vrf,)))
                _require(isinstance(known, Vrf), f"there is no VRF {vrf}", errno.ENODEV)
                assert isinstance(known, Vrf)
                name = known.interface
            case _:
                raise KernelError(errno.EOPNOTSUPP, "a label that leads to the one beneath it")
        try:
            return socket.if_nametoindex(name)
        except OSError:
            raise KernelError(errno.ENODEV, f"there is no interface {name}") from None

    def _table(self, vrf: str) -> int:
        known = self._entries.get(Key("vrf", (vrf,)))
        _require(isinstance(known, Vrf), f"there is no VRF {vrf}", errno.ENODEV)
        assert isinstance(known, Vrf)
        return known.table

    # What an earlier run left

    async def _sweep(self, netlink: AsyncIPRoute) -> None:
        wanted = {
            tunnel_device(entry.peer) if isinstance(entry, Tunnel) else entry.interface for entry in self._entries.values() if isinstance(entry, Tunnel | Vrf)
        }
        labels = {entry.label for entry in self._entries.values() if isinstance(entry, LabelBinding)}
        for route in await _routes(netlink, AF_MPLS):
            if route["proto"] == ROUTE_PROTOCOL and route["dst"] not in labels:
                with suppress(NetlinkError):
                    await netlink.route("del", family=AF_MPLS, dst=route["dst"], proto=ROUTE_PROTOCOL)
        for message in await _links(netlink):
            if message.get("IFLA_IFALIAS") == ALIAS and _kind(message) in ("vrf", "gre", "ip6gre", "ipip") and message.get("IFLA_IFNAME") not in wanted:
                with suppress(NetlinkError):
                    await netlink.link("del", index=message["index"])


class _Netlink:
    """A route socket whose errors are ours."""

    def __init__(self) -> None:
        self._route = AsyncIPRoute()

    async def __aenter__(self) -> AsyncIPRoute:
        return await self._route.__aenter__()

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        await self._route.__aexit__(None, None, None)
        if isinstance(error, NetlinkError):
            raise KernelError(error.code, f"labels: {error}") from error


async def _move(netlink: AsyncIPRoute, member: Any, master: int) -> None:
    with _addresses_kept(str(member.get("IFLA_IFNAME"))):
        await netlink.link("set", index=member["index"], master=master)


@contextmanager
def _addresses_kept(device: str) -> Iterator[None]:
    """A device goes down and up as it enters a VRF, and would lose its IPv6 addresses."""
    setting = Path(f"/proc/sys/net/ipv6/conf/{device}/keep_addr_on_down")
    before = ""
    with suppress(OSError):
        before = setting.read_text()
        setting.write_text("1")
    yield
    with suppress(OSError):
        setting.write_text(before)


def _gate(device: str, value: str) -> bool:
    """Whether a device takes labels goes with the device, so nothing is to be put back."""
    try:
        Path(f"/proc/sys/net/mpls/conf/{device}/input").write_text(value)
    except OSError:
        return False
    return True


def _require(condition: bool, detail: str, number: int = errno.EOPNOTSUPP) -> None:
    if not condition:
        raise KernelError(number, detail)


def _same(values: Iterable[bool]) -> bool:
    found = set(values)
    _require(len(found) == 1, "in Linux all paths of a label treat the TTL alike")
    return found.pop()


def _ways(paths: Paths, way_of: Callable[[Nhlfe], dict[str, Any]]) -> dict[str, Any]:
    ways = [way_of(path) for path in paths]
    return ways[0] if len(ways) == 1 else {"multipath": ways}


def _matches(labels: LabelSet) -> Iterator[tuple[int, int]]:
    """Value and mask of each block of labels."""
    for first, last in labels:
        at = int(first)
        while at <= last:
            size = at & -at or 1 << LABEL_BITS
            while at + size - 1 > last:
                size >>= 1
            yield at, (1 << LABEL_BITS) - size
            at += size


def _family(prefix: IPNetwork) -> int:
    return AF_INET if prefix.version == 4 else AF_INET6


def _kind(link: Any) -> str:
    information = link.get("IFLA_LINKINFO")
    return str(information.get("IFLA_INFO_KIND")) if information else ""


def _data(link: Any, attribute: str) -> Any:
    information = link.get("IFLA_LINKINFO")
    data = information.get("IFLA_INFO_DATA") if information else None
    return data.get(attribute) if data is not None else None


async def _links(netlink: AsyncIPRoute) -> list[Any]:
    return [message async for message in await netlink.get_links()]


async def _link(netlink: AsyncIPRoute, name: str) -> Any:
    return next((message for message in await _links(netlink) if message.get("IFLA_IFNAME") == name), None)


async def _routes(netlink: AsyncIPRoute, family: int) -> list[dict[str, int]]:
    found = []
    async for message in await netlink.get_routes(family=family):
        target = message.get("RTA_DST")
        if message["family"] == family and target:
            found.append({"dst": Label(target[0]["label"]), "proto": message["proto"]})
    return found


async def _routes_of_tables(netlink: AsyncIPRoute, family: int) -> set[tuple[int, str]]:
    found = set()
    async for message in await netlink.get_routes(family=family):
        if message["proto"] == ROUTE_PROTOCOL and message.get("RTA_DST"):
            found.add((message.get("RTA_TABLE") or message["table"], f"{message.get('RTA_DST')}/{message['dst_len']}"))
    return found
