"""Copies of every message for a promiscuous client (SADB_X_PROMISC): bounded, without keys, and honest about what it lost.

A copy is encoded only when the client reads it. At a bound the newest is counted and not kept: the client learns how many it
missed at the place where they are missing, and the shim never waits for it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Final

from kernel_shim.model import KernelEvent
from kernel_shim.pfkey.codec import Codec
from kernel_shim.pfkey.constants import PRIVATE_EXTENSIONS, PRIVATE_MESSAGES, MessageType, SaType
from kernel_shim.pfkey.event_messages import event_message
from kernel_shim.pfkey.messages import Extension, Key, Message, Proposal, UnknownExtension
from kernel_shim.pfkey.private import Lost, Statistics

MAX_WATCHED_MESSAGES: Final = 1024  # not yet read by a promiscuous client
MAX_WATCHED_OCTETS: Final = 1 << 20
EVENT_OCTETS: Final = 300  # what an event is taken for

Copy = bytes | Message | KernelEvent


def without_keys(message: Message) -> Message:
    """A request as others may see it. What cannot be read is not repeated, for it may be a key under another number."""
    return replace(message, extensions=tuple(it for it in message.extensions if not isinstance(it, Key | UnknownExtension)))


class Watch:
    """The copies that one client has yet to read."""

    def __init__(self) -> None:
        self._copies: deque[tuple[Copy | Lost, int]] = deque()
        self._octets = 0
        self._lost = 0  # since the last copy that was kept
        self.lost = 0

    def __len__(self) -> int:
        return len(self._copies)

    def add(self, copy: Copy, octets: int) -> None:
        if len(self._copies) >= MAX_WATCHED_MESSAGES or self._octets + octets > MAX_WATCHED_OCTETS:
            self._lost += 1
            self.lost += 1
            return
        if self._lost:
            self._copies.append((Lost(self._lost), 0))
            self._lost = 0
        self._copies.append((copy, octets))
        self._octets += octets

    def next(self) -> Copy | Lost | None:
        """Takes the oldest."""
        if self._copies:
            copy, octets = self._copies.popleft()
            self._octets -= octets
            return copy
        lost, self._lost = self._lost, 0
        return Lost(lost) if lost else None


def encode_copy(copy: Copy | Lost, codec: Codec, proposal: Proposal, *, private: bool) -> bytes | None:
    """The datagram for a promiscuous client; None when only clients with our extensions may see it."""
    if isinstance(copy, Lost):
        return codec.encode(Message(MessageType.X_OVERRUN, SaType.ESP, extensions=(copy,))) if private else None
    if isinstance(copy, bytes):
        if private:
            return copy
        copy = codec.decode(copy)
    if isinstance(copy, Message):
        if private:
            return codec.encode(copy)
        return codec.encode(_plain(copy)) if copy.type < PRIVATE_MESSAGES else None
    return codec.encode(event_message(copy, proposal, private=private))


def _plain(message: Message) -> Message:
    return replace(message, extensions=tuple(it for it in message.extensions if _number(it) < PRIVATE_EXTENSIONS))


def _number(extension: Extension) -> int:
    return extension.number if isinstance(extension, UnknownExtension) else int(extension.type)  # type: ignore[attr-defined]


def reply_copy(request: Message, data: bytes) -> Copy:
    """A reply as others may see it: counters are left to who asked for them."""
    return replace(request, extensions=(Statistics(()),)) if request.type == MessageType.X_STATISTICS else data
