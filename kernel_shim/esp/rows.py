"""Matrices of equal packets: one row a packet, views of every part made once and used for each batch.

All layouts lie over the same few buffers, so a layout costs its views and nothing else; a batch is worked off before the
next one begins. What RFC 4303 calls the packet is the row of the *wire* matrix, what it encrypts the row of the *plaintext* one.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from kernel_shim.esp.wire import HEADER, Shape
from kernel_shim.packet.virtio import MAX_UDP_SEGMENTS

Sequences = npt.NDArray[np.uint64]

# Specifications: what one send may hold, and the largest UDP payload over IPv4
MAX_ROWS: Final = MAX_UDP_SEGMENTS
MAX_DATAGRAMS: Final = 65507

# Limits of this implementation
MAX_LAYOUTS: Final = 64  # a layout of 64 rows costs about 40 kB of views

# The largest super-packet and, for each of its segments, headers, ESP's overhead and padding.
_CAPACITY: Final = 65536 + MAX_ROWS * 256


class Tables:
    """Headers, nonces and associated data of up to MAX_ROWS packets. `owner` says whose SPI and salt they hold now."""

    def __init__(self) -> None:
        self.owner: object = None
        self.counting = np.arange(MAX_ROWS, dtype=np.uint64)
        headers = bytearray(MAX_ROWS * 16)
        self.header_rows = np.frombuffer(headers, np.uint8).reshape(MAX_ROWS, 16)
        self.header_spis = np.ndarray((MAX_ROWS,), ">u4", headers, 0, (16,))
        self.header_sequences = np.ndarray((MAX_ROWS,), ">u4", headers, 4, (16,))
        self.header_ivs = np.ndarray((MAX_ROWS,), ">u8", headers, 8, (16,))
        nonces = bytearray(MAX_ROWS * 12)
        matrix = np.frombuffer(nonces, np.uint8).reshape(MAX_ROWS, 12)
        self.salts, self.raw_ivs = matrix[:, :4], matrix[:, 4:]
        self.ivs = np.ndarray((MAX_ROWS,), ">u8", nonces, 4, (12,))
        self.nonces = _slices(memoryview(nonces), 12, 0, 12, MAX_ROWS)
        self.short_nonces = _slices(memoryview(nonces), 12, 1, 12, MAX_ROWS)  # RFC 4309 section 4: AES-CCM has a salt of 3
        associated = bytearray(MAX_ROWS * 12)  # RFC 4106 section 5: SPI and the 64-bit sequence number
        self.associated_spis = np.ndarray((MAX_ROWS,), ">u4", associated, 0, (12,))
        self.associated_high = np.ndarray((MAX_ROWS,), ">u4", associated, 4, (12,))
        self.associated_low = np.ndarray((MAX_ROWS,), ">u4", associated, 8, (12,))
        self.associated = _slices(memoryview(associated), 12, 0, 12, MAX_ROWS)


def _slices(buffer: memoryview, stride: int, begin: int, end: int, count: int) -> list[memoryview]:
    return [buffer[row * stride + begin : row * stride + end] for row in range(count)]


class Rows:
    """Packets of one wire length. `plaintext` and `wire` are (capacity, length) matrices of bytes."""

    def __init__(self, tables: Tables, plaintext: memoryview, wire: memoryview, wire_length: int, shape: Shape) -> None:
        self.tables = tables
        self.wire_length: int = wire_length
        self.plaintext_length: int = wire_length - shape.overhead
        self.capacity: int = min(MAX_ROWS, len(wire) // wire_length)
        count, row = self.capacity, self.plaintext_length
        self.wire_buffer = wire
        self.plaintext: npt.NDArray[np.uint8] = np.frombuffer(plaintext, np.uint8)[: count * row].reshape(count, row)
        self.words: npt.NDArray[np.uint32] = np.frombuffer(plaintext, "<u4")[: count * row // 4].reshape(count, row // 4)
        self.trailers = self.plaintext[:, -2:]
        self.plaintext_views = _slices(plaintext, row, 0, row, count)
        self.wire: npt.NDArray[np.uint8] = np.frombuffer(wire, np.uint8)[: count * wire_length].reshape(count, wire_length)
        self.wire_marks = np.ndarray((count,), ">u8", wire, 0, (wire_length,))  # SPI and sequence number as one
        self.wire_ivs = self.wire[:, HEADER : HEADER + shape.iv]
        self.headers = _slices(wire, wire_length, 0, HEADER, count)
        self.sealed = _slices(wire, wire_length, HEADER + shape.iv, wire_length, count)
        self.packets = _slices(wire, wire_length, 0, wire_length, count)


class Workspace:
    """The buffers of one pipeline, and the layouts over them. `wire` is given where packets arrive in a buffer of their own."""

    def __init__(self, wire: memoryview | None = None) -> None:
        self.tables = Tables()
        self.wire = memoryview(bytearray(_CAPACITY)) if wire is None else wire
        self.plaintext = memoryview(bytearray(_CAPACITY))
        self._layouts: dict[tuple[int, int, int], Rows] = {}

    def __len__(self) -> int:
        """How many layouts there are."""
        return len(self._layouts)

    def knows(self, wire_length: int, shape: Shape) -> bool:
        """Whether `rows` has this layout at hand."""
        return (wire_length, shape.iv, shape.icv) in self._layouts

    def rows(self, wire_length: int, shape: Shape) -> Rows:
        """The layout for packets of `wire_length` bytes, which must be plausible for `shape` and at most MAX_DATAGRAMS."""
        key = (wire_length, shape.iv, shape.icv)
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= MAX_LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
            layout = self._layouts[key] = Rows(self.tables, self.plaintext, self.wire, wire_length, shape)
        return layout
