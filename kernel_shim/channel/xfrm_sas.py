"""The SAs of an `XfrmChannel`."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.channel.linux import is_local
from kernel_shim.channel.linux_channel import esp_probe, no_esp
from kernel_shim.channel.listeners import EventListeners
from kernel_shim.channel.netlink import LONG_TIMEOUT, SLICE, NetlinkSocket
from kernel_shim.channel.xfrm_acquires import XfrmAcquires
from kernel_shim.channel.xfrm_migration import check_migration, continuation, last_state, only_ports_differ
from kernel_shim.channel.xfrm_policies import XfrmPolicies
from kernel_shim.model import (
    NO_MARK,
    AcquireSequence,
    Direction,
    IPAddress,
    KernelError,
    Mark,
    ReqId,
    SaId,
    SaStatus,
    SecurityAssociation,
    Spi,
    SpiRequest,
)
from kernel_shim.xfrm.constants import OURS, MessageType
from kernel_shim.xfrm.ownership import is_ours, kernel_reqid
from kernel_shim.xfrm.replay import NO_REPLAY_STATE, ReplayState, event_from, get_event_message, set_event_message
from kernel_shim.xfrm.sa_replies import KernelSa, reqid_of, sa_from
from kernel_shim.xfrm.sas import Continuation, sa_dump_message, sa_id_message, sa_message, spi_message
from kernel_shim.xfrm.structs import MalformedMessage
from kernel_shim.xfrm.wire import Message

PROBED: Final = EspAlgorithm(EncryptionId.AES_GCM_16, 128)


@dataclass(frozen=True, slots=True)
class _Known:
    """What the kernel does not say of an SA, or wants to hear before it says anything."""

    direction: Direction
    mark: Mark = NO_MARK


class XfrmSas:
    """`counters` are the channel's. `acquires` are the larval ones that ACQUIREs left."""

    def __init__(self, requests: NetlinkSocket, policies: XfrmPolicies, listeners: EventListeners, counters: dict[str, int]) -> None:
        self._requests = requests
        self._policies = policies
        self._listeners = listeners
        self._counters = counters
        self._directed = False  # the kernel knows XFRMA_SA_DIR
        self._known: dict[SaId, _Known] = {}
        self._migrating = asyncio.Lock()
        self.acquires: Final = XfrmAcquires(requests, policies.standing, self._dump, listeners.tell, counters)

    async def probe(self) -> None:
        """An SA that nobody can use comes and goes again; whether it kept its direction tells whether the kernel knows of such."""
        probe = esp_probe(PROBED, ReqId(OURS - 1))
        try:
            await self._requests.request(sa_message(probe, update=False, directed=True), timeout=LONG_TIMEOUT)
        except KernelError as error:
            raise no_esp(error) from error
        self._directed = (await self._get(probe.id)).direction is not None
        await self.delete(probe.id)

    async def get_spi(self, request: SpiRequest) -> Spi:
        """A repeated request reserves a second SPI; the first expires by itself."""
        replies = await self._requests.request(spi_message(request))
        return Spi(_sa_of(replies, f"ALLOCSPI for {request.destination}").id.spi)

    async def add(self, sa: SecurityAssociation) -> None:
        """An outbound one sends what the kernel holds for it on its way at once."""
        await self._put(sa, None)
        if sa.direction is Direction.OUT:
            self.acquires.answered(sa.acquire)
            await self._policies.kick(sa.reqid)

    async def _put(self, sa: SecurityAssociation, continues: Continuation | None) -> None:
        message = self._message(sa, update=False, continues=continues)
        try:
            await self._requests.request(message, repeat=False, timeout=LONG_TIMEOUT)
        except TimeoutError:
            self._counters["repeated"] += 1
            if not await self._stands(sa):
                await self._requests.request(message, repeat=False, timeout=LONG_TIMEOUT)
        self._known[sa.id] = _Known(sa.direction, sa.mark)

    async def update(self, sa: SecurityAssociation) -> None:
        await self._requests.request(self._message(sa, update=True), timeout=LONG_TIMEOUT)
        self._known[sa.id] = _Known(sa.direction, sa.mark)

    def _message(self, sa: SecurityAssociation, *, update: bool, continues: Continuation | None = None) -> Message:
        device = 0
        if sa.offload:
            try:
                device = socket.if_nametoindex(sa.offload)
            except OSError:
                raise KernelError(errno.ENODEV, f"no device {sa.offload} to encrypt") from None
        return sa_message(sa, update=update, directed=self._directed, device=device, continues=continues)

    async def delete(self, sa: SaId) -> None:
        known = self._known.pop(sa, None)
        await self._requests.request(sa_id_message(MessageType.DELSA, sa, known.mark if known else NO_MARK))

    async def migrate(self, old: SecurityAssociation, new: SecurityAssociation) -> None:
        """What leaves between this and the update of the policy is held, and may cause an ACQUIRE for the old addresses."""
        check_migration(old, new)
        if only_ports_differ(old, new):
            await self.update(new)
        else:
            async with self._migrating:
                if await self._source(old) != old.source:  # their names may be the same: an SA is named by its destination
                    if await self._source(new) == new.source:
                        return
                    raise KernelError(errno.ESRCH, f"no SA {old.spi:08x} to move")
                last = await last_state(old, lambda: self.delete(old.id))
                await self._put(replace(new, acquire=AcquireSequence(0)), continuation(last, new.direction, directed=self._directed))
        self._counters["moved"] += 1
        if new.direction is Direction.OUT:
            await self._policies.kick(new.reqid)

    async def _source(self, sa: SecurityAssociation) -> IPAddress | None:
        """From where an SA of this name comes; None when there is none."""
        try:
            return _sa_of(await self._requests.request(sa_id_message(MessageType.GETSA, sa.id, sa.mark)), "GETSA").source
        except KernelError as error:
            if error.errno != errno.ESRCH:
                raise
            return None

    async def get(self, sa: SaId) -> SaStatus:
        return self._status(await self._get(sa))

    async def _get(self, sa: SaId) -> KernelSa:
        replies = await self._requests.request(sa_id_message(MessageType.GETSA, sa, self._mark(sa)))
        return _sa_of(replies, f"GETSA {sa.spi:08x}")

    def _mark(self, sa: SaId) -> Mark:
        known = self._known.get(sa)
        return known.mark if known is not None else NO_MARK

    async def replay_state(self, sa: SaId) -> ReplayState:
        """Sequence numbers and replay window, without the keys that `get_sa` brings along."""
        replies = await self._requests.request(get_event_message(sa, self._mark(sa)))
        return (event_from(replies[0]).replay if replies else None) or NO_REPLAY_STATE

    async def set_replay_state(self, sa: SaId, state: ReplayState) -> None:
        """A standing SA goes on from `state`, such as that of a gateway whose place this one takes. Lower numbers out than were sent repeat nonces."""
        await self._requests.request(set_event_message(sa, state, self._mark(sa)))

    async def dump(self) -> Sequence[SaStatus]:
        """Ours. A larval SA that an ACQUIRE left has SPI 0 and the flow as its selectors; who listens is told of those not yet heard of."""
        before = set(self._known)
        found = await (self.acquires.read() if self._listeners.any else self._dump())
        for gone in before - {sa.id for sa in found}:
            self._known.pop(gone, None)
        return [self._status(sa) for sa in found]

    async def flush(self) -> None:
        """Ours, larval ones included."""
        for found in await self._dump():
            with suppress(KernelError):  # it went of its own accord meanwhile
                if found.id.spi:
                    await self.delete(found.id)
                elif found.larval is not None:
                    await self.acquires.drop(found.larval)

    async def _stands(self, sa: SecurityAssociation) -> bool:
        """Whether a request whose answer was lost had its effect."""
        try:
            found = _sa_of(await self._requests.request(sa_id_message(MessageType.GETSA, sa.id, sa.mark)), "GETSA")
        except KernelError:
            return False
        if found.algorithm is None:
            return False
        if found.reqid != kernel_reqid(sa.reqid) or found.encryption_key != sa.encryption_key:
            raise KernelError(errno.EEXIST, f"another SA {sa.spi:08x} to {sa.destination} stands")
        return True

    async def _dump(self) -> list[KernelSa]:
        messages = await self._requests.request(sa_dump_message())
        found = []
        for at in range(0, len(messages), SLICE):
            for message in messages[at : at + SLICE]:
                try:
                    if message.type == MessageType.NEWSA and is_ours(reqid_of(message.body)):
                        found.append(sa_from(message.body, message.attributes))
                except MalformedMessage:
                    self._counters["malformed"] += 1
            await asyncio.sleep(0)
        return found

    def _status(self, found: KernelSa) -> SaStatus:
        """Linux before 6.10 does not tell a direction: ours to know, or to see by whose address the SA ends at."""
        known = self._known.get(found.id)
        direction = found.direction or (known.direction if known is not None else None)
        if direction is None:
            direction = Direction.IN if is_local(found.id.destination) else Direction.OUT
        if known is None and found.id.spi:
            self._known[found.id] = _Known(direction, found.mark)
        return found.status(direction, _device_name(found.device))

    def gone(self, sa: SaId) -> None:
        """It ended of its own accord."""
        self._known.pop(sa, None)


def _sa_of(replies: Sequence[Message], what: str) -> KernelSa:
    for message in replies:
        if message.type == MessageType.NEWSA:
            return sa_from(message.body, message.attributes)
    raise MalformedMessage(f"{what}: the kernel acknowledges and tells nothing")


def _device_name(index: int) -> str:
    """Empty for none, and for one that went meanwhile."""
    try:
        return socket.if_indextoname(index) if index else ""
    except OSError:
        return ""
