"""NETLINK_XFRM, for asyncio: how a key manager reaches Linux's own IPsec.

Two sockets, so that a storm of events cannot displace the answer to a request. What is ours is told from what is others' by the top bit
of reqids and policy indexes; dumps show, and flushes take, only ours.
"""

from __future__ import annotations

import asyncio
import errno
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.channel.linux import ACQUIRE_SECONDS, XFRM, HoldQueue, is_local, xfrm_statistics
from kernel_shim.channel.linux_mpls import node as linux_mpls
from kernel_shim.channel.listeners import EventListeners
from kernel_shim.channel.netlink import LONG_TIMEOUT, SLICE, NetlinkSocket
from kernel_shim.channel.xfrm_acquires import XfrmAcquires
from kernel_shim.channel.xfrm_migration import check_migration, continuation, last_state, only_ports_differ
from kernel_shim.channel.xfrm_policies import XfrmPolicies
from kernel_shim.model import (
    NO_MARK,
    Acquire,
    AcquireSequence,
    Capabilities,
    Direction,
    Expire,
    IPAddress,
    KernelError,
    KernelEvent,
    Mark,
    Mode,
    NewMapping,
    Policy,
    ReqId,
    SaId,
    SaStatus,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
)
from kernel_shim.mpls.node import NodeEntry
from kernel_shim.reasons import DropReason
from kernel_shim.secret import Secret
from kernel_shim.xfrm.constants import OURS, Group, MessageType
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
from kernel_shim.xfrm.ownership import is_ours, kernel_reqid
from kernel_shim.xfrm.policies import socket_bypass
from kernel_shim.xfrm.replay import NO_REPLAY_STATE, ReplayState, event_from, get_event_message, set_event_message
from kernel_shim.xfrm.sa_replies import KernelSa, reqid_of, sa_from
from kernel_shim.xfrm.sas import Continuation, sa_dump_message, sa_id_message, sa_message, spi_message
from kernel_shim.xfrm.structs import MalformedMessage
from kernel_shim.xfrm.wire import Message

EVENT_BUFFER: Final = 4 << 20  # octets: some 7,000 ACQUIREs, beyond which an overrun is heard
GROUPS: Final = (Group.ACQUIRE, Group.EXPIRE, Group.MIGRATE, Group.MAPPING, Group.REPORT)

# linux/in.h, linux/in6.h
_IP_XFRM_POLICY: Final = 17
_IPV6_XFRM_POLICY: Final = 35


@dataclass(frozen=True, slots=True)
class _Known:
    """What the kernel does not say of an SA, or wants to hear before it says anything."""

    direction: Direction
    mark: Mark = NO_MARK


