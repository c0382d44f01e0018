"""The client session: every request ends, whatever the other side does."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pfkey_support import B, NaiveKernel, PipeSockets, Talk, make_sa

from kernel_shim.model import Expire, KernelError, SaId
from kernel_shim.pfkey import messages as m
from kernel_shim.pfkey import private as p
from kernel_shim.pfkey.client import (
    ATTEMPTS,
    DUMP_TIMEOUT,
    MAX_OUTPUT,
    MAX_UNDER_WAY,
    REPEAT_AFTER,
    ClientSession,
    Overrun,
    Refused,
    Replied,
    Reported,
    TimedOut,
    Unclaimed,
)
from kernel_shim.pfkey.codec import Codec
from kernel_shim.pfkey.constants import MessageType, SaType
from kernel_shim.pfkey.event_messages import expire_message
from kernel_shim.pfkey.outbox import MAX_QUEUED_REPLIES
from kernel_shim.pfkey.sa_messages import sa_extensions, sa_id_extensions
from kernel_shim.pfkey.server import MAX_REMEMBERED_REPLIES, ServerSession

CODEC = Codec()
PID = 77
OLD, NEW = 0x10000, 0x20000  # SPIs that stand at the beginning, and that are added
FLUSH = m.Message(MessageType.FLUSH, SaType.ESP)
DUMP = m.Message(MessageType.DUMP, SaType.ESP)


@pytest.fixture
def client():
    return ClientSession(PID)


def sent(client: ClientSession) -> list[m.Message]:
    out = []
    while (data := client.next_output()) is not None:
        out.append(CODEC.decode(data))
        client.output_sent()
    return out


def events(client: ClientSession) -> list[object]:
    return list(iter(client.next_event, None))


def hear(client: ClientSession, message: m.Message, descriptors: tuple[int, ...] = (), now: float = 0.0) -> None:
    client.receive(CODEC.encode(message), descriptors, now)


def test_a_reply_finds_its_request(client):
    first, second = client.request(FLUSH, 0.0), client.request(FLUSH, 0.0)
    one, two = sent(client)
    assert one.pid == two.pid == PID
    hear(client, two)
    hear(client, replace(one, errno=errno.EPERM, extensions=(p.ErrorText("not you"),)))
    replied, refused = events(client)
    assert (replied.ticket, replied.messages) == (second, (two,))
    assert (refused.ticket, refused.error.errno, refused.error.detail) == (first, errno.EPERM, "not you")
    assert client.next_deadline() is None


def test_what_is_not_ours_is_passed_over(client):
    client.request(FLUSH, 0.0)
    (asked,) = sent(client)
    for other in (replace(asked, pid=PID + 1), replace(asked, sequence=asked.sequence + 1), replace(asked, type=MessageType.X_SPDFLUSH)):
        hear(client, other)
    assert events(client) == []
    hear(client, asked)
    hear(client, asked)
    assert len(events(client)) == 1


def test_silence_is_answered_by_repetition_and_then_by_an_end(client):
    ticket = client.request(FLUSH, 0.0)
    (first,) = sent(client)
    now = 0.0
    for _ in range(ATTEMPTS - 1):
        now = client.next_deadline()
        client.tick(now)
        assert sent(client) == [first]
    assert events(client) == []
    assert now == sum(REPEAT_AFTER[:-1])
    client.tick(client.next_deadline())
    assert events(client) == [TimedOut(ticket)]
    assert client.next_deadline() is None
    hear(client, first)
    assert events(client) == []


def test_nothing_piles_up_before_a_kernel_side_that_does_not_read(client):
    for _ in range(200):
        client.request(FLUSH, 0.0)
    while (deadline := client.next_deadline()) is not None:
        client.tick(deadline)
    assert len(events(client)) == 200
    assert client.next_output() is None


def test_a_bounded_number_is_under_way(client):
    tickets = [client.request(FLUSH, 0.0) for _ in range(MAX_UNDER_WAY + 2)]
    out = sent(client)
    assert len(out) == MAX_UNDER_WAY
    hear(client, out[0])
    assert len(sent(client)) == 1
    client.cancel(tickets[1], 0.0)
    assert len(sent(client)) == 1
    assert MAX_UNDER_WAY < MAX_QUEUED_REPLIES < MAX_REMEMBERED_REPLIES


def test_cancelled_requests_tell_nothing(client):
    ticket = client.request(FLUSH, 0.0)
    (asked,) = sent(client)
    client.cancel(ticket, 0.0)
    hear(client, asked, (7, 8))
    assert events(client) == [Unclaimed((7, 8))]


def test_a_notice_needs_no_reply_and_has_a_bound(client):
    for _ in range(MAX_OUTPUT):
        client.notify(m.Message(MessageType.ACQUIRE, SaType.ESP, errno.ETIMEDOUT, 5))
    assert client.next_deadline() is None
    with pytest.raises(KernelError) as error:
        client.notify(m.Message(MessageType.ACQUIRE, SaType.ESP, errno.ETIMEDOUT, 5))
    assert error.value.errno == errno.ENOBUFS


def test_a_malformed_reply_ends_its_request(client):
    ticket = client.request(FLUSH, 0.0)
    (asked,) = sent(client)
    client.receive(CODEC.encode(asked) + b"x", (3,), 0.0)
    refused, unclaimed = events(client)
    assert (refused.ticket, type(refused.error)) == (ticket, m.PfKeyError)
    assert unclaimed == Unclaimed((3,))
    assert client.malformed == 1


def test_events(client):
    expire = Expire(SaId(B, 5), 7, hard=True)
    hear(client, expire_message(expire))
    hear(client, m.Message(MessageType.X_OVERRUN, SaType.ESP))
    assert events(client) == [Reported(expire), Overrun()]


def entry(spi: int, sequence: int, request: int, remaining: int) -> m.Message:
    extensions = (m.Sa(spi), p.DumpPosition(request, remaining))
    return m.Message(MessageType.DUMP, SaType.ESP, 0, sequence, PID, extensions)


def test_a_dump_is_one_reply_and_lives_as_long_as_it_moves(client):
    ticket = client.request(DUMP, 0.0)
    (asked,) = sent(client)
    for position in range(1, 10):
        now = position * DUMP_TIMEOUT * 0.9
        client.tick(now)
        hear(client, entry(position, position % 9, asked.sequence, 9 - position), now=now)
    assert sent(client) == []
    (replied,) = events(client)
    assert replied.ticket == ticket
    assert [message.require(m.Sa).spi for message in replied.messages] == list(range(1, 10))


def test_entries_of_an_earlier_dump_do_not_count(client):
    first = client.request(DUMP, 0.0)
    (one,) = sent(client)
    hear(client, entry(1, 1, one.sequence, 2))
    client.cancel(first, 0.0)
    client.request(DUMP, 0.0)
    (two,) = sent(client)
    hear(client, entry(2, 2, one.sequence, 1))
    hear(client, entry(8, 1, two.sequence, 1))
    hear(client, entry(3, 0, one.sequence, 0))
    hear(client, entry(9, 0, two.sequence, 0))
    (replied,) = events(client)
    assert [message.require(m.Sa).spi for message in replied.messages] == [8, 9]


def test_a_dump_that_began_anew_is_not_counted_twice(client):
    client.request(DUMP, 0.0)
    (asked,) = sent(client)
    for spi, sequence, remaining in ((1, 1, 2), (2, 2, 1), (1, 1, 2), (2, 2, 1), (3, 0, 0)):
        hear(client, entry(spi, sequence, asked.sequence, remaining))
    (replied,) = events(client)
    assert [message.require(m.Sa).spi for message in replied.messages] == [1, 2, 3]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_dump_that_lost_an_entry_is_asked_for_again_as_a_whole(client, count):
    kernel = NaiveKernel()
    for spi in range(count):
        kernel.add_sa(make_sa(0x1000 + spi), 0.0)
    talk = Talk.start(ServerSession(kernel, PipeSockets()))
    talk.ask(CODEC.encode(m.Message(MessageType.REGISTER, SaType.ESP, extensions=(p.Hello(),))))
    for lost in range(count):
        now = 100.0 * lost
        ticket = client.request(DUMP, now)
        for data in sent(client):
            talk.say(CODEC.encode(data))
        for at, data in enumerate(talk.hear_all()):
            if at != lost:
                client.receive(data, (), now)
        if lost == count - 1:  # nothing came after it
            client.tick(now + DUMP_TIMEOUT)
        for data in sent(client):
            talk.say(CODEC.encode(data))
        for data in talk.hear_all():
            client.receive(data, (), now)
        (replied,) = events(client)
        assert replied.ticket == ticket
        assert [message.require(m.Sa).spi for message in replied.messages] == [0x1000 + spi for spi in range(count)]
    assert client.repeated == count


def test_a_dump_that_never_comes_whole_ends(client):
    ticket = client.request(DUMP, 0.0)
    (asked,) = sent(client)
    for _ in range(ATTEMPTS):
        hear(client, m.Message(MessageType.DUMP, SaType.ESP, 0, 0, PID, (m.Sa(2), p.DumpPosition(asked.sequence, 0, 2))))
        sent(client)
    assert events(client) == [TimedOut(ticket)]


def test_dumps_wait_for_each_other_and_hold_nothing_else_up(client):
    client.request(DUMP, 0.0)
    client.request(replace(DUMP, type=MessageType.X_SPDDUMP), 0.0)
    client.request(FLUSH, 0.0)
    out = sent(client)
    assert [message.type for message in out] == [MessageType.DUMP, MessageType.FLUSH]
    hear(client, replace(out[0], errno=errno.ENOENT))
    (replied,) = events(client)
    assert replied.messages == ()
    assert [message.type for message in sent(client)] == [MessageType.X_SPDDUMP]


def test_a_dump_that_fails_at_its_end(client):
    """Linux puts the errno into the last message, whose sequence is 0."""
    client.request(DUMP, 0.0)
    sent(client)
    hear(client, m.Message(MessageType.DUMP, SaType.ESP, 0, 1, PID, (m.Sa(1),)))
    hear(client, m.Message(MessageType.DUMP, SaType.ESP, errno.ENOBUFS, 0, PID))
    (refused,) = events(client)
    assert refused.error.errno == errno.ENOBUFS


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["add", "delete", "dump", "lose_request", "lose_reply", "time"]), max_size=40))
def test_every_request_ends_and_has_its_effect_once(steps):
    """Client and server with a channel between them that loses messages in both directions."""
    kernel = NaiveKernel()
    for spi in range(OLD, OLD + len(steps)):
        kernel.add_sa(make_sa(spi), 0.0)
    kernel.calls.clear()
    talk = Talk.start(ServerSession(kernel, PipeSockets()))
    client, now, added, deleted = ClientSession(PID), 0.0, 0, 0
    lose_request = lose_reply = 0
    tickets = {client.request(m.Message(MessageType.REGISTER, SaType.ESP, extensions=(p.Hello(),)), now)}
    ended: dict[int, object] = {}

    def run() -> None:
        nonlocal lose_request, lose_reply
        while True:
            moved = False
            while (data := client.next_output()) is not None:
                client.output_sent()
                moved = True
                if lose_request:
                    lose_request -= 1
                else:
                    talk.say(data)
            while (data := talk.hear()) is not None:
                moved = True
                if lose_reply:
                    lose_reply -= 1
                else:
                    client.receive(data, (), now)
            while (event := client.next_event()) is not None:
                ended[event.ticket] = event
            if not moved:
                return

    run()
    for step in steps:
        if step == "add":
            extensions = tuple(sa_extensions(make_sa(NEW + added), private=True, keys=True))
            tickets.add(client.request(m.Message(MessageType.ADD, SaType.ESP, extensions=extensions), now))
            added += 1
        elif step == "delete":
            extensions = tuple(sa_id_extensions(SaId(B, OLD + deleted)))
            tickets.add(client.request(m.Message(MessageType.DELETE, SaType.ESP, extensions=extensions), now))
            deleted += 1
        elif step == "dump":
            tickets.add(client.request(DUMP, now))
        elif step == "lose_request":
            lose_request = 1
        elif step == "lose_reply":
            lose_reply = 1
        elif (deadline := client.next_deadline()) is not None:
            now = deadline
            client.tick(now)
        run()
    lose_request = lose_reply = 0
    while (deadline := client.next_deadline()) is not None:
        now = deadline
        client.tick(now)
        run()
    # A lost reply never turns into the EEXIST or ESRCH of a repetition that was carried out again.
    assert ended.keys() == tickets
    assert not [event for event in ended.values() if isinstance(event, Refused)]
    timed_out = sum(isinstance(event, TimedOut) for event in ended.values())
    assert added + deleted - timed_out <= len(kernel.calls) <= added + deleted


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=80), max_size=5))
def test_garbage_from_the_kernel_side_disturbs_nothing(datagrams):
    client = ClientSession(PID)
    client.request(FLUSH, 0.0)
    (asked,) = sent(client)
    for data in datagrams:
        client.receive(data, (), 0.0)
    list(events(client))
    client.request(FLUSH, 0.0)
    (asked,) = sent(client)
    hear(client, asked)
    assert isinstance(events(client)[-1], Replied)
