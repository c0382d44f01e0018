"""Conversations of RFC 2367 with the server session, mostly in raw octets, as a foreign key manager speaks."""

from __future__ import annotations

import errno
import struct
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pfkey_support import A, B, NaiveKernel, PipeSockets, Talk, make_sa, selectors, without_keys

from kernel_shim.model import (
    Acquire,
    Action,
    AddressRange,
    Direction,
    Endpoint,
    Expire,
    Flow,
    Mode,
    NewMapping,
    Policy,
    PortRange,
    SaId,
    SaState,
    SaStatus,
    Selector,
    Template,
    Unresolved,
)
from kernel_shim.pfkey import messages as m
from kernel_shim.pfkey import private as p
from kernel_shim.pfkey.codec import Codec
from kernel_shim.pfkey.constants import ExtensionType as X
from kernel_shim.pfkey.constants import MessageType, SaType
from kernel_shim.pfkey.outbox import MAX_PENDING_ACQUIRES, MAX_PENDING_EXPIRES, MAX_QUEUED_NOTICES, MAX_QUEUED_REPLIES
from kernel_shim.pfkey.policy_messages import policy_extensions, policy_from, selector_extensions
from kernel_shim.pfkey.sa_messages import host_address, sa_extensions, sa_id_extensions, status_from
from kernel_shim.pfkey.server import ACQUIRE_REPEAT, MAX_CLIENTS, ClientId, ServerSession

CODEC = Codec()
PID = 4242


@pytest.fixture
def kernel():
    return NaiveKernel()


@pytest.fixture
def sockets():
    opened = PipeSockets()
    yield opened
    opened.close()


@pytest.fixture
def session(kernel, sockets):
    return ServerSession(kernel, sockets)


@pytest.fixture
def talk(session):
    return Talk.start(session)


def host(layout: str, *values: int) -> bytes:
    return struct.pack("=" + layout, *values)


