"""What the kernel is told of SAs, while it is asked for all of them."""

from __future__ import annotations

import asyncio

from xfrm_support import make_sa

from kernel_shim.channel.linux import HoldQueue
from kernel_shim.channel.listeners import EventListeners
from kernel_shim.channel.netlink import REPLY_TIMEOUT, NetlinkSocket
from kernel_shim.channel.xfrm_policies import XfrmPolicies
from kernel_shim.channel.xfrm_sas import XfrmSas
from kernel_shim.model import Mark
from kernel_shim.xfrm.constants import Attribute, MessageType, NetlinkFlag
from kernel_shim.xfrm.wire import Message


class Kernel(NetlinkSocket):
    """Without any SA when it is asked for them, and slow to say so."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Message] = []
        self.dumped = asyncio.Event()

    async def request(self, message: Message, *, repeat: bool = True, timeout: float = REPLY_TIMEOUT) -> list[Message]:
        self.requests.append(message)
        if message.flags & NetlinkFlag.DUMP == NetlinkFlag.DUMP:
            await self.dumped.wait()
        return []


async def test_an_sa_that_comes_during_a_dump_keeps_its_mark() -> None:
    kernel, counters = Kernel(), {"repeated": 0}
    sas = XfrmSas(kernel, XfrmPolicies(kernel, HoldQueue(), counters), EventListeners(), counters)
    dump = asyncio.ensure_future(sas.dump())
    while not kernel.requests:
        await asyncio.sleep(0)
    sa = make_sa(mark=Mark(7, 0xFF))
    await sas.add(sa)
    kernel.dumped.set()
    assert await dump == []
    await sas.delete(sa.id)
    deleted = kernel.requests[-1]
    assert deleted.type == MessageType.DELSA
    assert Attribute.MARK in deleted.attributes
