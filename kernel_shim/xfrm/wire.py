"""Netlink framing: datagrams to messages and back, on pyroute2's message classes.

A message is its fixed structure and its attributes, both still octets; `sas`, `policies` and `events` give them their meaning.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pyroute2.netlink import nlmsg
from pyroute2.netlink.exceptions import NetlinkDecodeError

from kernel_shim.xfrm import structs
from kernel_shim.xfrm.constants import Attribute, MessageType, NetlinkFlag, NetlinkType
from kernel_shim.xfrm.structs import MalformedMessage

HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port id
_ERROR: Final = struct.Struct("=i")
_ATTRIBUTE: Final = struct.Struct("=HH")
_ERROR_TEXT: Final = 1  # NLMSGERR_ATTR_MSG
_ALIGNMENT: Final = 4  # NLMSG_ALIGNTO


@dataclass(frozen=True, slots=True)
class Message:
    """One netlink message. `body` is the fixed structure; it and the attributes may hold keys, so neither is shown.

    Of an attribute that comes twice the last counts, as in the kernel.
    """

    type: int
    body: bytes = field(default=b"", repr=False)
    attributes: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    flags: int = 0
    sequence: int = 0
    port: int = 0

    def require(self, attribute: Attribute) -> bytes:
        value = self.attributes.get(attribute)
        if value is None:
            raise MalformedMessage(f"message {self.type:#x} without {attribute.name}")
        return value


class _Xfrm(nlmsg):  # type: ignore[misc]
    """What all messages of the family share: attributes by `XFRMA_*` number, their values taken as they are."""

    __slots__ = ()
    prefix = "XFRMA_"
    nla_map = tuple((attribute.value, f"XFRMA_{attribute.name}", "cdata") for attribute in Attribute)


def _message_class(name: str, size: int) -> type[_Xfrm]:
    return type(name, (_Xfrm,), {"__slots__": (), "fields": (("body", f"{size}s"),) if size else ()})


_SA: Final = _message_class("usersa_info", structs.SA_SIZE)
_SA_ID: Final = _message_class("usersa_id", structs.USERSA_ID.size)
_POLICY: Final = _message_class("userpolicy_info", structs.POLICY_SIZE)
_POLICY_ID: Final = _message_class("userpolicy_id", structs.POLICY_ID_SIZE)
_AEVENT: Final = _message_class("aevent_id", structs.AEVENT_SIZE)
_FLAGS: Final = _message_class("flags", structs.NUMBER.size)
_EMPTY: Final = _message_class("empty", 0)

CLASSES: Final[Mapping[int, type[_Xfrm]]] = {
    MessageType.NEWSA: _SA,
    MessageType.DELSA: _SA_ID,
    MessageType.GETSA: _SA_ID,
    MessageType.NEWPOLICY: _POLICY,
    MessageType.DELPOLICY: _POLICY_ID,
    MessageType.GETPOLICY: _POLICY_ID,
    MessageType.ALLOCSPI: _message_class("userspi_info", structs.SA_SIZE + structs.SPI_RANGE.size),
    MessageType.ACQUIRE: _message_class("user_acquire", structs.ACQUIRE_SIZE),
    MessageType.EXPIRE: _message_class("user_expire", structs.EXPIRE_SIZE),
    MessageType.UPDPOLICY: _POLICY,
    MessageType.UPDSA: _SA,
    MessageType.POLEXPIRE: _message_class("user_polexpire", structs.POLICY_SIZE + 8),
    MessageType.FLUSHSA: _message_class("usersa_flush", 4),
    MessageType.FLUSHPOLICY: _EMPTY,
    MessageType.NEWAE: _AEVENT,
    MessageType.GETAE: _AEVENT,
    MessageType.REPORT: _message_class("user_report", structs.REPORT_SIZE),
    MessageType.MIGRATE: _POLICY_ID,
    MessageType.NEWSADINFO: _FLAGS,
    MessageType.GETSADINFO: _FLAGS,
    MessageType.NEWSPDINFO: _FLAGS,
    MessageType.GETSPDINFO: _FLAGS,
    MessageType.MAPPING: _message_class("user_mapping", structs.MAPPING_SIZE),
}
"""Messages of other types are passed over: nothing here asks for them."""


def encode(message: Message) -> bytes:
    """KeyError for a type that is not in `CLASSES`."""
    encoded: Any = CLASSES[message.type]()
    if message.body:
        encoded["body"] = message.body
    encoded["attrs"] = [(f"XFRMA_{Attribute(kind).name}", value) for kind, value in message.attributes.items()]
    encoded["header"]["type"] = message.type
    encoded["header"]["flags"] = message.flags
    encoded["header"]["sequence_number"] = message.sequence
    encoded["header"]["pid"] = message.port
    encoded.encode()
    return bytes(encoded.data)


def frames(datagram: bytes) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Type, flags, sequence and port of each netlink message, in order, and where it begins, header included, and ends.

    MalformedMessage at the first that is none; those before it have been given.
    """
    at = 0
    while at < len(datagram):
        if len(datagram) - at < HEADER.size:
            raise MalformedMessage(f"{len(datagram) - at} octets where a message begins")
        length, kind, flags, sequence, port = HEADER.unpack_from(datagram, at)
        if not HEADER.size <= length <= len(datagram) - at:
            raise MalformedMessage(f"a message of {length} octets in {len(datagram) - at}")
        yield kind, flags, sequence, port, at, at + length
        at += length + -length % _ALIGNMENT


