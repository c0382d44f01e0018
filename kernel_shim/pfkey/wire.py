"""A bounded reader of PF_KEY octets and the writer that mirrors it.

Headers are in host byte order (RFC 2367 section 2.2), addresses and the ports of socket addresses in network byte order.
`Reader` raises PfKeyError(EINVAL) and nothing else, whatever it is given; `Writer` does when a value does not fit its field.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address
from struct import Struct
from typing import Any, Final

from kernel_shim.model import AddressRange, IPAddress, PortRange
from kernel_shim.pfkey.constants import AF_INET, WORD
from kernel_shim.pfkey.dialects import Dialect
from kernel_shim.pfkey.messages import PfKeyError

_FAMILY: Final = Struct("=H")
_LENGTH_AND_FAMILY: Final = Struct("=BB")
_NETWORK_16: Final = Struct("!H")
_NETWORK_32: Final = Struct("!I")
_SOCKADDR_LENGTH: Final = {4: 16, 6: 28}
ADDRESS_LENGTH: Final = {4: 4, 6: 16}  # octets


def padding(length: int) -> int:
    """How many octets fill `length` up to a word."""
    return -length % WORD


class Reader:
    """Reads `data` from its beginning; `field` names what is read, for errors."""

    def __init__(self, data: bytes, field: str, dialect: Dialect) -> None:
        self.field = field
        self.dialect = dialect
        self._data = data
        self._at = 0
        self._end = len(data)

    @property
    def remaining(self) -> int:
        return self._end - self._at

    def fail(self, reason: str, part: str = "") -> PfKeyError:
        return PfKeyError(f"{self.field}.{part}" if part else self.field, reason)

    def take(self, layout: Struct) -> tuple[Any, ...]:
        at = self._at
        if at + layout.size > self._end:
            raise self.fail(f"{layout.size} octets expected, {self.remaining} left")
        self._at = at + layout.size
        return layout.unpack_from(self._data, at)

    def octets(self, count: int) -> bytes:
        at = self._at
        if at + count > self._end:
            raise self.fail(f"{count} octets expected, {self.remaining} left")
        self._at = at + count
        return self._data[at : at + count]

    def network_16(self) -> int:
        return int(self.take(_NETWORK_16)[0])

    def network_32(self) -> int:
        return int(self.take(_NETWORK_32)[0])

    def pad(self) -> None:
        """Passes over the octets that fill up the last word; their value is not looked at, as in Linux."""
        if self.remaining < WORD:
            self._at = self._end

    def restrict_to(self, count: int, field: str) -> _Restriction:
        """Nothing inside the `with` reads past the next `count` octets, and all of them must be read."""
        if count > self.remaining:
            raise PfKeyError(field, f"{count} octets announced, {self.remaining} left")
        return _Restriction(self, self._at + count, field)

    def address(self, version: int) -> IPAddress:
        return IPv4Address(self.octets(4)) if version == 4 else IPv6Address(self.octets(16))

    def version(self, number: int) -> int:
        """Checks the IP version that our own layouts carry."""
        if number not in ADDRESS_LENGTH:
            raise self.fail(f"IP version {number}", "version")
        return number

    def address_range(self, version: int) -> AddressRange:
        first, last = self.address(version), self.address(version)
        if int(first) > int(last):
            raise self.fail(f"{first}-{last} ends before it begins", "addresses")
        return AddressRange(first, last)

    def port_range(self, low: int, high: int) -> PortRange:
        if low > high:
            raise self.fail(f"{low}-{high} ends before it begins", "ports")
        return PortRange(low, high)

    def text(self, length: int) -> str:
        try:
            return self.octets(length).decode()
        except UnicodeDecodeError:
            raise self.fail("not UTF-8") from None

    def sockaddr(self) -> tuple[IPAddress, int]:
        """Address and port; a sockaddr_in or sockaddr_in6 of the dialect."""
        if self.dialect.sockaddr_length_octet:
            length, family = self.take(_LENGTH_AND_FAMILY)
        else:
            length, family = None, self.take(_FAMILY)[0]
        if family not in (AF_INET, self.dialect.af_inet6):
            raise self.fail(f"address family {family}", "family")
        version = 4 if family == AF_INET else 6
        if length is not None and length != _SOCKADDR_LENGTH[version]:
            raise self.fail(f"socket address of {length} octets", "family")
        port = self.network_16()
        if version == 4:
            address = self.address(4)
            self.octets(8)  # sin_zero
        else:
            self.octets(4)  # sin6_flowinfo
            address = self.address(6)
            self.octets(4)  # sin6_scope_id
        return address, port


class _Restriction:
    """A class because a generator costs a decoder a third of its time."""

    __slots__ = ("_end", "_field", "_outer_end", "_outer_field", "_reader")

    def __init__(self, reader: Reader, end: int, field: str) -> None:
        self._reader = reader
        self._end = end
        self._field = field

    def __enter__(self) -> None:
        reader = self._reader
        self._outer_end, self._outer_field = reader._end, reader.field
        reader._end, reader.field = self._end, self._field

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        reader = self._reader
        if kind is not None:
            return
        if reader._at != reader._end:
            raise reader.fail(f"{reader.remaining} octets too many")
        reader._end, reader.field = self._outer_end, self._outer_field


class Writer:
    """What `Reader` reads."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self._data = bytearray()

    def __len__(self) -> int:
        return len(self._data)

    def put(self, layout: Struct, *values: int | bytes) -> None:
        try:
            self._data += layout.pack(*values)
        except struct.error as error:
            raise PfKeyError("value", str(error)) from None

    def patch(self, at: int, layout: Struct, *values: int) -> None:
        """Fills in what was not known when it was passed."""
        try:
            layout.pack_into(self._data, at, *values)
        except struct.error as error:
            raise PfKeyError("length", str(error)) from None

    def octets(self, data: bytes) -> None:
        self._data += data

    def network_16(self, value: int) -> None:
        self.put(_NETWORK_16, value)

    def network_32(self, value: int) -> None:
        self.put(_NETWORK_32, value)

    def pad(self) -> None:
        self._data += bytes(padding(len(self._data)))

    def address(self, address: IPAddress) -> None:
        self._data += address.packed

    def address_range(self, addresses: AddressRange) -> None:
        self._data += addresses.first.packed + addresses.last.packed

    def sockaddr(self, address: IPAddress, port: int = 0) -> None:
        family = AF_INET if address.version == 4 else self.dialect.af_inet6
        if self.dialect.sockaddr_length_octet:
            self.put(_LENGTH_AND_FAMILY, _SOCKADDR_LENGTH[address.version], family)
        else:
            self.put(_FAMILY, family)
        self.network_16(port)
        if address.version == 4:
            self._data += address.packed + bytes(8)
        else:
            self._data += bytes(4) + address.packed + bytes(4)

    def take(self) -> bytes:
        return bytes(self._data)
