"""The daemon's side of its kernel: it attaches, reads the kernel's tables and has the difference from what should be in them repaired.

Policies, SAs and labels are level, not edge. Which policies should stand `policy_synchroniser` knows and carries over, which SAs `installed_sas`,
which VRFs, labels and routes `label_synchroniser`.
Every `AUDIT_INTERVAL`, and after an overrun, the kernel's tables are held against both: missing policies are put back, those that nobody
wants and SAs that nobody owns go, SAs that vanished are told to their owners, events that were lost are told after all (`lost_events`).
After the kernel side was restarted the policies come back as they should be; SAs do not, for their sequence numbers are
lost and an outbound key is never installed twice (their owners hear of it and negotiate anew).
What an earlier run of the daemon left in a kernel that lived on, its orphans, keeps carrying packets until a successor of
the same selectors stands or `ORPHAN_GRACE` has passed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Final

import structlog

from kernel_shim.channel.api import ChannelClosed, KernelChannel, LabelChannel
from kernel_shim.model import (
    AcquireSequence,
    Capabilities,
    Direction,
    KernelError,
    KernelEvent,
    Policy,
    ReqId,
    SaId,
    SaStatus,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
)
from vpnd.daemon.audit import Strangers
from vpnd.daemon.background import Background
from vpnd.daemon.installed_sas import InstalledSas
from vpnd.daemon.label_synchroniser import LabelSynchroniser
from vpnd.daemon.lost_events import LostEvents
from vpnd.daemon.orphans import Orphans
from vpnd.daemon.policy_synchroniser import PolicySynchroniser
from vpnd.daemon.repair import Repair
from vpnd.daemon.reqid_pool import ReqIdPool
from vpnd.policies import PolicyTable
from vpnd.telemetry.counters import Counters
from vpnd.telemetry.throttle import Throttle
from vpnd.telemetry.wording import explained

ORPHAN_GRACE: Final = 30.0  # s, the time a successor has before an earlier run's SAs and policies are removed
RECONNECT_FIRST: Final = 0.05  # s
RECONNECT_LAST: Final = 0.25  # s; asking whether a socket listens costs little, and meanwhile no packet passes that needs a new SA
AUDIT_INTERVAL: Final = 180.0  # s
STRANGER_GRACE: Final = 30.0  # s that an SA without an owner has to get one

Connect = Callable[[], Awaitable[KernelChannel]]

log = structlog.get_logger("kernel")


class KernelSide:
    """Owns the channel. `event` hears what the kernel reports, `lost` the ids of SAs that vanished with a kernel."""

    def __init__(self, connect: Connect, counters: Counters) -> None:
        self._connect = connect
        self._counters = counters
        self._channel: KernelChannel | None = None
        self._capabilities: Capabilities | None = None
        self._policies = PolicySynchroniser(counters)
        self._sas = InstalledSas(lambda: self.channel, counters)
        self.labels: Final = LabelSynchroniser(counters)
        self._orphans = Orphans()
        self._strangers: Final = Strangers(STRANGER_GRACE)
        self._lost_events = LostEvents()
        self._reqids = ReqIdPool()
        self._orphan_task: asyncio.Task[None] | None = None
        self._reconnect_task: asyncio.Task[None] | None = None
        self._audit_task: asyncio.Task[None] | None = None
        self._examine_lock = asyncio.Lock()
        self._attaching = False
        self._overrun = False  # and not yet looked after
        self._refusals: Repair[tuple[AcquireSequence, int]] = Repair(self._refuse_again)
        self._resynchronisation: Repair[str] = Repair(lambda _: self._background.start(self._resynchronise()))
        self._closing = False
        self._background = Background()
        self.event: Callable[[KernelEvent], None] = lambda event: None
        self.lost: Callable[[Sequence[SaId]], None] = lambda ids: None
        self.found: Callable[[Iterable[Policy]], None] = lambda policies: None  # in the kernel, when it is attached

    # Life

    async def open(self) -> None:
        """Attach to the kernel; whatever `connect` raises passes through."""
        await self._attach()
        self._audit_task = asyncio.create_task(self._audit_regularly(), name="kernel-audit")

    async def close(self, *, leave: bool = False) -> None:
        """Detach. Unless `leave`, every policy and SA of ours goes first."""
        self._closing = True
        for task in (self._audit_task, self._orphan_task, self._reconnect_task):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._resynchronisation.stop()
        self._refusals.stop()
        self._sas.stop()
        await self.labels.stop()
        await self._policies.stop()
        channel, self._channel = self._channel, None
        if channel is None:
            return
        if not leave:
            try:
                await self.labels.remove_all()  # first: without policies they would leave in clear
                await channel.flush_policies()
                await channel.flush_sas()
            except (KernelError, TimeoutError, ChannelClosed) as error:
                log.warning("kernel not emptied at shutdown", error=str(error))
        await channel.close()

    @property
    def channel(self) -> KernelChannel:
        """Raises ChannelClosed while there is none."""
        if self._channel is None:
            raise ChannelClosed("the kernel side is away")
        return self._channel

    @property
    def connected(self) -> bool:
        return self._channel is not None

    def capabilities(self) -> Capabilities:
        """What the kernel last attached to can do; it stays known while the kernel is away."""
        if self._capabilities is None:
            raise ChannelClosed("no kernel was ever attached")
        return self._capabilities

    async def _attach(self) -> None:
        channel = await self._connect()
        self._capabilities = channel.capabilities()
        self._channel = channel
        self._policies.attach(channel)
        channel.on_closed(lambda: self._on_closed(channel))
        self._attaching = True
        try:
            await self._examine(channel, attached=True)
            if channel.capabilities().labels and isinstance(channel, LabelChannel):
                await self.labels.attach(channel)
            if channel is not self._channel:
                raise ChannelClosed("the kernel side went away")
        except BaseException:
            if channel is self._channel:
                self._channel = None
                self._policies.detach()
                self.labels.detach()
            await channel.close()
            raise
        finally:
            self._attaching = False
        self._sas.repair_at_once()
        channel.on_overrun(self._on_overrun)
        channel.on_event(self._on_event)

    def _on_closed(self, channel: KernelChannel) -> None:
        if self._closing or channel is not self._channel:
            return
        log.warning("the kernel side went away")
        self._counters.add("kernel_disconnects")
        self._channel = None
        self._policies.detach()
        self.labels.detach()
        if not self._attaching:  # else who attaches hears of it
            self._reconnect_task = asyncio.create_task(self._reconnect(), name="kernel-reconnect")

    async def _reconnect(self) -> None:
        delay, complaints = RECONNECT_FIRST, Throttle(burst=5, rate=0.1)
        while True:
            try:
                await self._attach()
            except (OSError, RuntimeError, TimeoutError, KernelError) as error:
                if (untold := complaints.admit(asyncio.get_running_loop().time())) is not None:
                    log.warning("no kernel yet", error=explained(error), next_try=f"{delay:.2f} s", untold=untold)
                await asyncio.sleep(delay)
                delay = min(delay * 2, RECONNECT_LAST)
            else:
                self._counters.add("kernel_reconnects")
                log.info("kernel attached again", policies=len(self.table))
                return

    async def acquire_failed(self, sequence: AcquireSequence, errno: int) -> None:
        """Nothing comes of this ACQUIRE: its larval SA stands in nobody's way any longer. The kernel is told again until it has heard."""
        try:
            await self.channel.acquire_failed(sequence, errno)
        except (KernelError, TimeoutError) as error:
            log.warning("ACQUIRE not answered", sequence=sequence, error=str(error))
            self._refusals.failed((sequence, errno))
        except ChannelClosed:
            self._refusals.done((sequence, errno))  # what still waits in the next kernel asks anew
        else:
            self._refusals.done((sequence, errno))

    def _refuse_again(self, refusals: Sequence[tuple[AcquireSequence, int]]) -> None:
        for refusal in refusals:
            self._background.start(self.acquire_failed(*refusal))

    def _on_event(self, event: KernelEvent) -> None:
        self._lost_events.heard(event)
        self.event(event)

    # What the kernel has, and what it should have

    async def _examine(self, channel: KernelChannel, *, attached: bool) -> None:
        """Compare what the kernel has with what it should have, and repair the difference.

        When it was just `attached`, what nobody here knows is an earlier run's and its orphan; later it is a stranger.
        """
        async with self._examine_lock:
            self._overrun = False
            before = self._sas.before_reading()
            statuses = await channel.sas()
            actual = {status.sa.id: status for status in statuses if status.sa.spi}
            with self._policies.being_read() as touched:
                standing = {(policy.direction, policy.selector): policy for policy in await channel.policies()}
                if channel is not self._channel:
                    raise ChannelClosed("the kernel side went away")
                self._reqids.reserve(template.reqid for policy in standing.values() for template in policy.templates)
                self._policies.compare(standing, touched, attached=attached)
            vanished = self._sas.vanished(before, actual)
            known = {*before.known, *self._sas.known}
            if attached:
                self.found(standing.values())
                self._adopt(actual, known)
            else:
                await self._remove_strangers(actual, known)
            self._tell_lost_events(statuses, standing.values())
            await self._policies.settled()
            if not attached:
                await self.labels.examine()
            if vanished:
                self._counters.add("kernel_sas_lost", len(vanished))
                self.lost(vanished)

    def _tell_lost_events(self, statuses: Sequence[SaStatus], standing: Iterable[Policy]) -> None:
        for event in self._lost_events.found(statuses, self._sas.standing, standing, time.time()):
            self._counters.add("kernel_events_found")
            log.info("an event that was lost is found", kind=type(event).__name__)
            self.event(event)

    def _adopt(self, actual: Mapping[SaId, SaStatus], known: Collection[SaId]) -> None:
        self._orphans.adopt(actual, known)
        sas, policies = len(self._orphans.ids), self._policies.spared
        if sas or policies:
            log.info("adopting what an earlier run left in the kernel", sas=sas, policies=policies)
            self._counters.add("kernel_orphans_adopted", sas)
            if self._orphan_task is not None:
                self._orphan_task.cancel()
            self._orphan_task = asyncio.create_task(self._drop_orphans_later(), name="orphans")

    async def _drop_orphans_later(self) -> None:
        await asyncio.sleep(ORPHAN_GRACE)
        left = self._orphans.give_up()
        if left or self._policies.spared:
            log.info("removing what an earlier run left", sas=len(left), policies=self._policies.spared)
        self._counters.add("kernel_orphans_removed", len(left))
        self._policies.spare_no_more()
        await self._sas.remove_all(left)

    async def _remove_strangers(self, actual: Mapping[SaId, SaStatus], known: Collection[SaId]) -> None:
        strangers = self._strangers.meet(actual, {*known, *self._orphans.ids}, asyncio.get_running_loop().time())
        for sa in strangers:
            log.warning("removing an SA that nobody owns", spi=f"{sa.spi:08x}", destination=str(sa.destination))
        if strangers:
            self._counters.add("kernel_sas_removed", len(strangers))
            await self._sas.remove_all(strangers)

    def _on_overrun(self) -> None:
        """The kernel side had to forget events: what they told is read from its tables, once for all overruns before the reading begins."""
        self._counters.add("kernel_overruns")
        if not self._overrun:
            self._overrun = True
            self._background.start(self._resynchronise())

    async def _resynchronise(self) -> None:
        try:
            examined = await self._try_to_examine("an overrun")
        finally:
            self._overrun = False
        if examined:
            self._resynchronisation.done("an overrun")
        elif self.connected:
            self._resynchronisation.failed("an overrun")

    async def audit(self) -> None:
        """Hold the kernel's tables against what should be in them, and repair. Never raises for what the kernel does."""
        self._counters.add("kernel_audits")
        await self._try_to_examine("an audit")

    async def _try_to_examine(self, why: str) -> bool:
        try:
            await self._examine(self.channel, attached=False)
        except (KernelError, ChannelClosed, TimeoutError) as error:
            self._counters.add("kernel_audits_failed")
            log.warning("kernel not examined", why=why, error=str(error))
            return False
        return True

    async def _audit_regularly(self) -> None:
        while True:
            await asyncio.sleep(min(AUDIT_INTERVAL, STRANGER_GRACE) if len(self._strangers) else AUDIT_INTERVAL)
            if self.connected:
                await self.audit()

    # Policies: as `PolicySynchroniser` says

    @property
    def table(self) -> PolicyTable:
        """The SPD as it should be."""
        return self._policies.table

    async def claim(self, owner: Hashable, policies: Sequence[Policy]) -> None:
        await self._policies.claim(owner, policies)

    async def release(self, owner: Hashable) -> None:
        await self._policies.release(owner)

    def transfer(self, owner: Hashable, heir: Hashable) -> None:
        self._policies.transfer(owner, heir)

    def has_claims(self, owner: Hashable) -> bool:
        return self._policies.has_claims(owner)

    # SAs

    async def get_spi(self, request: SpiRequest) -> Spi:
        return await self.channel.get_spi(request)

    async def install(self, sa: SecurityAssociation) -> None:
        """As `InstalledSas.install`. Orphans of the same selectors go once both directions stand."""
        await self._sas.install(sa)
        if sa.direction is Direction.OUT:
            await self._sas.remove_all(self._orphans.superseded(sa))

    async def migrate(self, old: SecurityAssociation, new: SecurityAssociation) -> None:
        await self._sas.migrate(old, new)

    async def remove(self, sa: SaId) -> None:
        await self._sas.remove(sa)

    def remove_later(self, sa: SaId, delay: float) -> None:
        self._sas.remove_later(sa, delay)

    def forget(self, sa: SaId) -> None:
        self._sas.forget(sa)

    @property
    def standing_sas(self) -> Collection[SecurityAssociation]:
        return self._sas.standing.values()

    @property
    def orphans(self) -> Sequence[SaStatus]:
        return self._orphans.statuses

    # Request ids

    def reserve_reqid(self, reqid: ReqId) -> None:
        """It is configured: never given out by `reqid_for`."""
        self._reqids.reserve((reqid,))

    def reqid_for(self, outbound: Selector | None) -> ReqId:
        """The reqid of the standing policy of this selector, so that an earlier run's SAs still serve it; else one that is free."""
        standing = self._policies.standing_reqid(outbound) if outbound is not None else None
        return standing if standing is not None else self._reqids.fresh(self.capabilities().maximum_reqid)
