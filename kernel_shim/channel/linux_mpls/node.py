"""The label node of a Linux kernel, in the network namespace of the calling thread.

| entry | in Linux |
|---|---|
| VRF | a VRF device of its interface's name on its table, its members enslaved, a `blackhole` default that ends the table |
| tunnel | a GRE device, or an `ipip` one that carries MPLS; over IPv6 also the detour and the shield, which all share |
| peer | a filter at the device's ingress that passes the labels which the peer may send; behind it `net.mpls.conf.DEVICE.input` |
| label | a route of the platform's label table |
| route | a route of the VRF's table that encapsulates in labels |

What Linux cannot do is refused. The kernel's tables are read, an earlier run's entries in them like ours: links bear an alias and routes a protocol
number of ours. What was put is remembered for what Linux does not tell, and told as it was put while the kernel's entry says as much.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Final

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kernel_shim.channel.linux_mpls import detour, devices, ingress, routes
from kernel_shim.channel.linux_mpls.devices import Devices, tunnel_device
from kernel_shim.channel.linux_mpls.known import Known
from kernel_shim.channel.linux_mpls.shield import raise_shield, shielded
from kernel_shim.channel.linux_mpls.tables import RouteTables
from kernel_shim.channel.route_socket import RouteSocket, link_named
from kernel_shim.channel.sysctl import Sysctls
from kernel_shim.model import KernelError
from kernel_shim.mpls.labels import LAST_LABEL
from kernel_shim.mpls.lfib import Key, Peer
from kernel_shim.mpls.node import LabelBinding, NodeEntry, Tunnel, Vrf, VrfRoute

FORWARDING: Final = "ipv6/conf/all/forwarding"
TABLE_SIZE: Final = LAST_LABEL  # as many labels as the kernel takes: it does without the last one


def available() -> bool:
    """Whether the kernel has MPLS (module mpls_router)."""
    return Path("/proc/sys/net/mpls").is_dir()


class LinuxLabels:
    """Implements the part `LabelChannel` of a channel. Errors are KernelError."""

    def __init__(self, sysctls: Sysctls) -> None:
        self._sysctls = sysctls
        self._known = Known()

    async def put_labels(self, entries: Sequence[NodeEntry]) -> None:
        if any(isinstance(entry, LabelBinding | VrfRoute) for entry in entries):
            self._sysctls.set("mpls/platform_labels", str(TABLE_SIZE))
        async with RouteSocket("labels") as netlink, RouteTables() as tables:
            by_detour = {tunnel.key: tunnel for tunnel in _by_detour(entries)}
            before = _by_detour(known for entry in entries if (known := self._known.get(entry.key)) is not None)
            if by_detour:
                self._require_forwarding(next(iter(by_detour.values())))
            try:
                if by_detour:
                    await raise_shield(_shielded({**self._known.tunnels, **by_detour}.values()))
                    if not await detour.lies(netlink):
                        await detour.lay(netlink)
                await self._put(netlink, tables, entries)
            except (KernelError, NetlinkError):
                if by_detour and not _by_detour(self._known.tunnels.values()) and not _by_detour((await Devices.read(netlink)).tunnels.values()):
                    with suppress(KernelError, NetlinkError):
                        await self._end_detour(netlink)
                raise
            if any(tunnel.key not in by_detour for tunnel in before):  # they go over IPv4 now
                await self._end_detour(netlink)

    async def delete_labels(self, entries: Sequence[NodeEntry]) -> None:
        async with RouteSocket("labels") as netlink, RouteTables() as tables:
            for run in _runs(entries):
                await self._delete(netlink, tables, [known for entry in run if (known := self._known.get(entry.key)) is not None])
            if _by_detour(entries):
                await self._end_detour(netlink)

    async def labels(self) -> Sequence[NodeEntry]:
        before, found, wrong = self._known, Known(), set[Key]()
        async with RouteSocket("labels") as netlink, RouteTables() as tables:
            links = await Devices.read(netlink)
            standing = self._standing_vrfs(links)
            for vrf in standing.values():
                found.put(before.as_put(vrf))
            by_detour = {tunnel.key for tunnel in _by_detour(links.tunnels.values())}
            lies, under_shield = bool(by_detour) and await detour.lies(netlink), await shielded() if by_detour else frozenset()
            for name, read in links.tunnels.items():
                detours, bare = read.key in by_detour, (read.local, read.remote) not in under_shield
                tunnel = before.as_put(replace(read, managed=detours and bare))
                assert isinstance(tunnel, Tunnel)
                found.put(tunnel)
                if (detours and not (lies and tunnel.managed == bare)) or not await links.fits(netlink, tunnel):
                    wrong.add(tunnel.key)
                peer = await ingress.admitted(netlink, name, links.indexes[tunnel_device(name)])
                if peer is not None:
                    found.put(before.as_put(peer))
            async for route in routes.read_routes(tables, links, standing):
                found.put(before.as_put(route))
        for own in before.own_routes.values():
            if own.vrf in standing:
                found.put(own)
        self._known = found
        return [_other(entry) if entry.key in wrong else entry for entry in found.entries()] if wrong else found.entries()

    async def forbidden(self) -> int:
        """How many packets the filters of the tunnels that stand have dropped: without a label, or with one that their peer may not send."""
        async with RouteSocket("labels") as netlink:
            links = await Devices.read(netlink)
            return await ingress.dropped(netlink, {links.indexes[tunnel_device(peer)] for peer in links.tunnels})

    # The detour

    def _require_forwarding(self, tunnel: Tunnel) -> None:
        if self._sysctls.get(FORWARDING) == "0":
            raise KernelError(
                errno.EOPNOTSUPP, f"peer {tunnel.peer}: over IPv6 labels are forwarded on their way out, and net.{FORWARDING.replace('/', '.')} is 0"
            )

    async def _end_detour(self, netlink: AsyncIPRoute) -> None:
        """As much of it as no tunnel that stands needs."""
        if not _by_detour(self._known.tunnels.values()):
            await detour.take_up(netlink)
        await raise_shield(_shielded(self._known.tunnels.values()))

    # What stands

    def _standing_vrfs(self, links: Devices) -> dict[str, Vrf]:
        """Ours, and those on a device of somebody else's that were put."""
        put = self._known.vrfs
        borrowed = {name: vrf for name, vrf in put.items() if name not in links.vrfs and links.stands(vrf)}
        return {name: put[name] if name in put and links.stands(put[name]) else vrf for name, vrf in links.vrfs.items()} | borrowed

    # Entries

    async def _put(self, netlink: AsyncIPRoute, tables: RouteTables, entries: Sequence[NodeEntry]) -> None:
        for run in _runs(entries):
            if isinstance(run[0], LabelBinding | VrfRoute):
                await self._put_routes(tables, run)
            else:
                for entry in run:
                    await self._put_device(netlink, tables, entry)

    async def _put_routes(self, tables: RouteTables, run: Sequence[NodeEntry]) -> None:
        """Those before and after one that is refused are put all the same."""
        wanted: dict[Key, LabelBinding | VrfRoute] = {entry.key: entry for entry in run if isinstance(entry, LabelBinding | VrfRoute)}
        for own in [entry for entry in wanted.values() if isinstance(entry, VrfRoute) and routes.stays_within(entry)]:
            if self._known.stands(own.key):
                await routes.delete_routes(tables, [own], self._known.vrfs)
            self._known.put(own)
            del wanted[own.key]
        refused: KernelError | None = None
        for ours in (False, True):
            some = [entry for key, entry in wanted.items() if self._known.stands(key) == ours]
            for entry, error in zip(some, await routes.put_routes(tables, some, self._known.vrfs, replace=ours), strict=True):
                refused = refused or error
                if error is None:
                    wanted.pop(entry.key)
                    self._known.put(entry)
        if refused is not None:
            raise refused

    async def _put_device(self, netlink: AsyncIPRoute, tables: RouteTables, entry: NodeEntry) -> None:
        """A device, or what a peer may send through one."""
        known, upon, made = self._known.get(entry.key), self._known.upon(entry.key), False
        match entry:
            case Vrf():
                if isinstance(known, Vrf) and (known.interface, known.table) != (entry.interface, entry.table):
                    for other in (*upon, known):  # in the former table they would stay
                        await self._delete(netlink, tables, [other], forget=False)
                made = await devices.put_vrf(netlink, entry)
                if made:
                    await routes.clear_table(tables, entry.table)
                await routes.end_table(netlink, entry.table, ended=True)
            case Tunnel():
                made = await devices.put_tunnel(netlink, entry)
                if made and (link := await link_named(netlink, tunnel_device(entry.peer))) is not None:
                    await ingress.shut(netlink, link["index"])  # now: its peer may be refused
            case Peer():
                await ingress.admit(netlink, entry)
            case _:
                raise KernelError(errno.EOPNOTSUPP, "Linux sets the traffic class of labels that it pushes to 0")
        self._known.put(entry)
        if made:  # what rested upon the former device went with it, or lost a path
            await self._put(netlink, tables, upon)

    async def _delete(self, netlink: AsyncIPRoute, tables: RouteTables, entries: Sequence[NodeEntry], *, forget: bool = True) -> None:
        lead_out = [it for it in entries if isinstance(it, LabelBinding) or (isinstance(it, VrfRoute) and not routes.stays_within(it))]
        await routes.delete_routes(tables, lead_out, self._known.vrfs)
        for entry in entries:
            match entry:
                case Vrf():
                    await devices.delete_vrf(netlink, entry)
                    await routes.end_table(netlink, entry.table, ended=False)
                case Tunnel():
                    await devices.delete_tunnel(netlink, entry.peer)
                case Peer():
                    ingress.gate(entry.name, open_=False)
            if forget:
                self._known.drop(entry.key)


def _runs(entries: Sequence[NodeEntry]) -> Iterator[Sequence[NodeEntry]]:
    """Neighbours that are routes of Linux, a slice at a time; and those that are not."""
    for start in range(0, len(entries), routes.SLICE):
        for _, run in groupby(entries[start : start + routes.SLICE], lambda entry: isinstance(entry, LabelBinding | VrfRoute)):
            yield list(run)


def _other(entry: NodeEntry) -> NodeEntry:
    """Told of a tunnel that stands, but not as it should below: it leads to itself, which nobody wants, so it is put again or goes."""
    return replace(entry, remote=entry.local) if isinstance(entry, Tunnel) else entry


def _by_detour(entries: Iterable[NodeEntry]) -> list[Tunnel]:
    """The tunnels among them that go by the detour."""
    return [entry for entry in entries if isinstance(entry, Tunnel) and entry.local.version == 6]


def _shielded(entries: Iterable[NodeEntry]) -> list[Tunnel]:
    """Those of them whose packets leave in SAs alone."""
    return [tunnel for tunnel in _by_detour(entries) if not tunnel.managed]
