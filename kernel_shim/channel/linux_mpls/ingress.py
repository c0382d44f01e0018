"""What a peer may send: a filter at the ingress of its tunnel's device, behind which alone the device takes labels.

Linux has one table of labels and a yes or no an interface (`net.mpls.conf.DEVICE.input`). So a filter (tc, u32) passes the labels of the
peer's allow-list and drops all else, what has no label too: the host's own tables would route it, whichever customer sent it.
It changes label by label: what is allowed before and after passes all the while.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kernel_shim.channel.linux_mpls.devices import tunnel_device
from kernel_shim.channel.route_socket import link_named
from kernel_shim.model import KernelError
from kernel_shim.mpls.labels import LABEL_BITS, Label, LabelRange, LabelSet
from kernel_shim.mpls.lfib import PLATFORM, Peer

ETH_P_ALL: Final = 0x0003
ETH_P_MPLS_UC: Final = 0x8847
INGRESS: Final = 0xFFFF0000  # the handle of that qdisc, and the parent of its filters
FLOW: Final = 0x10001  # the class of what passes, which a filter must name and ingress passes over
U32_FIRST_KEY: Final = 4 + 16  # behind the attribute's header and struct tc_u32_sel
U32_KEY: Final = struct.Struct("!II")  # mask and value of struct tc_u32_key
BEHIND_LABEL: Final = 12  # bits of a stack entry

# Choices and limits of this implementation
PASS, DROP = 1, 2  # in this order a packet meets them
MAX_BLOCKS: Final = 4095  # of one peer, the nodes of one u32 table; a range of labels takes up to 38


class Block(NamedTuple):
    """The labels that are `value` under `mask`."""

    value: int
    mask: int

    @property
    def labels(self) -> LabelRange:
        return LabelRange(Label(self.value), Label(self.value | ~self.mask & (1 << LABEL_BITS) - 1))


def blocks(labels: LabelSet) -> Iterator[Block]:
    """As few as make up the set."""
    for first, last in labels:
        at = int(first)
        while at <= last:
            size = at & -at or 1 << LABEL_BITS
            while at + size - 1 > last:
                size >>= 1
            yield Block(at, (1 << LABEL_BITS) - size)
            at += size


async def admit(route: AsyncIPRoute, peer: Peer) -> None:
    """The filter stands before the device takes any label. KernelError."""
    if peer.space != PLATFORM:
        raise KernelError(errno.EOPNOTSUPP, f"peer {peer.name}: Linux has one label space a platform")
    wanted = set(blocks(peer.accepts))
    if len(wanted) > MAX_BLOCKS:
        raise KernelError(errno.ENOSPC, f"peer {peer.name}: more than {MAX_BLOCKS} blocks of labels that it may send")
    link = await link_named(route, tunnel_device(peer.name))
    if link is None:
        raise KernelError(errno.ENODEV, f"peer {peer.name} has no tunnel")
    index = link["index"]
    filters = await shut(route, index)
    for block in wanted - filters.passed.keys():
        key = f"{block.value << BEHIND_LABEL:#x}/{block.mask << BEHIND_LABEL:#x}+0"
        await _filter(route, "add", "u32", index, PASS, target=FLOW, keys=[key], action="ok")
    for block in filters.passed.keys() - wanted:
        await _filter(route, "del", "u32", index, PASS, target=FLOW, handle=filters.passed[block])
    if not gate(peer.name, open_=True):
        raise KernelError(errno.EACCES, f"peer {peer.name}: {tunnel_device(peer.name)} cannot be opened to labels")


async def shut(route: AsyncIPRoute, index: int) -> _Filters:
    """From now on the device drops what is not passed; what is. KernelError."""
    filters = await _Filters.read(route, index)
    if not filters.drops:
        with suppress(NetlinkError):  # it is there already
            await route.tc("add", "ingress", index=index, handle=INGRESS)
        await _filter(route, "add", "matchall", index, DROP, ETH_P_ALL, action="drop")
    return filters


async def _filter(route: AsyncIPRoute, verb: str, kind: str, index: int, place: int, protocol: int = ETH_P_MPLS_UC, **options: Any) -> None:
    await route.tc(f"{verb}-filter", kind, index=index, parent=INGRESS, prio=place, protocol=protocol, **options)


async def admitted(route: AsyncIPRoute, name: str, index: int) -> Peer | None:
    """What the peer of this name may send through its device; None when it is not as `admit` leaves it."""
    filters = await _Filters.read(route, index)
    if not filters.drops or not gate(name):
        return None
    return Peer(name, LabelSet(block.labels for block in filters.passed))


async def dropped(route: AsyncIPRoute, indexes: Set[int]) -> int:
    """How many packets the filters of these devices have."""
    return sum([qdisc.get("TCA_STATS")["drop"] async for qdisc in await route.get_qdiscs() if qdisc["handle"] == INGRESS and qdisc["index"] in indexes])


def gate(peer: str, open_: bool | None = None) -> bool:
    """Whether the device takes labels, after it was set. The setting goes with the device, so nothing is to be put back."""
    setting = Path(f"/proc/sys/net/mpls/conf/{tunnel_device(peer)}/input")
    try:
        if open_ is not None:
            setting.write_text(str(int(open_)))
        return setting.read_text().strip() == "1"
    except OSError:
        return False


class _Filters(NamedTuple):
    passed: Mapping[Block, int]  # with their handles
    drops: bool  # all that is not passed

    @classmethod
    async def read(cls, route: AsyncIPRoute, index: int) -> _Filters:
        passed, drops = {}, False
        async for message in await route.get_filters(index=index, parent=INGRESS):
            options = message.get("TCA_OPTIONS")
            if message.get("TCA_KIND") == "matchall":
                drops = True
            elif options is not None and (selector := options.get("TCA_U32_SEL")):
                mask, value = U32_KEY.unpack_from(selector.data, selector.offset + U32_FIRST_KEY)  # pyroute2 reads keys four octets too early
                passed[Block(value >> BEHIND_LABEL, mask >> BEHIND_LABEL)] = message["handle"]
        return cls(passed, drops)
