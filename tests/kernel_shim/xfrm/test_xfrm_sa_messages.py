"""NETLINK_XFRM beside the plain SA: sequence numbers that go on, AE, MIGRATE, REPORT, offload, direction, and the databases as wholes."""

from __future__ import annotations

import errno
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xfrm_support import HERE, PEER, carried, make_sa

from kernel_shim.channel.xfrm_migration import check_migration, continuation, only_ports_differ
from kernel_shim.model import (
    AddressRange,
    Direction,
    Flow,
    KernelError,
    Mark,
    Mode,
    PortRange,
    ReqId,
    SaId,
    Selector,
    Spi,
    UdpEncapsulation,
)
from kernel_shim.secret import Secret
from kernel_shim.xfrm import structs
from kernel_shim.xfrm.constants import OURS, Attribute, DatabaseAttribute, EventFlag, MessageType, OffloadFlag, SaDirection
from kernel_shim.xfrm.events import Report, notice_from
from kernel_shim.xfrm.information import HashThreshold, sad_information_from, set_thresholds_message, spd_information_from
from kernel_shim.xfrm.migrate import Migration, Move, migrate_message, migration_from
from kernel_shim.xfrm.replay import ReplayState, SaEvent, Usage, event_from, get_event_message, replay_from, set_event_message
from kernel_shim.xfrm.sa_replies import sa_from
from kernel_shim.xfrm.sas import Continuation, sa_id_message, sa_message
from kernel_shim.xfrm.selectors import selector_struct
from kernel_shim.xfrm.structs import MalformedMessage, SaStruct
from kernel_shim.xfrm.wire import Message

pytestmark = pytest.mark.property

MOVED = IPv4Address("198.51.100.1")
SELECTOR = Selector(AddressRange.of(IPv4Network("10.1.0.0/16")), AddressRange.of(IPv4Network("10.2.0.0/16")), if_id=5)
WORDS = st.integers(0, 2**32 - 1)


@st.composite
def replay_states(draw: st.DrawFn) -> ReplayState:
    if not draw(st.booleans()):
        return ReplayState(draw(WORDS), draw(WORDS), bitmap=(draw(WORDS),))
    bitmap = tuple(draw(st.lists(WORDS, max_size=128)))
    return ReplayState(draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 32 * len(bitmap))), bitmap, wide=True)


def test_sizes_are_those_of_the_c_structures() -> None:
    assert structs.AEVENT_SIZE == 48
    assert structs.MOVE.size == 76
    assert structs.REPORT_SIZE == 60
    assert structs.LIFETIME_CURRENT.size == 32
    assert structs.OFFLOAD.size == 8
    assert structs.REPLAY_ESN.size == 24


# Sequence numbers


@given(replay_states())
def test_replay_states_are_read_back(state: ReplayState) -> None:
    message = carried(set_event_message(SaId(PEER, Spi(0xC0DE)), state))
    assert event_from(message).replay == state


def test_a_bitmap_that_is_not_as_long_as_it_says_is_refused() -> None:
    data = ReplayState(wide=True, window=64, bitmap=(1, 2)).attributes()[Attribute.REPLAY_ESN_VAL]
    for wrong in (data[:-1], data[:-4], data + bytes(4), structs.REPLAY_ESN.pack(129, 0, 0, 0, 0, 64) + bytes(4 * 129)):
        with pytest.raises(MalformedMessage, match="bitmap"):
            replay_from({Attribute.REPLAY_ESN_VAL: wrong})


@given(replay_states(), st.builds(Usage, *(st.integers(0, 2**60),) * 4))
def test_an_sa_goes_on_from_what_another_was(state: ReplayState, usage: Usage) -> None:
    message = carried(sa_message(make_sa(esn=True, replay_window=64), update=False, continues=Continuation(state, usage)))
    assert sa_from(message.body, message.attributes).replay == state
    assert structs.unpack(structs.LIFETIME_CURRENT, message.attributes[Attribute.LTIME_VAL], "") == (usage.octets, usage.packets, usage.added, usage.used)


