"""`kernel-shim monitor`: every message of a PF_KEY kernel, one line each. It listens in, and is no key manager."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Final

from kernel_shim.model import KernelError
from kernel_shim.pfkey.codec import Codec
from kernel_shim.pfkey.constants import MAX_MESSAGE, MessageType, SaType
from kernel_shim.pfkey.messages import Message, PfKeyError
from kernel_shim.pfkey.private import Hello, Lost
from kernel_shim.tool.decode import as_line, as_values

ANSWER_TIMEOUT: Final = 5.0  # s
LOADING_TIMEOUT: Final = 60.0  # s, in which Linux may have to load its cipher modules first
RECEIVE_BUFFER: Final = 1 << 20  # octets

_CODEC: Final = Codec()


def open_shim(path: Path) -> socket.socket:
    """A connection to the shim at `path`. OSError when none listens."""
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        opened.settimeout(ANSWER_TIMEOUT)
        opened.connect(os.fspath(path))
    except BaseException:
        opened.close()
        raise
    return opened


class Monitor:
    """A promiscuous client of the kernel at the other end of `opened`, which it owns. Raises OSError when no kernel answers, KernelError when it refuses.

    `doubled`: a kernel that tells promiscuous sockets once more what it tells everybody, as Linux; the second of two same messages is not shown.
    """

    def __init__(self, opened: socket.socket, *, doubled: bool = False) -> None:
        self._socket: Final = opened
        self._doubled = doubled
        self._held: list[bytes] = []  # what came before the answers to the requests below
        try:
            self._socket.settimeout(LOADING_TIMEOUT if doubled else ANSWER_TIMEOUT)
            self._ask(Message(MessageType.REGISTER, SaType.UNSPEC, 0, 1, os.getpid(), (Hello(),)))
            self._ask(Message(MessageType.X_PROMISC, 1, 0, 2, os.getpid()))
            self._socket.settimeout(None)
        except BaseException:
            self._socket.close()
            raise

    def _ask(self, request: Message) -> None:
        self._socket.send(_CODEC.encode(request))
        while True:
            data = self._read()
            reply = _CODEC.decode(data, from_kernel=True)
            if (reply.type, reply.sequence, reply.pid) != (request.type, request.sequence, request.pid):
                self._held.append(data)
                continue
            if reply.errno:
                raise KernelError(reply.errno, f"{MessageType(request.type).name}: {os.strerror(reply.errno)}")
            return

    def _read(self) -> bytes:
        data = self._socket.recv(MAX_MESSAGE)
        if not data:
            raise ConnectionResetError("the kernel went away")
        return data

    def messages(self) -> Iterator[bytes]:
        """For ever; ConnectionError when the kernel goes away."""
        before = b""
        for data in chain(self._held, iter(self._read, None)):
            before, again = data, self._doubled and data == before
            if again:
                before = b""
            else:
                yield data

    def close(self) -> None:
        self._socket.close()


def json_line(data: bytes, now: float) -> str:
    """`now` is Unix time."""
    values: dict[str, object] = {"time": now}
    try:
        message = _CODEC.decode(data, from_kernel=True)
    except PfKeyError as error:
        return json.dumps(values | {"malformed": str(error), "octets": len(data)})
    lost = _lost(message)
    return json.dumps(values | ({"lost": lost} if lost else as_values(message)))


def text_line(data: bytes, now: float) -> str:
    clock = datetime.fromtimestamp(now).astimezone().strftime("%H:%M:%S.%f")
    try:
        message = _CODEC.decode(data, from_kernel=True)
    except PfKeyError as error:
        return f"{clock} malformed, {len(data)} octets: {error}"
    lost = _lost(message)
    return f"{clock} {lost} messages lost: this monitor is too slow" if lost else f"{clock} {as_line(message)}"


def _lost(message: Message) -> int:
    found = message.find(Lost)
    return found.messages if found is not None else 0


def monitor(opened: socket.socket, *, as_json: bool, doubled: bool = False, show: Callable[[str], None], clock: Callable[[], float] = time.time) -> None:
    """Shows messages until the kernel goes away (ConnectionError) or `show` raises."""
    write = json_line if as_json else text_line
    watching = Monitor(opened, doubled=doubled)
    try:
        for data in watching.messages():
            show(write(data, clock()))
    finally:
        watching.close()
