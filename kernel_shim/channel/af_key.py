"""Linux' AF_KEY, for asyncio: PF_KEY where a legacy kernel has nothing else.

AF_KEY drops what does not fit a socket's receive buffer, replies too, and tells nobody. Here nothing is lost by it for long:
- The kernel answers within the call. A request that has no answer once the socket is read empty has lost it, and is made again at once.
- Only reading lowers the fill of the buffer, so whether messages were dropped is seen when it is read (SO_MEMINFO): an overrun,
  after which the tables are looked at.
- An ACQUIRE is a larval SA: what nobody has heard of is found there.
What a request that is made again finds already done is success.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from kernel_shim.algorithms import EspAlgorithm
from kernel_shim.channel.af_key_acquires import AfKeyAcquires
from kernel_shim.channel.af_key_socket import AfKeyTransport
from kernel_shim.channel.api import ChannelClosed
from kernel_shim.channel.linux import ACQUIRE_SECONDS, is_local, xfrm_statistics
from kernel_shim.channel.linux_channel import LinuxChannel, esp_probe, no_esp
from kernel_shim.channel.own_sas import OwnSas
from kernel_shim.channel.pfkey_link import PfKeyLink, RequestRefused, Transport
from kernel_shim.channel.standing import StandingPolicies
from kernel_shim.model import (
    Acquire,
    Action,
    Capabilities,
    Direction,
    Expire,
    KernelError,
    KernelEvent,
    NewMapping,
    Policy,
    PolicyIndex,
    ReqId,
    SaId,
    SaStatus,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
)
from kernel_shim.pfkey.af_key import (
    MAX_REQID,
    Larval,
    add_extensions,
    as_kept,
    plain_capabilities,
    require_policy,
    require_sa,
    spd_extensions,
    told_policy,
    told_sa,
)
from kernel_shim.pfkey.constants import MessageType, SaType
from kernel_shim.pfkey.messages import Message, PfKeyError, PolicyExtension, Sa
from kernel_shim.pfkey.policy_messages import require_selector_expressible, selector_extensions
from kernel_shim.pfkey.sa_messages import sa_id_extensions, spi_request_extensions


class AfKeyChannel(LinuxChannel):
    """A `KernelChannel` to the Linux kernel, in the network namespace of the thread that opens it. Opened once.

    `open` raises KernelError(EPROTONOSUPPORT) when the kernel has no AF_KEY, or no ESP unless `require_esp` is unset.
    Hold queue, `acquire_seconds` and `settings_file` as of `XfrmChannel`. Dumps show, and flushes take, only what is ours.
    """

    def __init__(
        self,
        *,
        listens: bool = True,
        require_esp: bool = True,
        acquire_seconds: int = ACQUIRE_SECONDS,
        settings_file: Path | None = None,
        transport: Transport | None = None,
    ) -> None:
        super().__init__(listens=listens, acquire_seconds=acquire_seconds, settings_file=settings_file)
        self._require_esp = require_esp
        self._capabilities: Capabilities | None = None
        self._link = PfKeyLink(transport or AfKeyTransport(), on_event=self._event, on_overrun=self._overrun, on_lost=self._listeners.tell_closed)
        self._standing = StandingPolicies(lambda direction, selector: (direction, selector))
        self._policy_lock = asyncio.Lock()  # so that no kick puts back what was just deleted
        self._own = OwnSas()
        self._counters = {"acquires": 0, "expires": 0, "mappings": 0, "foreign": 0, "malformed": 0, "kicks": 0, "found": 0}
        self._acquires: AfKeyAcquires = AfKeyAcquires(self._link, self._standing, self._dump_sas, self._listeners.tell, self._counters)

    def capabilities(self) -> Capabilities:
        """Known once `open` has returned; ChannelClosed before."""
        if self._capabilities is None:
            raise ChannelClosed("the channel is not open")
        return replace(self._capabilities, unresolved_modes=frozenset({self._hold.mode}))

    @property
    def _is_open(self) -> bool:
        return self._link.is_open

    # Life

    async def open(self) -> None:
        await self._link.open()
        try:
            if self._listens:
                with suppress(RequestRefused):  # EEXIST: the first reply was lost
                    await self._link.ask(MessageType.REGISTER, ())
            self._capabilities = plain_capabilities(await self._link.ask(MessageType.REGISTER, (), sa_type=SaType.UNSPEC))
            if self._require_esp:
                await self._probe_esp(self._capabilities)
        except BaseException:
            self._link.close()
            raise
        self._set_hold_queue()

    async def close(self) -> None:
        await self._acquires.stop()
        self._link.close()
        self._hold.restore()

    async def _probe_esp(self, capabilities: Capabilities) -> None:
        """An SA that nobody can use comes and goes again."""
        if not capabilities.algorithms:
            raise KernelError(errno.EPROTONOSUPPORT, "this kernel's AF_KEY has no algorithm that can be used")
        algorithm: EspAlgorithm = min(capabilities.algorithms, key=repr)
        probe = esp_probe(algorithm, ReqId(MAX_REQID))
        try:
            await self._link.ask(MessageType.ADD, add_extensions(probe))
        except KernelError as error:
            raise no_esp(error) from error
        await self.delete_sa(probe.id)

    # SAs

    async def get_spi(self, request: SpiRequest) -> Spi:
        """A repeated request reserves a second SPI; the first expires by itself."""
        reply = await self._link.ask(MessageType.GETSPI, spi_request_extensions(request, private=False))
        spi = Spi(reply.require(Sa).spi)
        self._own.put(SaId(request.destination, spi), Direction.IN)
        return spi

    async def add_sa(self, sa: SecurityAssociation) -> None:
        """An outbound one sends what the kernel holds for it on its way at once."""
        require_sa(sa, self.capabilities())
        self._own.put(sa.id, sa.direction)
        try:
            await self._link.ask(MessageType.ADD, add_extensions(sa))
        except RequestRefused as error:
            if error.errno != errno.EEXIST or not await self._stands(sa):
                raise
        if sa.direction is Direction.OUT:
            self._acquires.answered(sa)
            await self._kick(sa.reqid)

    async def update_sa(self, sa: SecurityAssociation) -> None:
        require_sa(sa, self.capabilities())
        await self._link.ask(MessageType.UPDATE, add_extensions(sa))
        self._own.put(sa.id, sa.direction)

    async def delete_sa(self, sa: SaId) -> None:
        self._own.drop(sa)
        try:
            await self._link.ask(MessageType.DELETE, sa_id_extensions(sa))
        except RequestRefused as error:
            if error.errno != errno.ESRCH:
                raise

    async def migrate_sa(self, old: SecurityAssociation, new: SecurityAssociation) -> None:
        raise KernelError(errno.EOPNOTSUPP, "this kernel cannot move an SA to other addresses")

    async def get_sa(self, sa: SaId) -> SaStatus:
        status = self._status(told_sa(await self._link.ask(MessageType.GET, sa_id_extensions(sa))))
        if status is None:
            raise KernelError(errno.ESRCH, f"no SA {sa.spi:08x} to {sa.destination} of ours")
        return status

    async def sas(self) -> Sequence[SaStatus]:
        """Ours. A larval SA that an ACQUIRE left has SPI 0; those that nobody has heard of are reported."""
        before = set(self._own)
        dumped = await (self._acquires.read() if self._listeners.any else self._dump_sas())
        found = [status for told in dumped if (status := self._status(told)) is not None]
        for gone in before - {status.sa.id for status in found}:
            self._own.drop(gone)
        return found

    async def flush_sas(self) -> None:
        """Ours, larval ones included."""
        for status in await self.sas():
            with suppress(KernelError):  # it went of its own accord meanwhile
                if status.sa.spi:
                    await self.delete_sa(status.sa.id)
                else:
                    await self._acquires.drop(status.sa.source, status.sa.destination, status.sa.mode, status.sa.reqid)

    async def _stands(self, sa: SecurityAssociation) -> bool:
        """Whether a request whose answer was lost had its effect."""
        told = told_sa(await self._link.ask(MessageType.GET, sa_id_extensions(sa.id)))
        return isinstance(told, SaStatus) and told.sa.encryption_key == sa.encryption_key and told.sa.reqid == sa.reqid

    async def _dump_sas(self) -> list[SaStatus | Larval]:
        return [told for told in await self._link.dump(MessageType.DUMP, self._told_sa) if told is not None]

    def _told_sa(self, message: Message) -> SaStatus | Larval | None:
        try:
            return told_sa(message)
        except PfKeyError:
            self._counters["malformed"] += 1
            return None

    def _status(self, told: SaStatus | Larval | None) -> SaStatus | None:
        """None for what is not ours."""
        if isinstance(told, Larval):
            if told.id not in self._own and (told.spi or self._acquires.asking(told) is None):
                return None
            return told.status(self._own.direction(told.id) or Direction.OUT, self._acquires.number_of(told))
        if told is None:
            return None
        direction = self._own.direction(told.sa.id)
        if direction is None:
            direction = Direction.IN if is_local(told.sa.destination) else Direction.OUT
            self._own.put(told.sa.id, direction)
        return replace(told, sa=replace(told.sa, direction=direction))

    async def _kick(self, reqid: ReqId) -> None:
        """The kernel polls its hold queue with growing pauses; to replace the policy makes it look at once (xfrm_policy_requeue)."""
        async with self._policy_lock:
            for policy in self._standing.outbound(reqid):
                with suppress(KernelError, TimeoutError):  # the SA stands all the same, and the kernel polls
                    await self._link.ask(MessageType.X_SPDUPDATE, spd_extensions(policy), sa_type=SaType.UNSPEC)
                    self._counters["kicks"] += 1

    # Policies

    async def add_policy(self, policy: Policy) -> Policy:
        return await self._put_policy(MessageType.X_SPDADD, policy)

    async def update_policy(self, policy: Policy) -> Policy:
        """SPDUPDATE replaces whosever policy has this selector, so what is not known to be ours is added first."""
        require_policy(policy)
        if self._standing.get(policy.direction, policy.selector) is None:
            try:
                return await self._put_policy(MessageType.X_SPDADD, policy)
            except KernelError as error:
                if error.errno != errno.EEXIST:
                    raise
                if await self._find(policy.direction, policy.selector) is None:
                    raise KernelError(errno.EEXIST, "another key manager's policy has this selector") from error
        return await self._put_policy(MessageType.X_SPDUPDATE, policy)

    async def _put_policy(self, kind: MessageType, policy: Policy) -> Policy:
        require_policy(policy)
        self._hold.require(policy)
        async with self._policy_lock:
            try:
                told = told_policy(await self._link.ask(kind, spd_extensions(policy), sa_type=SaType.UNSPEC))
            except RequestRefused as error:
                told = await self._find(policy.direction, policy.selector) if error.errno == errno.EEXIST else None
                if told is None or not _same(told, policy):
                    raise
            put = replace(policy, index=told.index if told is not None else PolicyIndex(0))
            self._standing.put(put)
        return put

    async def delete_policy(self, direction: Direction, selector: Selector) -> None:
        require_selector_expressible(selector)
        async with self._policy_lock:
            if self._standing.get(direction, selector) is None and await self._find(direction, selector) is None:
                raise KernelError(errno.ENOENT, f"no policy {selector} of ours")
            self._standing.drop(direction, selector)
            which = PolicyExtension(Action.DISCARD, direction)
            try:
                await self._link.ask(MessageType.X_SPDDELETE, (*selector_extensions(selector, private=False), which), sa_type=SaType.UNSPEC)
            except RequestRefused as error:
                if error.errno != errno.ENOENT:
                    raise

    async def policies(self) -> Sequence[Policy]:
        """Ours."""
        return [self._as_asked(policy) for policy in await self._dump_policies()]

    async def flush_policies(self) -> None:
        """Ours."""
        for policy in await self.policies():
            with suppress(KernelError):  # it went meanwhile
                await self.delete_policy(policy.direction, policy.selector)

    async def _dump_policies(self) -> list[Policy]:
        return [policy for policy in await self._link.dump(MessageType.X_SPDDUMP, self._told_policy) if policy is not None]

    def _told_policy(self, message: Message) -> Policy | None:
        try:
            return told_policy(message)
        except PfKeyError:
            self._counters["malformed"] += 1
            return None

    async def _find(self, direction: Direction, selector: Selector) -> Policy | None:
        return next((policy for policy in await self._dump_policies() if (policy.direction, policy.selector) == (direction, selector)), None)

    def _as_asked(self, told: Policy) -> Policy:
        """With what the kernel does not keep, where it has what was asked for."""
        asked = self._standing.get(told.direction, told.selector)
        policy = replace(asked, index=told.index) if asked is not None and _same(told, asked) else replace(told, unresolved=self._hold.mode_of(told))
        if asked is None or asked.index != told.index:
            self._standing.put(policy)  # an earlier run's, or another's
        return policy

    # Events

    def _event(self, event: KernelEvent) -> None:
        if isinstance(event, Acquire):
            self._acquires.add(event)
            return
        told: KernelEvent | None = None
        if isinstance(event, Expire):
            told = self._expire(event)
        elif isinstance(event, NewMapping):
            told = self._mapping(event)
        if told is not None:
            self._listeners.tell(told)

    def _expire(self, event: Expire) -> Expire | None:
        if not event.sa.spi:
            self._acquires.expired(event.sa.destination, event.reqid)
            return None
        if event.sa not in self._own:
            self._counters["foreign"] += 1
            return None
        self._counters["expires"] += 1
        if event.hard:
            self._own.drop(event.sa)
        return event

    def _mapping(self, event: NewMapping) -> NewMapping | None:
        """AF_KEY does not say where the SA ends."""
        sa = self._own.inbound(event.sa.spi)
        self._counters["foreign" if sa is None else "mappings"] += 1
        return replace(event, sa=sa) if sa is not None else None

    # The rest

    async def statistics(self) -> Mapping[str, int]:
        """The channel's own counters, and those of /proc/net/xfrm_stat where the kernel has it."""
        own = {**self._counters, "overruns": self._link.overruns, "repeated": self._link.repeated}
        own["malformed"] += self._link.malformed
        return {**own, **xfrm_statistics()}


def _same(told: Policy, asked: Policy) -> bool:
    """Whether the kernel has what was asked for, as far as it keeps that."""
    kept = as_kept(asked)
    return (told.action, told.priority, told.templates) == (kept.action, kept.priority, kept.templates)
