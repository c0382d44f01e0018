"""Traps and shunts: policies that stand without an SA, so that traffic asks for one or never needs one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from kernel_shim.model import Action, IPAddress, KernelError, ReqId, TrafficSelector
from vpnd.config.children import needs_ike_sa
from vpnd.config.model import ChildConfig, ConnectionConfig, TsTemplate
from vpnd.control.backend import ControlError
from vpnd.daemon.background import Background
from vpnd.daemon.endpoints import Endpoints, backoff
from vpnd.daemon.entry import ChildKey
from vpnd.daemon.manager import Manager
from vpnd.ike.marking import Marking, NumbersExhausted
from vpnd.ike.narrowing import resolve
from vpnd.peers import host_names
from vpnd.policies import PolicySpec, policies_for


class NoAddressYet(ControlError):
    """A name does not resolve or no route leads to the peer: it may be otherwise later."""


class Traps:
    """Those that stand, and those that wait for an address of their peer."""

    def __init__(self, manager: Manager, endpoints: Endpoints) -> None:
        self._manager = manager
        self._endpoints = endpoints
        self._traps: dict[ChildKey, tuple[ConnectionConfig, ChildConfig]] = {}
        self._held: dict[ChildKey, asyncio.TimerHandle] = {}  # those that wait; when each is tried again
        self._background = Background()
        endpoints.moved = self._moved

    @property
    def installed(self) -> Sequence[tuple[ConnectionConfig, ChildConfig]]:
        return list(self._traps.values())

    def trapped(self, connection: str, child: str) -> bool:
        """Or about to be, once there is an address."""
        return (connection, child) in self._traps or (connection, child) in self._held

    def held(self, connection: str, child: str) -> bool:
        """Whether its trap still waits for an address."""
        return (connection, child) in self._held

    async def install(self, connection: ConnectionConfig, child: ChildConfig) -> None:
        """Install the trap or shunt policies of a child. ControlError when it cannot be: the text says why. NoAddressYet when it may be later."""
        key = (connection.name, child.name)
        remote = await self._endpoints.remote(connection)
        local = self._endpoints.local(connection, remote)
        local_ts = selectors(child.local_ts, local)
        remote_ts = selectors(child.remote_ts, remote)
        if remote is None and child.action is Action.PROTECT and (names := host_names(connection.remote_addrs)):
            raise NoAddressYet(f"child '{child.name}' cannot be trapped: {', '.join(names)} of connection '{connection.name}' does not resolve")
        if local_ts is None and remote is not None:
            raise NoAddressYet(f"child '{child.name}' cannot be trapped: its local traffic selector is dynamic, and there is no route to {remote}")
        if local_ts is None or remote_ts is None:
            raise ControlError(
                f"child '{child.name}' cannot be trapped: its dynamic traffic selector needs an address of {connection.remote_addrs} that is known"
            )
        if child.action is Action.PROTECT and remote is None:
            raise ControlError(f"child '{child.name}' cannot be trapped: connection '{connection.name}' has no remote address to ask")
        marking = self._marking(key, child)
        if not child.reqid:
            first = next(policies_for(PolicySpec.of_child(child, child.mode, ReqId(0), local, remote, marking), local_ts, remote_ts), None)
            self._manager.reqids.adopt(connection, child, self._manager.kernel.reqid_for(first.selector if first else None))
        reqid = ReqId(self._manager.reqid(connection, child))
        spec = PolicySpec.of_child(child, child.mode, reqid, local, remote, marking)
        policies = list(policies_for(spec, local_ts, remote_ts))
        if not policies:
            raise ControlError(f"child '{child.name}' has no pair of traffic selectors of one family and protocol")
        try:
            # one that stands already is replaced without a moment in which there is none
            await self._manager.kernel.claim(("new trap", *key), policies)
        except (KernelError, TimeoutError) as error:
            raise ControlError(f"kernel refused the policies of child '{child.name}': {error}") from error
        await self._manager.kernel.release(("trap", *key))
        self._manager.kernel.transfer(("new trap", *key), ("trap", *key))
        self._traps[key] = (connection, child)
        self._stop_holding(key)
        await self._manager.kernel.release(("hold", *key))

    def _marking(self, key: ChildKey, child: ChildConfig) -> Marking:
        if needs_ike_sa(child):
            raise ControlError(f"child '{child.name}' cannot be trapped: without an IKE SA of connection '{key[0]}' it has no interface id")
        try:
            return self._manager.markings.trapped(key, child)
        except NumbersExhausted as error:
            raise ControlError(f"child '{child.name}' cannot be trapped: {error}") from error

    async def install_when_resolved(self, connection: ConnectionConfig, child: ChildConfig) -> None:
        """Install a trap as soon as the peer has an address; until then what it protects is discarded, so that it does not leave in clear."""
        key = (connection.name, child.name)
        if not self._manager.kernel.orphans:  # else the policies of an earlier run may still carry its packets
            await self._hold(key, child)
        self._try_to_install(key, 1, 0.0)

    async def _hold(self, key: ChildKey, child: ChildConfig) -> None:
        local_ts, remote_ts = selectors(child.local_ts, None), selectors(child.remote_ts, None)
        if not local_ts or not remote_ts or self._manager.kernel.has_claims(("hold", *key)):
            return
        spec = PolicySpec.of_child(child, child.mode, ReqId(0), None, None, self._marking(key, child))
        policies = [replace(policy, action=Action.DISCARD, templates=()) for policy in policies_for(spec, local_ts, remote_ts)]
        try:
            await self._manager.kernel.claim(("hold", *key), policies)
        except (KernelError, TimeoutError) as error:
            raise ControlError(f"kernel refused the policies of child '{child.name}': {error}") from error

    def _try_to_install(self, key: ChildKey, attempt: int, delay: float) -> None:
        async def work() -> None:
            config = self._manager.configured(*key)
            if config is None or key not in self._held:
                return
            try:
                await self.install(*config)
            except ControlError as error:
                if key in self._held:
                    delay = backoff(attempt)
                    self._manager.say(f"{error}; trying again in {delay:g} s", group="CFG", warning=True)
                    self._try_to_install(key, attempt + 1, delay)
                    await self._hold(key, config[1])
            else:
                self._manager.say(f"child '{key[1]}' of connection '{key[0]}' is trapped", group="CFG")

        self._held[key] = asyncio.get_running_loop().call_later(delay, lambda: self._background.start(work()))

    def _moved(self, connection: str) -> None:
        """Its peer has another address: so do the SAs that its traps ask for."""
        for config in self.installed:
            if config[0].name == connection:
                self._background.start(self._install_again(*config))

    async def _install_again(self, connection: ConnectionConfig, child: ChildConfig) -> None:
        try:
            await self.install(connection, child)
        except ControlError as error:
            self._manager.say(f"{error}; its trap stays as it was", group="CFG", warning=True)

    def _stop_holding(self, key: ChildKey) -> bool:
        handle = self._held.pop(key, None)
        if handle is not None:
            handle.cancel()
        return handle is not None

    async def uninstall(self, connection: str, child: str) -> None:
        """ControlError when it is not installed."""
        held = self._stop_holding((connection, child))
        if self._traps.pop((connection, child), None) is None and not held:
            raise ControlError(f"child '{child}' of connection '{connection}' is not installed")
        self._manager.markings.untrapped((connection, child))
        await self._manager.kernel.release(("hold", connection, child))
        await self._manager.kernel.release(("trap", connection, child))

    def stop(self) -> None:
        """No further attempt; what stands goes with the kernel's policies."""
        for handle in self._held.values():
            handle.cancel()


def selectors(templates: Sequence[TsTemplate], address: IPAddress | None) -> list[TrafficSelector] | None:
    """Templates with `dynamic` filled in; None when it must be and the address is not known."""
    if address is not None:
        return list(resolve(templates, address))
    fixed = [template.addresses for template in templates if template.addresses is not None]
    return fixed if len(fixed) == len(templates) else None
