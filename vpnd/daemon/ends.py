"""What follows when a CHILD_SA goes: its configured action, a successor, and policies that stay until that stands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from kernel_shim.model import SaId
from vpnd.config.model import ChildConfig, ConnectionConfig, StartAction
from vpnd.control.backend import ControlError
from vpnd.daemon.background import Background
from vpnd.daemon.entry import ChildKey, Entry
from vpnd.daemon.manager import Manager
from vpnd.daemon.traps import Traps
from vpnd.ike.effects import ChildSa, Reason
from vpnd.ike.sa import ChildSaState

RECOVERY_GRACE: Final = 60.0  # s, for which policies outlive a CHILD_SA that was lost while its successor is sought
SUCCESSION_GRACE: Final = 5.0  # s, for which they outlive one whose peer came back with a new IKE SA
RESTART_SPACING: Final = 5.0  # s; a peer that deletes again and again what we make again gives us work no faster

Demand = Callable[[ConnectionConfig, ChildConfig], object]


class Ends:
    """`demand` wants a CHILD_SA."""

    def __init__(self, manager: Manager, traps: Traps, demand: Demand) -> None:
        self._manager = manager
        self._traps = traps
        self._demand = demand
        self._outgoing: dict[ChildKey, dict[int, Entry]] = {}  # children that the kernel lost and whose successor is sought
        self._retired: set[int] = set()  # children that close because their successor stands, or cannot be had
        self._recovering: dict[ChildKey, asyncio.TimerHandle] = {}
        self._restarted: dict[ChildKey, float] = {}  # when it was last made again because the peer had deleted it
        self._restarts: dict[ChildKey, asyncio.TimerHandle] = {}
        self._background = Background()
        self._stopping = False

    def succession_of(self, key: ChildKey) -> bool:
        """Whether a successor is sought for a CHILD_SA of that child."""
        return key in self._recovering or key in self._outgoing

    def forget(self, key: ChildKey) -> None:
        """It is configured no more."""
        self._restarted.pop(key, None)

    # The successor

    def established(self, entry: Entry, child: ChildSa) -> None:
        """Whatever was kept until a successor stands goes."""
        key = (entry.sa.connection.name, child.name)
        self._recovered(key)
        self.retire(key, keep=child.id)

    def rekeyed(self, entry: Entry, old: ChildSa, child: ChildSa) -> None:
        """Its successor stands, so what was to become of `old` needs nobody's care."""
        self.retire((entry.sa.connection.name, child.name), only=old.id)

    def rekey_failed(self, entry: Entry, child_id: int) -> None:
        """Should the kernel have lost it already, it is made anew."""
        old = entry.sa.children.get(child_id)
        key = (entry.sa.connection.name, old.sa.name) if old else None
        if key is not None and child_id in self._outgoing.get(key, {}) and (config := self._manager.configured(*key)) is not None:
            self._demand(*config)

    def retire(self, key: ChildKey, *, keep: int = 0, only: int = 0) -> None:
        """Close what the kernel lost: its successor stands, or cannot be had."""
        outgoing = self._outgoing.pop(key, {})
        for child_id, entry in outgoing.items():
            if only and child_id != only:
                self._outgoing.setdefault(key, {})[child_id] = entry
            elif child_id != keep:
                self._retired.add(child_id)
                self.end(entry, child_id, lost=True)

    # The kernel's part

    def sas_lost(self, ids: Sequence[SaId]) -> None:
        """The kernel lost these SAs, and with them their sequence numbers: their keys are never used again."""
        for entry, child_id in dict.fromkeys(child for sa in ids if (child := self._manager.child_with(sa)) is not None):
            self.replace(entry, child_id)

    def replace(self, entry: Entry, child_id: int) -> None:
        """Make anew a CHILD_SA that the kernel has no more, and only then delete the old one, so that neither side is without policies in between.

        Without a configuration to make it from, it is deleted at once.
        """
        old = entry.sa.children.get(child_id)
        if old is None or entry.sa.closed:
            return
        configured = self._manager.configured(entry.sa.connection.name, old.sa.name)
        if configured is None or self._stopping:
            self.end(entry, child_id, lost=True)
            return
        if any(other.replaces == child_id for other in entry.sa.children.values()):
            self._retired.add(child_id)
            self.end(entry, child_id, lost=True)
            return
        key = (entry.sa.connection.name, old.sa.name)
        self._outgoing.setdefault(key, {})[child_id] = entry
        if old.state is not ChildSaState.REKEYING:
            self._demand(*configured)

    def end(self, entry: Entry, child_id: int, *, lost: bool = False, reason: Reason = Reason.REPLACED) -> None:
        """Delete it on the wire; `lost`: the kernel has it no more."""
        entry = entry.current
        if entry.sa.closed or child_id not in entry.sa.children:
            self._retired.discard(child_id)
            return
        now = asyncio.get_running_loop().time()
        self._manager.run(entry, entry.sa.child_expired(child_id, now) if lost else entry.sa.delete_child(child_id, now, reason))

    def close_all(self, connection: str, child: str, *, but: ChildConfig | None = None) -> None:
        """Delete the CHILD_SAs of that name, except those of the configuration `but`, and IKE SAs that have no others."""
        now = asyncio.get_running_loop().time()
        for entry in self._manager.registry.of_connection(connection):
            sa = entry.sa
            going = [one.sa.id for one in sa.children.values() if one.sa.name == child and one.config != but]
            if going and len(going) == len(sa.children):
                self._manager.run(entry, sa.delete(now))
            else:
                for child_id in going:
                    self._manager.run(entry, sa.delete_child(child_id, now))

    # The end

    def child_closed(self, entry: Entry, child: ChildSa, reason: Reason) -> None:
        configured = self._manager.configured(entry.sa.connection.name, child.name)
        if configured is None or self._stopping:
            return
        connection, config = configured
        key = (connection.name, child.name)
        action = self._action(entry, child, config, reason)
        self._retired.discard(child.id)
        trap = StartAction.TRAP in action and not self._traps.trapped(*key)
        if action or entry.superseded:
            # no clear packet while a successor is sought, or comes with the peer's new IKE SA: its policies stay
            self._keep_policies(entry, child, key, RECOVERY_GRACE if action else SUCCESSION_GRACE)
        if trap:
            self._background.start(self._trap(connection, config))
        if StartAction.START in action:
            self._restart(key, now=reason not in (Reason.PEER_DELETED, Reason.KERNEL_REFUSED))

    def _action(self, entry: Entry, child: ChildSa, config: ChildConfig, reason: Reason) -> StartAction:
        match reason:
            case Reason.EXPIRED | Reason.KERNEL_LOST | Reason.KERNEL_REFUSED:
                asked = StartAction.START in config.start_action or (entry.sa.initiator and not self._traps.trapped(entry.sa.connection.name, child.name))
                return StartAction.START if asked and child.id not in self._retired else StartAction.NONE
            case Reason.REDIRECTED | Reason.ADDRESS_GONE:
                return StartAction.START if entry.sa.original_initiator else StartAction.NONE
            case Reason.PEER_RESTARTED:
                return StartAction.START if entry.sa.initiator or StartAction.START in config.start_action else StartAction.NONE
            case Reason.PEER_SILENT:
                return (config.start_action & StartAction.START) | config.dpd_action
            case Reason.PEER_DELETED:
                # the peer deleted it because another one of the same stands
                twin = self._manager.twins.sends(entry.sa.local_id, entry.sa.remote_id, child)
                return StartAction.NONE if twin else config.close_action
            case Reason.REAUTHENTICATION:
                return StartAction.START
            case _:
                return StartAction.NONE

    def _restart(self, key: ChildKey, *, now: bool) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() if now else max(loop.time(), self._restarted.get(key, -RESTART_SPACING) + RESTART_SPACING)
        self._restarted[key] = due

        def again() -> None:
            self._restarts.pop(key, None)
            config = self._manager.configured(*key)
            if config is not None and not self._stopping:
                self._demand(*config)

        if due <= loop.time():
            again()
        elif key not in self._restarts:
            self._restarts[key] = loop.call_at(due, again)

    async def _trap(self, connection: ConnectionConfig, config: ChildConfig) -> None:
        try:
            await self._traps.install(connection, config)
        except ControlError as error:
            self._manager.say(f"{error}; trying again", group="CFG", warning=True)
            await self._traps.install_when_resolved(connection, config)
        self._recovered((connection.name, config.name))

    def _keep_policies(self, entry: Entry, child: ChildSa, key: ChildKey, grace: float) -> None:
        self._manager.kernel.transfer(("child", child.id), ("recovery", *key))
        entry.owners.discard(child.id)
        if key not in self._recovering:
            self._recovering[key] = asyncio.get_running_loop().call_later(grace, self._recovered, key)

    def _recovered(self, key: ChildKey) -> None:
        """A successor stands, or it took too long."""
        if (recovery := self._recovering.pop(key, None)) is not None:
            recovery.cancel()
            self._background.start(self._manager.kernel.release(("recovery", *key)))

    def stop(self) -> None:
        self._stopping = True
        for handle in (*self._recovering.values(), *self._restarts.values()):
            handle.cancel()