def header(kind: int, body: bytes = b"", *, number: int = 0, sa_type: int = 3, sequence: int = 1, pid: int = PID) -> bytes:
    return host("BBBBHHII", 2, kind, number, sa_type, (16 + len(body)) // 8, 0, sequence, pid) + body


def v4(kind: int, address, *, prefix: int = 32, proto: int = 0, port: int = 0) -> bytes:
    return host("HHBBHH", 3, kind, proto, prefix, 0, 2) + port.to_bytes(2, "big") + address.packed + bytes(8)


def message(kind: MessageType, *extensions, sequence: int = 1, sa_type: int = SaType.ESP, number: int = 0) -> bytes:
    return CODEC.encode(m.Message(kind, sa_type, number, sequence, PID, extensions))


def told(data: bytes | None) -> m.Message:
    assert data is not None
    return CODEC.decode(data)


def hello(talk: Talk) -> m.Message:
    return told(talk.ask(message(MessageType.REGISTER, p.Hello(), sequence=1)))


ADDRESSES = v4(5, A) + v4(6, B)
POLICY = Policy(
    Selector(AddressRange(A, A), AddressRange(B, B), 6, PortRange(), PortRange(80, 90)),
    Direction.OUT,
    Action.PROTECT,
    1000,
    (Template(Mode.TUNNEL, 7, A, B),),
    Unresolved.EAGAIN,
)


# Registration


def test_register_lists_the_algorithms(talk, kernel):
    reply = told(talk.ask(header(7)))
    assert (reply.type, reply.errno, reply.sequence, reply.pid) == (7, 0, 1, PID)
    auth = reply.require(m.Supported, X.SUPPORTED_AUTH).algorithms
    encrypt = {algorithm.id: algorithm for algorithm in reply.require(m.Supported, X.SUPPORTED_ENCRYPT).algorithms}
    assert {algorithm.id: algorithm.maximum_bits for algorithm in auth} == {3: 160, 5: 256}
    assert (encrypt[12].iv_length, encrypt[12].minimum_bits, encrypt[12].maximum_bits) == (16, 128, 256)
    assert encrypt[20].minimum_bits == 128
    assert len(reply.extensions) == 2
    assert kernel.listening == [True]


def test_register_twice_is_eexist_as_in_linux(talk):
    talk.ask(header(7))
    assert told(talk.ask(header(7))).errno == errno.EEXIST
    assert told(talk.ask(header(7, sa_type=2))).errno == 0
    assert told(talk.ask(header(7, sa_type=77))).errno == errno.EINVAL


def test_register_of_ours_gives_capabilities_and_may_be_repeated(talk, kernel):
    for _ in range(2):
        reply = hello(talk)
        assert reply.errno == 0
        assert reply.require(p.CapabilitiesExtension).capabilities == kernel.capabilities()


def test_a_register_that_only_asks_does_not_listen(talk, kernel):
    assert told(talk.ask(message(MessageType.REGISTER, p.Hello(), sa_type=0))).require(p.CapabilitiesExtension)
    assert kernel.listening == []


def test_the_last_listener_that_leaves_is_told_to_the_kernel(session, kernel):
    first, second = Talk.start(session, 1), Talk.start(session, 2)
    first.ask(header(7))
    second.ask(header(7))
    session.disconnect(first.client, 0.0)
    assert False not in kernel.listening
    session.disconnect(second.client, 0.0)
    assert kernel.listening[-1] is False
    session.disconnect(second.client, 0.0)
    assert session.next_output(second.client, 0.0) is None


# SAs


def test_getspi_update_get_delete(talk, kernel):
    """RFC 2367 section 3.1: an inbound SA's life, in octets."""
    spis = host("HHIII", 2, 16, 0x500, 0x5FF, 0)
    sa2 = host("HHBBHII", 2, 19, 2, 0, 0, 0, 7)
    reply = told(talk.ask(header(1, spis + ADDRESSES + sa2, sequence=77)))
    spi = reply.require(m.Sa).spi
    assert (reply.errno, reply.sequence, reply.pid, 0x500 <= spi <= 0x5FF) == (0, 77, PID, True)
    assert kernel.table[SaId(B, spi)].sa.acquire == 77

    sa = host("HH", 2, 1) + spi.to_bytes(4, "big") + host("BBBBI", 32, 1, 3, 12, 0)
    keys = host("HHHH", 4, 8, 160, 0) + bytes(20) + bytes(4) + host("HHHH", 3, 9, 128, 0) + bytes(16)
    nat = host("HHBBBB", 1, 20, 2, 0, 0, 0) + host("HH", 1, 21) + b"\x11\x94\0\0" + host("HH", 1, 22) + b"\x12\x34\0\0"
    lifetime = host("HHIQQQ", 4, 3, 0, 0, 3600, 0)
    assert told(talk.ask(header(2, sa + ADDRESSES + keys + sa2 + nat + lifetime))).errno == 0
    installed = kernel.table[SaId(B, spi)].sa
    assert installed.direction is Direction.IN
    assert installed.mode is Mode.TUNNEL
    assert (installed.encapsulation.source_port, installed.encapsulation.destination_port) == (4500, 0x1234)
    assert installed.hard.seconds == 3600
    assert (len(installed.encryption_key), len(installed.integrity_key)) == (16, 20)

    sa = host("HH", 2, 1) + spi.to_bytes(4, "big") + bytes(8)
    got = talk.ask(header(5, sa + ADDRESSES))
    assert status_from(told(got)).state is SaState.MATURE
    assert told(got).find(m.Key) is None
    assert not [extension for extension in told(got).extensions if isinstance(extension, m.UnknownExtension) or extension.type >= X.X_HELLO]
    assert told(talk.ask(header(4, sa + ADDRESSES))).errno == 0
    assert told(talk.ask(header(4, sa + ADDRESSES))).errno == errno.ESRCH
    assert not kernel.table


def test_add_is_outbound_unless_its_destination_is_ours(kernel, sockets):
    session = ServerSession(kernel, sockets, is_local=lambda address: address == B)
    talk = Talk.start(session)
    for destination in (A, B):
        sa = replace(make_sa(), source=A, destination=destination)
        assert told(talk.ask(message(MessageType.ADD, *sa_extensions(sa, private=False, keys=True)))).errno == 0
    assert kernel.table[SaId(A, 0x1000)].sa.direction is Direction.OUT
    assert kernel.table[SaId(B, 0x1000)].sa.direction is Direction.IN


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (header(3, ADDRESSES), errno.EINVAL),  # no SA
        (header(3, host("HH", 2, 1) + bytes(12) + v4(5, A)), errno.EINVAL),  # one address
        (header(3, host("HH", 2, 1) + bytes(4) + host("BBBBI", 0, 1, 0, 99, 0) + ADDRESSES), errno.ENOSYS),  # cipher
        (header(3, host("HH", 2, 1) + bytes(4) + host("BBBBI", 0, 1, 5, 12, 0) + ADDRESSES), errno.EINVAL),  # no keys
        (header(3, ADDRESSES, sa_type=2), errno.EPROTONOSUPPORT),  # AH
        (header(3, ADDRESSES, sa_type=0), errno.EINVAL),
        (header(9, sa_type=44), errno.EINVAL),
        (header(1, host("HHIII", 2, 16, 9, 8, 0) + ADDRESSES), errno.EINVAL),  # SPI range
        (header(6, ADDRESSES), errno.EOPNOTSUPP),  # ACQUIRE with a body
        (header(11), errno.EINVAL),
        (header(24), errno.EINVAL),  # MIGRATE of nothing
        (header(8), errno.EOPNOTSUPP),  # what only a kernel sends
        (header(17), errno.EOPNOTSUPP),
        (header(21), errno.EOPNOTSUPP),
        (header(23), errno.EOPNOTSUPP),
        (header(12), errno.EOPNOTSUPP),
        (header(10, sa_type=44), errno.EINVAL),
        (header(16, host("HHHBBII", 2, 18, 0, 2, 0, 17, 0)), errno.ENOENT),
        (header(22, host("HHHBBII", 2, 18, 0, 2, 0, 17, 0)), errno.ENOENT),
        (header(15, ADDRESSES + host("HHHBBII", 2, 18, 0, 2, 0, 0, 0)), errno.ENOENT),
        (header(4, host("HH", 2, 1) + bytes(12) + ADDRESSES), errno.ESRCH),
        (header(0), errno.EINVAL),
        (header(99), errno.EINVAL),
        (header(202), errno.EINVAL),  # ours, without asking for them
        (header(10), errno.ENOENT),  # nothing to dump
        (header(18), errno.ENOENT),
        (header(14, ADDRESSES), errno.EINVAL),  # no policy
        (header(3)[:12], errno.EMSGSIZE),
        (b"", errno.EMSGSIZE),
        (b"\x03" + header(3)[1:], errno.EINVAL),
    ],
)
def test_refusals_carry_linux_errno_and_only_a_header(talk, data, number):
    reply = told(talk.ask(data))
    assert (reply.errno, reply.extensions) == (number, ())
    assert told(talk.ask(header(7, sequence=5))).errno == 0  # the client goes on