def test_what_is_asked_of_an_ae_message_and_what_it_tells() -> None:
    request = carried(get_event_message(SaId(IPv6Address("2001:db8::1"), Spi(0xC0DE)), Mark(1, 3)))
    asked = event_from(request)
    assert asked.why == EventFlag.REPLAY | EventFlag.LIFETIME
    assert request.attributes[Attribute.MARK] == structs.MARK.pack(1, 3)
    told = structs.EventStruct.unpack(request.body)._replace(reqid=OURS | 7, flags=EventFlag.BY_TIMER)
    notice = notice_from(Message(MessageType.NEWAE, told.pack(), ReplayState(9).attributes() | Usage(1, 2, 3, 4).attributes()))
    assert notice is not None
    assert notice.ours
    assert isinstance(notice.event, SaEvent)
    assert (notice.event.sa, notice.event.usage) == (SaId(IPv6Address("2001:db8::1"), Spi(0xC0DE)), Usage(1, 2, 3, 4))
    assert notice.event.replay is not None
    assert notice.event.replay.sent == 9


# Other addresses


def test_migrate_is_read_back_and_known_as_ours() -> None:
    move = Move(HERE, PEER, MOVED, PEER, Mode.TUNNEL, OURS | 7)
    message = carried(migrate_message(Direction.OUT, SELECTOR, [move, move]))
    migration = migration_from(message)
    assert migration == Migration(Direction.OUT, SELECTOR, (move, move))
    notice = notice_from(message)
    assert notice is not None
    assert (notice.event, notice.ours) == (migration, True)


@pytest.mark.parametrize("size", [0, 75, 77, 7 * 76])
def test_moves_of_another_size_are_malformed(size: int) -> None:
    message = migrate_message(Direction.OUT, SELECTOR, [Move(HERE, PEER, MOVED, PEER, Mode.TUNNEL, OURS)])
    with pytest.raises(MalformedMessage, match="moves"):
        migration_from(replace(message, attributes={Attribute.MIGRATE: bytes(size)}))


def test_a_migrate_has_moves() -> None:
    with pytest.raises(KernelError, match="0 moves"):
        migrate_message(Direction.OUT, SELECTOR, [])


def test_only_addresses_and_encapsulation_may_change() -> None:
    old = make_sa(encapsulation=UdpEncapsulation())
    check_migration(old, replace(old, source=MOVED, destination=HERE, encapsulation=None))
    for change in ({"spi": Spi(1)}, {"encryption_key": Secret(bytes(range(20)))}, {"esn": True}, {"reqid": ReqId(8)}):
        with pytest.raises(KernelError) as refused:
            check_migration(old, replace(old, source=MOVED, **change))
        assert refused.value.errno == errno.EINVAL
    assert only_ports_differ(old, replace(old, encapsulation=UdpEncapsulation(4500, 61000)))
    assert not only_ports_differ(old, replace(old, encapsulation=None))
    assert not only_ports_differ(old, replace(old, source=MOVED))


# Direction and offload


def test_a_kernel_that_knows_directions_gets_no_window_on_an_outbound_sa() -> None:
    """Linux 6.10 refuses one; before it, ESN needs one."""
    outbound = make_sa(esn=True, replay_window=64)
    message = sa_message(outbound, update=False, directed=True)
    assert message.attributes[Attribute.SA_DIR] == bytes((SaDirection.OUT,))
    assert message.attributes[Attribute.REPLAY_ESN_VAL] == bytes(24)
    assert SaStruct.unpack(sa_message(make_sa(replay_window=32), update=False, directed=True).body).replay_window == 0
    inbound = sa_message(replace(outbound, direction=Direction.IN), update=True, directed=True)
    assert inbound.attributes[Attribute.SA_DIR] == bytes((SaDirection.IN,))
    told = sa_from(inbound.body, inbound.attributes)
    assert (told.direction, told.replay_window) == (Direction.IN, 64)
    assert Attribute.SA_DIR not in sa_message(outbound, update=False).attributes


