"""IKE identities (RFC 7296 section 3.5): text as in swanctl.conf, wire form, and matching with wildcards."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Self

from kernel_shim.model import IPAddress
from vpnd.ike.dn import decode_dn, dn_has_wildcards, dn_text, match_dn, parse_dn
from vpnd.ike.iana import IdType, name_of

MAX_LENGTH: Final = 8192  # octets of configured identification data; a message must have room for it

# How closely a pattern covers an identity; the values are strongSwan's.
NO_MATCH: Final = 0
ANY_MATCH: Final = 1
MOST_WILDCARDS: Final = 2
ONE_WILDCARD: Final = 19
PERFECT_MATCH: Final = 20


@dataclass(frozen=True, slots=True)
class Identity:
    """An identity: its type (`IdType`, or any number a peer sends) and the octets of its identification data.

    Equality is that of the octets; `matches` knows about upper and lower case.
    """

    type: int
    data: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """An identity from configuration text, by strongSwan's rules (swanctl.conf(5), `connections.<conn>.local.id`).

        A prefix (`ipv4:`, `ipv6:`, `fqdn:`, `dns:`, `email:`, `rfc822:`, `userfqdn:`, `asn1dn:`, `keyid:`; `#` after it
        begins hexadecimal) says the type. Else `=` makes a DN, `%any` and its synonyms match everything, an address is an address,
        `@name` an FQDN, `@@user@domain` and `user@domain` an e-mail address, `@#hex` a key id, and the rest an FQDN.
        Raises ValueError that says at which character, counted from 1.
        """
        identity_type, data = _parse(text)
        if len(data) > MAX_LENGTH:
            raise ValueError(f"identity of {len(data)} octets, at most {MAX_LENGTH} are allowed")
        return cls(identity_type, data)

    @classmethod
    def of_address(cls, address: IPAddress) -> Self:
        return cls(IdType.IPV4_ADDR if address.version == 4 else IdType.IPV6_ADDR, address.packed)

    @classmethod
    def of_dn(cls, der: bytes) -> Self:
        """The identity of a certificate's subject: `der` is the Name as DER."""
        return cls(IdType.DER_ASN1_DN, der)

    @property
    def any(self) -> bool:
        """Whether this is `%any`, which matches every identity and never goes on the wire."""
        return self.type == IdType.ANY

    @property
    def has_wildcards(self) -> bool:
        """Whether this is a pattern: `%any`, `*` in front of a name, or a DN with a value `*`."""
        if self.type == IdType.DER_ASN1_DN:
            return dn_has_wildcards(self.data)
        return self.any or (self.type in _NAMES and self.data.startswith(b"*"))

    @property
    def address(self) -> IPAddress | None:
        """The address that this identity is, None when it is none."""
        if self.type == IdType.IPV4_ADDR and len(self.data) == 4:
            return IPv4Address(self.data)
        if self.type == IdType.IPV6_ADDR and len(self.data) == 16:
            return IPv6Address(self.data)
        return None

    def body(self) -> bytes:
        """What an ID payload holds after its generic header, and what AUTH covers (RFC 7296 section 2.15)."""
        return bytes((self.type, 0, 0, 0)) + self.data

    def matches(self, pattern: Identity) -> bool:
        """Whether `pattern`, which may hold wildcards, covers this identity."""
        return self.match_quality(pattern) > NO_MATCH

    def match_quality(self, pattern: Identity) -> int:
        """How closely `pattern` covers this identity: NO_MATCH, ANY_MATCH (by `%any`), fewer wildcards better, up to PERFECT_MATCH.

        Wildcards in this identity itself have no meaning.
        """
        if pattern.any:
            return ANY_MATCH
        if self.type != pattern.type:
            return NO_MATCH
        if self.type == IdType.DER_ASN1_DN:
            wildcards = match_dn(self.data, pattern.data)
            return NO_MATCH if wildcards is None else max(PERFECT_MATCH - wildcards, MOST_WILDCARDS)
        if self.type in _NAMES:
            return _match_name(self.data.lower(), pattern.data.lower())
        return PERFECT_MATCH if self.data == pattern.data else NO_MATCH

    def __str__(self) -> str:
        """As strongSwan prints it. Octets of a peer that are not printable become `?`."""
        if self.any:
            return "%any"
        if (address := self.address) is not None:
            return str(address)
        if self.type == IdType.DER_ASN1_DN:
            try:
                return dn_text(self.data)
            except ValueError:
                return f"(invalid DN {self.data.hex()})"
        text = "".join(chr(octet) if 0x20 <= octet < 0x7F else "?" for octet in self.data)
        if self.type in _NAMES:
            return text
        if self.type == IdType.KEY_ID:
            return text if "?" not in text else self.data.hex(":")
        return f"({name_of(IdType, self.type)} {self.data.hex()})"


_LENGTHS: Final = {IdType.IPV4_ADDR: 4, IdType.IPV6_ADDR: 16}
_NAMES: Final = frozenset({IdType.FQDN, IdType.RFC822_ADDR})
_ANY_TEXTS: Final = frozenset({"", "%any", "%any4", "%any6", "*", "0.0.0.0", "::", "0::0"})  # noqa: S104 - a word of the configuration
_LOOKS_LIKE_ADDRESS: Final = re.compile(r"[0-9A-Fa-f:.%]+\Z")
_LOOKS_LIKE_IPV4: Final = re.compile(r"[0-9.]+\Z")
_UNSUPPORTED_PREFIXES: Final = ("ipv4net:", "ipv6net:", "ipv4range:", "ipv6range:", "asn1gn:", "uri:", "xmppaddr:")


