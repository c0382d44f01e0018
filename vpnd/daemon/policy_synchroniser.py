"""The SPD as it should be, and the carrying over of each change into the kernel.

A change marks its key (direction and selector); the marked keys of one *subject*, the policies between two address ranges in one direction,
are carried over one after another, what is wanted first: to a kernel with fewer words two selectors may be one, and the unwanted one must not take
the wanted one along. Subjects wait for nobody but each other's `CARRIED_OVER_AT_ONCE`: a request that is not answered holds up its own subject alone.
What the kernel refused or did not answer for is tried again with back-off until the kernel agrees or is gone.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import structlog

from kernel_shim.channel.api import ChannelClosed, KernelChannel
from kernel_shim.model import AddressRange, Direction, KernelError, Policy, ReqId, Selector
from vpnd.daemon.audit import policy_drift, same_policy
from vpnd.daemon.repair import Repair
from vpnd.policies import PolicyChange, PolicyKey, PolicyTable
from vpnd.telemetry.counters import Counters

CARRIED_OVER_AT_ONCE: Final = 64  # subjects; twice the requests that a channel keeps under way, so that a few unanswered ones do not idle it

Subject = tuple[Direction, AddressRange, AddressRange]

log = structlog.get_logger("kernel")


def subject_of(key: PolicyKey) -> Subject:
    direction, selector = key
    return direction, selector.source, selector.destination


class PolicySynchroniser:
    """Policies by owner. `claim` and `release` return when the kernel has answered for the policies in question, whatever else is under way."""

    def __init__(self, counters: Counters) -> None:
        self.table: Final = PolicyTable()
        self._counters = counters
        self._claims: dict[Hashable, list[Policy]] = {}
        self._channel: KernelChannel | None = None
        self._installed: dict[PolicyKey, Policy] = {}
        self._installed_before: frozenset[PolicyKey] = frozenset()  # ours in the kernel that went away, should it be the same that comes back
        self._unsure: set[PolicyKey] = set()  # the kernel did not say whether it has them
        self._spared: dict[PolicyKey, Policy] = {}  # an earlier run's: nobody wants them yet
        self._marked: dict[Subject, dict[PolicyKey, None]] = {}
        self._workers: dict[Subject, asyncio.Task[None]] = {}
        self._under_way: set[PolicyKey] = set()
        self._unanswered: set[PolicyKey] = set()  # marked, and not to be tried before `_repair` says so
        self._refused: dict[PolicyKey, KernelError] = {}
        self._touched: set[PolicyKey] | None = None
        self._turns = asyncio.Semaphore(CARRIED_OVER_AT_ONCE)
        self._repair: Repair[PolicyKey] = Repair(self._try_again)

    # Owners

    async def claim(self, owner: Hashable, policies: Sequence[Policy]) -> None:
        """`owner` needs these policies. KernelError when the kernel refuses one, TimeoutError when it does not answer: then none of them is claimed.

        While the kernel is away they are claimed, and carried over when it is back.
        """
        self._claims.setdefault(owner, []).extend(policies)
        self._mark_changes(self.table.claim(owner, policies))
        keys = [(policy.direction, policy.selector) for policy in policies]
        await self._settled(keys)
        refusals = [self._refused[key] for key in keys if key in self._refused]
        unanswered = any(key in self._unanswered for key in keys)
        if refusals or unanswered:
            await self.release(owner)
            raise refusals[0] if refusals else TimeoutError("the kernel does not answer")

    async def release(self, owner: Hashable) -> None:
        """`owner` needs its policies no more."""
        changes = self.table.release(owner, self._claims.pop(owner, []))
        self._mark_changes(changes)
        await self._settled((change.policy.direction, change.policy.selector) for change in changes)

    def transfer(self, owner: Hashable, heir: Hashable) -> None:
        """`heir` takes over all that `owner` claimed; nothing changes in the kernel."""
        policies = self._claims.pop(owner, [])
        self.table.claim(heir, policies)
        self.table.release(owner, policies)
        self._claims.setdefault(heir, []).extend(policies)

    def has_claims(self, owner: Hashable) -> bool:
        return owner in self._claims

    def _mark_changes(self, changes: Iterable[PolicyChange]) -> None:
        self._mark((change.policy.direction, change.policy.selector) for change in changes)

    # The kernel comes, is read, and goes

    def attach(self, channel: KernelChannel) -> None:
        self._channel = channel
        for subject in list(self._marked):
            self._start(subject)

    def detach(self) -> None:
        """The kernel went away; what is claimed and released meanwhile is carried over to the next."""
        self._channel = None
        self._installed_before = frozenset({*self._installed, *self._unsure, *self._installed_before} - {*self._spared})
        self._installed = {}
        self._unsure.clear()
        self._unanswered.clear()
        self._refused.clear()

    async def stop(self) -> None:
        """Nothing more is carried over."""
        self._channel = None
        self._repair.stop()
        workers = list(self._workers.values())
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    @contextmanager
    def being_read(self) -> Iterator[Collection[PolicyKey]]:
        """While a dump is under way: what is carried over meanwhile, for which it says nothing."""
        touched = self._touched = set(self._under_way)
        try:
            yield touched
        finally:
            self._touched = None

    def compare(self, standing: Mapping[PolicyKey, Policy], touched: Collection[PolicyKey], *, attached: bool) -> None:
        """`standing` is what the kernel has: the difference is marked. Of a kernel just `attached` an earlier run's policies are spared."""
        self._installed = {key: policy for key, policy in standing.items() if key not in touched} | {
            key: policy for key, policy in self._installed.items() if key in touched
        }
        self._unsure.intersection_update(touched)
        if attached:
            self._spared = {key: policy for key, policy in standing.items() if key not in self.table and key not in self._installed_before}
            self._installed_before = frozenset()
        marked = (key for keys in self._marked.values() for key in keys)
        drift = policy_drift(standing, self.table.desired(), {*marked, *self._under_way, *touched, *self._refused, *self._spared})
        for name, keys in (("kernel_policies_restored", drift.missing), ("kernel_policies_removed", drift.foreign)):
            if keys:
                self._counters.add(name, len(keys))
                self._mark(keys)

    @property
    def spared(self) -> int:
        """How many policies of an earlier run stand that nobody has claimed."""
        return len(self._spared)

    def spare_no_more(self) -> None:
        """An earlier run's policies that nobody claimed go."""
        spared, self._spared = self._spared, {}
        self._counters.add("kernel_orphan_policies_removed", len(spared))
        self._mark(spared)

    def standing_reqid(self, outbound: Selector) -> ReqId | None:
        """Of the outbound policy of that selector that the kernel has."""
        standing = self._installed.get((Direction.OUT, outbound))
        return standing.templates[0].reqid if standing is not None and standing.templates else None

    # Carrying over

    def _mark(self, keys: Iterable[PolicyKey]) -> None:
        subjects = {}
        for key in keys:
            subject = subjects[subject_of(key)] = subject_of(key)
            self._marked.setdefault(subject, {})[key] = None
            self._unanswered.discard(key)
        for subject in subjects:
            self._start(subject)

    def _start(self, subject: Subject) -> None:
        if self._channel is not None and subject not in self._workers:
            self._workers[subject] = asyncio.get_running_loop().create_task(self._carry_over_subject(subject), name="kernel-policies")

    def _try_again(self, keys: Sequence[PolicyKey]) -> None:
        self._mark(keys)

    async def _settled(self, keys: Iterable[PolicyKey]) -> None:
        workers = {worker for key in keys if (worker := self._workers.get(subject_of(key))) is not None}
        if workers:
            await asyncio.wait(workers)

    async def settled(self) -> None:
        """Everything that is under way now has been answered for, or will be tried again."""
        if self._workers:
            await asyncio.wait(list(self._workers.values()))

    async def _carry_over_subject(self, subject: Subject) -> None:
        try:
            while (channel := self._channel) is not None and (key := self._next(subject)) is not None:
                async with self._turns:
                    if not await self._carry_over(channel, subject, key) and channel is self._channel:
                        return
        finally:
            del self._workers[subject]
            if not self._marked.get(subject, True):
                del self._marked[subject]

    def _next(self, subject: Subject) -> PolicyKey | None:
        marked = self._marked.get(subject, {})
        wanted = [key for key in marked if key in self.table]
        choice = wanted or marked  # nothing goes before all that is wanted stands
        return next((key for key in choice if key not in self._unanswered), None)

    async def _carry_over(self, channel: KernelChannel, subject: Subject, key: PolicyKey) -> bool:
        """False when that kernel is gone."""
        marked = self._marked[subject]
        marked.pop(key, None)
        self._refused.pop(key, None)
        self._under_way.add(key)
        if self._touched is not None:
            self._touched.add(key)
        desired = self.table.get(key)
        try:
            await self._ask(channel, key, desired)
        except KernelError as error:
            log.warning("kernel refused a policy" if desired else "policy not deleted", selector=str(key[1]), error=str(error))
            self._counters.add("kernel_policies_refused")
            self._refused[key] = error
            self._repair.failed(key)
        except ChannelClosed:
            marked[key] = None  # for the next channel
            self._unsure.add(key)
            if channel is self._channel:
                self._repair.failed(key)
            return False
        except TimeoutError:
            self._counters.add("kernel_requests_unanswered")
            marked[key] = None
            self._unsure.add(key)
            self._unanswered.add(key)
            self._repair.failed(key)
        else:
            if channel is not self._channel:
                marked[key] = None
                return False
            self._repair.done(key)
        finally:
            self._under_way.discard(key)
        return True

    async def _ask(self, channel: KernelChannel, key: PolicyKey, desired: Policy | None) -> None:
        standing, unsure = self._installed.get(key), key in self._unsure
        if desired is not None:
            self._spared.pop(key, None)
            if standing is None or unsure or not same_policy(standing, desired):
                installed = await channel.update_policy(desired)
                if channel is self._channel:
                    self._installed[key] = installed
        elif (standing is not None or unsure) and key not in self._spared:
            try:
                await channel.delete_policy(*key)
            except KernelError as error:
                if error.errno not in (errno.ESRCH, errno.ENOENT):
                    raise
            self._installed.pop(key, None)
        self._unsure.discard(key)
