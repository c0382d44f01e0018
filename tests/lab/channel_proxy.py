"""Between a key manager's channel and the shim: loses messages of every class, and cuts connections. For asyncio."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kernel_shim.pfkey.codec import header_of
from kernel_shim.pfkey.constants import MAX_MESSAGE, MessageType

DUMPS: Final = frozenset({MessageType.DUMP, MessageType.X_SPDDUMP})
DEEPEST_LOSS: Final = 50  # entries into a dump; each class loses whole exchanges, or no large dump would ever come through
MAX_HELD: Final = 65536  # messages that one side has not taken


@dataclass
class _Way:
    """One direction of one connection."""

    source: socket.socket
    sink: socket.socket
    held: list[bytes] = field(default_factory=list)


class ChannelProxy:
    """Listens at `path` and passes messages on to `upstream`, but a `loss` part of them."""

    def __init__(self, path: Path, upstream: Path, *, loss: float, seed: int = 1) -> None:
        self.loss = loss
        self.lost = self.passed = self.cuts = 0
        self._upstream = upstream
        self._draw = random.Random(seed)
        self._loop = asyncio.get_running_loop()
        self._ways: list[_Way] = []
        self._doomed_entries: dict[int, int] = {}  # by message type: entries of its dump until the one that is lost
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._listener.bind(os.fspath(path))
        self._listener.listen()
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        far = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            far.connect(os.fspath(self._upstream))
        except OSError:
            near.close()
            far.close()
            return
        for end in (near, far):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for way in (_Way(near, far), _Way(far, near)):
            self._ways.append(way)
            self._loop.add_reader(way.source, self._readable, way, way.sink is far)

    def _readable(self, way: _Way, upwards: bool) -> None:
        for _ in range(64):
            try:
                data = way.source.recv(MAX_MESSAGE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._drop(way)
                return
            if self._loses(data, upwards):
                self.lost += 1
                continue
            self.passed += 1
            way.held.append(data)
            if len(way.held) == 1:
                self._send(way)
            if len(way.held) > MAX_HELD:
                self._drop(way)

    def _loses(self, data: bytes, upwards: bool) -> bool:
        header = header_of(data)
        if header.type not in DUMPS or header.errno:
            return self._draw.random() < self.loss
        if upwards:
            self._doomed_entries.pop(header.type, None)
            if self._draw.random() < self.loss:
                return True
            if self._draw.random() < self.loss:
                self._doomed_entries[header.type] = self._draw.randrange(DEEPEST_LOSS)
            return False
        if header.type not in self._doomed_entries:
            return False
        self._doomed_entries[header.type] -= 1
        if self._doomed_entries[header.type] >= 0:
            return False
        del self._doomed_entries[header.type]
        return True

    def _send(self, way: _Way) -> None:
        self._loop.remove_writer(way.sink)
        sent = 0
        try:
            for data in way.held:
                way.sink.send(data)
                sent += 1
        except BlockingIOError:
            self._loop.add_writer(way.sink, self._send, way)
        except OSError:
            self._drop(way)
            return
        del way.held[:sent]

    def _drop(self, way: _Way) -> None:
        ends = {way.source, way.sink}
        self._ways = [other for other in self._ways if other.source not in ends]
        for end in ends:
            self._loop.remove_reader(end)
            self._loop.remove_writer(end)
            end.close()

    def cut(self) -> None:
        """Every connection ends, with what was on its way."""
        self.cuts += 1
        while self._ways:
            self._drop(self._ways[0])

    def close(self) -> None:
        self._loop.remove_reader(self._listener)
        self._listener.close()
        while self._ways:
            self._drop(self._ways[0])
