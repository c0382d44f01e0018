"""ICMP errors to the senders of packets that cannot go on, back by the way that they came."""

from __future__ import annotations

from typing import Final

from kernel_shim.dataplane.origin import Origin
from kernel_shim.dataplane.output import Sink
from kernel_shim.dataplane.traffic import Traffic
from kernel_shim.packet import virtio
from kernel_shim.packet.icmp import IcmpError, RateLimit, error_packet
from kernel_shim.packet.ip import Malformed, layout

_BEGIN: Final = virtio.LENGTH


class Errors:
    def __init__(self, sink: Sink, traffic: Traffic) -> None:
        self._sink, self._traffic = sink, traffic
        self._limit: Final = RateLimit()

    def unreachable(self, view: memoryview, now: float, origin: Origin | None = None) -> None:
        self.tell(IcmpError.HOST_UNREACHABLE, view[_BEGIN:], now, 0, origin)

    def time_exceeded(self, view: memoryview, now: float, origin: Origin | None = None) -> None:
        self.tell(IcmpError.TIME_EXCEEDED, view[_BEGIN:], now, 0, origin)

    def tell(self, error: IcmpError, packet: memoryview, now: float, mtu: int = 0, origin: Origin | None = None) -> None:
        try:
            parsed = layout(packet)
        except Malformed:
            return
        message = error_packet(error, packet, parsed, mtu)
        if message is None or not self._limit.allow(now):
            self._traffic.icmp_suppressed += 1
            return
        self._traffic.icmp_errors += 1
        frame = memoryview(virtio.NO_OFFLOAD + message)
        if origin is None:
            self._sink.write_tun(frame)
        else:
            origin.tell(frame)
