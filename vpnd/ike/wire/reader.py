"""Reading and writing octets, side by side. Numbers are in network byte order."""

from __future__ import annotations

from types import TracebackType

from vpnd.ike.wire.errors import MalformedMessage


class Reader:
    """Reads one structure and never past its end. Every failure is MalformedMessage that names the field."""

    __slots__ = ("_data", "_end", "_field", "_position")

    def __init__(self, data: bytes, field: str) -> None:
        self._data = data
        self._position = 0
        self._end = len(data)
        self._field = field

    @property
    def remaining(self) -> int:
        return self._end - self._position

    @property
    def position(self) -> int:
        return self._position

    def fail(self, detail: str) -> MalformedMessage:
        """The error to raise for the structure being read."""
        return MalformedMessage(self._field, detail)

    def _advance(self, length: int) -> int:
        start = self._position
        if length > self._end - start:
            raise self.fail(f"{length} octets expected, {self._end - start} left")
        self._position = start + length
        return start

    def u8(self) -> int:
        return self._data[self._advance(1)]

    def u16(self) -> int:
        start = self._advance(2)
        return self._data[start] << 8 | self._data[start + 1]

    def take(self, length: int) -> bytes:
        start = self._advance(length)
        return self._data[start : start + length]

    def rest(self) -> bytes:
        return self.take(self._end - self._position)

    def skip(self, length: int) -> None:
        self._advance(length)

    def restrict_to(self, length: int, field: str) -> _Restriction:
        """A substructure: within the `with` block the reader ends after `length` octets, and the block must read them all."""
        return _Restriction(self, length, field)


class _Restriction:
    __slots__ = ("_field", "_length", "_outer_end", "_outer_field", "_reader")

    def __init__(self, reader: Reader, length: int, field: str) -> None:
        self._reader = reader
        self._length = length
        self._field = field
        self._outer_end = reader._end
        self._outer_field = reader._field

    def __enter__(self) -> None:
        reader = self._reader
        if not 0 <= self._length <= reader.remaining:
            raise MalformedMessage(self._field, f"length of {self._length} octets with {reader.remaining} left")
        reader._end = reader._position + self._length
        reader._field = self._field

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        reader = self._reader
        if kind is None and reader.remaining:
            raise reader.fail(f"{reader.remaining} octets too many")
        reader._end = self._outer_end
        reader._field = self._outer_field


class Writer:
    """Appends to a buffer; lengths are filled in where a substructure ends."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def __len__(self) -> int:
        return len(self._data)

    def u8(self, value: int) -> None:
        self._data.append(value)

    def u16(self, value: int) -> None:
        self._data += value.to_bytes(2, "big")

    def put(self, data: bytes) -> None:
        self._data += data

    def length_at(self, position: int, start: int) -> None:
        """Write the octets since `start` as the 16-bit length at `position`. Raises ValueError when they are too many."""
        length = len(self._data) - start
        if length > 0xFFFF:
            raise ValueError(f"structure of {length} octets does not fit its length field")
        self._data[position : position + 2] = length.to_bytes(2, "big")

    def bytes(self) -> bytes:
        return bytes(self._data)
