"""What really was on the wire: an AF_PACKET capture, its packets dissected as far as a leak shows.

A capture that lost packets proves nothing: `Capture.packets` raises when the kernel dropped any.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from types import TracebackType
from typing import Final, Self

from kernel_shim.packet.traffic_class import traffic_class
from lab.namespaces import Namespace
from lab.process import PATIENCE, LabError, wait_until

# linux/if_packet.h, linux/if_ether.h
SOL_PACKET: Final = 263
PACKET_STATISTICS: Final = 6
ETH_P_ALL: Final = 3
ETH_P_IP: Final = 0x0800
ETH_P_IPV6: Final = 0x86DD
ETH_P_MPLS: Final = (b"\x88\x47", b"\x88\x48")
SO_RCVBUFFORCE: Final = 33
SO_TIMESTAMPNS: Final = 35  # struct timespec of CLOCK_REALTIME

SNAP_BYTES: Final = 192  # outer and inner headers with options; payload is of no interest
BUFFER_BYTES: Final = 128 << 20
MAX_PACKETS: Final = 2_000_000

IPNetwork = IPv4Network | IPv6Network
IPAddress = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class WirePacket:
    """An IP packet as it stood on the wire. `payload` starts behind the IP header and may be cut; ports are 0 where there are none."""

    source: IPAddress
    destination: IPAddress
    protocol: int
    source_port: int
    destination_port: int
    length: int
    payload: bytes
    time: float = 0.0  # seconds of the Unix epoch, from the kernel
    traffic_class: int = 0  # DSCP and ECN
    dont_fragment: bool = False  # the bit of IPv4

    @property
    def is_ike(self) -> bool:
        """On port 500, or on 4500 behind the non-ESP marker (RFC 3948 section 2.2)."""
        if self.protocol != socket.IPPROTO_UDP:
            return False
        ports = {self.source_port, self.destination_port}
        return 500 in ports or (4500 in ports and self.payload[8:12] == bytes(4))

    @property
    def is_esp(self) -> bool:
        if self.protocol == socket.IPPROTO_ESP:
            return True
        return self.protocol == socket.IPPROTO_UDP and 4500 in (self.source_port, self.destination_port) and len(self.payload) > 12 and not self.is_ike

    @property
    def is_keepalive(self) -> bool:
        """RFC 3948 section 2.3."""
        return self.protocol == socket.IPPROTO_UDP and 4500 in (self.source_port, self.destination_port) and self.payload[8:] == b"\xff"

    @property
    def ike_exchange(self) -> tuple[int, bool] | None:
        """Exchange type and whether it is a response (RFC 7296 section 3.1); None when this is not IKE."""
        if not self.is_ike:
            return None
        header = self.payload[12:] if 4500 in (self.source_port, self.destination_port) else self.payload[8:]
        return (header[18], bool(header[19] & 0x20)) if len(header) >= 28 else None

    @property
    def is_syn(self) -> bool:
        """A TCP segment that asks for a connection, for the first time or again."""
        return self.protocol == socket.IPPROTO_TCP and len(self.payload) > 13 and self.payload[13] & 0x12 == 0x02

    @property
    def esp_spi(self) -> int | None:
        """None when this is not ESP."""
        if not self.is_esp:
            return None
        return int.from_bytes(self.payload[:4] if self.protocol == socket.IPPROTO_ESP else self.payload[8:12], "big")

    def __str__(self) -> str:
        return f"{self.source}.{self.source_port} > {self.destination}.{self.destination_port} protocol {self.protocol} length {self.length}"


def dissect(frame: bytes, time: float = 0.0) -> WirePacket | None:
    """The IP packet of an Ethernet frame; None for anything else."""
    kind = int.from_bytes(frame[12:14], "big")
    packet = frame[14:]
    source: IPAddress
    destination: IPAddress
    if kind == ETH_P_IP and len(packet) >= 20:
        header = (packet[0] & 15) * 4
        protocol, length = packet[9], int.from_bytes(packet[2:4], "big")
        source, destination = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
        first = not int.from_bytes(packet[6:8], "big") & 0x1FFF
        dont_fragment = bool(packet[6] & 0x40)
    elif kind == ETH_P_IPV6 and len(packet) >= 40:
        header, protocol, length = 40, packet[6], int.from_bytes(packet[4:6], "big") + 40
        source, destination = IPv6Address(packet[8:24]), IPv6Address(packet[24:40])
        first, dont_fragment = True, False
        if protocol == 44 and len(packet) >= 48:
            protocol, header, first = packet[40], 48, not int.from_bytes(packet[42:44], "big") & 0xFFF8
    else:
        return None
    payload = packet[header:]
    ports = struct.unpack("!HH", payload[:4]) if first and protocol in (6, 17) and len(payload) >= 4 else (0, 0)
    return WirePacket(source, destination, protocol, ports[0], ports[1], length, payload, time, traffic_class(packet), dont_fragment)


class Capture:
    """Captures on one interface of a namespace from `__enter__` on.

    `outgoing`: only what is sent there. A kernel that does IPsec shows what it decrypts once more, as if it had come in clear.
    """

    def __init__(self, namespace: Namespace, interface: str, *, outgoing: bool = False) -> None:
        self.interface = interface
        self._outgoing = outgoing
        self._frames: list[tuple[bytes, float]] = []
        self._stop = threading.Event()
        self._dropped = 0
        self._lock = threading.Lock()  # a frame is taken and noted in one
        self._socket = namespace.call(self._open)
        self._thread = threading.Thread(target=self._read, name=f"capture-{namespace.role}-{interface}", daemon=True)

    def _open(self) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        sock.bind((self.interface, ETH_P_ALL))
        sock.setblocking(False)
        return sock

    def _read(self) -> None:
        with suppress(OSError):  # the interface went away
            while not self._stop.is_set():
                if select.select([self._socket], [], [], 0.05)[0]:
                    self._take()

    def _take(self) -> None:
        """All that the kernel has for us now."""
        until = time.time()
        with self._lock:
            while True:
                try:
                    frame, ancillary, _, sender = self._socket.recvmsg(SNAP_BYTES, 64)
                except BlockingIOError:
                    return
                seconds, nanoseconds = struct.unpack("qq", ancillary[0][2]) if ancillary else (0, 0)
                seen = seconds + nanoseconds / 1e9
                if self._outgoing and sender[2] != socket.PACKET_OUTGOING:
                    continue
                if len(self._frames) < MAX_PACKETS:
                    self._frames.append((frame, seen))
                else:
                    self._dropped += 1
                if seen > until:
                    return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            self._take()
        self._socket.close()

    def packets(self) -> list[WirePacket]:
        """The IP packets until now, in both directions. LabError when the kernel dropped some."""
        if self._socket.fileno() >= 0:
            with suppress(OSError):
                self._take()
            _, dropped = struct.unpack("II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
            self._dropped += dropped
        if self._dropped:
            raise LabError(f"the capture on {self.interface} lost {self._dropped} packets and proves nothing")
        return [packet for frame, seen in list(self._frames) if (packet := dissect(frame, seen)) is not None]

    def wait_for(self, condition: Callable[[WirePacket], bool], what: str, timeout: float = PATIENCE) -> WirePacket:
        """The first packet that meets `condition`."""
        return wait_until(lambda: next(filter(condition, self.packets()), None), what, timeout)

    def clear_packets(self, selectors: Iterable[IPNetwork | str]) -> list[WirePacket]:
        """Packets on the wire with a source or destination within the protected `selectors`: leaks."""
        networks = [_network(selector) for selector in selectors]
        return [packet for packet in self.packets() if any(_within(packet, network) for network in networks)]

    def labelled(self) -> int:
        """Frames with a label stack in clear; of IP packets only `packets` tells."""
        self.packets()
        return sum(frame[12:14] in ETH_P_MPLS for frame, _ in list(self._frames))

    def esp(self) -> list[WirePacket]:
        return [packet for packet in self.packets() if packet.is_esp]

    def ike(self) -> list[WirePacket]:
        return [packet for packet in self.packets() if packet.is_ike]


def _network(selector: IPNetwork | str) -> IPNetwork:
    if not isinstance(selector, str):
        return selector
    return IPv4Network(selector) if ip_address(selector.split("/")[0]).version == 4 else IPv6Network(selector)


def _within(packet: WirePacket, network: IPNetwork) -> bool:
    return packet.source.version == network.version and (packet.source in network or packet.destination in network)