def test_flush_of_an_empty_table_succeeds(talk, kernel):
    for data in (header(9), header(9, sa_type=0), header(9, sa_type=2), header(19)):
        assert told(talk.ask(data)).errno == 0


def test_a_private_add_arrives_whole(talk, kernel):
    hello(talk)
    sa = make_sa(esn=True, replay_window=4096, source_selectors=selectors("10.0.0.0/8"), acquire=9)
    reply = told(talk.ask(message(MessageType.ADD, *sa_extensions(sa, private=True, keys=True), sequence=2)))
    assert kernel.table[sa.id].sa == sa
    assert status_from(reply).sa == without_keys(sa)


def test_a_refusal_tells_ours_why(talk):
    hello(talk)
    reply = told(talk.ask(message(MessageType.DELETE, *sa_id_extensions(SaId(B, 5)), sequence=2)))
    assert (reply.errno, reply.require(p.ErrorText).text) == (errno.ESRCH, "no SA 0x5")


def test_a_repeated_request_is_answered_and_not_carried_out_again(talk, kernel):
    hello(talk)
    add = message(MessageType.ADD, *sa_extensions(make_sa(), private=True, keys=True), sequence=2)
    assert talk.ask(add) == talk.ask(add)
    assert kernel.calls == ["add_sa"]
    getspi = message(MessageType.GETSPI, host_address(X.ADDRESS_SRC, B), host_address(X.ADDRESS_DST, A), sequence=3)
    assert talk.ask(getspi) == talk.ask(getspi)
    assert kernel.calls == ["add_sa", "get_spi"]
    another = message(MessageType.ADD, *sa_extensions(make_sa(0x2000), private=True, keys=True), sequence=2)
    assert told(talk.ask(another)).require(m.Sa).spi == 0x2000


