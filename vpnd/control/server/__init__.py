"""The control server: VICI on a UNIX stream socket.

A client's packets are carried out in order, one at a time, while its socket is read on, so that its end is noticed. Answers and the
events of its own command wait for the client; events of the daemon never do: what a slow client does not take is dropped, and it is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import os
import pwd
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from vpnd.config.model import DaemonConfig
from vpnd.config.tree import Section
from vpnd.control.backend import Alert, ChildRekeyed, ChildUpDown, ControlBackend, ControlError, DaemonEvent, IkeRekeyed, IkeUpdated, IkeUpDown, LogLine
from vpnd.control.server.commands import EVENTS, Commands
from vpnd.control.server.messages import failure
from vpnd.control.vici import formats
from vpnd.control.vici.codec import MalformedVici, Packet, PacketType, Segmenter, TooLong, decode_message, decode_packet, encode_message, encode_segment

MAX_CLIENTS: Final = 128  # a segment and a backlog each
MAX_PIPELINED: Final = 4  # packets of one client that wait for their turn; the protocol knows no more than one
MAX_EVENT_BACKLOG: Final = 1024 * 1024  # octets that a client has not read, from which on it gets no further events
MAX_LOG_LEVEL: Final = 1  # of `log` events, as strongSwan's: what is finer would flood
READ_SIZE: Final = 64 * 1024
PROBE: Final = 1.0  # s for a daemon that may serve our socket already to take a connection
STALL: Final = 60.0  # seconds for which an answer waits for a client that does not read, before the client is closed

_log = structlog.get_logger("vpnd.control")


class ControlSocketError(ControlError):
    """The control socket cannot be opened; the text is for the user."""


class ClientStalled(ConnectionError):
    """A client does not read its answer."""


class ControlServer:
    """Serves one `ControlBackend` where and as `config` says. `bind` (or not), `start` and `stop` once each, on one event loop."""

    def __init__(self, backend: ControlBackend, config: DaemonConfig) -> None:
        self._backend = backend
        self._config = config
        self._commands = Commands(backend)
        self._clients: set[_Client] = set()
        self._server: asyncio.Server | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self._listening: socket.socket | None = None
        self._inode: int | None = None

    @property
    def clients(self) -> int:
        return len(self._clients)

    def bind(self) -> None:
        """Take the socket; clients wait until `start`. Raises ControlSocketError. A socket that nobody listens on any more is replaced."""
        config = self._config
        self._listening = _listen(config.control_socket, config.control_mode, config.control_owner, config.control_group)
        self._inode = os.stat(config.control_socket).st_ino

    async def start(self) -> None:
        """Raises ControlSocketError, when it has yet to `bind`."""
        if self._listening is None:
            self.bind()
        self._unsubscribe = self._backend.subscribe(self._on_event)
        self._server = await asyncio.start_unix_server(self._on_client, sock=self._listening, limit=READ_SIZE)

    async def stop(self) -> None:
        """Ends all clients and their commands, and takes the socket away."""
        if self._unsubscribe:
            self._unsubscribe()
            self._unsubscribe = None
        if self._server:
            self._server.close()
            self._server = None
        if self._listening:
            self._listening.close()
            self._listening = None
        tasks = [client.task for client in self._clients]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._commands.close()
        with contextlib.suppress(OSError):
            if os.stat(self._config.control_socket).st_ino == self._inode:
                os.unlink(self._config.control_socket)

    async def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._clients) >= MAX_CLIENTS:
            _log.warning("a control client is turned away", clients=len(self._clients))
            writer.close()
            return
        client = _Client(task, reader, writer, self._commands)
        self._clients.add(client)
        try:
            await client.run()
        except asyncio.CancelledError:
            pass  # stop() cancelled it; nobody waits for the result of this task
        finally:
            self._clients.discard(client)
            await client.close()

    def _on_event(self, event: DaemonEvent) -> None:
        match event:
            case LogLine() if event.level <= MAX_LOG_LEVEL:
                self._publish("log", lambda: formats.log_event(event, thread=True))
            case IkeUpDown():
                self._publish("ike-updown", lambda: formats.updown_event(event.up, event.ike, with_children=False))
            case ChildUpDown():
                self._publish("child-updown", lambda: formats.updown_event(event.up, event.ike, with_children=True))
            case IkeUpdated():
                self._publish("ike-update", lambda: formats.ike_update_event(event.ike, event.local, event.remote))
            case Alert():
                self._publish("alert", lambda: formats.alert_event(event.kind, event.ike))
            case IkeRekeyed():
                self._publish("ike-rekey", lambda: formats.ike_rekey_event(event.old, event.new))
            case ChildRekeyed():
                self._publish("child-rekey", lambda: formats.child_rekey_event(event.ike, event.old, event.new))

    def _publish(self, name: str, message: Callable[[], Section]) -> None:
        listeners = [client for client in self._clients if name in client.events]
        if not listeners:
            return
        try:
            segment = _event(name, message())
        except TooLong as error:
            # Only clients can be told: a log line of ours would be the next event.
            notice = LogLine("CFG", 0, None, None, f"an event '{name}' was dropped, it is {error}")
            segment = _event("log", formats.log_event(notice, thread=True))
            listeners = [client for client in self._clients if "log" in client.events]
        for client in listeners:
            client.offer(segment)


class _Client:
    """One connection."""

    def __init__(self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter, commands: Commands) -> None:
        self.task = task
        self.events: set[str] = set()
        self._reader = reader
        self._writer = writer
        self._commands = commands
        self._packets: asyncio.Queue[Packet] = asyncio.Queue(MAX_PIPELINED)
        self._lost = 0
        self._telling: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until the client ends, breaks the protocol, or does not read."""
        reading = asyncio.create_task(self._read())
        working = asyncio.create_task(self._work())
        try:
            done, _ = await asyncio.wait({reading, working}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        except MalformedVici as error:
            _log.warning("a control client is closed, it does not speak VICI", reason=str(error))
        except ClientStalled:
            _log.warning("a control client is closed, it does not read its answer", seconds=STALL)
        except OSError:
            pass  # it went away
        finally:
            reading.cancel()
            working.cancel()
            await asyncio.gather(reading, working, return_exceptions=True)

    async def close(self) -> None:
        if self._telling:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)
        self._writer.transport.abort()

    def offer(self, segment: bytes) -> None:
        """Send an event of the daemon, or drop it when the client lags behind."""
        if self._lost or self._writer.transport.get_write_buffer_size() > MAX_EVENT_BACKLOG:
            self._lost += 1
            if self._telling is None:
                self._telling = asyncio.create_task(self._tell())
        else:
            self._writer.write(segment)

    async def _tell(self) -> None:
        """Once the client has caught up: how many events it has lost."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()
            lost, self._lost = self._lost, 0
            self._telling = None
            if "log" in self.events:
                line = LogLine("CFG", 0, None, None, f"{lost} events were dropped, this client reads too slowly")
                self._writer.write(_event("log", formats.log_event(line, thread=True)))
            if "x-events-lost" in self.events:
                self._writer.write(_event("x-events-lost", Section.of({"events": lost})))

    async def _read(self) -> None:
        segmenter = Segmenter()
        while data := await self._reader.read(READ_SIZE):
            for segment in segmenter.feed(data):
                try:
                    self._packets.put_nowait(decode_packet(segment))
                except asyncio.QueueFull:
                    raise MalformedVici(f"more than {MAX_PIPELINED} packets without waiting for an answer") from None

    async def _work(self) -> None:
        while True:
            packet = await self._packets.get()
            match packet.type:
                case PacketType.CMD_REQUEST:
                    await self._request(packet)
                case PacketType.EVENT_REGISTER:
                    known = packet.name in EVENTS
                    if known:
                        self.events.add(packet.name)
                    await self._send(Packet(PacketType.EVENT_CONFIRM if known else PacketType.EVENT_UNKNOWN))
                case PacketType.EVENT_UNREGISTER:
                    known = packet.name in self.events
                    self.events.discard(packet.name)
                    await self._send(Packet(PacketType.EVENT_CONFIRM if known else PacketType.EVENT_UNKNOWN))
                case _:
                    raise MalformedVici(f"a packet of type {packet.type.name} from a client")

    async def _request(self, packet: Packet) -> None:
        request = decode_message(packet.message)
        if not self._commands.known(packet.name):
            await self._send(Packet(PacketType.CMD_UNKNOWN))
            return
        answer = await self._commands.handle(packet.name, request, self._stream)
        try:
            message = encode_message(answer)
            segment = encode_segment(Packet(PacketType.CMD_RESPONSE, message=message))
        except TooLong as error:
            segment = encode_segment(Packet(PacketType.CMD_RESPONSE, message=encode_message(failure(f"the answer is {error}"))))
        await self._write(segment)

    async def _stream(self, name: str, message: Section) -> None:
        if name in self.events:
            await self._write(_event(name, message))
            await asyncio.sleep(0)  # a long list does not hold up the daemon

    async def _send(self, packet: Packet) -> None:
        await self._write(encode_segment(packet))

    async def _write(self, segment: bytes) -> None:
        self._writer.write(segment)
        try:
            async with asyncio.timeout(STALL):
                await self._writer.drain()
        except TimeoutError:
            raise ClientStalled from None


def _event(name: str, message: Section) -> bytes:
    return encode_segment(Packet(PacketType.EVENT, name, encode_message(message)))


# The socket


def _listen(path: Path, mode: int, owner: str | None, group: str | None) -> socket.socket:
    """Bound beside its place, given its rights, and only then moved there: nobody can connect with too many of them."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}"[-100:])
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        uid = _number(owner, lambda name: pwd.getpwnam(name).pw_uid)
        gid = _number(group, lambda name: grp.getgrnam(name).gr_gid)
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_if_served(path)
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        listening.bind(str(temporary))
        os.chmod(temporary, 0o600)
        listening.listen(MAX_CLIENTS)
        os.chmod(temporary, mode)  # while it is ours: to change what is another's takes CAP_FOWNER
        os.chown(temporary, uid, gid)
        os.rename(temporary, path)
    except (OSError, KeyError, ValueError) as error:
        listening.close()
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ControlSocketError(f"cannot open the control socket {path}: {reason}") from error
    listening.setblocking(False)
    return listening


def _number(name: str | None, look_up: Callable[[str], int]) -> int:
    """A user's or group's number; -1, which leaves it as it is, for None."""
    if name is None:
        return -1
    return int(name) if name.isdecimal() else look_up(name)


def _refuse_if_served(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(None, "there is another file at this place")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        raise ControlSocketError(f"a daemon serves the control socket {path} already")
