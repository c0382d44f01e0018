"""The process of the userspace kernel: one loop around the data plane, the PF_KEY server, the TUN and the sockets.

1. poll, until the earliest deadline
2. control: signals, address notices, key managers
3. packets: error queues, ESP sockets, the TUN; the data plane flushes its batches
4. path MTUs that sends and error queues learned
5. deadlines that are due
6. answers and events to the key managers
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

import structlog

from kernel_shim.dataplane.engine import Engine, EngineConfig
from kernel_shim.io import settings as bounds
from kernel_shim.io.capture import Capture
from kernel_shim.io.captured import CapturedKernel, CapturedSockets
from kernel_shim.io.clear_labels import ClearLabels
from kernel_shim.io.counters import Counters
from kernel_shim.io.esp_sockets import EspSocket
from kernel_shim.io.listener import Listener
from kernel_shim.io.privileges import drop_privileges
from kernel_shim.io.settings import ShimSettings
from kernel_shim.io.sink import EdgeSink
from kernel_shim.io.sockets import GatewaySockets, raw_sockets_allowed
from kernel_shim.io.tun import Tun
from kernel_shim.io.vrfs import VrfDevices
from kernel_shim.logs import configure_logs
from kernel_shim.model import Endpoint, KernelError
from kernel_shim.pfkey.server import ServerSession
from kernel_shim.service import notify

MAX_PATH_REPORTS: Final = 1024  # path MTUs learned in one wake-up
LOGGED_ERRORS: Final = 100  # internal errors that are logged with their trace; all are counted
LONGEST_SLEEP: Final = 60.0  # seconds
PAUSE_BETWEEN_COLLECTIONS: Final = 10.0  # seconds, of Python's collector of cycles, in idle moments
LONGEST_WITHOUT_COLLECTION: Final = 600.0  # seconds; what a shim that is never idle may let cycles pile up

log = structlog.get_logger("kernel_shim")


class Shim:
    """Opens everything, or raises KernelError with nothing left behind."""

    def __init__(self, settings: ShimSettings) -> None:
        self._settings: Final = settings
        self._poll: Final = select.epoll()
        self._watched: set[int] = set()
        self._handlers: dict[int, Callable[[int, float], None]] = {}
        self._counters: Final = Counters()
        self._mtus: dict[tuple[Endpoint, Endpoint], int] = {}
        self._running = True
        self._collected = 0.0
        self.failed = False
        undo: list[Callable[[], None]] = [self._poll.close]
        try:
            # The socket's path first: it is what two shims that should be one meet at.
            self._listener: Final = Listener(settings.socket, self._watch)
            undo.append(self._listener.close)
            self._tun: Final = Tun(settings.tun, settings.mtu)
            undo.append(self._tun.close)
            self._clear: Final = Tun(settings.clear_tun, settings.mtu)
            undo.append(self._clear.close)
            self._clear.allow_forwarding()
            self._capture: Final = Capture(settings, self._tun)
            undo.append(self._capture.give_up)
            plain_esp = raw_sockets_allowed()
            self._sockets: Final = GatewaySockets(settings.mark, self._counters, self._learn_mtu, raw=plain_esp)
            self._sockets.on_bound = self._serve_esp
            self._sockets.on_unbound = lambda esp: self._watch(esp.fileno(), 0)
            sink = EdgeSink(self._tun, self._clear, self._sockets, self._counters)
            epoch = time.time() - time.monotonic()
            config = EngineConfig(epoch=epoch, path_mtu=settings.egress_mtu, udp_segmentation=self._tun.segmentation, plain_esp=plain_esp)
            self._engine: Final = Engine(config, os.urandom, sink)
            self._kernel: Final = CapturedKernel(self._engine, self._capture, self._statistics, self._sockets.bind_raw)
            clear = ClearLabels(self._engine.labels_in_clear, self._inside, self._counters, self._serve_labels, lambda descriptor: self._watch(descriptor, 0))
            self._vrfs: Final = VrfDevices(self._engine, self._capture.routes, self._capture.set_vrfs, sink.vrfs, self._serve_vrf, self._leave_vrf, clear)
            undo.append(self._vrfs.close)
            self._capture.on_host(self._vrfs.set_host)
            provider = CapturedSockets(self._sockets.bind, self._sockets.unbind, self._capture)
            self._session: Final = ServerSession(self._kernel, provider, is_local=self._capture.is_local, inspected=self._engine, labels=self._vrfs)
        except BaseException:
            for step in reversed(undo):
                step()
            raise

    # Watching

    def _watch(self, descriptor: int, events: int) -> None:
        if not events:
            if descriptor in self._watched:
                self._watched.discard(descriptor)
                self._handlers.pop(descriptor, None)
                with suppress(OSError):
                    self._poll.unregister(descriptor)
        elif descriptor in self._watched:
            self._poll.modify(descriptor, events)
        else:
            self._watched.add(descriptor)
            self._poll.register(descriptor, events)

    def _serve_esp(self, esp: EspSocket) -> None:
        def handle(events: int, now: float) -> None:
            if events & select.EPOLLERR:
                esp.read_errors()
            engine = self._engine
            local = esp.local
            for batch in esp.receive(engine.inbound_buffer):
                engine.inbound(local, batch.remote, batch.length, batch.segment_size, now, batch.traffic_class)

        self._handlers[esp.fileno()] = handle
        self._watch(esp.fileno(), select.EPOLLIN)

    def _serve_vrf(self, vrf: str, device: Tun) -> None:
        engine = self._engine
        self._handlers[device.fileno()] = lambda _events, now: self._read(device, now, lambda length: engine.from_vrf(vrf, length, now))
        self._watch(device.fileno(), select.EPOLLIN)

    def _inside(self) -> frozenset[str]:
        return self._vrfs.interfaces() | {self._settings.tun, self._settings.clear_tun}

    def _serve_labels(self, descriptor: int, read: Callable[[float], None]) -> None:
        self._handlers[descriptor] = lambda _events, now: read(now)
        self._watch(descriptor, select.EPOLLIN)

    def _leave_vrf(self, device: Tun) -> None:
        self._watch(device.fileno(), 0)

    def _read_tun(self, events: int, now: float) -> None:
        engine = self._engine
        self._read(self._tun, now, lambda length: engine.outbound(length, now))

    def _read(self, device: Tun, now: float, take: Callable[[int], None]) -> None:
        buffer = self._engine.outbound_buffer
        total = 0
        for _ in range(bounds.READS):
            try:
                length = device.read_into(buffer)
            except BlockingIOError:
                return
            except OSError as error:  # EBADFD: the interface was deleted under us
                log.error("TUN lost", interface=device.name, reason=error.strerror)
                self._counters.add("io.tun.read.error")
                self._watch(device.fileno(), 0)
                self._running, self.failed = False, True
                return
            take(length)
            total += length
            if total >= bounds.READ_BYTES:
                return

    def _learn_mtu(self, local: Endpoint, remote: Endpoint, mtu: int) -> None:
        # Kept until the data plane has finished what it was about: a sink never calls back.
        if len(self._mtus) < MAX_PATH_REPORTS:
            self._mtus[local, remote] = mtu

    def _statistics(self) -> Mapping[str, int]:
        return {**self._counters.values(), **self._queue_losses(), **self._capture.statistics(), **self._session.statistics()}

    def _queue_losses(self) -> dict[str, int]:
        """Packets that the kernel's queues before us could not hold: our loss, although the kernel counts it."""
        found = {"io.esp.queue-full": self._sockets.losses(), **self._vrfs.queue_losses()}
        for name, counter in ((self._tun.name, "io.tun.queue-full"), (self._clear.name, "io.bypass.queue-full")):
            with suppress(OSError, ValueError), open(f"/sys/class/net/{name}/statistics/tx_dropped") as file:
                found[counter] = int(file.read())
        return found

    # The loop

    def run(self) -> None:
        """Serve until a signal says to stop."""
        wake, wake_write = socket.socketpair()
        for end in (wake, wake_write):
            end.setblocking(False)
        signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._watch(wake.fileno(), select.EPOLLIN)
        for descriptor in self._capture.filenos():
            self._watch(descriptor, select.EPOLLIN)
        self._handlers[self._tun.fileno()] = self._read_tun
        self._watch(self._tun.fileno(), select.EPOLLIN)
        self._listener.listen(self._session)
        self._announce()
        gc.collect()
        gc.freeze()
        self._collected = time.monotonic()
        # A collection while thousands of packets are held takes 10 to 20 ms out of the middle of a burst: it waits for a pause.
        gc.disable()
        try:
            while self._running:
                self._turn(wake)
        finally:
            signal.set_wakeup_fd(-1)
            wake.close()
            wake_write.close()

    def _stop(self, *_: object) -> None:
        self._running = False

    def _turn(self, wake: socket.socket) -> None:
        ready = self._poll.poll(self._patience())
        now = time.monotonic()
        if now - self._collected > (LONGEST_WITHOUT_COLLECTION if ready else PAUSE_BETWEEN_COLLECTIONS):
            gc.collect()
            self._collected = now
        listener, handlers = self._listener, self._handlers
        packets = []
        for descriptor, events in ready:
            if descriptor in handlers:
                packets.append((descriptor, events))
            elif listener.owns(descriptor):
                self._guarded(listener.handle, descriptor, events, now)
            elif descriptor in self._capture.filenos():
                self._guarded(self._capture.refresh)
            else:
                with suppress(BlockingIOError):
                    wake.recv(64)
        for descriptor, events in packets:
            handler = handlers.get(descriptor)
            if handler is not None:  # unbound a moment ago
                self._guarded(handler, events, now)
        self._guarded(self._engine.flush, now)
        if self._mtus:
            learned, self._mtus = self._mtus, {}
            for (local, remote), mtu in learned.items():
                self._engine.path_mtu(local, remote, mtu, now)
        self._tick(now)
        listener.send_ready(now)

    def _guarded(self, step: Callable[..., None], *arguments: object) -> None:
        """A fault of ours in one batch must not end every tunnel."""
        try:
            step(*arguments)
        except Exception:
            self._counters.add("io.internal-errors")
            if self._counters.value("io.internal-errors") <= LOGGED_ERRORS:
                log.exception("internal error")

    def _patience(self) -> float:
        if self._listener.unfinished:
            return 0.0
        now = time.monotonic()
        deadlines = [deadline for deadline in (self._engine.next_deadline(), self._session.next_deadline(), self._grace_ends()) if deadline is not None]
        return min(max(0.0, min(deadlines) - now), LONGEST_SLEEP) if deadlines else LONGEST_SLEEP

    def _grace_ends(self) -> float | None:
        since = self._kernel.listened_since
        return since + bounds.TAKEOVER_GRACE if self._capture.takeover and since is not None else None

    def _tick(self, now: float) -> None:
        deadline = self._engine.next_deadline()
        if deadline is not None and deadline <= now:
            self._guarded(self._engine.tick, now)
            self._guarded(self._engine.flush, now)
        deadline = self._session.next_deadline()
        if deadline is not None and deadline <= now:
            self._guarded(self._session.tick, now)
        deadline = self._grace_ends()
        if deadline is not None and deadline <= now:
            self._capture.end_takeover()

    def _announce(self) -> None:
        log.info("ready", socket=str(self._settings.socket), tun=self._settings.tun, mtu=self._settings.mtu, takeover=self._capture.takeover)
        descriptor = self._settings.ready_descriptor
        if descriptor is not None:
            with suppress(OSError):
                os.write(descriptor, b"ready\n")
                os.close(descriptor)
        notify("READY=1")

    def close(self) -> None:
        """The orderly end: nothing of ours stays in the host."""
        notify("STOPPING=1")
        self._listener.close()
        self._vrfs.close()
        self._capture.remove_everything()
        self._sockets.close()
        self._clear.close()
        self._tun.close()
        self._poll.close()


def serve(settings: ShimSettings, log_level: str = "info") -> int:
    """Run until SIGTERM or SIGINT; the exit status."""
    configure_logs(log_level)
    try:
        shim = Shim(settings)
    except KernelError as error:
        log.error("cannot start", reason=error.detail, errno=error.errno)
        return 1
    if not settings.keep_privileges:
        drop_privileges()
    # Anything but a signal leaves routes, rules and guard where they are: a dead shim means no traffic, never clear traffic.
    shim.run()
    if shim.failed:
        log.error("stopped, the host stays closed")
        return 1
    shim.close()
    log.info("stopped")
    return 0