def test_a_foreign_repetition_is_carried_out(talk, kernel):
    add = message(MessageType.ADD, *sa_extensions(make_sa(), private=False, keys=True))
    talk.ask(add)
    assert told(talk.ask(add)).errno == errno.EEXIST


# Policies


def test_policies(talk, kernel):
    request = host("HHBBHII", 48, 50, 2, 3, 0, 7, 0) + (host("H", 2) + bytes(2) + A.packed + bytes(8)) + (host("H", 2) + bytes(2) + B.packed + bytes(8))
    policy = host("HHHBBII", 8, 18, 2, 2, 0, 0, 1000) + request
    ends = v4(5, A, prefix=24, proto=6) + v4(6, B, prefix=32, proto=6, port=80)
    reply = told(talk.ask(header(14, ends + policy, sa_type=0)))
    index = reply.require(m.PolicyExtension).id
    assert index
    (installed,) = kernel.spd
    assert str(installed.selector) == "192.0.2.0/24[tcp] => 192.0.2.2/32[tcp/80]"
    assert installed.templates == (Template(Mode.TUNNEL, 7, A, B),)
    assert told(talk.ask(header(14, ends + policy))).errno == errno.EEXIST
    assert told(talk.ask(header(13, ends + policy))).require(m.PolicyExtension).id == index
    by_index = host("HHHBBII", 2, 18, 0, 0, 0, index, 0)  # its direction is in the index
    assert policy_from(told(talk.ask(header(16, by_index)))) == installed
    assert told(talk.ask(header(22, by_index))).errno == 0
    assert told(talk.ask(header(16, by_index))).errno == errno.ENOENT
    talk.ask(header(14, ends + policy))
    assert told(talk.ask(header(15, ends + host("HHHBBII", 2, 18, 0, 2, 0, 0, 0)))).errno == 0
    assert not kernel.spd


def test_a_private_policy_arrives_whole(talk, kernel):
    hello(talk)
    reply = told(talk.ask(message(MessageType.X_SPDADD, *policy_extensions(POLICY, private=True), sequence=2)))
    assert [policy_from(reply)] == kernel.spd == [replace(POLICY, index=kernel.spd[0].index)]
    which = m.PolicyExtension(0, Direction.OUT)
    assert told(talk.ask(message(MessageType.X_SPDDELETE, *selector_extensions(POLICY.selector, private=True), which, sequence=3))).errno == 0
    assert not kernel.spd


# Several clients


def test_changes_are_told_to_the_others(session, kernel):
    ours, foreign = Talk.start(session, 1), Talk.start(session, 2)
    hello(ours)
    ours.say(message(MessageType.ADD, *sa_extensions(make_sa(), private=True, keys=True), sequence=9))
    notice = told(foreign.hear())
    assert (notice.type, notice.sequence, notice.pid, notice.find(m.Key), notice.find(p.SaExtension)) == (3, 9, PID, None, None)
    foreign.ask(header(9))
    assert [told(data).type for data in ours.hear_all()] == [3, 9]


def test_what_failed_or_only_looked_is_told_to_nobody_else(session):
    first, second = Talk.start(session, 1), Talk.start(session, 2)
    first.ask(header(4, ADDRESSES))
    first.ask(header(10))
    first.ask(header(7))
    assert second.hear() is None


