"""Labels and VRF routes as routes of Linux: of the platform's label table, and of a VRF's table with labels put on.

`vrf_of` gives the VRF of a name that stands, or raises KernelError. Reading gives an entry back as far as Linux tells it: of the TTL only
whether it is handed down, of what comes to light only the VRF.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from ipaddress import ip_network
from typing import Any, Final, Self

from pyroute2 import AsyncIPRoute
from pyroute2.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, nlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nlsocket import NetlinkRequest
from pyroute2.netlink.rtnl import RTM_NEWROUTE
from pyroute2.netlink.rtnl.rtmsg import rtmsg_base

from kernel_shim.channel.linux_mpls.devices import Devices, tunnel_device
from kernel_shim.model import ROUTE_PROTOCOL, KernelError
from kernel_shim.mpls.labels import LABEL_BITS, LARGEST_TTL, Label
from kernel_shim.mpls.lfib import PLATFORM, NextHop, Nhlfe, ToInterface, ToPeer, ToVrf, TtlModel
from kernel_shim.mpls.node import LabelBinding, Vrf, VrfRoute

AF_INET: Final = 2
AF_INET6: Final = 10
AF_MPLS: Final = 28
LWTUNNEL_ENCAP_MPLS: Final = 1
RT_TABLE_MAIN: Final = 254
RTN_UNICAST: Final = 1
RTN_BLACKHOLE: Final = 6
LAST_METRIC: Final = 0xFFFFFFFE  # of the default that ends a VRF's table

FindVrf = Callable[[str], Vrf]


def stays_within(route: VrfRoute) -> bool:
    """A VRF's own prefixes are its members' subnets and the host's routes in its table: nothing is to be put."""
    return all(isinstance(path.next_hop, ToInterface) for path in route.paths)


async def put_route(netlink: AsyncIPRoute, entry: LabelBinding | VrfRoute, vrf_of: FindVrf, *, ours: bool) -> None:
    """`ours`: the one that stands may be replaced. KernelError, EEXIST where somebody else's stands."""
    message = RouteMessage.of(entry, vrf_of)
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | (NLM_F_REPLACE if ours else NLM_F_EXCL)
    request = NetlinkRequest(netlink, message, msg_type=RTM_NEWROUTE, msg_flags=flags)
    try:
        await request.send()
        async for _ in request.response():
            pass
    except NetlinkError as error:
        if error.code == errno.EEXIST:
            what = f"label {entry.label}" if isinstance(entry, LabelBinding) else f"{entry.prefix} in VRF {entry.vrf}"
            raise KernelError(errno.EEXIST, f"another program's route stands for {what}") from error
        raise


async def delete_route(netlink: AsyncIPRoute, entry: LabelBinding | VrfRoute, vrf_of: FindVrf) -> None:
    with suppress(NetlinkError):  # it went with a device, or by hand
        await netlink.route("del", **_key(entry, vrf_of))


async def clear_table(netlink: AsyncIPRoute, table: int) -> None:
    """What an earlier device of the VRF has left there of ours."""
    for family in (AF_INET, AF_INET6):
        for message in [message async for message in await netlink.get_routes(family=family, table=table)]:
            if message["proto"] == ROUTE_PROTOCOL and message["type"] == RTN_UNICAST:
                target = f"{message.get('RTA_DST')}/{message['dst_len']}"
                with suppress(NetlinkError):
                    await netlink.route("del", family=family, dst=target, table=table, proto=ROUTE_PROTOCOL)


async def end_table(netlink: AsyncIPRoute, table: int, *, ended: bool) -> None:
    """What has no route in the table never falls through to another one."""
    for family, everything in ((AF_INET, "0.0.0.0/0"), (AF_INET6, "::/0")):
        with nullcontext() if ended else suppress(NetlinkError):
            verb = "replace" if ended else "del"
            await netlink.route(verb, family=family, dst=everything, table=table, priority=LAST_METRIC, type=RTN_BLACKHOLE, proto=ROUTE_PROTOCOL)


# Asking


class RouteMessage(rtmsg_base, nlmsg):  # type: ignore[misc]
    """pyroute2's, whose own passes over RTA_TTL_PROPAGATE, and over the labels of several next hops."""

    __slots__ = ()
    nla_map = (*rtmsg_base.nla_map, ("RTA_PAD", "none"), ("RTA_UID", "uint32"), ("RTA_TTL_PROPAGATE", "uint8"))

    @classmethod
    def of(cls, entry: LabelBinding | VrfRoute, vrf_of: FindVrf) -> Self:
        """KernelError for what Linux cannot do."""
        message = cls()
        fields, attributes = _of_label(entry) if isinstance(entry, LabelBinding) else _of_prefix(entry, vrf_of)
        for field, value in {**fields, "type": RTN_UNICAST, "proto": ROUTE_PROTOCOL}.items():
            message[field] = value
        labels = _in_place if isinstance(entry, LabelBinding) else _around
        ways = [(_device(path, vrf_of), labels(path) if path.labels else []) for path in entry.paths]
        if len(ways) == 1:
            hops = [("RTA_OIF", ways[0][0]), *ways[0][1]]
        else:
            hops = [("RTA_MULTIPATH", [{"oif": index, "attrs": attributes} for index, attributes in ways])]
        message["attrs"] = [*attributes, *hops]
        return message

    def encode(self) -> None:
        nlmsg.encode(self)


Attributes = list[tuple[str, Any]]


