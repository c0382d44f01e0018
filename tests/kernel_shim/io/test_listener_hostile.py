"""Bad input on a real socket costs the client that sent it, and nobody else."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pfkey_support import NaiveKernel, PipeSockets, make_sa

from kernel_shim.io.listener import CLIENT_BUFFER, Listener
from kernel_shim.pfkey import messages as m
from kernel_shim.pfkey.codec import Codec
from kernel_shim.pfkey.constants import MessageType, SaType
from kernel_shim.pfkey.outbox import MAX_QUEUED_REPLIES
from kernel_shim.pfkey.sa_messages import sa_extensions
from kernel_shim.pfkey.server import MAX_CLIENTS, ServerSession

CODEC = Codec()
FLUSH = CODEC.encode(m.Message(MessageType.X_SPDFLUSH, SaType.UNSPEC, 0, 5, 6))


class Shim:
    """The listener on a poll that the test turns by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kernel, self.sockets = NaiveKernel(), PipeSockets()
        self.session = ServerSession(self.kernel, self.sockets)
        self._poll = select.epoll()
        self._watched: set[int] = set()
        self._listener = Listener(path, self._watch)
        self._listener.listen(self.session)

    def _watch(self, descriptor: int, events: int) -> None:
        if not events:
            self._poll.unregister(descriptor)
            self._watched.discard(descriptor)
            return
        (self._poll.modify if descriptor in self._watched else self._poll.register)(descriptor, events)
        self._watched.add(descriptor)

    def turn(self) -> None:
        """Until nothing is left to do."""
        while True:
            ready = self._poll.poll(0)
            for descriptor, events in ready:
                if self._listener.owns(descriptor):
                    self._listener.handle(descriptor, events, 0.0)
            self._listener.send_ready(0.0)
            if not ready and not self._listener.unfinished:
                return

    def client(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.setblocking(False)
        client.connect(os.fspath(self.path))
        self.turn()
        return client

    def ask(self, client: socket.socket, data: bytes) -> m.Message:
        client.send(data)
        self.turn()
        return CODEC.decode(client.recv(1 << 19))

    def close(self) -> None:
        self._listener.close()
        self._poll.close()
        self.sockets.close()


@pytest.fixture
def shim(tmp_path):
    running = Shim(tmp_path / "kernel")
    yield running
    running.close()


def heard(client: socket.socket) -> list[m.Message]:
    messages = []
    while True:
        try:
            data = client.recv(1 << 19)
        except BlockingIOError:
            return messages
        assert data, "the client was thrown out"
        messages.append(CODEC.decode(data))


def framed(data: bytes, kind: int) -> bytes:
    whole = data[: len(data) // 8 * 8]
    return struct.pack("=BBBBHHII", 2, kind, 0, 3, 2 + len(whole) // 8, 0, 1, 6) + whole


PIECES = [CODEC.encode(m.Message(MessageType.ADD, SaType.ESP, extensions=(extension,)))[16:] for extension in sa_extensions(make_sa(), private=True, keys=True)]
octets = st.binary(min_size=1, max_size=120) | st.builds(framed, st.binary(max_size=120), st.integers(0, 255))
pieces = st.builds(lambda parts, kind: framed(b"".join(parts), kind), st.lists(st.sampled_from(PIECES), max_size=8), st.integers(0, 30))


def test_whatever_one_client_sends_the_others_are_served(shim):
    hostile, good = shim.client(), shim.client()

    @settings(max_examples=100, deadline=None)
    @given(st.lists(octets | pieces, min_size=1, max_size=8))
    def check(datagrams):
        for data in datagrams:
            hostile.send(data)
            shim.turn()
            for message in heard(hostile):
                assert message.errno in errno.errorcode or message.errno == 0
        good.send(FLUSH)
        shim.turn()
        answers = [message for message in heard(good) if message.pid == 6 and message.sequence == 5]
        assert [answer.errno for answer in answers] == [0]

    check()
    assert shim.ask(good, FLUSH).errno == 0


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (b"\x02", errno.EMSGSIZE),
        (FLUSH[:15], errno.EMSGSIZE),
        (FLUSH + bytes(8), errno.EMSGSIZE),
        (b"\x03" + FLUSH[1:], errno.EINVAL),
        (framed(bytes(8), 3), errno.EINVAL),
        (framed(struct.pack("=HHI", 9, 1, 0), 3), errno.EINVAL),
        (struct.pack("=BBBBHHII", 2, 3, 0, 3, 0xFFFF, 0, 1, 6), errno.EMSGSIZE),
    ],
)
def test_a_malformed_message_is_answered_and_the_client_goes_on(shim, data, number):
    client = shim.client()
    assert shim.ask(client, data).errno == number
    assert shim.ask(client, FLUSH).errno == 0


def test_a_client_that_does_not_read_is_not_read_from_and_loses_no_reply(shim):
    silent, good = shim.client(), shim.client()
    asked = 0
    while True:
        try:
            silent.send(CODEC.encode(m.Message(MessageType.GET, SaType.ESP, 0, asked + 1, 6)))
        except BlockingIOError:
            break
        asked += 1
        shim.turn()
        if asked > 4 * CLIENT_BUFFER // 16:
            raise AssertionError("it is read without end")
    assert asked > MAX_QUEUED_REPLIES
    assert shim.ask(good, FLUSH).errno == 0
    answers: list[int] = []
    while len(answers) < asked:
        new = [message.sequence for message in heard(silent) if message.type == MessageType.GET]
        assert new
        answers += new
        shim.turn()
    assert answers == list(range(1, asked + 1))


def test_a_client_that_goes_in_the_middle_of_a_dump_is_forgotten(shim):
    for number in range(500):
        shim.kernel.add_sa(make_sa(0x1000 + number), 0.0)
    client = shim.client()
    client.send(CODEC.encode(m.Message(MessageType.DUMP, SaType.ESP, 0, 1, 6)))
    client.close()
    shim.turn()
    assert shim.session.statistics()["pfkey.clients"] == 0


def test_one_client_too_many_is_turned_away(shim):
    clients = [shim.client() for _ in range(MAX_CLIENTS)]
    assert shim.client().recv(16) == b""
    assert shim.ask(clients[0], FLUSH).errno == 0


def test_only_the_owner_may_connect(shim):
    assert stat.S_IMODE(shim.path.stat().st_mode) == 0o600
    if os.geteuid():
        pytest.skip("needs root, to be someone else")
    shim.path.chmod(0o666)  # past the mode it is still the peer's user that counts
    shim.path.parent.chmod(0o755)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            directory = os.open(shim.path.parent, os.O_PATH)
            os.setuid(65534)
            client.connect(f"/proc/self/fd/{directory}/{shim.path.name}")
            os.write(write, b"c")
            os.write(write, b"x" if client.recv(16) == b"" else b"!")
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"c"
    shim.turn()
    assert os.read(read, 1) == b"x"
    os.waitpid(child, 0)
    os.close(read)
