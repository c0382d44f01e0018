"""An SA of an `XfrmChannel` moves to other addresses, and goes on with its sequence numbers.

MIGRATE, the kernel's own way, may use sequence numbers twice (`kernel_shim.xfrm.migrate`). So the old SA is deleted first: what the kernel then
multicasts of it is its last state, after which it sends and takes nothing (xfrm_output_one and xfrm_input look at the state under its lock). From there
the new one goes on. Packets out are held meanwhile as for any SA that is yet to come; packets in that arrive meanwhile are lost.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import replace

from kernel_shim.channel.netlink import NetlinkSocket
from kernel_shim.model import Direction, KernelError, SecurityAssociation
from kernel_shim.xfrm.constants import Attribute, Group, MessageType
from kernel_shim.xfrm.replay import ReplayState
from kernel_shim.xfrm.sa_replies import KernelSa, sa_from
from kernel_shim.xfrm.sas import Continuation
from kernel_shim.xfrm.structs import MalformedMessage
from kernel_shim.xfrm.wire import Message


def check_migration(old: SecurityAssociation, new: SecurityAssociation) -> None:
    """KernelError(EINVAL) when they differ in more than addresses and encapsulation, or in the family of their addresses."""
    moved = replace(old, source=new.source, destination=new.destination, encapsulation=new.encapsulation)
    if replace(moved, acquire=new.acquire) != new:
        raise KernelError(errno.EINVAL, "an SA that moves to other addresses stays what it is in all else")


def only_ports_differ(old: SecurityAssociation, new: SecurityAssociation) -> bool:
    """Then the kernel changes them in place (xfrm_state_update)."""
    return (old.source, old.destination) == (new.source, new.destination) and None not in (old.encapsulation, new.encapsulation)


async def last_state(old: SecurityAssociation, delete: Callable[[], Awaitable[None]]) -> KernelSa:
    """Delete an SA, and give what it was when it ended. KernelError(EIO) when the kernel's notice of it was lost, and then the SA is."""
    told: list[KernelSa] = []

    def heard(message: Message) -> None:
        data = message.attributes.get(Attribute.SA)
        if message.type != MessageType.DELSA or data is None:
            return
        try:
            sa = sa_from(data, message.attributes)
        except MalformedMessage:
            return  # another key manager's
        if sa.id == old.id and sa.source == old.source:
            told.append(sa)

    notices = NetlinkSocket((Group.SA,), on_message=heard)
    notices.open()
    try:
        try:
            await delete()
        except KernelError as error:
            if error.errno != errno.ESRCH:  # it may be the repetition of a request whose answer was lost
                raise
        # It was sent within the request, so it is there already.
        while not told and notices.read():
            pass
        if told:
            return told[0]
        raise KernelError(errno.EIO, f"the last state of SA {old.spi:08x} was lost")
    finally:
        notices.close()


def continuation(last: KernelSa, direction: Direction, *, directed: bool) -> Continuation:
    """What the new SA goes on from. `directed`: as of `sa_message`."""
    replay = last.replay
    if directed:
        # XFRMA_SA_DIR: an outbound SA has no window, and an inbound one has sent nothing
        replay = ReplayState(sent=replay.sent, wide=replay.wide) if direction is Direction.OUT else replace(replay, sent=0)
    return Continuation(replay, last.usage)