def decode(datagram: bytes) -> Iterator[Message]:
    """The messages of a datagram. Errors as of `frames`."""
    for kind, flags, sequence, port, begin, end in frames(datagram):
        body, attributes = _split(kind, datagram[begin:end])
        yield Message(kind, body, attributes, flags, sequence, port)


def _split(kind: int, whole: bytes) -> tuple[bytes, Mapping[int, bytes]]:
    if kind not in CLASSES:
        return whole[HEADER.size :], {}
    decoded: Any = CLASSES[kind](whole)
    try:
        decoded.decode()
        attributes = dict(_attributes(decoded["attrs"])) if "attrs" in decoded else {}
    except (NetlinkDecodeError, struct.error, ValueError, KeyError, IndexError, TypeError) as error:
        raise MalformedMessage(f"message {kind:#x}: {error}") from None
    return b"" if CLASSES[kind] is _EMPTY else decoded["body"], attributes


def _attributes(slots: Iterable[Any]) -> Iterator[tuple[int, bytes]]:
    for slot in slots:
        name, value = slot[0], slot[1]
        if isinstance(name, str) and name.startswith("XFRMA_") and isinstance(value, bytes):
            yield Attribute[name.removeprefix("XFRMA_")].value, value


def error_of(message: Message) -> int:
    """The errno of an NLMSG_ERROR (0 is an acknowledgement) or NLMSG_DONE."""
    if message.type == NetlinkType.DONE and len(message.body) < _ERROR.size:
        return 0
    (number,) = structs.unpack(_ERROR, message.body, "nlmsgerr")
    return -number if number < 0 else 0


def error_text(message: Message) -> str:
    """What the kernel says about an error (NLMSGERR_ATTR_MSG); empty when it says nothing. The socket asked for capped acknowledgements."""
    if message.type != NetlinkType.ERROR or not message.flags & NetlinkFlag.ACK_TLVS:
        return ""
    at = _ERROR.size + HEADER.size
    while at + _ATTRIBUTE.size <= len(message.body):
        length, kind = _ATTRIBUTE.unpack_from(message.body, at)
        if length < _ATTRIBUTE.size:
            return ""
        if kind == _ERROR_TEXT:
            return message.body[at + _ATTRIBUTE.size : at + length].split(b"\0", 1)[0].decode("utf-8", "replace")
        at += length + -length % _ALIGNMENT
    return ""