def _of_label(binding: LabelBinding) -> tuple[dict[str, int], Attributes]:
    if binding.space != PLATFORM:
        raise KernelError(errno.EOPNOTSUPP, "Linux has one label space a platform")
    handed_down = {path.ttl is TtlModel.UNIFORM for path in binding.paths}
    if len(handed_down) != 1:
        raise KernelError(errno.EOPNOTSUPP, "in Linux all paths of a label treat the TTL alike")
    fields = {"family": AF_MPLS, "dst_len": LABEL_BITS, "table": RT_TABLE_MAIN}
    return fields, [("RTA_DST", _stack((binding.label,))), ("RTA_TTL_PROPAGATE", int(handed_down.pop()))]


def _of_prefix(route: VrfRoute, vrf_of: FindVrf) -> tuple[dict[str, int], Attributes]:
    if len(route.paths) > 1 and route.prefix.version == 6:
        raise KernelError(errno.EOPNOTSUPP, f"route to {route.prefix}: of IPv6 one path here")
    fields = {"family": _family(route), "dst_len": route.prefix.prefixlen}
    return fields, [("RTA_TABLE", vrf_of(route.vrf).table), ("RTA_DST", str(route.prefix.network_address))]


def _in_place(path: Nhlfe) -> Attributes:
    """The labels instead of the one that led here."""
    return [("RTA_NEWDST", _stack(path.labels))]


def _around(path: Nhlfe) -> Attributes:
    """The labels on an IP packet."""
    ttl = [] if path.ttl is TtlModel.UNIFORM else [("MPLS_IPTUNNEL_TTL", LARGEST_TTL)]
    return [("RTA_ENCAP_TYPE", LWTUNNEL_ENCAP_MPLS), ("RTA_ENCAP", {"attrs": [("MPLS_IPTUNNEL_DST", _stack(path.labels)), *ttl]})]


def _stack(labels: Sequence[Label]) -> list[dict[str, int]]:
    return [{"label": int(label), "tc": 0, "bos": int(at == len(labels) - 1), "ttl": 0} for at, label in enumerate(labels)]


def _key(entry: LabelBinding | VrfRoute, vrf_of: FindVrf) -> dict[str, Any]:
    """By which pyroute2 deletes it."""
    if isinstance(entry, LabelBinding):
        return {"family": AF_MPLS, "dst": int(entry.label), "proto": ROUTE_PROTOCOL}
    return {"family": _family(entry), "dst": str(entry.prefix), "table": vrf_of(entry.vrf).table, "proto": ROUTE_PROTOCOL}


def _family(route: VrfRoute) -> int:
    return AF_INET if route.prefix.version == 4 else AF_INET6


def _device(path: Nhlfe, vrf_of: FindVrf) -> int:
    """The index."""
    if path.entropy:
        raise KernelError(errno.EOPNOTSUPP, "Linux has no entropy labels")
    if path.traffic_class is not None:
        raise KernelError(errno.EOPNOTSUPP, "Linux sets the traffic class of labels that it pushes to 0")
    match path.next_hop:
        case ToPeer(peer=peer):
            name = tunnel_device(peer)
        case ToVrf(vrf=vrf) | ToInterface(vrf=vrf):
            name = vrf_of(vrf).interface
        case _:
            raise KernelError(errno.EOPNOTSUPP, "in Linux no label leads to the one beneath it")
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise KernelError(errno.ENODEV, f"there is no interface {name}") from None


# Reading


async def read_routes(netlink: AsyncIPRoute, devices: Devices, vrfs: Mapping[str, Vrf]) -> list[LabelBinding | VrfRoute]:
    """Those of ours that lead to peers and into VRFs."""
    hops: dict[str, NextHop] = {tunnel_device(peer): ToPeer(peer) for peer in devices.tunnels}
    hops |= {vrf.interface: ToVrf(vrf.name) for vrf in vrfs.values()}
    by_index = {index: hops[name] for name, index in devices.indexes.items() if name in hops}
    tables = {vrf.table: vrf.name for vrf in vrfs.values()}
    found: list[LabelBinding | VrfRoute] = []
    netlink.marshal.msg_map[RTM_NEWROUTE] = RouteMessage
    for family in (AF_MPLS, AF_INET, AF_INET6):
        async for message in await netlink.get_routes(family=family):
            target = message.get("RTA_DST")
            if message["family"] != family or message["proto"] != ROUTE_PROTOCOL or message["type"] != RTN_UNICAST or not target:
                continue
            ways = [(way["oif"], way) for way in message.get("RTA_MULTIPATH") or ()] or [(message.get("RTA_OIF"), message)]
            if any(index not in by_index for index, _ in ways):
                continue
            if family == AF_MPLS:
                ttl = TtlModel.UNIFORM if message.get("RTA_TTL_PROPAGATE") else TtlModel.PIPE
                paths = tuple(Nhlfe(by_index[index], _labels(way.get("RTA_NEWDST")), ttl) for index, way in ways)
                found.append(LabelBinding(Label(target[0]["label"]), paths))
            elif (vrf := tables.get(message.get("RTA_TABLE"))) is not None:
                paths = tuple(_read_way(by_index[index], way.get("RTA_ENCAP")) for index, way in ways)
                found.append(VrfRoute(vrf, ip_network(f"{target}/{message['dst_len']}"), paths))
    return found


def _read_way(hop: NextHop, encapsulation: Any) -> Nhlfe:
    if encapsulation is None:
        return Nhlfe(hop)
    ttl = TtlModel.PIPE if encapsulation.get("MPLS_IPTUNNEL_TTL") else TtlModel.UNIFORM
    return Nhlfe(hop, _labels(encapsulation.get("MPLS_IPTUNNEL_DST")), ttl)


def _labels(stack: Any) -> tuple[Label, ...]:
    return tuple(Label(each["label"]) for each in stack or ())
