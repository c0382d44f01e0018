"""The interfaces of VRFs, and what the host needs so that each customer's packets meet its own table and nothing else.

For a VRF with a table: rules send what comes from its interface and from its members to that table, where its routes through tunnels
lead to its interface and the members' own subnets to the members. A `blackhole` default ends the table: what has no
route there never falls through to another one, nor does anything when the shim is dead and its interface gone.

What the host itself answers to a customer (ICMP, TCP) is routed by the same table: the answer bears the mark of the packet, by which a rule knows the VRF.
It comes from an address of a member.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Final

from kernel_shim.dataplane.engine import Engine
from kernel_shim.io.clear_labels import ClearLabels
from kernel_shim.io.connected import HostAddress
from kernel_shim.io.routes import HostRoutes
from kernel_shim.io.tun import Tun
from kernel_shim.model import IPAddress, IPNetwork, KernelError
from kernel_shim.mpls.lfib import Key, ToInterface
from kernel_shim.mpls.node import NodeEntry, Tunnel, Vrf, VrfRoute
from kernel_shim.packet.ip import LARGEST_PACKET

# The host never finds a packet too big for this interface: its errors know no VRF, and the data plane's go back by the interface.
VRF_MTU: Final = LARGEST_PACKET


class VrfDevices:
    """Implements `kernel_shim.kernel.LabelKernel` on an engine.

    `opened` and `closed` are called with each interface, `keep_apart` with all that VRFs route and the marks of their packets.
    """

    def __init__(
        self,
        engine: Engine,
        routes: HostRoutes,
        keep_apart: Callable[[Mapping[str, int]], None],
        devices: dict[str, Tun],
        opened: Callable[[str, Tun], None],
        closed: Callable[[Tun], None],
        clear: ClearLabels,
    ) -> None:
        self._engine, self._routes, self._keep_apart = engine, routes, keep_apart
        self._devices = devices  # by the VRF's name
        self._opened, self._closed = opened, closed
        self._clear = clear
        self._vrfs: dict[str, Vrf] = {}
        self._through: dict[str, set[IPNetwork]] = {}  # prefixes of a VRF that lie elsewhere
        self._local: dict[str, frozenset[tuple[int, IPNetwork]]] = {}
        self._numbers: dict[str, int] = {}  # of VRFs with a table; as small as can be
        self._marks: dict[str, int] = {}
        self._preferred: dict[str, Mapping[int, IPAddress]] = {}  # by IP version
        self._addresses: tuple[HostAddress, ...] = ()

    def label_entries(self) -> Sequence[NodeEntry]:
        return self._engine.label_entries()

    def put_label_entry(self, entry: NodeEntry, now: float) -> None:
        """A VRF's interface is up and closed to others before the engine knows of it."""
        if isinstance(entry, Vrf):
            return self._put_vrf(entry, now)
        if isinstance(entry, Tunnel):
            return self._put_tunnel(entry, now)
        self._engine.put_label_entry(entry, now)
        if isinstance(entry, VrfRoute):
            self._follow(entry.vrf, entry.prefix, through=any(path.next_hop != ToInterface(entry.vrf) for path in entry.paths))

    def remove_label_entry(self, key: Key, now: float) -> None:
        self._engine.remove_label_entry(key, now)
        if key.kind == "vrf":
            self._close(str(key.name[0]))
        elif key.kind == "tunnel":
            self._clear.remove(str(key.name[0]))
        elif key.kind == "route":
            vrf, prefix = key.name
            assert isinstance(prefix, IPNetwork)
            self._follow(str(vrf), prefix, through=False)

    def set_host(self, addresses: Iterable[HostAddress]) -> None:
        """The host's addresses changed: the subnets of members are routed within their VRF."""
        self._addresses = tuple(addresses)
        for vrf in self._vrfs.values():
            with suppress(KernelError):
                self._route_members(vrf)
        with suppress(KernelError):
            self._guard()

    def queue_losses(self) -> dict[str, int]:
        """Packets that the interfaces' queues could not hold."""
        lost = 0
        for device in self._devices.values():
            with suppress(OSError, ValueError), open(f"/sys/class/net/{device.name}/statistics/tx_dropped") as file:
                lost += int(file.read())
        return {"io.vrf.queue-full": lost} if self._devices else {}

    def interfaces(self) -> frozenset[str]:
        """All that belong to a VRF."""
        return frozenset(name for vrf in self._vrfs.values() for name in (vrf.interface, *vrf.members))

    def close(self) -> None:
        self._clear.close()
        for name in list(self._vrfs):
            self._close(name)

    # Inside

    def _put_tunnel(self, tunnel: Tunnel, now: float) -> None:
        self._clear.put(tunnel)
        try:
            self._engine.put_label_entry(tunnel, now)
        except KernelError:
            self._clear.remove(tunnel.peer)
            raise

    def _put_vrf(self, vrf: Vrf, now: float) -> None:
        old = self._vrfs.get(vrf.name)
        if old == vrf:
            return
        if old is not None and (old.interface, old.table) == (vrf.interface, vrf.table):
            return self._change_members(old, vrf, now)
        if old is not None:
            self._engine.remove_label_entry(old.key, now)
            self._close(vrf.name)
        self._engine.put_label_entry(vrf, now)
        try:
            self._open(vrf)
        except KernelError:
            self._engine.remove_label_entry(vrf.key, now)
            self._close(vrf.name)
            raise

    def _change_members(self, old: Vrf, vrf: Vrf, now: float) -> None:
        """The interface and what passes it stay."""
        self._engine.put_label_entry(vrf, now)
        self._vrfs[vrf.name] = vrf
        for member in set(old.members) - set(vrf.members):
            self._routes.release_interface(member, vrf.table)
        for member in set(vrf.members) - set(old.members):
            self._routes.bind_interface(member, vrf.table)
        self._route_members(vrf)
        self._guard()

    def _guard(self) -> None:
        self._keep_apart({name: self._marks[vrf.name] for vrf in self._vrfs.values() if vrf.table for name in (vrf.interface, *vrf.members)})

    def _open(self, vrf: Vrf) -> None:
        device = Tun(vrf.interface, VRF_MTU)
        self._devices[vrf.name] = device
        self._vrfs[vrf.name] = vrf
        if vrf.table:
            self._numbers[vrf.name] = next(number for number in count() if number not in self._numbers.values())
            self._marks[vrf.name] = self._routes.bind_mark(self._numbers[vrf.name], vrf.table)
            self._guard()
            self._routes.close_table(vrf.table)
            for interface in (vrf.interface, *vrf.members):
                self._routes.bind_interface(interface, vrf.table)
            self._route_members(vrf)
            self._route_through(vrf, device)
        self._opened(vrf.name, device)

    def _close(self, name: str) -> None:
        vrf, device = self._vrfs.pop(name, None), self._devices.pop(name, None)
        self._local.pop(name, None)
        self._preferred.pop(name, None)
        self._engine.set_vrf_addresses(name, ())
        if device is not None:
            self._closed(device)
            device.close()
        if vrf is not None and vrf.table:
            for interface in (vrf.interface, *vrf.members):
                self._routes.release_interface(interface, vrf.table)
            if vrf.name in self._marks:
                self._routes.release_mark(self._marks.pop(name), vrf.table)
            self._numbers.pop(name, None)
            self._routes.empty_table(vrf.table)
            with suppress(KernelError):
                self._guard()

    def _follow(self, name: str, prefix: IPNetwork, *, through: bool) -> None:
        known = self._through.get(name, set())
        if through == (prefix in known):
            return
        if through:
            self._through.setdefault(name, known).add(prefix)
        else:
            known.discard(prefix)
            if not known:
                del self._through[name]
        vrf, device = self._vrfs.get(name), self._devices.get(name)
        if vrf is not None and device is not None and vrf.table:
            if through:
                self._route_prefix(vrf, device, prefix)
            else:
                self._routes.unroute_in(vrf.table, prefix)

    def _route_through(self, vrf: Vrf, device: Tun) -> None:
        for prefix in self._through.get(vrf.name, ()):
            self._route_prefix(vrf, device, prefix)

    def _route_prefix(self, vrf: Vrf, device: Tun, prefix: IPNetwork) -> None:
        self._routes.route_in(vrf.table, prefix, device.index, preferred=self._preferred.get(vrf.name, {}).get(prefix.version))

    def _route_members(self, vrf: Vrf) -> None:
        if not vrf.table:
            return
        # By index: an interface that went and came again has lost its routes.
        wanted = frozenset((_index(it.interface), it.network) for it in self._addresses if it.interface in vrf.members)
        standing = self._local.get(vrf.name, frozenset())
        for _, network in standing - wanted:
            self._routes.unroute_in(vrf.table, network, own=True)
        for index, network in wanted - standing:
            self._routes.route_in(vrf.table, network, index, own=True)
        self._local[vrf.name] = wanted
        # Without an address of its own the host would answer from any: its own outer one, or another customer's.
        preferred: dict[int, IPAddress] = {
            it.address.version: it.address for it in sorted(self._addresses, key=str, reverse=True) if it.interface in vrf.members
        }
        if preferred != self._preferred.get(vrf.name, {}):
            self._preferred[vrf.name] = preferred
            self._engine.set_vrf_addresses(vrf.name, preferred.values())
            if (device := self._devices.get(vrf.name)) is not None:
                self._route_through(vrf, device)


def _index(interface: str) -> int:
    try:
        with open(f"/sys/class/net/{os.path.basename(interface)}/ifindex") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0
