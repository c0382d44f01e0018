"""A blocking VICI client: one connection, one request at a time. For `vpnctl` and for tests of daemons."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from vpnd.config.tree import Plain, Section
from vpnd.control.vici.codec import HEADER_LENGTH, MAX_SEGMENT, MalformedVici, Packet, PacketType, decode_message, decode_packet, encode_message, encode_segment

CONNECT_TIMEOUT: Final = 5.0  # s

EventHandler = Callable[[str, Section], None]


class ControlUnavailable(Exception):
    """There is no daemon to talk to; the text says why, for the user."""


class CommandFailed(Exception):
    """The daemon answered `success = no`; the text is its errmsg. `answer` has what else it said."""

    def __init__(self, message: str, answer: Section) -> None:
        super().__init__(message)
        self.answer = answer


class ViciClient:
    """A connection to a daemon. `timeout` (s, None for ever) bounds the wait for each answer; then ControlUnavailable."""

    def __init__(self, path: Path, timeout: float | None = None) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._timeout = timeout
        self._socket.settimeout(CONNECT_TIMEOUT)
        try:
            self._socket.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            self._socket.close()
            raise ControlUnavailable(f"no daemon listens on {path}: is vpnd running?") from None
        except PermissionError:
            self._socket.close()
            raise ControlUnavailable(f"no permission to use {path}: ask as root or as a member of the socket's group") from None
        except OSError as error:
            self._socket.close()
            raise ControlUnavailable(f"cannot connect to {path}: {error.strerror or error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def request(self, command: str, message: Plain | Section | None = None) -> Section:
        """The answer. CommandFailed when it says that the command failed, ControlUnavailable when none comes."""
        return self._request(command, message, lambda name, event: None)

    def streamed(
        self, command: str, event: str, message: Plain | Section | None = None, on_event: Callable[[Section], None] | None = None
    ) -> Sequence[Section]:
        """The messages of `event` that the command streams; `on_event` sees each as it comes. Raises as `request`."""
        found: list[Section] = []

        def collect(name: str, body: Section) -> None:
            if name == event:
                found.append(body)
                if on_event:
                    on_event(body)

        self.register(event)
        try:
            self._request(command, message, collect)
        except CommandFailed:
            self._exchange(Packet(PacketType.EVENT_UNREGISTER, event), collect)
            raise
        self._exchange(Packet(PacketType.EVENT_UNREGISTER, event), collect)
        return found

    def register(self, *events: str) -> None:
        """Raises CommandFailed for an event that the daemon does not know."""
        for event in events:
            if self._exchange(Packet(PacketType.EVENT_REGISTER, event), lambda name, body: None).type is not PacketType.EVENT_CONFIRM:
                raise CommandFailed(f"the daemon does not know the event '{event}'", Section())

    def events(self) -> Iterator[tuple[str, Section]]:
        """The events that come, for which `register` asked, one after another."""
        while True:
            packet = self._receive(None)
            if packet.type is PacketType.EVENT:
                yield packet.name, self._decode(packet)

    def _request(self, command: str, message: Plain | Section | None, on_event: EventHandler) -> Section:
        body = message if isinstance(message, Section) else Section.of(message or {})
        packet = self._exchange(Packet(PacketType.CMD_REQUEST, command, encode_message(body)), on_event)
        if packet.type is PacketType.CMD_UNKNOWN:
            raise CommandFailed(f"the daemon does not know the command '{command}'", Section())
        if packet.type is not PacketType.CMD_RESPONSE:
            raise ControlUnavailable(f"the daemon answered with a {packet.type.name} packet")
        answer = self._decode(packet)
        if answer.text("success") not in (None, "yes"):
            raise CommandFailed(answer.text("errmsg") or f"'{command}' failed", answer)
        return answer

    def _exchange(self, packet: Packet, on_event: EventHandler) -> Packet:
        try:
            self._socket.settimeout(self._timeout)
            self._socket.sendall(encode_segment(packet))
        except OSError as error:
            raise ControlUnavailable(f"the daemon went away: {error.strerror or error}") from None
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        while (answer := self._receive(deadline)).type is PacketType.EVENT:
            on_event(answer.name, self._decode(answer))
        return answer

    def _receive(self, deadline: float | None) -> Packet:
        length = int.from_bytes(self._take(HEADER_LENGTH, deadline), "big")
        if length > MAX_SEGMENT:
            raise ControlUnavailable("the daemon does not speak VICI")
        try:
            return decode_packet(self._take(length, deadline))
        except MalformedVici as error:
            raise ControlUnavailable(f"the daemon does not speak VICI: {error}") from None

    def _decode(self, packet: Packet) -> Section:
        try:
            return decode_message(packet.message)
        except MalformedVici as error:
            raise ControlUnavailable(f"the daemon does not speak VICI: {error}") from None

    def _take(self, length: int, deadline: float | None) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                self._socket.settimeout(None if deadline is None else max(deadline - time.monotonic(), 0.001))
                part = self._socket.recv(length - len(data))
            except TimeoutError:
                raise ControlUnavailable(f"the daemon did not answer within {self._timeout:g} s") from None
            except OSError as error:
                raise ControlUnavailable(f"the daemon went away: {error.strerror or error}") from None
            if not part:
                raise ControlUnavailable("the daemon closed the connection")
            data += part
        return bytes(data)
