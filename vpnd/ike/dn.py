"""Distinguished names: text to DER and back (X.501, RFC 4514, RFC 5280 section 4.1.2.4), and their comparison.

Text is what strongSwan reads and prints: `C=CH, O=strongSwan, CN=moon`, or with slashes as `openssl x509 -subject` once wrote it.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from vpnd.auth.der import dotted

SEQUENCE: Final = 0x30
SET: Final = 0x31
OBJECT_IDENTIFIER: Final = 0x06
UTF8_STRING: Final = 0x0C
PRINTABLE_STRING: Final = 0x13
T61_STRING: Final = 0x14
IA5_STRING: Final = 0x16
UNIVERSAL_STRING: Final = 0x1C
BMP_STRING: Final = 0x1E

MAX_ATTRIBUTES: Final = 64  # of one name

_ENCODINGS: Final = {
    UTF8_STRING: "utf-8",
    PRINTABLE_STRING: "ascii",
    T61_STRING: "latin-1",
    IA5_STRING: "ascii",
    UNIVERSAL_STRING: "utf-32-be",
    BMP_STRING: "utf-16-be",
}
_PRINTABLE: Final = re.compile(r"[A-Za-z0-9 '()+,\-./:=?]*\Z")

# The first name of an object identifier is the one that is printed.
_NAMES: Final = (
    ("CN", "2.5.4.3"),
    ("S", "2.5.4.4"),
    ("SN", "2.5.4.5"),
    ("serialNumber", "2.5.4.5"),
    ("C", "2.5.4.6"),
    ("L", "2.5.4.7"),
    ("ST", "2.5.4.8"),
    ("STREET", "2.5.4.9"),
    ("O", "2.5.4.10"),
    ("OU", "2.5.4.11"),
    ("T", "2.5.4.12"),
    ("D", "2.5.4.13"),
    ("postalCode", "2.5.4.17"),
    ("N", "2.5.4.41"),
    ("G", "2.5.4.42"),
    ("I", "2.5.4.43"),
    ("ID", "2.5.4.45"),
    ("dnQualifier", "2.5.4.46"),
    ("pseudonym", "2.5.4.65"),
    ("organizationIdentifier", "2.5.4.97"),
    ("UID", "0.9.2342.19200300.100.1.1"),
    ("DC", "0.9.2342.19200300.100.1.25"),
    ("E", "1.2.840.113549.1.9.1"),
    ("Email", "1.2.840.113549.1.9.1"),
    ("emailAddress", "1.2.840.113549.1.9.1"),
    ("unstructuredName", "1.2.840.113549.1.9.2"),
    ("UN", "1.2.840.113549.1.9.2"),
    ("unstructuredAddress", "1.2.840.113549.1.9.8"),
    ("UA", "1.2.840.113549.1.9.8"),
    ("EN", "2.16.840.1.113730.3.1.3"),
    ("employeeNumber", "2.16.840.1.113730.3.1.3"),
)
_OID_OF_NAME: Final = {name.lower(): oid for name, oid in _NAMES}
_NAME_OF_OID: Final = {oid: name for name, oid in reversed(_NAMES)}
_IA5_OIDS: Final = frozenset({_OID_OF_NAME["e"], _OID_OF_NAME["dc"]})
_OID_TEXT: Final = re.compile(r"[0-2](\.(0|[1-9][0-9]{0,17})){1,30}\Z")


class Attribute(NamedTuple):
    """One attribute of a name; `rdn` numbers the RDN that it belongs to, `tag` is the DER tag of its value."""

    rdn: int
    oid: str
    tag: int
    value: bytes

    @property
    def text(self) -> str | None:
        """The value as characters; None when it is no valid string."""
        try:
            return self.value.decode(_ENCODINGS[self.tag])
        except (KeyError, UnicodeDecodeError):
            return None


def parse_dn(text: str) -> bytes:
    """The Name as DER. Raises ValueError that says at which character (from 1) of `text` it stopped."""
    separator = "/" if text.startswith("/") else ","
    rdns: list[bytes] = []
    position = 1 if separator == "/" else 0
    while True:
        end = text.find("=", position)
        if end < 0:
            raise ValueError(f"'=' expected after attribute type at character {position + 1}")
        name = text[position:end].strip()
        oid = _OID_OF_NAME.get(name.lower(), name)
        if not _OID_TEXT.match(oid):
            raise ValueError(f"unknown attribute type {name!r} at character {position + 1}")
        value, position = _read_value(text, end + 1, separator)
        rdns.append(_tlv(SET, _tlv(SEQUENCE, _encode_oid(oid) + _encode_value(oid, value))))
        if len(rdns) > MAX_ATTRIBUTES:
            raise ValueError(f"more than {MAX_ATTRIBUTES} attributes")
        if position >= len(text):
            return _tlv(SEQUENCE, b"".join(rdns))
        position += 1


def _read_value(text: str, position: int, separator: str) -> tuple[str, int]:
    """A value and the position of the separator after it, or of the text's end. Quotes and backslashes protect separators."""
    value: list[str] = []
    protected = 0  # characters of `value` that may not be stripped
    quoted = False
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
            if position == len(text):
                raise ValueError(f"nothing follows the backslash at character {position}")
            value.append(text[position])
            protected = len(value)
        elif character == '"':
            quoted = not quoted
            protected = len(value)
        elif character == separator and not quoted:
            break
        elif value or quoted or not character.isspace():
            value.append(character)
            protected = len(value) if quoted else protected
        position += 1
    if quoted:
        raise ValueError(f"quote is not closed at character {position + 1}")
    return "".join(value[:protected]) + "".join(value[protected:]).rstrip(), position


