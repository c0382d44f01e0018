"""As much DER (X.690) as an AlgorithmIdentifier and the comparison of names need, reader and writer."""

from __future__ import annotations

from typing import Final

_INTEGER: Final = 0x02
_NULL: Final = 0x05
_OBJECT_IDENTIFIER: Final = 0x06
_SEQUENCE: Final = 0x30
_SET: Final = 0x31
_STRINGS: Final = {0x0C: "utf-8", 0x13: "ascii", 0x14: "latin-1", 0x16: "ascii", 0x1C: "utf-32-be", 0x1E: "utf-16-be"}
_CONTEXT: Final = 0xA0

MAX_INTEGER_OCTETS: Final = 8  # no number in an AlgorithmIdentifier is larger
MAX_IDENTIFIER_OCTETS: Final = 64  # of an object identifier; peers may say any length, and each octet costs more than the one before


class DerError(ValueError):
    """The octets are not the DER that was expected."""


class DerReader:
    """Reads elements one after another and never past its end."""

    __slots__ = ("_data", "_offset")

    def __init__(self, data: bytes) -> None:
        self._data, self._offset = data, 0

    def at_end(self) -> bool:
        return self._offset == len(self._data)

    def end(self) -> None:
        if not self.at_end():
            raise DerError("trailing octets")

    def sequence(self) -> DerReader:
        return DerReader(self._element(_SEQUENCE))

    def set(self) -> DerReader:
        return DerReader(self._element(_SET))

    def string(self) -> str:
        """Any of the character string types."""
        tag = self._peek()
        if tag not in _STRINGS:
            raise DerError("no character string")
        try:
            return self._element(tag).decode(_STRINGS[tag])
        except UnicodeDecodeError as error:
            raise DerError("malformed character string") from error

    def null(self) -> None:
        if self._element(_NULL):
            raise DerError("NULL with content")

    def optional(self, number: int) -> DerReader | None:
        """The content of the context-specific element `number` if it comes next."""
        return DerReader(self._element(_CONTEXT | number)) if self._peek() == _CONTEXT | number else None

    def integer(self) -> int:
        content = self._element(_INTEGER)
        if not 1 <= len(content) <= MAX_INTEGER_OCTETS:
            raise DerError("integer of an unexpected length")
        return int.from_bytes(content, "big", signed=True)

    def object_identifier(self) -> str:
        return dotted(self._element(_OBJECT_IDENTIFIER))

    def _peek(self) -> int | None:
        return None if self.at_end() else self._data[self._offset]

    def _element(self, tag: int) -> bytes:
        if self._peek() != tag:
            raise DerError(f"no element of tag {tag:#04x}")
        header = self._data[self._offset + 1 : self._offset + 4]
        if not header:
            raise DerError("truncated element")
        if header[0] < 0x80:
            length, start = header[0], self._offset + 2
        elif header[0] == 0x81 and len(header) > 1:
            length, start = header[1], self._offset + 3
        elif header[0] == 0x82 and len(header) > 2:
            length, start = header[1] << 8 | header[2], self._offset + 4
        else:
            raise DerError("unexpected length")
        content = self._data[start : start + length]
        if len(content) != length:
            raise DerError("truncated element")
        self._offset = start + length
        return content


def dotted(content: bytes) -> str:
    """An object identifier, from the content of its element. DerError for one that is none, or longer than anybody's."""
    if not content or content[-1] & 0x80 or len(content) > MAX_IDENTIFIER_OCTETS:
        raise DerError("malformed object identifier")
    arcs: list[int] = []
    arc = 0
    for octet in content:
        arc = arc << 7 | octet & 0x7F
        if not octet & 0x80:
            arcs.append(arc)
            arc = 0
    first = min(arcs[0] // 40, 2)
    return ".".join(str(arc) for arc in (first, arcs[0] - 40 * first, *arcs[1:]))


def _element(tag: int, content: bytes) -> bytes:
    if len(content) < 0x80:
        return bytes([tag, len(content)]) + content
    if len(content) < 0x100:
        return bytes([tag, 0x81, len(content)]) + content
    return bytes([tag, 0x82]) + len(content).to_bytes(2, "big") + content


def sequence(*elements: bytes) -> bytes:
    return _element(_SEQUENCE, b"".join(elements))


def tagged(number: int, content: bytes) -> bytes:
    """An explicit context-specific tag."""
    return _element(_CONTEXT | number, content)


def integer(value: int) -> bytes:
    return _element(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def object_identifier(dotted: str) -> bytes:
    first, second, *rest = (int(arc) for arc in dotted.split("."))
    content = bytearray()
    for arc in (40 * first + second, *rest):
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(arc & 0x7F | 0x80)
        content += bytes(reversed(groups))
    return _element(_OBJECT_IDENTIFIER, bytes(content))


def canonical_name(der: bytes) -> tuple[tuple[tuple[str, str], ...], ...]:
    """A distinguished name to compare: string types, letter case and runs of spaces do not matter (RFC 5280 section 7.1). DerError."""
    outer = DerReader(der)
    relatives = outer.sequence()
    outer.end()
    name = []
    while not relatives.at_end():
        attributes = relatives.set()
        values = []
        while not attributes.at_end():
            attribute = attributes.sequence()
            oid, text = attribute.object_identifier(), attribute.string()
            attribute.end()
            values.append((oid, " ".join(text.casefold().split())))
        name.append(tuple(sorted(values)))
    return tuple(name)
