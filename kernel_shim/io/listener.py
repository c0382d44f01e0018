"""The PF_KEY socket: UNIX SOCK_SEQPACKET clients around the server core."""

from __future__ import annotations

import array
import errno
import os
import select
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from kernel_shim.io.settings import CONTROL_READS
from kernel_shim.model import KernelError
from kernel_shim.pfkey.server import ClientId, ServerSession

SO_PEERCRED: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
MAX_MESSAGE: Final = 1 << 19  # bytes; the length field of PF_KEY holds 65,535 units of 8
CLIENT_BUFFER: Final = 1 << 20
BACKLOG: Final = 16
ACCEPTS: Final = 16
OUTPUTS: Final = 256  # datagrams to one client a wake-up, so that a dump does not hold packets up

Watch = Callable[[int, int], None]  # descriptor, epoll events; 0 takes it out

log = structlog.get_logger("kernel_shim.listener")


class Listener:
    """Owns the listening socket and its clients. `watch` changes what the loop polls a descriptor for.

    Raises KernelError(EADDRINUSE) when another kernel listens at `path`; a socket file that nobody answers is replaced.
    """

    def __init__(self, path: Path, watch: Watch) -> None:
        self._path: Final = path
        self._watch: Final = watch
        self._session: ServerSession | None = None
        self._clients: dict[int, socket.socket] = {}
        self._events: dict[int, int] = {}
        self._blocked: set[int] = set()
        self._unfinished: set[int] = set()
        self._buffer: Final = memoryview(bytearray(MAX_MESSAGE))
        self._socket: Final = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._remove_stale()
            previous = os.umask(0o177)
            try:
                self._socket.bind(os.fspath(path))
            finally:
                os.umask(previous)
        except OSError as error:
            self._socket.close()
            raise KernelError.of(error, f"socket {path}") from error
        except KernelError:
            self._socket.close()
            raise

    def _remove_stale(self) -> None:
        try:
            if not stat.S_ISSOCK(self._path.lstat().st_mode):
                raise KernelError(errno.ENOTSOCK, f"{self._path} is not a socket")
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            try:
                probe.connect(os.fspath(self._path))
            except ConnectionRefusedError:
                self._path.unlink()
                return
        raise KernelError(errno.EADDRINUSE, f"a kernel listens at {self._path} already")

    def listen(self, session: ServerSession) -> None:
        """From here on clients are served."""
        self._session = session
        self._socket.listen(BACKLOG)
        self._watch(self._socket.fileno(), select.EPOLLIN)

    @property
    def unfinished(self) -> bool:
        """A client could be sent more at once: the loop must not sleep."""
        return bool(self._unfinished)

    def owns(self, descriptor: int) -> bool:
        return descriptor in self._clients or descriptor == self._socket.fileno()

    def handle(self, descriptor: int, events: int, now: float) -> None:
        """What the poll said of one of our descriptors."""
        if descriptor == self._socket.fileno():
            self._accept(now)
            return
        if events & select.EPOLLIN:
            self._receive(descriptor, now)
        if descriptor in self._clients and events & select.EPOLLOUT:
            self._blocked.discard(descriptor)
            self._unfinished.add(descriptor)
        if descriptor in self._clients and events & (select.EPOLLHUP | select.EPOLLERR) and not events & select.EPOLLIN:
            self._drop(descriptor, now)

    def _accept(self, now: float) -> None:
        assert self._session is not None
        for _ in range(ACCEPTS):
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            pid, uid, _ = SO_PEERCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, SO_PEERCRED.size))
            if uid not in (0, os.geteuid()):
                log.warning("client refused", pid=pid, uid=uid)
                client.close()
                continue
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CLIENT_BUFFER)
            number = client.fileno()
            try:
                self._session.accept(ClientId(number), pid=pid, uid=uid, now=now)
            except KernelError as error:
                log.warning("client refused", pid=pid, uid=uid, reason=error.detail)
                client.close()
                continue
            self._clients[number] = client
            self._poll(number)

    def _receive(self, number: int, now: float) -> None:
        assert self._session is not None
        client, identity = self._clients[number], ClientId(number)
        for _ in range(CONTROL_READS):
            if not self._session.wants_read(identity):
                break
            try:
                length, _, flags, _ = client.recvmsg_into((self._buffer,))
            except BlockingIOError:
                break
            except OSError:
                length = 0
                flags = 0
            if length == 0:
                self._drop(number, now)
                return
            if flags & socket.MSG_TRUNC:
                length = MAX_MESSAGE  # the session answers that its length is wrong
            self._session.receive(identity, bytes(self._buffer[:length]), now)
        self._unfinished.add(number)

    def send_ready(self, now: float) -> None:
        """Send what the session has; the end of every wake-up."""
        assert self._session is not None
        ready = self._session.take_ready() | self._unfinished
        self._unfinished.clear()
        for number in ready:
            if number in self._clients:
                if number not in self._blocked:
                    self._send(number, now)
                if number in self._clients:
                    self._poll(number)

    def _send(self, number: int, now: float) -> None:
        assert self._session is not None
        client, identity = self._clients[number], ClientId(number)
        for _ in range(OUTPUTS):
            output = self._session.next_output(identity, now)
            if output is None:
                return
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", output.descriptors))] if output.descriptors else []
            try:
                client.sendmsg((output.data,), rights)
            except BlockingIOError:
                self._blocked.add(number)
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    self._blocked.add(number)
                    return
                self._drop(number, now)
                return
            self._session.output_sent(identity, now)
        self._unfinished.add(number)

    def _poll(self, number: int) -> None:
        assert self._session is not None
        events = (select.EPOLLIN if self._session.wants_read(ClientId(number)) else 0) | (select.EPOLLOUT if number in self._blocked else 0)
        # 0 must not stop the poll: a hang-up is always told.
        if self._events.get(number) != events:
            self._events[number] = events
            self._watch(number, events or select.EPOLLERR)

    def _drop(self, number: int, now: float) -> None:
        assert self._session is not None
        client = self._clients.pop(number)
        self._blocked.discard(number)
        self._unfinished.discard(number)
        self._events.pop(number, None)
        self._watch(number, 0)
        self._session.disconnect(ClientId(number), now)
        client.close()

    def close(self) -> None:
        """Stop to listen, and remove the socket file."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        self._socket.close()
        self._path.unlink(missing_ok=True)
