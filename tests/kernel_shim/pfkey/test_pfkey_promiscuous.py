"""Promiscuous clients: they see what others say and hear, lose honestly, and hold nobody up."""

from __future__ import annotations

import pytest
from pfkey_support import A, B, NaiveKernel, PipeSockets, Talk, make_sa

from kernel_shim.model import Acquire, Expire, Mode, SaId
from kernel_shim.pfkey import messages as m
from kernel_shim.pfkey import private as p
from kernel_shim.pfkey.codec import Codec
from kernel_shim.pfkey.constants import PRIVATE_EXTENSIONS, MessageType, SaType
from kernel_shim.pfkey.sa_messages import sa_extensions, sa_id_extensions
from kernel_shim.pfkey.server import ServerSession
from kernel_shim.pfkey.watch import MAX_WATCHED_MESSAGES, MAX_WATCHED_OCTETS

CODEC = Codec()


def said(kind: MessageType, *extensions: m.Extension, sequence: int = 1, sa_type: int = SaType.ESP, pid: int = 42) -> bytes:
    return CODEC.encode(m.Message(kind, sa_type, 0, sequence, pid, extensions))


def watch(session: ServerSession, number: int, *, private: bool = True) -> Talk:
    talk = Talk.start(session, number)
    if private:
        talk.ask(said(MessageType.REGISTER, p.Hello(), sa_type=SaType.UNSPEC, pid=number))
    reply = CODEC.decode(talk.ask(said(MessageType.X_PROMISC, sa_type=1, pid=number)))
    assert (reply.type, reply.errno) == (MessageType.X_PROMISC, 0)
    return talk


def heard(talk: Talk) -> list[m.Message]:
    return [CODEC.decode(data) for data in talk.hear_all()]


@pytest.fixture
def kernel() -> NaiveKernel:
    return NaiveKernel()


@pytest.fixture
def session(kernel: NaiveKernel) -> ServerSession:
    return ServerSession(kernel, PipeSockets())


@pytest.fixture
def talk(session: ServerSession) -> Talk:
    talk = Talk.start(session, 1)
    talk.ask(said(MessageType.REGISTER, p.Hello()))
    return talk


def add(talk: Talk, spi: int, sequence: int = 9) -> None:
    talk.ask(said(MessageType.ADD, *sa_extensions(make_sa(spi), private=True, keys=True), sequence=sequence))


def test_requests_replies_and_events_of_others_without_keys(session: ServerSession, talk: Talk, kernel: NaiveKernel) -> None:
    watcher = watch(session, 2)
    add(talk, 0x1000)
    talk.ask(said(MessageType.DELETE, *sa_id_extensions(make_sa(0x2000).id), sequence=10))
    kernel.emit(Expire(SaId(B, 0x1000), 7, hard=True))
    copies = heard(watcher)
    assert [(it.type, it.sequence, it.errno) for it in copies] == [
        (MessageType.ADD, 9, 0),
        (MessageType.ADD, 9, 0),
        (MessageType.DELETE, 10, 0),
        (MessageType.DELETE, 10, 3),
        (MessageType.EXPIRE, 0, 0),
    ]
    assert all(it.find(m.Key) is None for it in copies)
    assert copies[0].require(p.SaExtension).algorithm == make_sa().algorithm


def test_no_key_manager_and_no_copies_of_its_own_words(session: ServerSession, talk: Talk, kernel: NaiveKernel) -> None:
    before = list(kernel.listening)
    watcher = watch(session, 2)
    watcher.ask(said(MessageType.X_STATISTICS, sequence=3, pid=2))
    assert heard(watcher) == []
    watcher.session.disconnect(watcher.client, 0.0)
    assert kernel.listening == before
    assert session.statistics()["pfkey.promiscuous"] == 0


def test_it_ends_when_the_client_says_so(session: ServerSession, talk: Talk) -> None:
    watcher = watch(session, 2)
    watcher.ask(said(MessageType.X_PROMISC, sa_type=0, sequence=5, pid=2))
    talk.ask(said(MessageType.X_STATISTICS, sequence=3))
    assert heard(watcher) == []


def test_a_client_without_our_extensions_sees_none_of_them(session: ServerSession, talk: Talk, kernel: NaiveKernel) -> None:
    watcher = watch(session, 2, private=False)
    add(talk, 0x1000)
    talk.ask(said(MessageType.X_STATISTICS, sequence=3))
    kernel.emit(Acquire(9, 17, 7, Mode.TUNNEL, A, B))
    copies = heard(watcher)
    assert [it.type for it in copies] == [MessageType.ADD, MessageType.ADD, MessageType.ACQUIRE]
    assert all(int(extension.type) < PRIVATE_EXTENSIONS for it in copies for extension in it.extensions)  # type: ignore[attr-defined]


def test_what_a_slow_one_loses_is_counted_at_its_place(session: ServerSession, talk: Talk, kernel: NaiveKernel) -> None:
    watcher = watch(session, 2)
    for spi in range(MAX_WATCHED_MESSAGES + 5):
        kernel.emit(Expire(SaId(B, spi), 7, hard=False))
    first = [CODEC.decode(watcher.hear() or b"") for _ in range(3)]
    assert [it.require(m.Sa).spi for it in first] == [0, 1, 2]
    kernel.emit(Expire(SaId(A, 0xFFFF), 7, hard=False))
    rest = heard(watcher)
    assert rest[-2].require(p.Lost).messages == 5
    assert rest[-1].require(m.Sa).spi == 0xFFFF
    assert session.statistics()["pfkey.copies-lost"] == 5


def test_loss_at_the_end_is_told_as_well(session: ServerSession, kernel: NaiveKernel) -> None:
    watcher = watch(session, 2)
    for spi in range(MAX_WATCHED_MESSAGES + 1):
        kernel.emit(Expire(SaId(B, spi), 7, hard=False))
    assert heard(watcher)[-1].require(p.Lost).messages == 1


def test_the_octets_of_copies_are_bounded(session: ServerSession, talk: Talk) -> None:
    watcher = watch(session, 2)
    long = m.UnknownExtension(0x7000, bytes(MAX_WATCHED_OCTETS // 8 + 4))
    for sequence in range(20):
        talk.ask(said(MessageType.GET, *sa_id_extensions(make_sa().id), long, sequence=sequence))
    copies = heard(watcher)
    assert sum(len(CODEC.encode(it)) for it in copies) < MAX_WATCHED_OCTETS
    assert copies[0].find(m.UnknownExtension) is None, "what cannot be read may be a key"
    lost = [it.require(p.Lost).messages for it in copies if it.type == MessageType.X_OVERRUN]
    assert lost
    assert sum(lost) + len(copies) - len(lost) == 40


def test_a_dump_and_its_entries_are_no_copies(session: ServerSession, talk: Talk) -> None:
    for spi in range(5):
        add(talk, 0x1000 + spi, sequence=20 + spi)
    watcher = watch(session, 2)
    talk.say(said(MessageType.DUMP, sequence=40))
    assert len(talk.hear_all()) == 5
    assert [it.type for it in heard(watcher)] == [MessageType.DUMP]


@pytest.mark.parametrize("private", [True, False])
def test_dumps_of_what_a_kernel_does_not_have_are_refused(session: ServerSession, private: bool) -> None:
    talk = Talk.start(session, 3)
    talk.ask(said(MessageType.REGISTER, *((p.Hello(),) if private else ())))
    for kind in (MessageType.X_PENDINGDUMP, MessageType.X_BUNDLEDUMP):
        assert CODEC.decode(talk.ask(said(kind, sequence=8))).errno == 95
