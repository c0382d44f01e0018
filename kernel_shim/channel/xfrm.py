"""NETLINK_XFRM, for asyncio: how a key manager reaches Linux's own IPsec.

Two sockets, so that a storm of events cannot displace the answer to a request. What is ours is told from what is others' by the top bit
of reqids and policy indexes; dumps show, and flushes take, only ours.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from kernel_shim.channel.linux import ACQUIRE_SECONDS, XFRM, xfrm_statistics
from kernel_shim.channel.linux_channel import LinuxChannel
from kernel_shim.channel.linux_mpls import node as linux_mpls
from kernel_shim.channel.netlink import NetlinkSocket
from kernel_shim.channel.xfrm_acquires import XfrmAcquires
from kernel_shim.channel.xfrm_policies import XfrmPolicies
from kernel_shim.channel.xfrm_sas import XfrmSas
from kernel_shim.model import (
    Acquire,
    Capabilities,
    Direction,
    Expire,
    NewMapping,
    Policy,
    SaId,
    SaStatus,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
)
from kernel_shim.mpls.node import NodeEntry
from kernel_shim.reasons import DropReason
from kernel_shim.xfrm.constants import Group, MessageType
from kernel_shim.xfrm.events import Report, notice_from
from kernel_shim.xfrm.information import (
    HashThreshold,
    SadInformation,
    SpdInformation,
    get_sad_information_message,
    get_spd_information_message,
    sad_information_from,
    set_thresholds_message,
    spd_information_from,
)
from kernel_shim.xfrm.migrate import Migration
from kernel_shim.xfrm.policies import socket_bypass
from kernel_shim.xfrm.replay import ReplayState
from kernel_shim.xfrm.structs import MalformedMessage
from kernel_shim.xfrm.wire import Message

EVENT_BUFFER: Final = 4 << 20  # octets: some 7,000 ACQUIREs, beyond which an overrun is heard
GROUPS: Final = (Group.ACQUIRE, Group.EXPIRE, Group.MIGRATE, Group.MAPPING, Group.REPORT)

# linux/in.h, linux/in6.h
_IP_XFRM_POLICY: Final = 17
_IPV6_XFRM_POLICY: Final = 35


class XfrmChannel(LinuxChannel):
    """A `KernelChannel` to the Linux kernel, in the network namespace of the thread that opens it. Opened once.

    `open` raises KernelError(EPROTONOSUPPORT) when the kernel has no ESP, unless `require_esp` is unset (policies and ACQUIREs work all the same).
    The kernel's hold queue is switched on (net.core.xfrm_larval_drop), and a larval SA stands for `acquire_seconds`; both settings are put back by `close`.
    """

    def __init__(
        self,
        *,
        listens: bool = True,
        require_esp: bool = True,
        acquire_seconds: int = ACQUIRE_SECONDS,
        event_buffer: int = EVENT_BUFFER,
        settings_file: Path | None = None,
    ) -> None:
        super().__init__(listens=listens, acquire_seconds=acquire_seconds, settings_file=settings_file)
        self._require_esp = require_esp
        self._requests = NetlinkSocket()
        self._events = NetlinkSocket(GROUPS if listens else (), receive_buffer=event_buffer, on_message=self._event, on_overrun=self._overrun)
        self._labels = linux_mpls.LinuxLabels(self._hold.sysctls)
        names = ("acquires", "expires", "mappings", "migrations", "reports", "foreign", "malformed", "kicks", "repeated", "found", "moved")
        self._counters = dict.fromkeys(names, 0)
        self._policies = XfrmPolicies(self._requests, self._hold, self._counters)
        self._sas = XfrmSas(self._requests, self._policies, self._listeners, self._counters)
        self._acquires: XfrmAcquires = self._sas.acquires

    def capabilities(self) -> Capabilities:
        return replace(XFRM, unresolved_modes=frozenset({self._hold.mode}), labels=linux_mpls.available())

    @property
    def _is_open(self) -> bool:
        return self._requests.is_open

    # Life

    async def open(self) -> None:
        try:
            self._requests.open()
            self._events.open()
            if self._require_esp:
                await self._sas.probe()
        except BaseException:
            await self.close()
            raise
        self._set_hold_queue()

    async def close(self) -> None:
        await self._acquires.stop()
        self._events.close()
        self._requests.close()
        self._hold.restore()

    # SAs

    async def get_spi(self, request: SpiRequest) -> Spi:
        return await self._sas.get_spi(request)

    async def add_sa(self, sa: SecurityAssociation) -> None:
        await self._sas.add(sa)

    async def update_sa(self, sa: SecurityAssociation) -> None:
        await self._sas.update(sa)

    async def delete_sa(self, sa: SaId) -> None:
        await self._sas.delete(sa)

    async def migrate_sa(self, old: SecurityAssociation, new: SecurityAssociation) -> None:
        await self._sas.migrate(old, new)

    async def get_sa(self, sa: SaId) -> SaStatus:
        return await self._sas.get(sa)

    async def replay_state(self, sa: SaId) -> ReplayState:
        return await self._sas.replay_state(sa)

    async def set_replay_state(self, sa: SaId, state: ReplayState) -> None:
        await self._sas.set_replay_state(sa, state)

    async def sas(self) -> Sequence[SaStatus]:
        return await self._sas.dump()

    async def flush_sas(self) -> None:
        await self._sas.flush()

    # Policies

    async def add_policy(self, policy: Policy) -> Policy:
        return await self._policies.put(policy, update=False)

    async def update_policy(self, policy: Policy) -> Policy:
        return await self._policies.put(policy, update=True)

    async def delete_policy(self, direction: Direction, selector: Selector) -> None:
        await self._policies.delete(direction, selector)

    async def policies(self) -> Sequence[Policy]:
        """Ours."""
        return await self._policies.dump()

    async def flush_policies(self) -> None:
        """Ours."""
        await self._policies.flush()

    # Labels

    async def put_labels(self, entries: Sequence[NodeEntry]) -> None:
        await self._labels.put_labels(entries)

    async def delete_labels(self, entries: Sequence[NodeEntry]) -> None:
        await self._labels.delete_labels(entries)

    async def labels(self) -> Sequence[NodeEntry]:
        return await self._labels.labels()

    # Databases as wholes

    async def spd_information(self) -> SpdInformation:
        """Of everybody's policies."""
        return spd_information_from(self._first(await self._requests.request(get_spd_information_message()), MessageType.NEWSPDINFO))

    async def sad_information(self) -> SadInformation:
        """Of everybody's SAs."""
        return sad_information_from(self._first(await self._requests.request(get_sad_information_message()), MessageType.NEWSADINFO))

    async def set_hash_thresholds(self, threshold4: HashThreshold | None = None, threshold6: HashThreshold | None = None) -> None:
        """From which prefix lengths on policies are found by hash; None leaves a family as it is. Of everybody's policies in this namespace."""
        await self._requests.request(set_thresholds_message(threshold4, threshold6))

    def _first(self, replies: Sequence[Message], kind: MessageType) -> Message:
        for message in replies:
            if message.type == kind:
                return message
        raise MalformedMessage(f"no {kind.name} in the kernel's answer")

    # Events

    def _event(self, message: Message) -> None:
        try:
            notice = notice_from(message)
        except MalformedMessage:
            self._counters["malformed"] += 1
            return
        if notice is None:
            return
        event = notice.event
        if isinstance(event, Report):
            self._counters["reports"] += 1  # nobody's: there is no SA
            return
        if not notice.ours:
            self._counters["foreign"] += 1
            return
        if isinstance(event, Acquire):
            self._counters["acquires"] += 1
            self._acquires.add(event)
        elif isinstance(event, Expire):
            self._counters["expires"] += 1
            if event.hard:
                self._sas.gone(event.sa)
            self._listeners.tell(event)
        elif isinstance(event, NewMapping):
            self._counters["mappings"] += 1
            self._listeners.tell(event)
        elif isinstance(event, Migration):
            # Somebody else moved SAs of ours: they are no longer what we know.
            self._counters["migrations"] += 1
            self._listeners.tell_overrun()

    # The rest

    async def statistics(self) -> Mapping[str, int]:
        """The channel's own counters, those of /proc/net/xfrm_stat where the kernel has it, and of the filters of label tunnels."""
        own = dict(self._counters)
        for name in ("overruns", "malformed", "timeouts"):
            own[name] = own.get(name, 0) + getattr(self._requests, name) + getattr(self._events, name)
        if linux_mpls.available():
            own[f"drop_{DropReason.MPLS_LABEL_FORBIDDEN.value}"] = await self._labels.forbidden()
        return {**own, **xfrm_statistics()}


def bypass_policies(opened: socket.socket) -> None:
    """Let a socket's own packets, in and out, pass every policy. OSError where that is not permitted."""
    version = 4 if opened.family == socket.AF_INET else 6
    level, option = (socket.IPPROTO_IP, _IP_XFRM_POLICY) if version == 4 else (socket.IPPROTO_IPV6, _IPV6_XFRM_POLICY)
    for direction in (Direction.IN, Direction.OUT):
        opened.setsockopt(level, option, socket_bypass(version, direction))
