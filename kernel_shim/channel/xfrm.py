"""NETLINK_XFRM, for asyncio: how a key manager reaches Linux's own IPsec.

Two sockets, so that a storm of events cannot displace the answer to a request. What is ours is told from what is others' by the top bit
of reqids and policy indexes; dumps show, and flushes take, only ours.
"""

from __future__ import annotations

import asyncio
import errno
import secrets
import socket
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.channel.api import ChannelClosed
from kernel_shim.channel.linux import XFRM
from kernel_shim.channel.netlink import LONG_TIMEOUT, NetlinkSocket
from kernel_shim.channel.standing import StandingPolicies
from kernel_shim.channel.sysctl import Sysctls
from kernel_shim.model import (
    Acquire,
    AcquireSequence,
    Action,
    Capabilities,
    Direction,
    Expire,
    Flow,
    IPAddress,
    KernelError,
    KernelEvent,
    Mode,
    Policy,
    PolicyIndex,
    ReqId,
    SaId,
    SaStatus,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
    Unresolved,
)
from kernel_shim.secret import Secret
from kernel_shim.xfrm.constants import OURS, Group, MessageType
from kernel_shim.xfrm.events import notice_from
from kernel_shim.xfrm.policies import FIRST_INDEX, INDEX_STEP, LAST_INDEX, policy_dump_message, policy_from, policy_id_message, policy_message, socket_bypass
from kernel_shim.xfrm.sas import (
    KernelSa,
    claim_message,
    is_ours,
    kernel_reqid,
    reqid_from,
    reqid_of,
    sa_dump_message,
    sa_from,
    sa_id_message,
    sa_message,
    spi_message,
)
from kernel_shim.xfrm.selectors import standing_key
from kernel_shim.xfrm.structs import MalformedMessage
from kernel_shim.xfrm.wire import Message

EVENT_BUFFER: Final = 4 << 20  # octets: some 7,000 ACQUIREs, beyond which an overrun is heard
ACQUIRE_SECONDS: Final = 165  # how long a larval SA stands: as long as a negotiation may take with the default retransmissions
MAX_ACQUIRES: Final = 65536  # remembered, so that their larval SAs can be removed; beyond it the oldest expire by themselves
SLICE: Final = 256  # entries of a dump that are translated at a time, so that it does not starve the rest of the loop
STATISTICS: Final = Path("/proc/thread-self/net/xfrm_stat")

# linux/in.h, linux/in6.h
_IP_XFRM_POLICY: Final = 17
_IPV6_XFRM_POLICY: Final = 35


