"""The ACQUIREs of an `XfrmChannel`: each is state, a larval SA, that is found by looking when its notice was lost, and removed when nothing comes of it."""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

from kernel_shim.channel.larval import MAX_ACQUIRES, Refusals, Removal
from kernel_shim.channel.look import Look
from kernel_shim.channel.netlink import NetlinkSocket
from kernel_shim.channel.standing import StandingPolicies
from kernel_shim.model import NO_MARK, Acquire, AcquireSequence, Flow, KernelError, PolicyIndex, SaId, Spi
from kernel_shim.xfrm.constants import MessageType
from kernel_shim.xfrm.sa_replies import KernelSa, sa_from
from kernel_shim.xfrm.sas import Larval, claim_message, sa_id_message


class XfrmAcquires:
    """`dump` gives the SAs of ours, `heard` takes each ACQUIRE once more than it was heard of. `counters` are the channel's."""

    def __init__(
        self,
        requests: NetlinkSocket,
        standing: StandingPolicies,
        dump: Callable[[], Awaitable[Sequence[KernelSa]]],
        heard: Callable[[Acquire], None],
        counters: dict[str, int],
    ) -> None:
        self._requests = requests
        self._standing = standing
        self._dump = dump
        self._heard = heard
        self._counters = counters
        self._known: OrderedDict[AcquireSequence, Acquire] = OrderedDict()
        self._removal = Removal()
        self._refusals = Refusals(self.drop)
        self._look = Look(self.read, "xfrm-acquires")
        self._reading = 0  # dumps under way
        self._ended: set[AcquireSequence] = set()  # meanwhile: the dumps may show them still

    def add(self, event: Acquire) -> None:
        """One that the kernel reported, or that was found."""
        self._known[event.sequence] = event
        if len(self._known) > MAX_ACQUIRES:
            self._known.popitem(last=False)
        self._heard(event)

    def answered(self, sequence: AcquireSequence) -> None:
        """The larval SA is gone: an SA took its place, or nothing came of it."""
        self._known.pop(sequence, None)
        if self._reading:
            self._ended.add(sequence)

    async def failed(self, sequence: AcquireSequence) -> None:
        """KernelError or TimeoutError when the larval SA may stand still: this is to be asked again."""
        if await self._refusals.refuse(sequence, self._larval_of(sequence)) is not None:
            self.answered(sequence)

    def _larval_of(self, sequence: AcquireSequence) -> Larval | None:
        event = self._known.get(sequence)
        if event is None or event.source is None or event.destination is None:
            return None
        mark, if_id = (event.selector.mark, event.selector.if_id) if event.selector is not None else (NO_MARK, 0)
        return Larval(sequence, event.source, event.destination, event.mode, event.reqid, mark, if_id)

    async def drop(self, larval: Larval) -> None:
        """Errors as of `failed`."""

        async def claim(spi: Spi) -> Spi:
            replies = await self._requests.request(claim_message(larval, spi))
            return next((sa_from(it.body, it.attributes).id.spi for it in replies if it.type == MessageType.NEWSA), spi)

        async def delete(spi: Spi) -> None:
            try:
                await self._requests.request(sa_id_message(MessageType.DELSA, SaId(larval.destination, spi), larval.mark))
            except KernelError as error:
                if error.errno != errno.ESRCH:
                    raise

        ends = larval.source, larval.destination, larval.mode, larval.reqid, larval.mark, larval.if_id
        await self._removal.remove(ends, claim, delete)

    # Looking

    def look(self) -> None:
        """Report those that nobody has heard of."""
        self._look.ask()

    async def stop(self) -> None:
        await self._look.stop()

    async def read(self) -> Sequence[KernelSa]:
        """The SAs of ours. Those ACQUIREs among them that nobody has heard of are reported."""
        self._reading += 1
        try:
            found = await self._dump()
            for sa in found:
                larval = sa.larval
                if larval is not None and larval.acquire not in self._known and larval.acquire not in self._ended:
                    self._counters["found"] += 1
                    self.add(self._acquire_of(sa, larval))
        finally:
            self._reading -= 1
            if not self._reading:
                self._ended.clear()
        return found

    def _acquire_of(self, sa: KernelSa, larval: Larval) -> Acquire:
        """What the kernel said, or would have said, when it made this larval SA, whose selector is the flow."""
        asked = sa.selector
        flow = None
        if asked is not None:
            flow = Flow(asked.source.first, asked.destination.first, asked.protocol, asked.source_ports.low, asked.destination_ports.low)
        policy = self._standing.asking(larval.reqid, flow)
        index = policy.index if policy is not None else PolicyIndex(0)
        selector = policy.selector if policy is not None else None
        return Acquire(larval.acquire, index, larval.reqid, larval.mode, larval.source, larval.destination, selector, flow)