class XfrmChannel:
    """A `KernelChannel` to the Linux kernel, in the network namespace of the thread that opens it. Opened once.

    `open` raises KernelError(EPROTONOSUPPORT) when the kernel has no ESP, unless `require_esp` is unset (policies and ACQUIREs work all the same).
    The kernel's hold queue is switched on (net.core.xfrm_larval_drop), and a larval SA stands for `acquire_seconds`; both settings are put back by `close`.
    `listens` False is for tools, which only look: no events, and no settings changed.
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
        self._listens = listens
        self._require_esp = require_esp
        self._acquire_seconds = acquire_seconds
        self._requests = NetlinkSocket()
        self._events = NetlinkSocket(GROUPS if listens else (), receive_buffer=event_buffer, on_message=self._event, on_overrun=self._overrun)
        self._listeners = EventListeners()
        self._hold = HoldQueue(settings_file)
        self._labels = linux_mpls.LinuxLabels(self._hold.sysctls)
        self._directed = False  # the kernel knows XFRMA_SA_DIR
        self._known: dict[SaId, _Known] = {}
        self._migrating = asyncio.Lock()
        names = ("acquires", "expires", "mappings", "migrations", "reports", "foreign", "malformed", "kicks", "repeated", "found", "moved")
        self._counters = dict.fromkeys(names, 0)
        self._policies = XfrmPolicies(self._requests, self._hold, self._counters)
        self._acquires = XfrmAcquires(self._requests, self._policies.standing, self._dump_sas, self._listeners.tell, self._counters)

    def capabilities(self) -> Capabilities:
        return replace(XFRM, unresolved_modes=frozenset({self._hold.mode}), labels=linux_mpls.available())

    def on_event(self, listener: Callable[[KernelEvent], None]) -> None:
        """Larval SAs whose ACQUIREs an earlier listener, or none, has heard are reported too: they stand in the way of the next ACQUIRE."""
        self._listeners.on_event(listener)
        if self._requests.is_open:
            self._acquires.look()

    def on_overrun(self, listener: Callable[[], None]) -> None:
        """`listener` is called when events were lost: look at `sas()` and `policies()`."""
        self._listeners.on_overrun(listener)

    def on_closed(self, listener: Callable[[], None]) -> None:
        """Never called: this kernel goes away only together with its host."""

    # Life

    async def open(self) -> None:
        try:
            self._requests.open()
            self._events.open()
            if self._require_esp:
                await self._probe_esp()
        except BaseException:
            await self.close()
            raise
        if not self._listens:
            self._hold.look()
            return
        self._hold.switch_on(self._acquire_seconds)

    async def close(self) -> None:
        await self._acquires.stop()
        self._events.close()
        self._requests.close()
        self._hold.restore()

    async def _probe_esp(self) -> None:
        """An SA that nobody can use comes and goes again; whether it kept its direction tells whether the kernel knows of such."""
        address = IPv4Address("127.0.0.1")
        probe = SecurityAssociation(
            spi=Spi(secrets.randbelow(1 << 31) + 0x100),
            source=address,
            destination=address,
            direction=Direction.OUT,
            mode=Mode.TRANSPORT,
            reqid=ReqId(OURS - 1),
            algorithm=EspAlgorithm(EncryptionId.AES_GCM_16, 128),
            encryption_key=Secret(secrets.token_bytes(20)),
        )
        try:
            await self._requests.request(sa_message(replace(probe, replay_window=0), update=False, directed=True), timeout=LONG_TIMEOUT)
        except KernelError as error:
            raise KernelError(errno.EPROTONOSUPPORT, f"this kernel has no ESP (modules esp4, esp6): {error.detail}") from error
        self._directed = (await self._get(probe.id)).direction is not None
        await self.delete_sa(probe.id)

    # SAs

    async def get_spi(self, request: SpiRequest) -> Spi:
        """A repeated request reserves a second SPI; the first expires by itself."""
        replies = await self._requests.request(spi_message(request))
        return Spi(self._sa_of(replies, f"ALLOCSPI for {request.destination}").id.spi)

    async def add_sa(self, sa: SecurityAssociation) -> None:
        """An outbound one sends what the kernel holds for it on its way at once."""
        await self._add(sa, None)
        if sa.direction is Direction.OUT:
            self._acquires.answered(sa.acquire)
            await self._policies.kick(sa.reqid)

    async def _add(self, sa: SecurityAssociation, continues: Continuation | None) -> None:
        message = self._message(sa, update=False, continues=continues)
        try:
            await self._requests.request(message, repeat=False, timeout=LONG_TIMEOUT)
        except TimeoutError:
            self._counters["repeated"] += 1
            if not await self._stands(sa):
                await self._requests.request(message, repeat=False, timeout=LONG_TIMEOUT)
        self._known[sa.id] = _Known(sa.direction, sa.mark)

    async def update_sa(self, sa: SecurityAssociation) -> None:
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

    async def delete_sa(self, sa: SaId) -> None:
        known = self._known.pop(sa, None)
        await self._requests.request(sa_id_message(MessageType.DELSA, sa, known.mark if known else NO_MARK))

    async def migrate_sa(self, old: SecurityAssociation, new: SecurityAssociation) -> None:
        """What leaves between this and the update of the policy is held, and may cause an ACQUIRE for the old addresses."""
        check_migration(old, new)
        if only_ports_differ(old, new):
            await self.update_sa(new)
        else:
            async with self._migrating:
                if await self._source(old) != old.source:  # their names may be the same: an SA is named by its destination
                    if await self._source(new) == new.source:
                        return
                    raise KernelError(errno.ESRCH, f"no SA {old.spi:08x} to move")
                last = await last_state(old, lambda: self.delete_sa(old.id))
                await self._add(replace(new, acquire=AcquireSequence(0)), continuation(last, new.direction, directed=self._directed))
        self._counters["moved"] += 1
        if new.direction is Direction.OUT:
            await self._policies.kick(new.reqid)

    async def _source(self, sa: SecurityAssociation) -> IPAddress | None:
        """From where an SA of this name comes; None when there is none."""
        try:
            return self._sa_of(await self._requests.request(sa_id_message(MessageType.GETSA, sa.id, sa.mark)), "GETSA").source
        except KernelError as error:
            if error.errno != errno.ESRCH:
                raise
            return None

    async def get_sa(self, sa: SaId) -> SaStatus:
        return self._status(await self._get(sa))

    async def _get(self, sa: SaId) -> KernelSa:
        replies = await self._requests.request(sa_id_message(MessageType.GETSA, sa, self._mark(sa)))
        return self._sa_of(replies, f"GETSA {sa.spi:08x}")

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

    async def sas(self) -> Sequence[SaStatus]:
        """Ours. A larval SA that an ACQUIRE left has SPI 0 and the flow as its selectors; who listens is told of those not yet heard of."""
        found = await (self._acquires.read() if self._listeners.any else self._dump_sas())
        standing = {sa.id for sa in found}
        self._known = {sa: known for sa, known in self._known.items() if sa in standing}
        return [self._status(sa) for sa in found]

    async def flush_sas(self) -> None:
        """Ours, larval ones included."""
        for found in await self._dump_sas():
            with suppress(KernelError):  # it went of its own accord meanwhile
                if found.id.spi:
                    await self.delete_sa(found.id)
                elif found.larval is not None:
                    await self._acquires.drop(found.larval)

    async def _stands(self, sa: SecurityAssociation) -> bool:
        """Whether a request whose answer was lost had its effect."""
        try:
            found = self._sa_of(await self._requests.request(sa_id_message(MessageType.GETSA, sa.id, sa.mark)), "GETSA")
        except KernelError:
            return False
        if found.algorithm is None:
            return False
        if found.reqid != kernel_reqid(sa.reqid) or found.encryption_key != sa.encryption_key:
            raise KernelError(errno.EEXIST, f"another SA {sa.spi:08x} to {sa.destination} stands")
        return True

    def _sa_of(self, replies: Sequence[Message], what: str) -> KernelSa:
        for message in replies:
            if message.type == MessageType.NEWSA:
                return sa_from(message.body, message.attributes)
        raise MalformedMessage(f"{what}: the kernel acknowledges and tells nothing")

    async def _dump_sas(self) -> list[KernelSa]:
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

    def _overrun(self) -> None:
        self._listeners.tell_overrun()
        self._acquires.look()

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
                self._known.pop(event.sa, None)
            self._listeners.tell(event)
        elif isinstance(event, NewMapping):
            self._counters["mappings"] += 1
            self._listeners.tell(event)
        elif isinstance(event, Migration):
            # Somebody else moved SAs of ours: they are no longer what we know.
            self._counters["migrations"] += 1
            self._listeners.tell_overrun()

    async def acquire_failed(self, sequence: AcquireSequence, errno: int) -> None:
        """The larval SA goes, so that the next packet asks again; it would block its flow for `acquire_seconds`."""
        await self._acquires.failed(sequence)

    # The rest

    async def bind(self, address: IPAddress) -> tuple[int, int]:
        raise KernelError(errno.EOPNOTSUPP, "this kernel opens no IKE sockets: the key manager does")

    async def unbind(self, address: IPAddress) -> None:
        """Nothing was bound."""

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


def _device_name(index: int) -> str:
    """Empty for none, and for one that went meanwhile."""
    try:
        return socket.if_indextoname(index) if index else ""
    except OSError:
        return ""
