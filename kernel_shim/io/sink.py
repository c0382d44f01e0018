"""Where the data plane's packets leave: the TUN, the interface for bypassed packets, and the ESP sockets."""

from __future__ import annotations

import errno
from typing import Final

from kernel_shim.io.counters import Counters
from kernel_shim.io.sockets import GatewaySockets
from kernel_shim.io.tun import Tun
from kernel_shim.model import Endpoint


class EdgeSink:
    """Implements `kernel_shim.dataplane.output.Sink`."""

    def __init__(self, tun: Tun, clear: Tun, sockets: GatewaySockets, counters: Counters) -> None:
        self._tun: Final = tun
        self._clear: Final = clear
        self._sockets: Final = sockets
        self._counters: Final = counters
        self.vrfs: Final[dict[str, Tun]] = {}

    def send_esp(self, local: Endpoint, remote: Endpoint, buffer: memoryview, segment_size: int, *, whole: bool = True, traffic_class: int = 0) -> None:
        esp = self._sockets.esp(local)
        if esp is None:
            self._counters.add("io.esp.send.unbound")
            return
        esp.send(remote, buffer, segment_size, whole=whole, traffic_class=traffic_class)

    def write_tun(self, frame: memoryview) -> None:
        self._write(self._tun, frame, "io.tun.write")

    def write_vrf(self, vrf: str, frame: memoryview) -> None:
        device = self.vrfs.get(vrf)
        if device is None:
            self._counters.add("io.vrf.write.absent")
            return
        self._write(device, frame, "io.vrf.write")

    def bypass(self, frame: memoryview) -> None:
        self._write(self._clear, frame, "io.bypass.write")

    def _write(self, device: Tun, frame: memoryview, counter: str) -> None:
        try:
            device.write(frame)
        except OSError as error:
            self._counters.add(f"{counter}.{errno.errorcode.get(error.errno or 0, 'other').lower()}")