def test_what_a_kernel_that_knows_directions_refuses_is_not_carried_over() -> None:
    message = sa_message(make_sa(), update=False, continues=Continuation(ReplayState(5, 6, 64, (1, 2), wide=True), Usage()))
    last = sa_from(message.body, message.attributes)
    assert continuation(last, Direction.OUT, directed=False).replay == last.replay
    assert continuation(last, Direction.OUT, directed=True).replay == ReplayState(5, wide=True)
    assert continuation(last, Direction.IN, directed=True).replay == replace(last.replay, sent=0)


@pytest.mark.parametrize(("direction", "version", "flags"), [(Direction.OUT, 4, OffloadFlag(0)), (Direction.IN, 6, OffloadFlag.IPV6 | OffloadFlag.INBOUND)])
def test_offload(direction: Direction, version: int, flags: OffloadFlag) -> None:
    ends = (HERE, PEER) if version == 4 else (IPv6Address("::1"), IPv6Address("::2"))
    message = carried(sa_message(make_sa(direction=direction, source=ends[0], destination=ends[1]), update=False, device=3))
    assert message.attributes[Attribute.OFFLOAD_DEV] == structs.OFFLOAD.pack(3, flags)
    assert sa_from(message.body, message.attributes).device == 3


def test_flags_that_we_never_set_are_told() -> None:
    message = sa_message(make_sa(), update=False)
    body = SaStruct.unpack(message.body)._replace(flags=0x10).pack()
    told = sa_from(body, {**message.attributes, Attribute.SA_EXTRA_FLAGS: structs.NUMBER.pack(2)})
    assert (told.flags, told.extra_flags) == (0x10, 2)


def test_an_sa_with_a_mark_is_asked_for_with_it() -> None:
    assert sa_id_message(MessageType.GETSA, SaId(PEER, Spi(1)), Mark(7, 0xFF)).attributes == {Attribute.MARK: structs.MARK.pack(7, 0xFF)}
    assert sa_id_message(MessageType.DELSA, SaId(PEER, Spi(1))).attributes == {}


# The databases


def test_spd_information() -> None:
    attributes = {
        DatabaseAttribute.SPD_COUNTS: structs.SPD_COUNTS.pack(1, 2, 3, 4, 5, 6),
        DatabaseAttribute.SPD_HASH: structs.HASH_SIZES.pack(7, 1 << 20),
        DatabaseAttribute.SPD_THRESHOLD_4: structs.HASH_THRESHOLD.pack(24, 16),
    }
    told = spd_information_from(carried(Message(MessageType.NEWSPDINFO, bytes(4), attributes)))
    assert told.policies == {Direction.IN: 1, Direction.OUT: 2, Direction.FORWARD: 3}
    assert told.socket_policies == {Direction.IN: 4, Direction.OUT: 5, Direction.FORWARD: 6}
    assert (told.buckets, told.most_buckets, told.threshold4, told.threshold6) == (7, 1 << 20, HashThreshold(24, 16), None)


def test_sad_information() -> None:
    told = sad_information_from(carried(Message(MessageType.NEWSADINFO, bytes(4), {1: structs.NUMBER.pack(9), 2: structs.HASH_SIZES.pack(7, 8)})))
    assert (told.sas, told.buckets, told.most_buckets) == (9, 7, 8)


def test_thresholds_beyond_an_address_are_refused() -> None:
    assert set_thresholds_message(HashThreshold(0, 32), None).attributes == {DatabaseAttribute.SPD_THRESHOLD_4: b"\x00\x20"}
    for threshold4, threshold6 in ((HashThreshold(33, 0), None), (None, HashThreshold(0, 129)), (HashThreshold(-1, 0), None)):
        with pytest.raises(KernelError, match="hash threshold"):
            set_thresholds_message(threshold4, threshold6)


def test_report() -> None:
    flow = Selector(AddressRange.host(HERE), AddressRange.host(PEER), 17, PortRange(5, 5), PortRange(6, 6))
    notice = notice_from(carried(Message(MessageType.REPORT, structs.REPORT_HEAD.pack(60) + selector_struct(flow).pack())))
    assert notice is not None
    assert notice.event == Report(60, Flow(HERE, PEER, 17, 5, 6))
    assert not notice.ours
