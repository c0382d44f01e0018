"""What stays and what goes as a routing daemon's connections come, end and break; the server between it and them."""

from __future__ import annotations

import asyncio
import os
from ipaddress import IPv4Address, ip_address
from struct import pack

import pytest

from kernel_shim.mpls.fpm import FpmError
from kernel_shim.mpls.fpm_rib import Surroundings
from kernel_shim.mpls.labels import Label
from kernel_shim.mpls.lfib import Key, Nhlfe, ToPeer, TtlModel
from kernel_shim.mpls.node import LabelBinding, Tunnel
from vpnd.io.fpm import READ_AT_ONCE, FpmServer
from vpnd.mpls.fpm_feed import Difference, FpmFeed, Heard
from vpnd.telemetry.counters import Counters

GATEWAY = IPv4Address("192.0.2.2")
AROUND = Surroundings({101: "red"}.get, {11: "red"}.get, {GATEWAY: "pe"}.get)
SETTLE, GRACE = 10.0, 100.0
ZEBRA, STRANGER = 64101, 64102  # users
# Says one thing and lives until it is told to go.
SPEAK = "exec 3<>/dev/tcp/127.0.0.1/$0; printf $1 >&3; read"


def said(label: int, out: int, *, gone: bool = False, by: IPv4Address = GATEWAY) -> bytes:
    """A frame as zebra sends it: packets with `label` go to `by` with `out`."""
    attributes = pack("=HH", 8, 1) + (label << 12 | 0x100).to_bytes(4, "big")
    if not gone:
        attributes += pack("=HH", 8, 19) + (out << 12 | 0x100).to_bytes(4, "big") + pack("=HHH", 10, 18, 2) + by.packed + b"\0\0"
    body = pack("=BBBBBBBBI", 28, 20, 0, 0, 254, 196, 0, 1, 0) + attributes
    message = pack("=IHHII", 16 + len(body), 25 if gone else 24, 0, 0, 0) + body
    return pack("!BBH", 1, 1, 4 + len(message)) + message


def binding(label: int, out: int) -> LabelBinding:
    return LabelBinding(Label(label), (Nhlfe(ToPeer("pe"), (Label(out),), TtlModel.PIPE),))


def key(label: int) -> Key:
    return Key("label", ("", Label(label)))


@pytest.fixture
def feed() -> FpmFeed:
    return FpmFeed(AROUND, SETTLE, GRACE)


def test_what_a_new_connection_does_not_say_again_goes_once_it_is_quiet(feed: FpmFeed) -> None:
    feed.begin(0.0)
    assert feed.hear(said(100, 200) + said(101, 201), 1.0) == Heard(2, beyond_bounds=0, unresolved=0)
    assert set(feed.take().put) == {binding(100, 200), binding(101, 201)}
    feed.end(20.0)
    assert feed.deadline == 20.0 + GRACE
    feed.begin(30.0)
    feed.hear(said(100, 200), 31.0)
    assert feed.take() == Difference((), ())
    assert feed.deadline == 31.0 + SETTLE
    assert feed.tick(40.9) == 0
    assert feed.tick(41.0) == 1
    assert feed.take().gone == (key(101),)
    assert feed.deadline is None


def test_one_who_says_nothing_yet_takes_nothing_away_before_the_grace(feed: FpmFeed) -> None:
    feed.begin(0.0)
    feed.hear(said(100, 200), 0.0)
    feed.begin(30.0)  # on that connection nothing comes
    assert feed.deadline == 30.0 + GRACE
    feed.begin(60.0)
    assert feed.tick(59.0 + GRACE) == 0
    feed.hear(said(101, 201), 60.0 + GRACE - 1)
    assert feed.deadline == 60.0 + GRACE
    assert feed.tick(60.0 + GRACE) == 1


def test_one_who_never_falls_silent_is_measured_by_the_grace(feed: FpmFeed) -> None:
    feed.begin(0.0)
    feed.hear(said(100, 200), 0.0)
    feed.end(1.0)
    feed.begin(2.0)
    for second in range(2, 200, 5):
        feed.hear(said(101, second + 16), float(second))
        assert feed.deadline is None or feed.deadline <= 2.0 + GRACE
        feed.tick(float(second))
    assert len(feed) == 1


def test_after_the_grace_nothing_is_left(feed: FpmFeed) -> None:
    feed.begin(0.0)
    feed.hear(said(100, 200), 0.0)
    feed.take()
    feed.end(5.0)
    assert feed.tick(5.0 + GRACE) == 1
    assert feed.take().gone == (key(100),)
    assert feed.deadline is None


def test_a_withdrawal_is_carried_out_at_once(feed: FpmFeed) -> None:
    feed.begin(0.0)
    feed.hear(said(100, 200), 0.0)
    feed.take()
    feed.hear(said(100, 0, gone=True), 1.0)
    assert feed.take().gone == (key(100),)


