"""The ACQUIREs of an `AfKeyChannel`: each is state, a larval SA, that is found by looking when its notice was lost, and removed when nothing comes of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from kernel_shim.channel.larval import MAX_ACQUIRES, Refusals, Removal
from kernel_shim.channel.look import Look
from kernel_shim.channel.pfkey_link import PfKeyLink
from kernel_shim.channel.standing import StandingPolicies
from kernel_shim.model import Acquire, AcquireSequence, IPAddress, KernelError, Mode, Policy, ReqId, SaId, SaStatus, SecurityAssociation, Spi, SpiRequest
from kernel_shim.pfkey.af_key import Larval
from kernel_shim.pfkey.constants import MessageType
from kernel_shim.pfkey.sa_messages import sa_id_extensions, spi_request_extensions

FIRST_FOUND: Final = 0xC0000000  # the first number of ours, for ACQUIREs whose own nobody heard

_Ends = tuple[IPAddress, IPAddress, Mode, ReqId]


@dataclass
class _Standing:
    """A larval SA that was told of; `added` is its time of birth once a dump has said it."""

    number: AcquireSequence
    added: int | None = None

    def is_of(self, larval: Larval) -> bool:
        """Whether it is this one, and no later one of the same ends."""
        if self.added is None:
            self.added = larval.added
        return self.added == larval.added


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
        self._larval: dict[_Ends, _Standing] = {}
        self._to: dict[tuple[IPAddress, ReqId], set[_Ends]] = {}  # those of `_larval` by all that an EXPIRE tells
        self._next_found = FIRST_FOUND
        self._removal = Removal()
        self._refusals: Refusals[_Ends] = Refusals(lambda ends: self.drop(*ends))
        self._look = Look(self.read, "af-key-acquires")
        self._reading = 0  # dumps under way
        self._ended: set[_Ends] = set()  # meanwhile: the dumps may show them still

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
        self._forget(_ends_of(sa))
        self._known.pop(sa.acquire, None)

    def expired(self, destination: IPAddress, reqid: ReqId) -> None:
        for ends in list(self._to.get((destination, reqid), ())):
            self._forget(ends)

    async def failed(self, sequence: AcquireSequence) -> None:
        """KernelError or TimeoutError when the larval SA may stand still: this is to be asked again."""
        event, known = self._known.get(sequence), None
        if event is not None and event.source is not None and event.destination is not None:
            known = event.source, event.destination, event.mode, event.reqid
        ends = await self._refusals.refuse(sequence, known)
        if ends is None:
            return
        self._known.pop(sequence, None)
        standing = self._larval.get(ends)
        if standing is None or standing.number == sequence:  # else the packet that waits has asked anew meanwhile
            self._forget(ends)

    async def drop(self, source: IPAddress, destination: IPAddress, mode: Mode, reqid: ReqId) -> None:
        """GETSPI claims the larval SA of these ends and reqid (xfrm_find_acq). Errors as of `failed`."""

        async def claim(spi: Spi) -> Spi:
            request = SpiRequest(source, destination, mode, reqid, minimum=spi, maximum=spi)
            await self._link.ask(MessageType.GETSPI, spi_request_extensions(request, private=False))
            return spi

        async def delete(spi: Spi) -> None:
            with suppress(KernelError):  # it is gone
                await self._link.ask(MessageType.DELETE, sa_id_extensions(SaId(destination, spi)))

        await self._removal.remove((source, destination, mode, reqid), claim, delete)

    # Looking

    def look(self) -> None:
        """Report those that nobody has heard of."""
        self._look.ask()

    async def stop(self) -> None:
        await self._look.stop()

    async def read(self) -> Sequence[SaStatus | Larval]:
        """The SAs that the kernel tells. Those ACQUIREs of ours among them that nobody has heard of are reported.

        Its own number a larval SA does not tell: it gets one of ours. Where an SA of the same ends stands it asks for nothing any more.
        """
        before = dict(self._larval)
        self._reading += 1
        try:
            found = await self._dump()
            larval = {_ends_of(told): told for told in found if isinstance(told, Larval) and not told.spi}
            for ends, standing in list(self._larval.items()):
                gone = not standing.is_of(larval[ends]) if ends in larval else before.get(ends) is standing
                if gone:
                    self._take_out(ends)
            served = {_ends_of(told.sa) for told in found if isinstance(told, SaStatus)}
            for ends in larval.keys() - self._larval.keys() - self._ended - served:
                policy = self.asking(larval[ends])
                if policy is not None:
                    self._report(larval[ends], policy)
        finally:
            self._reading -= 1
            if not self._reading:
                self._ended.clear()
        return found

    def number_of(self, larval: Larval) -> AcquireSequence:
        """0 when nobody was told of it."""
        standing = self._larval.get(_ends_of(larval))
        return standing.number if standing is not None and not larval.spi else AcquireSequence(0)

    def _report(self, larval: Larval, policy: Policy) -> None:
        self._counters["found"] += 1
        number = AcquireSequence(self._next_found)
        self._next_found = FIRST_FOUND if self._next_found == 0xFFFFFFFF else self._next_found + 1
        self._put(Acquire(number, policy.index, larval.reqid, larval.mode, larval.source, larval.destination, policy.selector), larval.added)

    def asking(self, larval: Larval) -> Policy | None:
        """The policy of ours that may have left it."""
        for policy in self._standing.outbound(larval.reqid):
            for template in policy.templates:
                fits = template.source in (None, larval.source) and template.destination in (None, larval.destination)
                if fits and (template.mode, template.reqid) == (larval.mode, larval.reqid):
                    return policy
        return None

    def _put(self, event: Acquire, added: int | None = None) -> None:
        self._known[event.sequence] = event
        if event.source is not None and event.destination is not None:
            ends = event.source, event.destination, event.mode, event.reqid
            self._larval[ends] = _Standing(event.sequence, added)
            self._to.setdefault((event.destination, event.reqid), set()).add(ends)
        if len(self._known) > MAX_ACQUIRES:
            number, oldest = self._known.popitem(last=False)
            if oldest.source is not None and oldest.destination is not None:
                ends = oldest.source, oldest.destination, oldest.mode, oldest.reqid
                if ends in self._larval and self._larval[ends].number == number:  # else a newer one has these ends
                    self._forget(ends)
        self._tell(event)

    def _forget(self, ends: _Ends) -> None:
        self._take_out(ends)
        if self._reading:
            self._ended.add(ends)

    def _take_out(self, ends: _Ends) -> None:
        standing = self._larval.pop(ends, None)
        if standing is None:
            return
        self._known.pop(standing.number, None)
        _, destination, _, reqid = ends
        alike = self._to[destination, reqid]
        alike.discard(ends)
        if not alike:
            del self._to[destination, reqid]


def _ends_of(sa: Larval | SecurityAssociation) -> _Ends:
    return sa.source, sa.destination, sa.mode, sa.reqid
