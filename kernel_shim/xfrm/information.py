"""What the kernel tells of its two databases as wholes, and from which prefix lengths on its SPD is a hash table."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from kernel_shim.model import Direction, KernelError
from kernel_shim.xfrm.constants import SAD_COUNT, SAD_HASH, DatabaseAttribute, MessageType, NetlinkFlag
from kernel_shim.xfrm.structs import HASH_SIZES, HASH_THRESHOLD, NUMBER, SPD_COUNTS, unpack
from kernel_shim.xfrm.wire import Message

_EVERYTHING: Final = NUMBER.pack(0xFFFFFFFF)  # the flags of a request, of which the kernel takes no notice
_BITS: Final = {4: 32, 6: 128}


@dataclass(frozen=True, slots=True)
class HashThreshold:
    """Policies whose selectors have at least so many bits are found by hash, the others in trees and lists."""

    local: int
    remote: int


@dataclass(frozen=True, slots=True)
class SpdInformation:
    """`policies` and `socket_policies` are counts. `buckets` grow with the SPD up to `most_buckets`. Thresholds None: this kernel has none."""

    policies: dict[Direction, int]
    socket_policies: dict[Direction, int]
    buckets: int
    most_buckets: int
    threshold4: HashThreshold | None
    threshold6: HashThreshold | None


@dataclass(frozen=True, slots=True)
class SadInformation:
    sas: int
    buckets: int
    most_buckets: int


def get_spd_information_message() -> Message:
    return Message(MessageType.GETSPDINFO, _EVERYTHING, {}, NetlinkFlag.REQUEST | NetlinkFlag.ACK)


def get_sad_information_message() -> Message:
    return Message(MessageType.GETSADINFO, _EVERYTHING, {}, NetlinkFlag.REQUEST | NetlinkFlag.ACK)


def set_thresholds_message(threshold4: HashThreshold | None, threshold6: HashThreshold | None) -> Message:
    """NEWSPDINFO; None leaves a family as it is. The kernel builds its tables anew. KernelError(EINVAL) for more bits than an address has."""
    attributes: dict[int, bytes] = {}
    for version, kind, threshold in ((4, DatabaseAttribute.SPD_THRESHOLD_4, threshold4), (6, DatabaseAttribute.SPD_THRESHOLD_6, threshold6)):
        if threshold is None:
            continue
        if not all(0 <= bits <= _BITS[version] for bits in (threshold.local, threshold.remote)):
            raise KernelError(errno.EINVAL, f"a hash threshold of {threshold.local} and {threshold.remote} bits of IPv{version}")
        attributes[kind] = HASH_THRESHOLD.pack(threshold.local, threshold.remote)
    return Message(MessageType.NEWSPDINFO, _EVERYTHING, attributes, NetlinkFlag.REQUEST | NetlinkFlag.ACK)


def spd_information_from(message: Message) -> SpdInformation:
    attributes = message.attributes
    counts = unpack(SPD_COUNTS, attributes.get(DatabaseAttribute.SPD_COUNTS, b""), "spdinfo")
    buckets, most = unpack(HASH_SIZES, attributes.get(DatabaseAttribute.SPD_HASH, b""), "spdhinfo")
    order = (Direction.IN, Direction.OUT, Direction.FORWARD)
    thresholds = [
        HashThreshold(*unpack(HASH_THRESHOLD, attributes[kind], "spdhthresh")) if kind in attributes else None
        for kind in (DatabaseAttribute.SPD_THRESHOLD_4, DatabaseAttribute.SPD_THRESHOLD_6)
    ]
    return SpdInformation(dict(zip(order, counts[:3], strict=True)), dict(zip(order, counts[3:], strict=True)), buckets, most, *thresholds)


def sad_information_from(message: Message) -> SadInformation:
    (count,) = unpack(NUMBER, message.attributes.get(SAD_COUNT, b""), "sadinfo")
    return SadInformation(count, *unpack(HASH_SIZES, message.attributes.get(SAD_HASH, b""), "sadhinfo"))