def test_a_monitor_that_does_not_read_is_told_of_the_gap(session, kernel):
    writer, monitor = Talk.start(session, 1), Talk.start(session, 2)
    hello(monitor)
    for _ in range(MAX_QUEUED_NOTICES + 5):
        kernel.table[make_sa().id] = SaStatus(make_sa(), SaState.MATURE)
        writer.ask(header(9))
    kinds = [told(data).type for data in monitor.hear_all()]
    assert kinds == [MessageType.X_OVERRUN] + [MessageType.FLUSH] * MAX_QUEUED_NOTICES


def test_too_many_clients(session):
    for number in range(MAX_CLIENTS):
        Talk.start(session, number)
    with pytest.raises(m.KernelError) as error:
        session.accept(ClientId(99), pid=1, uid=0, now=0.0)
    assert error.value.errno == errno.EMFILE


# Replies are not dropped


def test_who_does_not_read_is_not_read_from(session, talk, kernel):
    said = 0
    while session.wants_read(talk.client):
        said += 1
        talk.say(header(5, ADDRESSES, sequence=said))
    assert said == MAX_QUEUED_REPLIES
    assert [told(data).sequence for data in talk.hear_all()] == list(range(1, said + 1))
    assert session.wants_read(talk.client)


def test_output_stays_until_it_is_sent(session, talk):
    talk.say(header(7))
    assert session.take_ready() == {talk.client}
    assert session.take_ready() == frozenset()
    first = session.next_output(talk.client, 0.0)
    assert session.next_output(talk.client, 0.0) is first
    session.output_sent(talk.client, 0.0)
    assert session.next_output(talk.client, 0.0) is None


# Dumps


def fill(kernel: NaiveKernel, count: int) -> None:
    for spi in range(0x1000, 0x1000 + count):
        kernel.add_sa(make_sa(spi), 0.0)


def test_a_dump_is_a_snapshot(talk, kernel):
    fill(kernel, 5)
    talk.say(header(10, sequence=8))
    first = told(talk.hear())
    kernel.flush_sas()
    rest = [told(data) for data in talk.hear_all()]
    assert [reply.sequence for reply in (first, *rest)] == [1, 2, 3, 4, 0]
    assert {reply.require(m.Sa).spi for reply in (first, *rest)} == set(range(0x1000, 0x1005))
    assert all(reply.pid == PID and reply.find(m.Key) is None for reply in rest)


def test_requests_are_answered_and_events_told_during_a_dump(talk, kernel):
    hello(talk)
    fill(kernel, 6)
    talk.say(message(MessageType.DUMP, sequence=2))
    talk.hear()
    kernel.emit(Expire(SaId(B, 0x1000), 7, hard=False))
    kernel.emit(Expire(SaId(B, 0x1001), 7, hard=False))
    talk.say(header(7, sequence=3))
    kinds = [MessageType(told(data).type).name for data in talk.hear_all()]
    assert kinds == ["REGISTER", "EXPIRE", "DUMP", "EXPIRE", "DUMP", "DUMP", "DUMP", "DUMP"]


def test_a_second_dump_is_ebusy(talk, kernel):
    fill(kernel, 3)
    talk.say(header(10, sequence=8))
    talk.say(header(18, sequence=9))
    assert [(told(data).type, told(data).errno) for data in talk.hear_all()] == [(18, errno.EBUSY), (10, 0), (10, 0), (10, 0)]


def test_a_second_dump_of_ours_takes_the_place_of_the_first(talk, kernel):
    hello(talk)
    fill(kernel, 3)
    talk.say(message(MessageType.DUMP, sequence=8))
    talk.hear()
    talk.say(message(MessageType.DUMP, sequence=8))  # only a repetition
    talk.hear()
    talk.say(message(MessageType.DUMP, sequence=9))
    positions = [told(data).require(p.DumpPosition) for data in talk.hear_all()]
    assert [(position.request, position.remaining) for position in positions] == [(9, 2), (9, 1), (9, 0)]


def test_policies_are_dumped(talk, kernel):
    hello(talk)
    kernel.add_policy(POLICY, 0.0)
    reply = told(talk.ask(message(MessageType.X_SPDDUMP, sequence=2)))
    assert reply.sequence == 0
    assert policy_from(reply) == kernel.spd[0]