def test_garbage_changes_nothing_of_what_stands(feed: FpmFeed) -> None:
    feed.begin(0.0)
    feed.hear(said(100, 200), 0.0)
    feed.take()
    with pytest.raises(FpmError):
        feed.hear(said(100, 0, gone=True) + b"GET / HTTP/1.1", 1.0)
    assert not feed.take().gone
    assert len(feed) == 1


def test_what_counts_for_nothing_is_told(feed: FpmFeed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernel_shim.mpls.fpm_rib.MAX_ROUTES", 1)
    feed.begin(0.0)
    assert feed.hear(said(100, 200, by=IPv4Address("203.0.113.1")), 0.0) == Heard(1, beyond_bounds=0, unresolved=1)
    assert feed.hear(said(100, 200) + said(101, 201), 1.0) == Heard(2, beyond_bounds=1, unresolved=0)
    assert feed.take().put == (binding(100, 200),)


def test_what_an_earlier_run_left_stays_until_it_is_said_again_or_the_grace_is_over(feed: FpmFeed) -> None:
    tunnel = Tunnel("pe", ip_address("192.0.2.1"), GATEWAY)
    feed.adopt([binding(100, 200), binding(101, 201), tunnel], 0.0)
    assert feed.deadline == GRACE
    feed.begin(1.0)
    feed.hear(said(100, 200), 2.0)
    assert feed.take().put == (binding(100, 200),)
    assert feed.tick(2.0 + SETTLE) == 1
    assert feed.take().gone == (key(101),)


def test_other_surroundings_count_from_then_on(feed: FpmFeed) -> None:
    feed.begin(0.0)
    feed.hear(said(100, 200), 0.0)
    feed.take()
    feed.surround(Surroundings(lambda _: None, lambda _: None, lambda _: None))
    assert feed.take().gone == (key(100),)


def test_a_message_that_is_cut_off_counts_for_nothing_and_is_told(feed: FpmFeed) -> None:
    feed.begin(0.0)
    feed.hear(said(100, 200) + said(100, 0, gone=True)[:-1], 0.0)
    assert feed.end(1.0)
    assert len(feed) == 1
    feed.begin(2.0)
    feed.hear(said(100, 200), 2.0)
    assert not feed.end(3.0)


# ---------------------------------------------------------------- the server


async def test_the_newest_connection_wins_and_garbage_ends_one(feed: FpmFeed) -> None:
    changed, counters = asyncio.Event(), Counters()
    server = FpmServer(feed, changed.set, counters)
    await server.open(IPv4Address("127.0.0.1"), 0)
    try:
        assert server.port
        first, first_writer = await asyncio.open_connection("127.0.0.1", server.port)
        first_writer.write(b"".join(said(100 + number, 200) for number in range(2 * READ_AT_ONCE // 68)))
        while len(feed) < 2 * READ_AT_ONCE // 68:
            changed.clear()
            await changed.wait()
        second, second_writer = await asyncio.open_connection("127.0.0.1", server.port)
        assert await _ended(first)
        assert feed.connected
        second_writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await _ended(second)
        while feed.connected:
            changed.clear()
            await changed.wait()
        assert counters.snapshot()["fpm_garbage"] == 1
        assert counters.snapshot()["fpm_connections"] == 2
        assert len(feed) == 2 * READ_AT_ONCE // 68
        for writer in (first_writer, second_writer):
            writer.close()
    finally:
        await server.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be others")
async def test_only_its_user_may_say_routes(feed: FpmFeed) -> None:
    """A stranger neither says one nor takes the place of who may."""
    counters, heard = Counters(), asyncio.Event()
    server = FpmServer(feed, heard.set, counters, ["no-such-user", str(ZEBRA)])
    await server.open(IPv4Address("127.0.0.1"), 0)
    try:
        for user, label, refused in ((ZEBRA, 100, 0), (STRANGER, 101, 1)):
            peer = await asyncio.create_subprocess_exec(
                *("bash", "-c", SPEAK, str(server.port), "".join(f"\\x{octet:02x}" for octet in said(label, 200))),
                user=user,
                group=user,
                stdin=asyncio.subprocess.PIPE,
            )
            while len(feed) != 1 or counters.snapshot().get("fpm_refused", 0) != refused:
                await asyncio.sleep(0.01)
            assert peer.stdin is not None
            peer.stdin.close()
            await peer.wait()
        assert counters.snapshot()["fpm_connections"] == 1
        assert [change.key for change in feed.take().put] == [key(100)]
    finally:
        await server.close()


async def _ended(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read(1) == b""
    except ConnectionError:
        return True