class XfrmChannel:
    """A `KernelChannel` to the Linux kernel, in the network namespace of the thread that opens it. Opened once.

    `open` raises KernelError(EPROTONOSUPPORT) when the kernel has no ESP, unless `require_esp` is unset (policies and ACQUIREs work all the same).
    The kernel's hold queue is switched on (net.core.xfrm_larval_drop), and a larval SA stands for `acquire_seconds`; both settings are put back by `close`.
    `listens` False is for tools, which only look: no events, and no settings changed.
    """

    def __init__(self, *, listens: bool = True, require_esp: bool = True, acquire_seconds: int = ACQUIRE_SECONDS, event_buffer: int = EVENT_BUFFER) -> None:
        self._listens = listens
        self._require_esp = require_esp
        self._acquire_seconds = acquire_seconds
        groups = (Group.ACQUIRE, Group.EXPIRE, Group.MAPPING) if listens else ()
        self._requests = NetlinkSocket()
        self._events = NetlinkSocket(groups, receive_buffer=event_buffer, on_message=self._event, on_overrun=self._overrun)
        self._event_listeners: list[Callable[[KernelEvent], None]] = []
        self._overrun_listeners: list[Callable[[], None]] = []
        self._sysctls = Sysctls()
        self._looking: asyncio.Task[None] | None = None
        self._look_again = False
        self._holds = False
        self._next_index = FIRST_INDEX + INDEX_STEP * secrets.randbelow(1 << 27)
        self._standing = StandingPolicies(standing_key)
        self._policy_lock = asyncio.Lock()  # so that no kick puts back what was just deleted
        self._directions: dict[SaId, Direction] = {}
        self._acquires: OrderedDict[AcquireSequence, Acquire] = OrderedDict()
        self._counters = {"acquires": 0, "expires": 0, "mappings": 0, "foreign": 0, "malformed": 0, "kicks": 0, "repeated": 0, "found": 0}

    def capabilities(self) -> Capabilities:
        return replace(XFRM, unresolved_modes=frozenset({Unresolved.QUEUE if self._holds else Unresolved.DROP}))

    def on_event(self, listener: Callable[[KernelEvent], None]) -> None:
        """Larval SAs whose ACQUIREs an earlier listener, or none, has heard are reported too: they stand in the way of the next ACQUIRE."""
        self._event_listeners.append(listener)
        if self._requests.is_open:
            self._look_for_acquires()

    def on_overrun(self, listener: Callable[[], None]) -> None:
        """`listener` is called when events were lost: look at `sas()` and `policies()`."""
        self._overrun_listeners.append(listener)

    def on_closed(self, listener: Callable[[], None]) -> None:
        """Never called: this kernel goes away only together with its host."""

    # Life

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            self._requests.open()
            self._events.open()
            if self._require_esp:
                await self._probe_esp()
        except BaseException:
            await self.close()
            raise
        if not self._listens:
            self._holds = self._sysctls.get("core/xfrm_larval_drop") == "0"
            return
        self._holds = self._sysctls.set("core/xfrm_larval_drop", "0")
        self._sysctls.set("core/xfrm_acq_expires", str(self._acquire_seconds))

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        self._events.close()
        self._requests.close()
        self._sysctls.restore()

    async def _probe_esp(self) -> None:
        """An SA that nobody can use comes and goes again."""
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
            await self._requests.request(sa_message(probe, update=False), timeout=LONG_TIMEOUT)
        except KernelError as error:
            raise KernelError(errno.EPROTONOSUPPORT, f"this kernel has no ESP (modules esp4, esp6): {error.detail}") from error
        await self.delete_sa(probe.id)

    # SAs

    async def get_spi(self, request: SpiRequest) -> Spi:
        """A repeated request reserves a second SPI; the first expires by itself."""
        replies = await self._requests.request(spi_message(request))
        return Spi(self._sa_of(replies, f"ALLOCSPI for {request.destination}").id.spi)

    async def add_sa(self, sa: SecurityAssociation) -> None:
        """An outbound one sends what the kernel holds for it on its way at once."""
        message = sa_message(sa, update=False)
        try:
            await self._requests.request(message, repeat=False, timeout=LONG_TIMEOUT)
        except TimeoutError:
            self._counters["repeated"] += 1
            if not await self._stands(sa):
                await self._requests.request(message, repeat=False, timeout=LONG_TIMEOUT)
        self._directions[sa.id] = sa.direction
        if sa.direction is Direction.OUT:
            self._acquires.pop(sa.acquire, None)
            await self._kick(sa.reqid)

    async def update_sa(self, sa: SecurityAssociation) -> None:
        await self._requests.request(sa_message(sa, update=True), timeout=LONG_TIMEOUT)
        self._directions[sa.id] = sa.direction

    async def delete_sa(self, sa: SaId) -> None:
        self._directions.pop(sa, None)
        await self._requests.request(sa_id_message(MessageType.DELSA, sa))

    async def migrate_sa(self, old: SecurityAssociation, new: SecurityAssociation) -> None:
        raise KernelError(errno.EOPNOTSUPP, "this kernel cannot move an SA to other addresses")

    async def get_sa(self, sa: SaId) -> SaStatus:
        replies = await self._requests.request(sa_id_message(MessageType.GETSA, sa))
        found = self._sa_of(replies, f"GETSA {sa.spi:08x}")
        return found.status(self._direction(found))

    async def sas(self) -> Sequence[SaStatus]:
        """Ours. A larval SA that an ACQUIRE left has SPI 0 and the flow as its selectors."""
        found = await self._dump_sas()
        standing = {sa.id for sa in found}
        self._directions = {sa: direction for sa, direction in self._directions.items() if sa in standing}
        return [sa.status(self._direction(sa)) for sa in found]

    async def flush_sas(self) -> None:
        """Ours, larval ones included."""
        for found in await self._dump_sas():
            with suppress(KernelError):  # it went of its own accord meanwhile
                if found.id.spi:
                    await self.delete_sa(found.id)
                elif found.acquire:
                    await self._drop_larval(found.acquire, found.source, found.id.destination, found.mode, reqid_from(found.reqid))

    async def _stands(self, sa: SecurityAssociation) -> bool:
        """Whether a request whose answer was lost had its effect."""
        try:
            found = self._sa_of(await self._requests.request(sa_id_message(MessageType.GETSA, sa.id)), "GETSA")
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

    def _direction(self, found: KernelSa) -> Direction:
        """Linux before 6.10 does not say: ours to know, or to see by whose address the SA ends at."""
        direction = found.direction or self._directions.get(found.id)
        if direction is None:
            direction = Direction.IN if _is_local(found.id.destination) else Direction.OUT
            if found.id.spi:
                self._directions[found.id] = direction
        return direction

    async def _kick(self, reqid: ReqId) -> None:
        """The kernel polls its hold queue with growing pauses; to replace the policy makes it look at once (xfrm_policy_requeue)."""
        async with self._policy_lock:
            for policy in self._standing.outbound(reqid):
                with suppress(KernelError, TimeoutError):  # the SA stands all the same, and the kernel polls
                    await self._requests.request(policy_message(policy, replace=True))
                    self._counters["kicks"] += 1

    # Policies

    async def add_policy(self, policy: Policy) -> Policy:
        return await self._put_policy(policy, update=False)

    async def update_policy(self, policy: Policy) -> Policy:
        return await self._put_policy(policy, update=True)

    async def _put_policy(self, policy: Policy, *, update: bool) -> Policy:
        if policy.direction is Direction.OUT and policy.action is Action.PROTECT and policy.unresolved not in self.capabilities().unresolved_modes:
            why = "" if self._holds else "; net.core.xfrm_larval_drop is 1 and cannot be changed"
            raise KernelError(errno.EOPNOTSUPP, f"unresolved: this kernel does not know '{policy.unresolved.value}'{why}")
        index, self._next_index = self._next_index, self._next_index + INDEX_STEP
        if self._next_index > LAST_INDEX:
            self._next_index = FIRST_INDEX
        async with self._policy_lock:
            try:
                await self._requests.request(policy_message(policy, replace=update, index=index), repeat=update)
            except TimeoutError:
                told = await self._told(policy.direction, policy.selector)
                if told is None or told.index // INDEX_STEP != index // INDEX_STEP:
                    raise
                self._counters["repeated"] += 1
            else:
                # Which number it has only the kernel knows: a replaced policy keeps its own.
                told = await self._told(policy.direction, policy.selector)
            put = replace(policy, index=told.index) if told is not None else policy
            self._standing.put(put)
        return put

    async def _told(self, direction: Direction, selector: Selector) -> Policy | None:
        """What the kernel has under this selector; None when it went meanwhile."""
        try:
            replies = await self._requests.request(policy_id_message(MessageType.GETPOLICY, direction, selector))
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        told = policy_from(replies[0]) if replies else None
        return told.policy if told is not None else None

    async def delete_policy(self, direction: Direction, selector: Selector) -> None:
        message = policy_id_message(MessageType.DELPOLICY, direction, selector)
        async with self._policy_lock:
            standing = self._standing.get(direction, selector)
            if standing is not None and standing.selector != selector:
                return  # to the kernel the two selectors are one, and the other is wanted
            self._standing.drop(direction, selector)
            await self._requests.request(message)

    async def policies(self) -> Sequence[Policy]:
        """Ours."""
        found = []
        messages = await self._requests.request(policy_dump_message())
        for at in range(0, len(messages), SLICE):
            for message in messages[at : at + SLICE]:
                try:
                    told = policy_from(message) if message.type == MessageType.NEWPOLICY else None
                except MalformedMessage:
                    self._counters["malformed"] += 1
                    continue
                if told is not None and told.ours:
                    found.append(self._as_asked(told.policy))
            await asyncio.sleep(0)
        return found

    async def flush_policies(self) -> None:
        """Ours."""
        for policy in await self.policies():
            with suppress(KernelError):  # it went meanwhile
                await self.delete_policy(policy.direction, policy.selector)

    def _as_asked(self, policy: Policy) -> Policy:
        """In the words in which it was asked for, where the kernel has only one of several ways to say it."""
        unresolved = policy.unresolved
        if policy.direction is Direction.OUT and policy.action is Action.PROTECT and not self._holds:
            unresolved = Unresolved.DROP
        asked = self._standing.get(policy.direction, policy.selector)
        policy = replace(policy, unresolved=unresolved, selector=asked.selector if asked is not None else policy.selector)
        if asked is None:
            self._standing.put(policy)  # an earlier run's
        return policy

    # Events

    def _overrun(self) -> None:
        for listener in self._overrun_listeners:
            self._loop.call_soon(listener)
        self._look_for_acquires()

    def _look_for_acquires(self) -> None:
        self._look_again = True
        if self._looking is None or self._looking.done():
            self._looking = self._loop.create_task(self._find_acquires(), name="xfrm-acquires")

    async def _find_acquires(self) -> None:
        """An ACQUIRE is state, a larval SA: what nobody has heard of is found there."""
        while self._look_again:
            self._look_again = False
            try:
                found = await self._dump_sas()
            except (KernelError, TimeoutError, ChannelClosed):
                return  # the next overrun looks again; the larval SA expires
            for larval in found:
                if larval.algorithm is None and not larval.id.spi and larval.acquire and larval.acquire not in self._acquires:
                    self._counters["found"] += 1
                    self._acquired(self._acquire_of(larval))

    def _acquire_of(self, larval: KernelSa) -> Acquire:
        """What the kernel said, or would have said, when it made this larval SA, whose selector is the flow."""
        reqid = reqid_from(larval.reqid)
        asked = larval.selector
        flow = None
        if asked is not None:
            flow = Flow(asked.source.first, asked.destination.first, asked.protocol, asked.source_ports.low, asked.destination_ports.low)
        policy = self._standing.asking(reqid, flow)
        index = policy.index if policy is not None else PolicyIndex(0)
        selector = policy.selector if policy is not None else None
        return Acquire(larval.acquire, index, reqid, larval.mode, larval.source, larval.id.destination, selector, flow)

    def _acquired(self, event: Acquire) -> None:
        self._acquires[event.sequence] = event
        if len(self._acquires) > MAX_ACQUIRES:
            self._acquires.popitem(last=False)
        for listener in self._event_listeners:
            self._loop.call_soon(listener, event)

    def _event(self, message: Message) -> None:
        try:
            notice = notice_from(message)
        except MalformedMessage:
            self._counters["malformed"] += 1
            return
        if notice is None:
            return
        if not notice.ours:
            self._counters["foreign"] += 1
            return
        event = notice.event
        if isinstance(event, Acquire):
            self._counters["acquires"] += 1
            self._acquired(event)
            return
        if isinstance(event, Expire):
            self._counters["expires"] += 1
            if event.hard:
                self._directions.pop(event.sa, None)
        else:
            self._counters["mappings"] += 1
        for listener in self._event_listeners:
            self._loop.call_soon(listener, event)

    async def acquire_failed(self, sequence: AcquireSequence, errno: int) -> None:
        """The larval SA goes, so that the next packet asks again; it would block its flow for `acquire_seconds`."""
        event = self._acquires.pop(sequence, None)
        if event is not None and event.source is not None and event.destination is not None:
            await self._drop_larval(sequence, event.source, event.destination, event.mode, event.reqid)

    async def _drop_larval(self, sequence: AcquireSequence, source: IPAddress, destination: IPAddress, mode: Mode, reqid: ReqId) -> None:
        """A larval SA can only be deleted by an SPI, so it is given one first."""
        spi = Spi(secrets.randbelow(0xFFFFFF00) + 0x100)
        with suppress(KernelError):  # it is gone, or an SA took its place
            await self._requests.request(claim_message(sequence, source, destination, mode, reqid, spi))
            await self._requests.request(sa_id_message(MessageType.DELSA, SaId(destination, spi)))

    # The rest

    async def bind(self, address: IPAddress) -> tuple[int, int]:
        raise KernelError(errno.EOPNOTSUPP, "this kernel opens no IKE sockets: the key manager does")

    async def unbind(self, address: IPAddress) -> None:
        """Nothing was bound."""

    async def statistics(self) -> Mapping[str, int]:
        """The channel's own counters, and those of /proc/net/xfrm_stat where the kernel has it."""
        own = dict(self._counters)
        for name in ("overruns", "malformed", "timeouts"):
            own[name] = own.get(name, 0) + getattr(self._requests, name) + getattr(self._events, name)
        with suppress(OSError):
            for line in STATISTICS.read_text().splitlines():
                name, _, value = line.partition(" ")
                own[name] = int(value)
        return own


def bypass_policies(opened: socket.socket) -> None:
    """Let a socket's own packets, in and out, pass every policy. OSError where that is not permitted."""
    version = 4 if opened.family == socket.AF_INET else 6
    level, option = (socket.IPPROTO_IP, _IP_XFRM_POLICY) if version == 4 else (socket.IPPROTO_IPV6, _IPV6_XFRM_POLICY)
    for direction in (Direction.IN, Direction.OUT):
        opened.setsockopt(level, option, socket_bypass(version, direction))


def _is_local(address: IPAddress) -> bool:
    with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
        return True