def test_a_dump_of_another_protocol_is_empty(talk, kernel):
    fill(kernel, 1)
    assert told(talk.ask(header(10, sa_type=2))).errno == errno.ENOENT


# Events


def acquire(sequence: int) -> Acquire:
    return Acquire(sequence, 17, 7, Mode.TUNNEL, None, B, POLICY.selector, Flow(A, B, 6, 1000, 80))


def test_acquire_reaches_those_who_registered(session, kernel):
    ours, foreign, silent = (Talk.start(session, number) for number in (1, 2, 3))
    hello(ours)
    foreign.ask(header(7))
    kernel.emit(acquire(5))
    assert session.take_ready() >= {ours.client, foreign.client}
    private, plain = told(ours.hear()), told(foreign.hear())
    assert private.require(p.FlowExtension).flow == acquire(5).flow
    assert plain.find(p.FlowExtension) is None
    assert (plain.sequence, plain.pid, plain.require(m.Address, X.ADDRESS_SRC).address) == (5, 0, A)
    assert plain.require(m.PolicyExtension).id == 17
    assert plain.require(m.Proposal).combinations
    assert silent.hear() is None


def test_a_foreign_acquire_never_mixes_families(talk, kernel):
    talk.ask(header(7))
    inner = type(acquire(5).flow)(ip_address("fd00::1"), ip_address("fd00::2"), 6)
    kernel.emit(replace(acquire(5), selector=None, flow=inner))
    heard = told(talk.hear())
    ends = [heard.require(m.Address, kind).address.version for kind in (X.ADDRESS_SRC, X.ADDRESS_DST)]
    assert ends == [4, 4]


def test_an_acquire_that_the_key_manager_gives_up(talk, kernel):
    talk.ask(header(7))
    kernel.emit(acquire(5))
    kernel.emit(acquire(6))
    talk.say(header(6, number=errno.ETIMEDOUT, sequence=5))
    assert kernel.failed == [(5, errno.ETIMEDOUT)]
    assert [told(data).sequence for data in talk.hear_all()] == [6]  # the one that is over is not told any more


def test_acquires_of_one_sequence_are_one(talk, kernel):
    talk.ask(header(7))
    for _ in range(3):
        kernel.emit(acquire(5))
    assert len(talk.hear_all()) == 1


def test_acquires_beyond_the_bound_come_later(session, talk, kernel):
    talk.ask(header(7))
    kernel.outstanding = [acquire(sequence) for sequence in range(1, MAX_PENDING_ACQUIRES + 11)]
    for event in kernel.outstanding:
        kernel.emit(event)
    heard = {told(data).sequence for data in talk.hear_all()}
    assert len(heard) == MAX_PENDING_ACQUIRES
    assert session.next_deadline() is not None
    kernel.outstanding = [event for event in kernel.outstanding if event.sequence not in heard]  # the others got their SAs
    session.tick(session.next_deadline())
    heard |= {told(data).sequence for data in talk.hear_all()}
    assert heard == set(range(1, MAX_PENDING_ACQUIRES + 11))
    assert session.next_deadline() is None
    assert ACQUIRE_REPEAT > 0


def test_expire(talk, kernel):
    talk.ask(header(7))
    kernel.emit(Expire(SaId(B, 0x1000), 7, hard=False))
    kernel.emit(Expire(SaId(B, 0x1000), 7, hard=True))
    (expire,) = [told(data) for data in talk.hear_all()]
    assert expire.require(m.LifetimeExtension, X.LIFETIME_HARD)
    assert (expire.require(m.Sa).spi, expire.pid, expire.sa_type) == (0x1000, 0, 3)


def test_expires_beyond_the_bound_become_one_notice(talk, kernel):
    hello(talk)
    for spi in range(MAX_PENDING_EXPIRES + 3):
        kernel.emit(Expire(SaId(B, spi), 7, hard=True))
    heard = talk.hear_all()
    assert told(heard[0]).type == MessageType.X_OVERRUN
    assert len(heard) == 1 + MAX_PENDING_EXPIRES


