"""The control server against clients that break rules, lag behind or go away, and the rights of its socket."""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from control_fakes import FakeBackend, LogLine, ike_status

from vpnd.config.model import DaemonConfig
from vpnd.config.tree import Section
from vpnd.control.server import MAX_CLIENTS, MAX_EVENT_BACKLOG, MAX_PIPELINED, ControlServer, ControlSocketError
from vpnd.control.vici.codec import MAX_SEGMENT, Packet, PacketType, decode_message, decode_packet, encode_message, encode_segment

VERSION = encode_segment(Packet(PacketType.CMD_REQUEST, "version"))
ROOT = Path(__file__).resolve().parents[3]
NOBODY = pwd.getpwnam("nobody")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes the owner of a socket")


class Peer:
    """A client that does what a test says, packet by packet."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, path: Path) -> Peer:
        return cls(*await asyncio.open_unix_connection(str(path)))

    def send(self, kind: PacketType, name: str, message: dict[str, str] | None = None) -> None:
        self.writer.write(encode_segment(Packet(kind, name, encode_message(Section.of(message or {})))))

    async def receive(self) -> tuple[PacketType, str, Section]:
        length = int.from_bytes(await self.reader.readexactly(4), "big")
        packet = decode_packet(await self.reader.readexactly(length))
        return packet.type, packet.name, decode_message(packet.message)

    async def answer(self, kind: PacketType, name: str, message: dict[str, str] | None = None) -> Section:
        self.send(kind, name, message)
        _, _, answer = await self.receive()
        return answer

    async def closed(self) -> bool:
        """Whether the server ends the connection, whatever it sends before."""
        while True:
            try:
                if not await self.reader.read(65536):
                    return True
            except ConnectionError:
                return True

    def close(self) -> None:
        self.writer.transport.abort()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[tuple[ControlServer, FakeBackend, Path]]:
    path = tmp_path / "run" / "vici.sock"
    backend = FakeBackend()
    served = ControlServer(backend, DaemonConfig(control_socket=path))
    await served.start()
    yield served, backend, path
    await served.stop()
    assert not path.exists()
    assert backend.listeners == []


Served = tuple[ControlServer, FakeBackend, Path]


@pytest.mark.parametrize(
    "garbage",
    [
        (MAX_SEGMENT + 1).to_bytes(4, "big"),
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x01\x63",
        b"\x00\x00\x00\x03\x00\x09a",
        b"\x00\x00\x00\x01\x01",
        b"\x00\x00\x00\x0a\x00\x07version\x02",
        VERSION * (MAX_PIPELINED * 50),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_a_client_that_does_not_speak_vici_is_closed_and_no_other(server: Served, garbage: bytes) -> None:
    _, _, path = server
    good, bad = await Peer.connect(path), await Peer.connect(path)
    await good.answer(PacketType.EVENT_REGISTER, "log")
    bad.writer.write(garbage)
    assert await bad.closed()
    assert (await good.answer(PacketType.CMD_REQUEST, "version")).text("daemon") == "vpnd"
    good.close()


async def test_requests_are_answered_in_order(server: Served) -> None:
    _, _, path = server
    peer = await Peer.connect(path)
    for kind, name in (
        (PacketType.EVENT_REGISTER, "list-sa"),
        (PacketType.CMD_REQUEST, "list-sas"),
        (PacketType.EVENT_UNREGISTER, "list-sa"),
        (PacketType.EVENT_UNREGISTER, "list-sa"),
    ):
        peer.send(kind, name)
    kinds = [(await peer.receive())[0] for _ in range(4)]
    assert kinds == [PacketType.EVENT_CONFIRM, PacketType.CMD_RESPONSE, PacketType.EVENT_CONFIRM, PacketType.EVENT_UNKNOWN]
    peer.close()


async def test_a_command_ends_with_its_client(server: Served) -> None:
    served, backend, path = server
    peer = await Peer.connect(path)
    peer.send(PacketType.CMD_REQUEST, "initiate", {"child": "slow"})
    await backend.initiating.wait()
    peer.close()
    await backend.cancelled.wait()
    while served.clients:
        await asyncio.sleep(0)


async def test_stopping_ends_commands_and_clients(tmp_path: Path) -> None:
    backend = FakeBackend()
    served = ControlServer(backend, DaemonConfig(control_socket=tmp_path / "vici.sock"))
    await served.start()
    waiting, background = await Peer.connect(tmp_path / "vici.sock"), await Peer.connect(tmp_path / "vici.sock")
    waiting.send(PacketType.CMD_REQUEST, "initiate", {"child": "slow"})
    await background.answer(PacketType.CMD_REQUEST, "initiate", {"child": "slow", "timeout": "-1"})
    await backend.initiating.wait()
    await served.stop()
    assert await waiting.closed()
    assert await background.closed()
    assert backend.cancelled.is_set()


async def test_a_client_that_does_not_read_loses_events_and_is_told(server: Served) -> None:
    _, backend, path = server
    slow = await Peer.connect(path)
    await slow.answer(PacketType.EVENT_REGISTER, "log")
    await slow.answer(PacketType.EVENT_REGISTER, "x-events-lost")
    quick = await Peer.connect(path)
    line = LogLine("IKE", 1, None, None, "x" * 10_000)
    sent = 4 * MAX_EVENT_BACKLOG // 10_000
    for _ in range(sent):  # the server's loop is ours: nothing is read meanwhile
        backend.publish(line)
    assert (await quick.answer(PacketType.CMD_REQUEST, "version")).text("daemon") == "vpnd"
    seen, lost, notice = 0, 0, ""
    while not lost:
        _, name, event = await slow.receive()
        if name == "x-events-lost":
            lost = int(event.text("events") or 0)
        elif event.text("group") == "CFG":
            notice = event.text("msg") or ""
        else:
            seen += 1
    assert seen + lost == sent
    assert lost > sent // 4
    assert notice == f"{lost} events were dropped, this client reads too slowly"
    backend.publish(replace(line, text="after"))
    _, _, event = await slow.receive()
    assert event.text("msg") == "after"
    slow.close()
    quick.close()


async def test_answers_wait_for_a_slow_client(server: Served) -> None:
    _, backend, path = server
    backend.sas += [ike_status(f"gw-{number}", number) for number in range(1, 3001)]
    peer = await Peer.connect(path)
    await peer.answer(PacketType.EVENT_REGISTER, "list-sa")
    peer.send(PacketType.CMD_REQUEST, "list-sas")
    names = []
    while (received := await peer.receive())[0] is PacketType.EVENT:
        names += list(received[2].entries)
    assert names == [f"gw-{number}" for number in range(1, 3001)]
    peer.close()


async def test_a_client_that_never_reads_its_answer_is_closed(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served, backend, path = server
    monkeypatch.setattr("vpnd.control.server.STALL", 0.05)
    backend.sas += [ike_status(f"gw-{number}", number) for number in range(1, 3001)]
    peer = await Peer.connect(path)
    await peer.answer(PacketType.EVENT_REGISTER, "list-sa")
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
    peer.send(PacketType.CMD_REQUEST, "list-sas")
    while served.clients:
        await asyncio.sleep(0.01)
    peer.close()


async def test_an_answer_that_is_too_long_is_an_error(server: Served) -> None:
    _, backend, path = server
    backend.shared |= {f"{number:05}-" + "x" * 100: None for number in range(6000)}  # type: ignore[misc]
    peer = await Peer.connect(path)
    answer = await peer.answer(PacketType.CMD_REQUEST, "get-shared")
    assert answer.text("success") == "no"
    assert "too" in (answer.text("errmsg") or "") or "the most is" in (answer.text("errmsg") or "")
    peer.close()


async def test_more_clients_than_the_bound_are_turned_away(server: Served) -> None:
    _, _, path = server
    peers = [await Peer.connect(path) for _ in range(MAX_CLIENTS)]
    for peer in peers:
        await peer.answer(PacketType.CMD_REQUEST, "version")
    late = await Peer.connect(path)
    assert await late.closed()
    assert (await peers[0].answer(PacketType.CMD_REQUEST, "version")).text("daemon") == "vpnd"
    for peer in peers:
        peer.close()


# The socket


@needs_root
async def test_owner_group_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "vici.sock"
    group = grp.getgrgid(NOBODY.pw_gid).gr_name
    served = ControlServer(FakeBackend(), DaemonConfig(control_socket=path, control_mode=0o620, control_owner="nobody", control_group=group))
    await served.start()
    found = path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o620
    assert (found.st_uid, found.st_gid) == (NOBODY.pw_uid, NOBODY.pw_gid)
    assert os.listdir(tmp_path) == ["vici.sock"]
    await served.stop()


@needs_root
@pytest.mark.parametrize(("group", "status"), [(NOBODY.pw_gid, 0), (0, 3)])
async def test_only_the_group_may_connect(tmp_path: Path, group: int, status: int) -> None:
    for directory in [tmp_path, *tmp_path.parents]:
        if directory != Path("/") and directory.stat().st_mode & 0o001 == 0:
            directory.chmod(directory.stat().st_mode | 0o011)
    path = tmp_path / "vici.sock"
    served = ControlServer(FakeBackend(), DaemonConfig(control_socket=path, control_group=str(group)))
    await served.start()
    program = (
        "import os, sys; from vpnd.cli.control import main, parser; parser();"
        f"os.setgroups([]); os.setgid({NOBODY.pw_gid}); os.setuid({NOBODY.pw_uid});"
        f"sys.exit(main(['--socket', {str(path)!r}, '--json', 'status']))"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    output, errors = await process.communicate()
    assert process.returncode == status, errors
    assert (b'"ikesas"' if status == 0 else b"no permission") in output
    await served.stop()


async def test_a_socket_left_behind_is_replaced_and_a_served_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "vici.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    first = ControlServer(FakeBackend(), DaemonConfig(control_socket=path))
    await first.start()
    with pytest.raises(ControlSocketError, match="serves the control socket"):
        await ControlServer(FakeBackend(), DaemonConfig(control_socket=path)).start()
    peer = await Peer.connect(path)
    assert (await peer.answer(PacketType.CMD_REQUEST, "version")).text("daemon") == "vpnd"
    peer.close()
    await first.stop()


async def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for config, why in (
        (DaemonConfig(control_socket=tmp_path / "file"), "another file"),
        (DaemonConfig(control_socket=tmp_path / "file" / "vici.sock"), "cannot open"),
        (DaemonConfig(control_socket=tmp_path / "vici.sock", control_group="no-such-group"), "no-such-group"),
    ):
        with pytest.raises(ControlSocketError, match=why):
            await ControlServer(FakeBackend(), config).start()
    assert os.listdir(tmp_path) == ["file"]
