"""The ACQUIREs of an `XfrmChannel`: each is state, a larval SA, that is found by looking when its notice was lost, and removed when nothing comes of it."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from kernel_shim.channel.api import ChannelClosed
from kernel_shim.channel.linux import MAX_ACQUIRES
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
        self._looking: asyncio.Task[None] | None = None
        self._look_again = False

    def add(self, event: Acquire) -> None:
        """One that the kernel reported, or that was found."""
        self._known[event.sequence] = event
        if len(self._known) > MAX_ACQUIRES:
            self._known.popitem(last=False)
        self._heard(event)

    def answered(self, sequence: AcquireSequence) -> None:
        """An SA took the larval one's place."""
        self._known.pop(sequence, None)

    async def failed(self, sequence: AcquireSequence) -> None:
        event = self._known.pop(sequence, None)
        if event is not None and event.source is not None and event.destination is not None:
            mark, if_id = (event.selector.mark, event.selector.if_id) if event.selector is not None else (NO_MARK, 0)
            try:
                await self.drop(Larval(sequence, event.source, event.destination, event.mode, event.reqid, mark, if_id))
            except TimeoutError:
                self._known[sequence] = event  # to be asked again
                raise

    async def drop(self, larval: Larval) -> None:
        """A larval SA can only be deleted by an SPI, so it is given one first; it has one if an earlier try got so far, and the reply tells it."""
        spi = Spi(secrets.randbelow(0xFFFFFF00) + 0x100)
        with suppress(KernelError):  # it is gone, or an SA took its place
            replies = await self._requests.request(claim_message(larval, spi))
            spi = next((sa_from(it.body, it.attributes).id.spi for it in replies if it.type == MessageType.NEWSA), spi)
            await self._requests.request(sa_id_message(MessageType.DELSA, SaId(larval.destination, spi), larval.mark))

    # Looking

    def look(self) -> None:
        """Report those that nobody has heard of."""
        self._look_again = True
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._find(), name="xfrm-acquires")

    async def stop(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    async def _find(self) -> None:
        while self._look_again:
            self._look_again = False
            try:
                found = await self._dump()
            except (KernelError, TimeoutError, ChannelClosed):
                return  # the next overrun looks again; the larval SA expires
            for sa in found:
                larval = sa.larval
                if larval is not None and larval.acquire not in self._known:
                    self._counters["found"] += 1
                    self.add(self._acquire_of(sa, larval))

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
