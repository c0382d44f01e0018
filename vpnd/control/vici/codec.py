"""VICI on the wire: segments of a stream, packets in segments, messages in packets. Reader and writer side by side.

A segment is a u32 length and that many octets; a packet a u8 type, for some types a name with a u8 length, and a message; a message
is a sequence of elements, each a u8 type, a name with a u8 length and a value with a u16 length as the type has them. Network order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from vpnd.config.tree import Items, Node, Scalar, Section

# Of the protocol

MAX_SEGMENT: Final = 512 * 1024  # octets, without the length
HEADER_LENGTH: Final = 4
MAX_NAME: Final = 255
MAX_VALUE: Final = 65535

# Of this implementation

MAX_DEPTH: Final = 32  # sections in sections; what anyone sends is at most 5 deep


class PacketType(IntEnum):
    CMD_REQUEST = 0
    CMD_RESPONSE = 1
    CMD_UNKNOWN = 2
    EVENT_REGISTER = 3
    EVENT_UNREGISTER = 4
    EVENT_CONFIRM = 5
    EVENT_UNKNOWN = 6
    EVENT = 7


class Element(IntEnum):
    SECTION_START = 1
    SECTION_END = 2
    KEY_VALUE = 3
    LIST_START = 4
    LIST_ITEM = 5
    LIST_END = 6


NAMED: Final = frozenset({PacketType.CMD_REQUEST, PacketType.EVENT_REGISTER, PacketType.EVENT_UNREGISTER, PacketType.EVENT})


class MalformedVici(ValueError):
    """What came is not VICI; the text says where."""


class TooLong(ValueError):
    """What should be sent does not fit the protocol's lengths."""


@dataclass(frozen=True, slots=True)
class Packet:
    """`name` is empty for types that have none; `message` is still encoded."""

    type: PacketType
    name: str = ""
    message: bytes = field(default=b"", repr=False)


class Segmenter:
    """Cuts a stream into segments. Holds at most one segment and what `feed` was given."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The segments that `data` completes. Raises MalformedVici for a length that no segment has; the stream is then lost."""
        self._buffer += data
        segments = []
        start = 0
        while len(self._buffer) - start >= HEADER_LENGTH:
            length = int.from_bytes(self._buffer[start : start + HEADER_LENGTH], "big")
            if length > MAX_SEGMENT:
                raise MalformedVici(f"a segment of {length} octets, the most is {MAX_SEGMENT}")
            end = start + HEADER_LENGTH + length
            if len(self._buffer) < end:
                break
            segments.append(bytes(self._buffer[start + HEADER_LENGTH : end]))
            start = end
        del self._buffer[:start]
        return segments


def encode_segment(packet: Packet) -> bytes:
    """A packet with the length in front. Raises TooLong."""
    body = bytes([packet.type]) + (_encode_name(packet.name) if packet.type in NAMED else b"") + packet.message
    if len(body) > MAX_SEGMENT:
        raise TooLong(f"a message of {len(body)} octets, the most is {MAX_SEGMENT}")
    return len(body).to_bytes(HEADER_LENGTH, "big") + body


def decode_packet(segment: bytes) -> Packet:
    """Raises MalformedVici."""
    reader = _Reader(segment)
    number = reader.octet()
    try:
        packet_type = PacketType(number)
    except ValueError:
        raise MalformedVici(f"unknown packet type {number}") from None
    name = reader.name() if packet_type in NAMED else ""
    return Packet(packet_type, name, segment[reader.at :])


def encode_message(message: Section) -> bytes:
    """Raises TooLong for a name or value that is too long."""
    parts: list[bytes] = []
    _encode_section(message, parts)
    return b"".join(parts)


def _encode_section(section: Section, parts: list[bytes]) -> None:
    for name, node in section.entries.items():
        _encode_node(name, node, parts)


def _encode_node(name: str, node: Node, parts: list[bytes]) -> None:
    if isinstance(node, Section):
        parts.append(bytes([Element.SECTION_START]) + _encode_name(name))
        _encode_section(node, parts)
        parts.append(bytes([Element.SECTION_END]))
    elif isinstance(node, Items):
        parts.append(bytes([Element.LIST_START]) + _encode_name(name))
        parts += [bytes([Element.LIST_ITEM]) + _encode_value(item) for item in node.items]
        parts.append(bytes([Element.LIST_END]))
    else:
        parts.append(bytes([Element.KEY_VALUE]) + _encode_name(name) + _encode_value(node))


def _encode_name(name: str) -> bytes:
    encoded = name.encode()
    if len(encoded) > MAX_NAME:  # none has no name in its place: the counters of the whole daemon
        raise TooLong(f"a name of {len(encoded)} octets, it has at most {MAX_NAME}")
    return bytes([len(encoded)]) + encoded


def _encode_value(scalar: Scalar) -> bytes:
    if len(scalar.value) > MAX_VALUE:
        raise TooLong(f"a value of {len(scalar.value)} octets, the most is {MAX_VALUE}")
    return len(scalar.value).to_bytes(2, "big") + scalar.value


def decode_message(data: bytes) -> Section:
    """Raises MalformedVici: unbalanced, nested too deep, a key twice in a section, cut off."""
    reader = _Reader(data)
    root = Section()
    stack = [root]
    while not reader.at_end():
        element = reader.octet()
        if element == Element.SECTION_END:
            if len(stack) == 1:
                raise reader.malformed("the end of a section that was not begun")
            stack.pop()
        elif element == Element.KEY_VALUE:
            name = reader.name()
            _add(reader, stack[-1], name, Scalar(reader.value()))
        elif element == Element.LIST_START:
            name = reader.name()
            _add(reader, stack[-1], name, _decode_list(reader))
        elif element == Element.SECTION_START:
            if len(stack) > MAX_DEPTH:
                raise reader.malformed(f"sections more than {MAX_DEPTH} deep")
            section = Section()
            _add(reader, stack[-1], reader.name(), section)
            stack.append(section)
        else:
            raise reader.malformed(f"element type {element} is not expected")
    if len(stack) > 1:
        raise reader.malformed("a section without its end")
    return root


def _decode_list(reader: _Reader) -> Items:
    items = []
    while (element := reader.octet()) == Element.LIST_ITEM:
        items.append(Scalar(reader.value()))
    if element != Element.LIST_END:
        raise reader.malformed(f"element type {element} in a list")
    return Items(tuple(items))


def _add(reader: _Reader, section: Section, name: str, node: Node) -> None:
    if name in section.entries:
        raise reader.malformed("a name twice in one section")
    section.entries[name] = node


class _Reader:
    """Takes lengths at their word only within the data."""

    __slots__ = ("_data", "at")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def at_end(self) -> bool:
        return self.at >= len(self._data)

    def octet(self) -> int:
        return self._take(1)[0]

    def name(self) -> str:
        encoded = self._take(self.octet())
        try:
            return encoded.decode()
        except UnicodeDecodeError:
            raise self.malformed("a name that is not UTF-8") from None

    def value(self) -> bytes:
        return self._take(int.from_bytes(self._take(2), "big"))

    def malformed(self, what: str) -> MalformedVici:
        return MalformedVici(f"{what}, at octet {self.at}")

    def _take(self, length: int) -> bytes:
        taken = self._data[self.at : self.at + length]
        if len(taken) != length:
            raise self.malformed("cut off")
        self.at += length
        return taken
