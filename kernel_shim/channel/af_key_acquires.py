"""The ACQUIREs of an `AfKeyChannel`: each is state, a larval SA, that is found by looking when its notice was lost, and removed when nothing comes of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

from kernel_shim.channel.larval import MAX_ACQUIRES, remove_larval
from kernel_shim.channel.look import Look
from kernel_shim.channel.pfkey_link import PfKeyLink
from kernel_shim.channel.standing import StandingPolicies
from kernel_shim.model import Acquire, AcquireSequence, IPAddress, KernelError, Mode, Policy, ReqId, SaId, SaStatus, SecurityAssociation, Spi, SpiRequest
from kernel_shim.pfkey.af_key import Larval
from kernel_shim.pfkey.constants import MessageType
from kernel_shim.pfkey.sa_messages import sa_id_extensions, spi_request_extensions

FIRST_FOUND: Final = 0xC0000000  # the first number of ours, for ACQUIREs whose own nobody heard

_Ends = tuple[IPAddress, IPAddress, Mode, ReqId]


class AfKeyAcquires:
    """`dump` gives the SAs, `tell` takes each ACQUIRE with what its policy says of it. `counters` are the channel's."""

    def __init__(
        self,
        link: PfKeyLink,
        standing: StandingPolicies,
        dump: Callable[[], Awaitable[Sequence[SaStatus | Larval]]],
        tell: Callable[[Acquire], None],
        counters: dict[str, int],
    ) -> None:
        self._link = link
        self._standing = standing
        self._dump = dump
        self._tell = tell
        self._counters = counters
        self._known: OrderedDict[AcquireSequence, Acquire] = OrderedDict()
        self._larval: dict[_Ends, AcquireSequence] = {}
        self._next_found = FIRST_FOUND
        self._look = Look(self._find, "af-key-acquires")

    def add(self, event: Acquire) -> None:
        """One that the kernel reported: it names the policy and the outer addresses; the rest is the policy's."""
        policy = self._standing.of_index(event.policy)
        if policy is None or not policy.templates:
            self._counters["foreign"] += 1
            self._look.ask()  # it may be of a policy whose own reply has not come yet
            return
        self._counters["acquires"] += 1
        template = policy.templates[0]
        self._put(replace(event, reqid=template.reqid, mode=template.mode, selector=policy.selector))

    def answered(self, sa: SecurityAssociation) -> None:
        """An SA took the larval one's place."""
        self._forget(sa.source, sa.destination, sa.reqid)
        self._known.pop(sa.acquire, None)

    def expired(self, destination: IPAddress, reqid: ReqId) -> None:
        for ends in [ends for ends in self._larval if ends[1] == destination and ends[3] == reqid]:
            self._known.pop(self._larval.pop(ends), None)

    async def failed(self, sequence: AcquireSequence) -> None:
        """KernelError or TimeoutError when the larval SA may stand still: this is to be asked again."""
        event = self._known.get(sequence)
        if event is None or event.source is None or event.destination is None:
            return
        await self.drop(event.source, event.destination, event.mode, event.reqid)
        self._known.pop(sequence, None)
        self._forget(event.source, event.destination, event.reqid)

    async def drop(self, source: IPAddress, destination: IPAddress, mode: Mode, reqid: ReqId) -> None:
        """GETSPI claims the larval SA of these ends and reqid (xfrm_find_acq). Errors as of `failed`."""

        async def claim(spi: Spi) -> Spi:
            request = SpiRequest(source, destination, mode, reqid, minimum=spi, maximum=spi)
            await self._link.ask(MessageType.GETSPI, spi_request_extensions(request, private=False))
            return spi

        async def delete(spi: Spi) -> None:
            with suppress(KernelError):  # it is gone
                await self._link.ask(MessageType.DELETE, sa_id_extensions(SaId(destination, spi)))

        await remove_larval(claim, delete)

    # Looking

    def look(self) -> None:
        """Report those that nobody has heard of."""
        self._look.ask()

    async def stop(self) -> None:
        await self._look.stop()

    async def _find(self) -> None:
        """Its own number a larval SA does not tell, and gets one of ours."""
        for larval in await self._dump():
            if not isinstance(larval, Larval) or larval.spi:
                continue
            if self._larval.get((larval.source, larval.destination, larval.mode, larval.reqid)) in self._known:
                continue
            policy = self.asking(larval)
            if policy is not None:
                self._counters["found"] += 1
                number = AcquireSequence(self._next_found)
                self._next_found = FIRST_FOUND if self._next_found == 0xFFFFFFFF else self._next_found + 1
                self._put(Acquire(number, policy.index, larval.reqid, larval.mode, larval.source, larval.destination, policy.selector))

    def asking(self, larval: Larval) -> Policy | None:
        """The policy of ours that may have left it."""
        for policy in self._standing.outbound(larval.reqid):
            for template in policy.templates:
                fits = template.source in (None, larval.source) and template.destination in (None, larval.destination)
                if fits and (template.mode, template.reqid) == (larval.mode, larval.reqid):
                    return policy
        return None

    def _put(self, event: Acquire) -> None:
        self._known[event.sequence] = event
        if event.source is not None and event.destination is not None:
            self._larval[event.source, event.destination, event.mode, event.reqid] = event.sequence
        if len(self._known) > MAX_ACQUIRES:
            _, oldest = self._known.popitem(last=False)
            if oldest.source is not None and oldest.destination is not None:
                self._forget(oldest.source, oldest.destination, oldest.reqid)
        self._tell(event)

    def _forget(self, source: IPAddress, destination: IPAddress, reqid: ReqId) -> None:
        for mode in Mode:
            sequence = self._larval.pop((source, destination, mode, reqid), None)
            if sequence is not None:
                self._known.pop(sequence, None)