def test_new_mapping(talk, kernel):
    hello(talk)
    one, two, three = (Endpoint(A, port) for port in (1, 2, 3))
    kernel.emit(NewMapping(SaId(B, 5), 7, one, two))
    kernel.emit(NewMapping(SaId(B, 5), 7, two, three))
    (mapping,) = [told(data) for data in talk.hear_all()]
    assert mapping.require(m.NatTPort, X.X_NAT_T_SPORT).port == 1
    assert mapping.require(m.NatTPort, X.X_NAT_T_DPORT).port == 3
    assert mapping.require(m.Address, X.X_SA_DESTINATION).address == B


# IKE sockets and statistics


def test_bind_hands_descriptors_over(talk, sockets):
    hello(talk)
    talk.say(message(MessageType.X_BIND, host_address(X.ADDRESS_SRC, A), sequence=2))
    output = talk.session.next_output(talk.client, 0.0)
    assert output.descriptors == sockets.bound[A]
    talk.session.output_sent(talk.client, 0.0)
    refused = talk.ask(message(MessageType.X_BIND, host_address(X.ADDRESS_SRC, type(A)("224.0.0.1")), sequence=3))
    assert told(refused).errno == errno.EADDRNOTAVAIL


def test_closed_descriptors_never_leave(session, talk, sockets):
    hello(talk)
    for sequence in (2, 3):
        talk.say(message(MessageType.X_BIND, host_address(X.ADDRESS_SRC, A), sequence=sequence))
    assert session.next_output(talk.client, 0.0).descriptors  # peeked at, not sent
    talk.say(message(MessageType.X_UNBIND, host_address(X.ADDRESS_SRC, A), sequence=4))
    outputs = []
    while (output := session.next_output(talk.client, 0.0)) is not None:
        outputs.append((told(output.data).sequence, told(output.data).errno, output.descriptors))
        session.output_sent(talk.client, 0.0)
    assert outputs == [(2, errno.EADDRNOTAVAIL, ()), (3, errno.EADDRNOTAVAIL, ()), (4, 0, ())]
    assert not sockets.bound


def test_statistics(talk, kernel):
    hello(talk)
    counters = dict(told(talk.ask(message(MessageType.X_STATISTICS, sequence=2))).require(p.Statistics).counters)
    assert counters["drops.no_sa"] == 1 << 40
    assert counters["pfkey.clients"] == 1


# Nothing that a client sends disturbs the session


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=120)), max_size=6), st.booleans())
def test_garbage_costs_an_error_value(requests, private):
    talk = Talk.start(ServerSession(NaiveKernel(), PipeSockets()))
    if private:
        hello(talk)
    for kind, body in requests:
        talk.say(header(kind, body[: len(body) // 8 * 8]))
        talk.say(body)
        for data in talk.hear_all():
            told(data)


BODIES = [
    header(3, b"".join([host("HH", 2, 1), bytes(4), host("BBBBI", 0, 1, 0, 20, 0), ADDRESSES, host("HHHH", 4, 9, 160, 0), bytes(24)])),
    header(14, v4(5, A) + v4(6, B) + host("HHHBBII", 4, 18, 2, 2, 0, 0, 1) + host("HHBBHII", 16, 50, 1, 2, 0, 0, 0)),
    header(1, host("HHIII", 2, 16, 0x500, 0x5FF, 0) + ADDRESSES),
    message(MessageType.ADD, *sa_extensions(make_sa(source_selectors=selectors("10.0.0.0/8")), private=True, keys=True)),
    message(MessageType.X_SPDADD, *policy_extensions(POLICY, private=True)),
    message(MessageType.X_UNBIND, host_address(X.ADDRESS_SRC, A)),
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(BODIES), st.lists(st.tuples(st.integers(3, 10_000), st.integers(0, 255)), max_size=3))
def test_a_damaged_request_costs_an_error_value(data, changes):
    damaged = bytearray(data)
    for at, value in changes:
        damaged[at % len(data)] = value
    talk = Talk.start(ServerSession(NaiveKernel(), PipeSockets()))
    hello(talk)
    talk.say(bytes(damaged))
    for heard in talk.hear_all():
        told(heard)
