"""`struct virtio_net_hdr`: what a TUN with IFF_VNET_HDR puts before each packet (virtio 1.2 section 5.1.6, linux/virtio_net.h)."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple, Self

LENGTH: Final = 10
NEEDS_CHECKSUM: Final = 1
GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80
MAX_UDP_SEGMENTS: Final = 64  # UDP_MAX_SEGMENTS of Linux before 6.9; a frame of more is refused whole (EINVAL)
NO_OFFLOAD: Final = bytes(LENGTH)

_HEADER: Final = struct.Struct("<BBHHHH")


class VnetHeader(NamedTuple):
    """`checksum_start` and `checksum_offset` count from the packet's first byte."""

    flags: int = 0
    gso_type: int = GSO_NONE
    header_length: int = 0
    gso_size: int = 0
    checksum_start: int = 0
    checksum_offset: int = 0

    @classmethod
    def unpack(cls, frame: bytes | bytearray | memoryview) -> Self:
        return cls(*_HEADER.unpack_from(frame))

    def pack(self) -> bytes:
        return _HEADER.pack(*self)


def pack_into(frame: bytearray | memoryview, header: VnetHeader) -> None:
    _HEADER.pack_into(frame, 0, *header)
