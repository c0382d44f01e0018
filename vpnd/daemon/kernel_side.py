"""The daemon's side of its kernel: which policies and SAs should be there, and the carrying over of the difference.

Policies are level, not edge: a change marks its key, and one synchroniser at a time makes the kernel agree with the table.
What the kernel refused or did not answer, deletions of SAs included, is tried again with back-off until the kernel agrees or is gone.
Every `AUDIT_INTERVAL`, and after an overrun, the kernel's tables are read and held against what should be in them: missing policies are put back,
those that nobody wants and SAs that nobody owns go, SAs that vanished are told to their owners.
After the kernel side was restarted the policies come back as they should be; SAs do not, for their sequence numbers are
lost and an outbound key is never installed twice (their owners hear of it and negotiate anew).
What an earlier run of the daemon left in a kernel that lived on, its orphans, keeps carrying packets until a successor of
the same selectors stands or `ORPHAN_GRACE` has passed.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Final

import structlog

from kernel_shim.channel.api import ChannelClosed, KernelChannel
from kernel_shim.model import (
    Capabilities,
    Direction,
    KernelError,
    KernelEvent,
    Policy,
    ReqId,
    SaId,
    SaState,
    SaStatus,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
)
from vpnd.daemon.audit import Strangers, policy_drift, same_policy
from vpnd.daemon.background import Background
from vpnd.policies import PolicyKey, PolicyTable
from vpnd.telemetry.counters import Counters

ORPHAN_GRACE: Final = 30.0  # s, the time a successor has before an earlier run's SAs and policies are removed
RECONNECT_FIRST: Final = 0.05  # s
RECONNECT_LAST: Final = 5.0  # s
REPAIR_FIRST: Final = 0.5  # s, until what the kernel refused or did not answer is tried again; doubles
REPAIR_LAST: Final = 60.0  # s
AUDIT_INTERVAL: Final = 180.0  # s
STRANGER_GRACE: Final = 30.0  # s that an SA without an owner has to get one
SYNCHRONISED_AT_ONCE: Final = 32  # policies; as many requests as a channel keeps under way
REQID_FIRST: Final = 1
REQID_LAST: Final = 0x7FFFFFFF

Connect = Callable[[], Awaitable[KernelChannel]]

log = structlog.get_logger("kernel")


class KernelSide:
    """Owns the channel. `event` hears what the kernel reports, `lost` the ids of SAs that vanished with a kernel."""

    def __init__(self, connect: Connect, counters: Counters) -> None:
        self._connect = connect
        self._counters = counters
        self._channel: KernelChannel | None = None
        self._capabilities: Capabilities | None = None
        self.table: Final = PolicyTable()
        self._installed: dict[PolicyKey, Policy] = {}
        self._dirty: dict[PolicyKey, None] = {}
        self._unsure: set[PolicyKey] = set()  # the kernel did not say whether it has them
        self._refused: dict[PolicyKey, KernelError] = {}
        self._doomed: dict[SaId, None] = {}  # to be deleted, which the kernel has not done yet
        self._claims: dict[Hashable, list[Policy]] = {}
        self._sync_lock = asyncio.Lock()
        self._ours: dict[SaId, SecurityAssociation] = {}
        self._orphans: dict[SaId, SaStatus] = {}
        self._orphan_policies: dict[PolicyKey, Policy] = {}
        self._orphan_task: asyncio.Task[None] | None = None
        self._reconnect_task: asyncio.Task[None] | None = None
        self._repair_task: asyncio.Task[None] | None = None
        self._audit_task: asyncio.Task[None] | None = None
        self._examine_lock = asyncio.Lock()
        self._installing: dict[SaId, None] = {}
        self._installed_before: frozenset[PolicyKey] = frozenset()  # ours in the kernel that went away, should it be the same that comes back
        self._strangers: Final = Strangers(STRANGER_GRACE)
        self._next_reqid = REQID_FIRST
        self._reqids: set[int] = set()
        self._closing = False
        self._background = Background()
        self.event: Callable[[KernelEvent], None] = lambda event: None
        self.lost: Callable[[Sequence[SaId]], None] = lambda ids: None

    # Life

    async def open(self) -> None:
        """Attach to the kernel; whatever `connect` raises passes through."""
        await self._attach()
        self._audit_task = asyncio.create_task(self._audit_regularly(), name="kernel-audit")

    async def close(self, *, leave: bool = False) -> None:
        """Detach. Unless `leave`, every policy and SA of ours goes first."""
        self._closing = True
        for task in (self._audit_task, self._orphan_task, self._reconnect_task, self._repair_task):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        channel, self._channel = self._channel, None
        if channel is None:
            return
        if not leave:
            try:
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
        channel.on_closed(lambda: self._on_closed(channel))
        try:
            await self._examine(channel, attached=True)
        except BaseException:
            self._channel = None
            await channel.close()
            raise
        channel.on_overrun(lambda: self._background.start(self._resynchronise()))
        channel.on_event(self._on_event)

    async def _examine(self, channel: KernelChannel, *, attached: bool) -> None:
        """Compare what the kernel has with what it should have, and repair the difference.

        When it was just `attached`, what nobody here knows is an earlier run's and its orphan; later it is a stranger.
        """
        async with self._examine_lock:
            before = list(self._ours)  # what is installed while the tables are read need not be in them
            actual = {status.sa.id: status for status in await channel.sas()}
            async with self._sync_lock:
                standing = {(policy.direction, policy.selector): policy for policy in await channel.policies()}
                self._installed = standing
                self._unsure.clear()
                self._look_at_policies(standing, attached=attached)
            vanished = [sa for sa in before if sa in self._ours and sa not in actual]
            for sa in vanished:
                del self._ours[sa]
            for sa in [sa for sa in self._doomed if sa not in actual]:
                del self._doomed[sa]
            if attached:
                self._adopt(actual)
            await self._synchronise()
            if vanished:
                self._counters.add("kernel_sas_lost", len(vanished))
                self.lost(vanished)
            if self._doomed:
                self._repair_soon()
            if not attached:
                await self._remove_strangers(actual)

    def _look_at_policies(self, standing: Mapping[PolicyKey, Policy], *, attached: bool) -> None:
        for policy in standing.values():
            self._reqids.update(template.reqid for template in policy.templates)
        if attached:
            self._orphan_policies = {key: policy for key, policy in standing.items() if key not in self.table and key not in self._installed_before}
            self._installed_before = frozenset()
        drift = policy_drift(standing, self.table.desired(), {*self._dirty, *self._orphan_policies})
        for name, keys in (("kernel_policies_restored", drift.missing), ("kernel_policies_removed", drift.foreign)):
            if keys:
                self._counters.add(name, len(keys))
                self._dirty.update(dict.fromkeys(keys))

    def _adopt(self, actual: Mapping[SaId, SaStatus]) -> None:
        known = {*self._ours, *self._doomed, *self._installing}
        self._orphans = {sa: status for sa, status in actual.items() if sa not in known and status.state is not SaState.LARVAL}
        if self._orphans or self._orphan_policies:
            log.info("adopting what an earlier run left in the kernel", sas=len(self._orphans), policies=len(self._orphan_policies))
            if self._orphan_task is not None:
                self._orphan_task.cancel()
            self._orphan_task = asyncio.create_task(self._drop_orphans_later(), name="orphans")

    async def _remove_strangers(self, actual: Mapping[SaId, SaStatus]) -> None:
        known = {*self._ours, *self._doomed, *self._installing, *self._orphans}
        for sa in self._strangers.meet(actual, known, asyncio.get_running_loop().time()):
            log.warning("removing an SA that nobody owns", spi=f"{sa.spi:08x}", destination=str(sa.destination))
            self._counters.add("kernel_sas_removed")
            await self.remove(sa)

    async def _resynchronise(self) -> None:
        """After the kernel side had to forget events: what they told is read from its tables."""
        self._counters.add("kernel_overruns")
        await self._try_to_examine("an overrun")

    async def audit(self) -> None:
        """Hold the kernel's tables against what should be in them, and repair. Never raises for what the kernel does."""
        self._counters.add("kernel_audits")
        await self._try_to_examine("an audit")

    async def _try_to_examine(self, why: str) -> None:
        try:
            await self._examine(self.channel, attached=False)
        except (KernelError, ChannelClosed, TimeoutError) as error:
            self._counters.add("kernel_audits_failed")
            log.warning("kernel not examined", why=why, error=str(error))

    async def _audit_regularly(self) -> None:
        while True:
            await asyncio.sleep(min(AUDIT_INTERVAL, STRANGER_GRACE) if len(self._strangers) else AUDIT_INTERVAL)
            if self.connected:
                await self.audit()

    def _on_event(self, event: KernelEvent) -> None:
        self.event(event)

    def _on_closed(self, channel: KernelChannel) -> None:
        if self._closing or channel is not self._channel:
            return
        log.warning("the kernel side went away")
        self._counters.add("kernel_disconnects")
        self._channel = None
        self._installed_before = frozenset({*self._installed, *self._unsure, *self._installed_before} - {*self._orphan_policies})
        self._installed = {}
        self._unsure.clear()
        self._reconnect_task = asyncio.create_task(self._reconnect(), name="kernel-reconnect")

    async def _reconnect(self) -> None:
        delay = RECONNECT_FIRST
        while True:
            try:
                await self._attach()
            except (OSError, RuntimeError, TimeoutError, KernelError) as error:
                log.warning("no kernel yet", error=str(error), next_try=f"{delay:.2f} s")
                await asyncio.sleep(delay)
                delay = min(delay * 2, RECONNECT_LAST)
            else:
                log.info("kernel attached again", policies=len(self.table))
                return

    # Policies

    async def claim(self, owner: Hashable, policies: Sequence[Policy]) -> None:
        """`owner` needs these policies. KernelError when the kernel refuses one, TimeoutError when it does not answer: then none of them is claimed.

        While the kernel is away they are claimed, and carried over when it is back.
        """
        changes = self.table.claim(owner, policies)
        self._claims.setdefault(owner, []).extend(policies)
        self._dirty.update(dict.fromkeys((change.policy.direction, change.policy.selector) for change in changes))
        answered = await self._synchronise()
        keys = [(policy.direction, policy.selector) for policy in policies]
        refusals = [self._refused.pop(key) for key in keys if key in self._refused]
        unanswered = not answered and any(key in self._dirty for key in keys)
        if refusals or unanswered:
            await self.release(owner)
            raise refusals[0] if refusals else TimeoutError("the kernel does not answer")

    async def release(self, owner: Hashable) -> None:
        """`owner` needs its policies no more."""
        changes = self.table.release(owner, self._claims.pop(owner, []))
        self._dirty.update(dict.fromkeys((change.policy.direction, change.policy.selector) for change in changes))
        await self._synchronise()

    def transfer(self, owner: Hashable, heir: Hashable) -> None:
        """`heir` takes over all that `owner` claimed; nothing changes in the kernel."""
        policies = self._claims.pop(owner, [])
        self.table.claim(heir, policies)
        self.table.release(owner, policies)
        self._claims.setdefault(heir, []).extend(policies)

    def has_claims(self, owner: Hashable) -> bool:
        return owner in self._claims

    async def _synchronise(self) -> bool:
        """Make the kernel agree with the table in all marked keys. What it refuses is in `_refused` afterwards, for whoever claimed it.

        False when it did not answer, so that keys are left marked.
        """
        async with self._sync_lock:
            while self._dirty and (channel := self._channel) is not None:
                # What is wanted first: to a kernel with fewer words two selectors may be one.
                wanted = [key for key in self._dirty if self.table.get(key) is not None]
                unwanted = [key for key in self._dirty if self.table.get(key) is None]
                for keys in (wanted, unwanted):
                    answers = await self._carry_over_all(channel, keys)
                    if not all(answers):
                        return False not in answers
        return True

    async def _carry_over_all(self, channel: KernelChannel, keys: Sequence[PolicyKey]) -> list[bool | None]:
        """`SYNCHRONISED_AT_ONCE` at a time; who waits for an answer holds the others up no longer than it lasts."""
        left = iter(keys)

        async def one_after_another() -> bool | None:
            for key in left:
                if not (answer := await self._carry_over_one(channel, key)):
                    return answer
            return True

        return await asyncio.gather(*(one_after_another() for _ in range(min(len(keys), SYNCHRONISED_AT_ONCE))))

    async def _carry_over_one(self, channel: KernelChannel, key: PolicyKey) -> bool | None:
        """False when the kernel did not answer, None when it is gone."""
        self._dirty.pop(key, None)
        self._refused.pop(key, None)
        desired = self.table.get(key)
        try:
            await self._carry_over(channel, key, desired)
        except KernelError as error:
            # A later call may carry over what this one marked: a refusal belongs to the key, not to the caller.
            self._refused[key] = error
            log.warning("kernel refused a policy" if desired else "policy not deleted", selector=str(key[1]), error=str(error))
            self._repair_soon()
        except ChannelClosed:
            self._dirty[key] = None
            self._unsure.add(key)
            if channel is self._channel:
                self._repair_soon()
            return None  # the reconnection marks everything again
        except (TimeoutError, asyncio.CancelledError) as error:
            self._unsure.add(key)
            self._dirty[key] = None
            self._repair_soon()
            if isinstance(error, asyncio.CancelledError):
                raise
            return False
        return True

    async def _carry_over(self, channel: KernelChannel, key: PolicyKey, desired: Policy | None) -> None:
        standing, unsure = self._installed.get(key), key in self._unsure
        if desired is not None:
            self._orphan_policies.pop(key, None)
            if standing is None or unsure or not same_policy(standing, desired):
                self._installed[key] = await channel.update_policy(desired)
        elif (standing is not None or unsure) and key not in self._orphan_policies:
            try:
                await channel.delete_policy(*key)
            except KernelError as error:
                if error.errno not in (errno.ESRCH, errno.ENOENT):
                    raise
            self._installed.pop(key, None)
        self._unsure.discard(key)

    # Repair

    def _repair_soon(self) -> None:
        if not self._closing and (self._repair_task is None or self._repair_task.done()):
            self._repair_task = asyncio.create_task(self._repair(), name="kernel-repair")

    async def _repair(self) -> None:
        """Ask again for what the kernel has not done, until it has; the reconnection does so for a kernel that is away."""
        delay = REPAIR_FIRST
        while self.connected and (self._doomed or self._dirty or self._refused):
            await asyncio.sleep(delay)
            delay = min(delay * 2, REPAIR_LAST)
            for sa in list(self._doomed):
                await self.remove(sa)
            self._dirty.update(dict.fromkeys(self._refused))
            await self._synchronise()

    # SAs

    async def get_spi(self, request: SpiRequest) -> Spi:
        return await self.channel.get_spi(request)

    async def install(self, sa: SecurityAssociation) -> None:
        """Give keys to an inbound SPI that `get_spi` reserved, or add an outbound SA. Orphans of the same selectors go once both stand.

        An SA of which the kernel did not say whether it has it is deleted as soon as the kernel answers: its keys are not used again.
        """
        self._installing[sa.id] = None
        try:
            if sa.direction is Direction.IN:
                await self.channel.update_sa(sa)
            else:
                await self.channel.add_sa(sa)
        except KernelError:
            raise
        except BaseException:
            self._doom(sa.id)
            raise
        finally:
            self._installing.pop(sa.id, None)
        self._ours[sa.id] = sa
        self._doomed.pop(sa.id, None)
        if sa.direction is Direction.OUT and self._orphans:
            await self._drop_superseded(sa)

    async def remove(self, sa: SaId) -> None:
        """That it is gone already is no error. What the kernel does not do now it is asked for again, also when it was away."""
        self._ours.pop(sa, None)
        self._doomed.pop(sa, None)
        try:
            await self.channel.delete_sa(sa)
        except (KernelError, TimeoutError, ChannelClosed) as error:
            if not isinstance(error, KernelError) or error.errno != errno.ESRCH:
                log.warning("SA not deleted", spi=f"{sa.spi:08x}", error=str(error))
                self._doom(sa)

    def _doom(self, sa: SaId) -> None:
        self._doomed[sa] = None
        self._repair_soon()

    def forget(self, sa: SaId) -> None:
        """The kernel dropped it of its own accord."""
        self._ours.pop(sa, None)

    # Orphans

    @property
    def orphans(self) -> Sequence[SaStatus]:
        return list(self._orphans.values())

    async def _drop_superseded(self, successor: SecurityAssociation) -> None:
        pair = (successor.source_selectors, successor.destination_selectors)
        for status in self.orphans:
            old = status.sa
            selectors = (old.source_selectors, old.destination_selectors)
            if selectors == (pair if old.direction is Direction.OUT else pair[::-1]):
                self._orphans.pop(old.id, None)
                await self.remove(old.id)

    async def _drop_orphans_later(self) -> None:
        await asyncio.sleep(ORPHAN_GRACE)
        if self._orphans or self._orphan_policies:
            log.info("removing what an earlier run left", sas=len(self._orphans), policies=len(self._orphan_policies))
        while self._orphans:
            sa, _status = self._orphans.popitem()
            await self.remove(sa)
        self._dirty.update(dict.fromkeys(self._orphan_policies))
        self._orphan_policies = {}
        await self._synchronise()

    # Request ids

    def reserve_reqid(self, reqid: ReqId) -> None:
        """It is configured: never given out by `reqid_for`."""
        self._reqids.add(reqid)

    def reqid_for(self, outbound: Selector | None) -> ReqId:
        """The reqid of the standing policy of this selector, so that an earlier run's SAs still serve it; else one that is free."""
        if outbound is not None:
            standing = self._installed.get((Direction.OUT, outbound))
            if standing is not None and standing.templates:
                return standing.templates[0].reqid
        while self._next_reqid in self._reqids:
            self._next_reqid = self._next_reqid + 1 if self._next_reqid < REQID_LAST else REQID_FIRST
        self._reqids.add(self._next_reqid)
        return ReqId(self._next_reqid)
