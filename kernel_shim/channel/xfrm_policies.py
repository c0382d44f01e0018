"""The policies of an `XfrmChannel`."""

from __future__ import annotations

import asyncio
import errno
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

from kernel_shim.channel.linux import HoldQueue
from kernel_shim.channel.netlink import SLICE, NetlinkSocket
from kernel_shim.channel.standing import StandingPolicies
from kernel_shim.model import Direction, KernelError, Policy, ReqId, Selector
from kernel_shim.xfrm.constants import MessageType
from kernel_shim.xfrm.policies import FIRST_INDEX, INDEX_STEP, LAST_INDEX, KernelPolicy, policy_dump_message, policy_from, policy_id_message, policy_message
from kernel_shim.xfrm.selectors import standing_key
from kernel_shim.xfrm.structs import MalformedMessage

_INDEXES: Final = 1 << 27  # from which our numbers begin, by chance


class XfrmPolicies:
    """`counters` are the channel's."""

    def __init__(self, requests: NetlinkSocket, hold: HoldQueue, counters: dict[str, int]) -> None:
        self._requests = requests
        self._counters = counters
        self._next_index = FIRST_INDEX + INDEX_STEP * secrets.randbelow(_INDEXES)
        self._lock = asyncio.Lock()  # so that no kick puts back what was just deleted
        self.standing = StandingPolicies(standing_key)
        self._hold = hold

    async def kick(self, reqid: ReqId) -> None:
        """The kernel polls its hold queue with growing pauses; to replace the policy makes it look at once (xfrm_policy_requeue)."""
        async with self._lock:
            for policy in self.standing.outbound(reqid):
                with suppress(KernelError, TimeoutError):  # the SA stands all the same, and the kernel polls
                    await self._requests.request(policy_message(policy, replace=True))
                    self._counters["kicks"] += 1

    async def put(self, policy: Policy, *, update: bool) -> Policy:
        self._hold.require(policy)
        index, self._next_index = self._next_index, self._next_index + INDEX_STEP
        if self._next_index > LAST_INDEX:
            self._next_index = FIRST_INDEX
        async with self._lock:
            if update:  # which replaces whatever has this selector
                theirs = await self._standing_in_kernel(policy.direction, policy.selector)
                if theirs is not None and not theirs.ours:
                    raise KernelError(errno.EEXIST, "another key manager's policy has this selector")
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
            self.standing.put(put)
        return put

    async def _told(self, direction: Direction, selector: Selector) -> Policy | None:
        """What the kernel has under this selector; None when it went meanwhile."""
        told = await self._standing_in_kernel(direction, selector)
        return told.policy if told is not None else None

    async def _standing_in_kernel(self, direction: Direction, selector: Selector) -> KernelPolicy | None:
        try:
            replies = await self._requests.request(policy_id_message(MessageType.GETPOLICY, direction, selector))
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return policy_from(replies[0]) if replies else None

    async def delete(self, direction: Direction, selector: Selector) -> None:
        message = policy_id_message(MessageType.DELPOLICY, direction, selector)
        async with self._lock:
            standing = self.standing.get(direction, selector)
            if standing is not None and standing.selector != selector:
                return  # to the kernel the two selectors are one, and the other is wanted
            self.standing.drop(direction, selector)
            theirs = await self._standing_in_kernel(direction, selector)
            if theirs is None or theirs.ours:
                await self._requests.request(message)

    async def dump(self) -> Sequence[Policy]:
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

    async def flush(self) -> None:
        """Ours."""
        for policy in await self.dump():
            with suppress(KernelError):  # it went meanwhile
                await self.delete(policy.direction, policy.selector)

    def _as_asked(self, policy: Policy) -> Policy:
        """In the words in which it was asked for, where the kernel has only one of several ways to say it."""
        asked = self.standing.get(policy.direction, policy.selector)
        policy = replace(policy, unresolved=self._hold.mode_of(policy), selector=asked.selector if asked is not None else policy.selector)
        if asked is None:
            self.standing.put(policy)  # an earlier run's
        return policy