def _match_name(name: bytes, pattern: bytes) -> int:
    if not pattern.startswith(b"*"):
        return PERFECT_MATCH if name == pattern else NO_MATCH
    if len(pattern) == 1:
        return MOST_WILDCARDS
    return ONE_WILDCARD if name.endswith(pattern[1:]) else NO_MATCH


def _parse(text: str) -> tuple[IdType, bytes]:
    lowered = text.lower()
    for prefix, (identity_type, parse) in _PREFIXES.items():
        if lowered.startswith(prefix):
            rest = text[len(prefix) :]
            return identity_type, _hexadecimal_of(identity_type, text, len(prefix) + 1) if rest.startswith("#") else parse(text, len(prefix))
    if lowered.startswith(_UNSUPPORTED_PREFIXES):
        raise ValueError(f"identity type {lowered.split(':')[0]!r} at character 1 is not supported")
    if "=" in text:
        return IdType.DER_ASN1_DN, _dn(text, 0)
    if lowered in _ANY_TEXTS:
        return IdType.ANY, b""
    if text.startswith("@#"):
        return IdType.KEY_ID, _hexadecimal(text, 2)
    if text.startswith("@@"):
        return IdType.RFC822_ADDR, _name(text, 2)
    if text.startswith("@"):
        return IdType.FQDN, _name(text, 1)
    if "@" in text:
        return IdType.RFC822_ADDR, _name(text, 0)
    return _parse_bare(text)


def _parse_bare(text: str) -> tuple[IdType, bytes]:
    try:
        address = ip_address(text)
    except ValueError:
        # A mistyped address must not silently become a name.
        if _LOOKS_LIKE_IPV4.match(text) or (":" in text and _LOOKS_LIKE_ADDRESS.match(text)):
            raise ValueError(f"not an address at character 1: {text!r} (write fqdn: or keyid: before it if it is a name)") from None
        return (IdType.KEY_ID, _octets(text, 0)) if ":" in text else (IdType.FQDN, _name(text, 0))
    return (IdType.IPV4_ADDR if address.version == 4 else IdType.IPV6_ADDR), address.packed


def _hexadecimal_of(identity_type: IdType, text: str, start: int) -> bytes:
    data = _hexadecimal(text, start)
    if identity_type in _LENGTHS and len(data) != _LENGTHS[identity_type]:
        raise ValueError(f"{_LENGTHS[identity_type]} octets expected at character {start + 1}")
    if identity_type == IdType.DER_ASN1_DN:
        try:
            decode_dn(data)
        except ValueError as error:
            raise ValueError(f"not a distinguished name at character {start + 1}: {error}") from None
    return data


def _hexadecimal(text: str, start: int) -> bytes:
    digits = text[start:].replace(":", "")
    wrong = re.search(r"[^0-9A-Fa-f]", text[start:].replace(":", "0"))
    if wrong:
        raise ValueError(f"not a hexadecimal digit at character {start + wrong.start() + 1}: {wrong[0]!r}")
    if not digits or len(digits) % 2:
        raise ValueError(f"an even number of hexadecimal digits expected at character {start + 1}")
    return bytes.fromhex(digits)


def _name(text: str, start: int) -> bytes:
    wrong = re.search(r"[^!-~]|/", text[start:])
    if wrong:
        raise ValueError(f"not allowed in a name at character {start + wrong.start() + 1}: {wrong[0]!r}")
    if start == len(text):
        raise ValueError(f"name expected at character {start + 1}")
    return text[start:].encode("ascii")


def _octets(text: str, start: int) -> bytes:
    if start == len(text):
        raise ValueError(f"key id expected at character {start + 1}")
    return text[start:].encode("utf-8")


def _dn(text: str, start: int) -> bytes:
    try:
        return parse_dn(text[start:])
    except ValueError as error:
        raise ValueError(f"not a distinguished name: {error} of {text[start:]!r}") from None


def _ipv4(text: str, start: int) -> bytes:
    return _address(text, start, IPv4Address)


def _ipv6(text: str, start: int) -> bytes:
    return _address(text, start, IPv6Address)


def _address(text: str, start: int, family: type[IPv4Address] | type[IPv6Address]) -> bytes:
    try:
        return family(text[start:]).packed
    except ValueError as error:
        raise ValueError(f"not an address at character {start + 1}: {error}") from None


_PREFIXES: Final[dict[str, tuple[IdType, Callable[[str, int], bytes]]]] = {
    "ipv4:": (IdType.IPV4_ADDR, _ipv4),
    "ipv6:": (IdType.IPV6_ADDR, _ipv6),
    "rfc822:": (IdType.RFC822_ADDR, _name),
    "email:": (IdType.RFC822_ADDR, _name),
    "userfqdn:": (IdType.RFC822_ADDR, _name),
    "fqdn:": (IdType.FQDN, _name),
    "dns:": (IdType.FQDN, _name),
    "asn1dn:": (IdType.DER_ASN1_DN, _dn),
    "keyid:": (IdType.KEY_ID, _octets),
}