def _encode_value(oid: str, value: str) -> bytes:
    if oid in _IA5_OIDS and value.isascii():
        return _tlv(IA5_STRING, value.encode("ascii"))
    if _PRINTABLE.match(value):
        return _tlv(PRINTABLE_STRING, value.encode("ascii"))
    return _tlv(UTF8_STRING, value.encode("utf-8"))


def decode_dn(der: bytes) -> tuple[Attribute, ...]:
    """The attributes of a DER Name. Raises ValueError when it is none."""
    (name,) = _contents(der, SEQUENCE)
    attributes: list[Attribute] = []
    for number, rdn in enumerate(_contents_each(name, SET)):
        for pair in _contents_each(rdn, SEQUENCE):
            (_, oid), (tag, value) = _pair(pair)
            attributes.append(Attribute(number, dotted(oid), tag, value))
            if len(attributes) > MAX_ATTRIBUTES:
                raise ValueError(f"more than {MAX_ATTRIBUTES} attributes")
    return tuple(attributes)


def dn_text(der: bytes) -> str:
    """As strongSwan prints a name. Raises ValueError when `der` is none."""
    return ", ".join(f"{_NAME_OF_OID.get(attribute.oid, attribute.oid)}={_value_text(attribute)}" for attribute in decode_dn(der))


def _value_text(attribute: Attribute) -> str:
    text = attribute.text
    if text is None:
        return f"#{attribute.value.hex()}"
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return '"' + shown.replace("\\", "\\\\").replace('"', '\\"') + '"' if re.search(r'[,"\\]', shown) else shown


def match_dn(der: bytes, pattern: bytes) -> int | None:
    """How many of `pattern`'s values were the wildcard `*`; None when the names differ.

    Attributes must be the same ones in the same order. Strings are compared without regard to case, string type and runs of
    spaces (RFC 5280 section 7.1), anything else octet by octet. Names that are no valid DER are compared as octets.
    """
    if der == pattern:
        return 0
    try:
        ours, theirs = decode_dn(der), decode_dn(pattern)
    except ValueError:
        return None
    if len(ours) != len(theirs):
        return None
    wildcards = 0
    for own, other in zip(ours, theirs, strict=True):
        if (own.rdn, own.oid) != (other.rdn, other.oid):
            return None
        if other.text == "*":
            wildcards += 1
        elif _comparable(own) != _comparable(other):
            return None
    return wildcards


def dn_has_wildcards(der: bytes) -> bool:
    """Whether a value is `*`; False also when `der` is no name."""
    try:
        return any(attribute.text == "*" for attribute in decode_dn(der))
    except ValueError:
        return False


def _comparable(attribute: Attribute) -> tuple[int, bytes] | str:
    text = attribute.text
    return (attribute.tag, attribute.value) if text is None else " ".join(text.casefold().split())


# DER, as much of it as a Name needs.


def _tlv(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return bytes((tag, length)) + content
    size = (length.bit_length() + 7) // 8
    return bytes((tag, 0x80 | size)) + length.to_bytes(size, "big") + content


def _read_tlv(data: bytes, position: int) -> tuple[int, bytes, int]:
    if position + 2 > len(data):
        raise ValueError("DER element is cut off")
    tag, length = data[position], data[position + 1]
    position += 2
    if length & 0x80:
        size = length & 0x7F
        if not 1 <= size <= 3 or position + size > len(data):
            raise ValueError("DER length is not valid")
        length = int.from_bytes(data[position : position + size], "big")
        position += size
    if position + length > len(data):
        raise ValueError("DER element is cut off")
    return tag, data[position : position + length], position + length


def _elements(data: bytes) -> list[tuple[int, bytes]]:
    elements: list[tuple[int, bytes]] = []
    position = 0
    while position < len(data):
        tag, content, position = _read_tlv(data, position)
        elements.append((tag, content))
    return elements


def _contents_each(data: bytes, tag: int) -> list[bytes]:
    elements = _elements(data)
    if any(found != tag for found, _ in elements):
        raise ValueError(f"DER element is not of type {tag:#x}")
    return [content for _, content in elements]


def _contents(data: bytes, tag: int) -> tuple[bytes]:
    contents = _contents_each(data, tag)
    if len(contents) != 1:
        raise ValueError(f"{len(contents)} DER elements where one belongs")
    return (contents[0],)


def _pair(data: bytes) -> tuple[tuple[int, bytes], tuple[int, bytes]]:
    elements = _elements(data)
    if len(elements) != 2 or elements[0][0] != OBJECT_IDENTIFIER:
        raise ValueError("DER attribute is not a type and a value")
    return elements[0], elements[1]


def _encode_oid(oid: str) -> bytes:
    first, second, *rest = (int(arc) for arc in oid.split("."))
    if first < 2 and second > 39:
        raise ValueError(f"not an object identifier: {oid}")
    content = bytearray()
    for arc in (first * 40 + second, *rest):
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(arc & 0x7F | 0x80)
        content += bytes(reversed(groups))
    return _tlv(OBJECT_IDENTIFIER, bytes(content))
