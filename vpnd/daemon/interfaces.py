"""The XFRM interfaces of route-based children: each stands while a loaded connection wants it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import structlog

from kernel_shim.channel.interfaces import XfrmInterface, XfrmInterfaces
from kernel_shim.model import IPNetwork, KernelError
from vpnd.config.model import ChildConfig, ConnectionConfig, Unique
from vpnd.control.backend import ControlError

log: Final = structlog.get_logger("vpnd")


class Interfaces:
    """Several children of one `if_id` may share an interface; its routes are those of all of them."""

    def __init__(self) -> None:
        self._links = XfrmInterfaces()
        self._wanted: dict[str, dict[str, XfrmInterface]] = {}  # interface, connection

    async def load(self, connection: ConnectionConfig) -> None:
        """In place of what the connection of this name wanted before. ControlError when an interface cannot be had."""
        wanted = _of_connection(connection)
        for name, interface in wanted.items():
            for owner, other in self._wanted.get(name, {}).items():
                if owner != connection.name and other.if_id != interface.if_id:
                    raise ControlError(f"interface {name} cannot have the if_id {interface.if_id}: connection '{owner}' wants it with {other.if_id}")
        changed = [*wanted, *(name for name, owners in self._wanted.items() if connection.name in owners and name not in wanted)]
        for name in changed:
            owners = self._wanted.setdefault(name, {})
            if name in wanted:
                owners[connection.name] = wanted[name]
            else:
                del owners[connection.name]
        try:
            for name in changed:
                await self._carry_over(name)
        except KernelError as error:
            await self.unload(connection.name)
            raise ControlError(error.detail) from error

    async def unload(self, connection: str) -> None:
        for name in [name for name, owners in self._wanted.items() if connection in owners]:
            del self._wanted[name][connection]
            try:
                await self._carry_over(name)
            except KernelError as error:
                log.warning("interface not as it should be", interface=name, error=error.detail)

    async def loaded(self) -> None:
        """The configuration is in: what an earlier run left and nobody wants goes."""
        try:
            for name in await self._links.remove_left_over():
                log.info("interface of an earlier run removed", interface=name)
        except KernelError as error:
            log.warning("interfaces of an earlier run not removed", error=error.detail)

    async def close(self) -> None:
        await self._links.close()

    async def _carry_over(self, name: str) -> None:
        owners = self._wanted[name]
        if not owners:
            del self._wanted[name]
            await self._links.remove(name)
            return
        routes = dict.fromkeys(network for interface in owners.values() for network in interface.routes)
        await self._links.put(XfrmInterface(name, next(iter(owners.values())).if_id, tuple(routes)))


def _of_connection(connection: ConnectionConfig) -> dict[str, XfrmInterface]:
    """ControlError when two of its children want one interface with different numbers."""
    found: dict[str, XfrmInterface] = {}
    for child in connection.children.values():
        if not child.xfrm_interface or isinstance(child.if_id_out, Unique):
            continue
        other = found.get(child.xfrm_interface)
        if other is not None and other.if_id != child.if_id_out:
            raise ControlError(f"child '{child.name}': interface {child.xfrm_interface} has the if_id {other.if_id} already")
        routes = (*(other.routes if other is not None else ()), *_routes(child))
        found[child.xfrm_interface] = XfrmInterface(child.xfrm_interface, child.if_id_out, tuple(dict.fromkeys(routes)))
    return found


def _routes(child: ChildConfig) -> Iterator[IPNetwork]:
    """To all that `remote_ts` names. Not everything: a default route would lead the tunnel's own packets into the tunnel."""
    if not child.xfrm_routes:
        return
    for selector in child.remote_ts:
        if selector.addresses is not None:
            yield from (network for network in selector.addresses.addresses.prefixes() if network.prefixlen)
