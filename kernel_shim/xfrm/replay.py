"""Sequence numbers and replay windows of SAs: the attributes that tell and set them, and the AE messages that carry nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kernel_shim.model import NO_MARK, IPAddress, Mark, SaId, Spi
from kernel_shim.xfrm.constants import MAX_REPLAY_WINDOW, Attribute, EventFlag, MessageType, NetlinkFlag
from kernel_shim.xfrm.selectors import mark_attributes
from kernel_shim.xfrm.structs import (
    LIFETIME_CURRENT,
    NUMBER,
    REPLAY,
    REPLAY_ESN,
    EventStruct,
    MalformedMessage,
    SaIdStruct,
    family_of,
    pack_address,
    unpack,
    unpack_address,
)
from kernel_shim.xfrm.wire import Message

WORD: Final = 32  # bits of one word of a replay bitmap
_LOW: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class ReplayState:
    """`sent` is the last number sent, `received` the highest received. `bitmap` is in the kernel's words and order, which depend on `window`.

    `wide`: the state of an SA with ESN or a window beyond 32 (struct xfrm_replay_state_esn); in the narrow form the SA itself tells the window.
    """

    sent: int = 0
    received: int = 0
    window: int = 0
    bitmap: tuple[int, ...] = ()
    wide: bool = False

    @classmethod
    def empty(cls, window: int) -> ReplayState:
        """The wide form of an SA that was not used yet."""
        return cls(window=window, bitmap=(0,) * -(-window // WORD), wide=True)

    def attributes(self) -> dict[int, bytes]:
        if not self.wide:
            bitmap = self.bitmap[0] if self.bitmap else 0
            return {Attribute.REPLAY_VAL: REPLAY.pack(self.sent & _LOW, self.received & _LOW, bitmap)}
        head = REPLAY_ESN.pack(len(self.bitmap), self.sent & _LOW, self.received & _LOW, self.sent >> WORD, self.received >> WORD, self.window)
        return {Attribute.REPLAY_ESN_VAL: head + b"".join(NUMBER.pack(word) for word in self.bitmap)}


NO_REPLAY_STATE: Final = ReplayState()


def replay_from(attributes: Mapping[int, bytes]) -> ReplayState | None:
    """None where the attributes tell nothing of it, as of an outbound SA that was never used."""
    if (data := attributes.get(Attribute.REPLAY_ESN_VAL)) is not None:
        words, sent, received, sent_high, received_high, window = unpack(REPLAY_ESN, data, "replay_state_esn")
        if words > MAX_REPLAY_WINDOW // WORD or len(data) != REPLAY_ESN.size + NUMBER.size * words:
            raise MalformedMessage(f"a replay bitmap of {words} words in {len(data) - REPLAY_ESN.size} octets")
        bitmap = tuple(word for (word,) in NUMBER.iter_unpack(data[REPLAY_ESN.size :]))
        return ReplayState(sent_high << WORD | sent, received_high << WORD | received, window, bitmap, wide=True)
    if (data := attributes.get(Attribute.REPLAY_VAL)) is not None:
        sent, received, word = unpack(REPLAY, data, "replay_state")
        return ReplayState(sent, received, bitmap=(word,))
    return None


@dataclass(frozen=True, slots=True)
class Usage:
    """struct xfrm_lifetime_cur. Times are seconds of the Unix epoch, 0 before the first packet."""

    octets: int = 0
    packets: int = 0
    added: int = 0
    used: int = 0

    def attributes(self) -> dict[int, bytes]:
        return {Attribute.LTIME_VAL: LIFETIME_CURRENT.pack(self.octets, self.packets, self.added, self.used)}


@dataclass(frozen=True, slots=True)
class SaEvent:
    """What an AE message tells of an SA; `why` are the flags."""

    sa: SaId
    source: IPAddress
    reqid: int  # the kernel's own
    why: EventFlag
    replay: ReplayState | None
    usage: Usage | None


def get_event_message(sa: SaId, mark: Mark = NO_MARK) -> Message:
    """GETAE: the kernel answers with a NEWAE that has the replay state and the use, and no key."""
    return _event_message(MessageType.GETAE, sa, EventFlag.REPLAY | EventFlag.LIFETIME, mark_attributes(mark), NetlinkFlag.ACK)


def set_event_message(sa: SaId, replay: ReplayState, mark: Mark = NO_MARK) -> Message:
    """NEWAE: a standing SA goes on from `replay`, which must have its form and window."""
    return _event_message(MessageType.NEWAE, sa, EventFlag.REPLAY, replay.attributes() | mark_attributes(mark), NetlinkFlag.ACK | NetlinkFlag.REPLACE)


def _event_message(kind: MessageType, sa: SaId, why: EventFlag, attributes: dict[int, bytes], flags: NetlinkFlag) -> Message:
    name = SaIdStruct(pack_address(sa.destination), sa.spi, family_of(sa.destination.version), sa.protocol)
    return Message(kind, EventStruct(name, bytes(16), why, 0).pack(), attributes, NetlinkFlag.REQUEST | flags)


def event_from(message: Message) -> SaEvent:
    told = EventStruct.unpack(message.body)
    usage = None
    if (data := message.attributes.get(Attribute.LTIME_VAL)) is not None:
        usage = Usage(*unpack(LIFETIME_CURRENT, data, "lifetime_cur"))
    return SaEvent(
        sa=SaId(unpack_address(told.id.daddr, told.id.family), Spi(told.id.spi), told.id.proto),
        source=unpack_address(told.saddr, told.id.family),
        reqid=told.reqid,
        why=EventFlag(told.flags),
        replay=replay_from(message.attributes),
        usage=usage,
    )
