"""A whole IKE message: header and payload chain (RFC 7296 section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from vpnd.ike.wire.header import Header
from vpnd.ike.wire.payloads import NotifyPayload, Payload, SkfPayload, SkPayload

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Message:
    """Payloads in their order on the wire. An encrypted message ends with `SkPayload` or `SkfPayload`, unopened."""

    header: Header
    payloads: tuple[Payload, ...]

    def first(self, kind: type[P]) -> P | None:
        return next((payload for payload in self.payloads if isinstance(payload, kind)), None)

    def all(self, kind: type[P]) -> tuple[P, ...]:
        return tuple(payload for payload in self.payloads if isinstance(payload, kind))

    def notify(self, notify_type: int) -> NotifyPayload | None:
        """The first notification of that type."""
        return next((payload for payload in self.payloads if isinstance(payload, NotifyPayload) and payload.type == notify_type), None)

    def notifies(self, notify_type: int) -> tuple[NotifyPayload, ...]:
        return tuple(payload for payload in self.payloads if isinstance(payload, NotifyPayload) and payload.type == notify_type)

    @property
    def encrypted(self) -> SkPayload | SkfPayload | None:
        last = self.payloads[-1] if self.payloads else None
        return last if isinstance(last, SkPayload | SkfPayload) else None


def decode_message(data: bytes) -> Message:
    """A datagram (without non-ESP marker) as a message. Raises MalformedMessage."""
    raise NotImplementedError


def encode_message(message: Message) -> bytes:
    raise NotImplementedError


def decode_payloads(first: int, data: bytes) -> tuple[Payload, ...]:
    """The payload chain inside an opened SK payload; `first` is the type of its first payload. Raises MalformedMessage."""
    raise NotImplementedError


def encode_payloads(payloads: Sequence[Payload]) -> tuple[int, bytes]:
    """The type of the first payload (0 for none) and the chain."""
    raise NotImplementedError
