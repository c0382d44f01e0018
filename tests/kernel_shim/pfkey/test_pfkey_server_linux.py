"""What Linux added to RFC 2367, served by our shim: MIGRATE, SPDEXPIRE, the filter of a dump, labels that are given back."""

from __future__ import annotations

import errno
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pfkey_support import A, B, NaiveKernel, PipeSockets, Talk, make_sa

from kernel_shim.model import (
    Action,
    AddressRange,
    Direction,
    Identity,
    Labels,
    Migration,
    Mode,
    Move,
    Policy,
    PolicyExpire,
    PolicyIndex,
    SecurityContext,
    Selector,
    Sensitivity,
    Template,
)
from kernel_shim.pfkey import messages as m
from kernel_shim.pfkey import private as p
from kernel_shim.pfkey.codec import Codec
from kernel_shim.pfkey.constants import ExtensionType as X
from kernel_shim.pfkey.constants import MessageType, SaType
from kernel_shim.pfkey.event_messages import event_from
from kernel_shim.pfkey.policy_messages import migration_extensions, migration_from, policy_extensions, policy_from
from kernel_shim.pfkey.sa_messages import sa_extensions, sa_id_extensions, status_from
from kernel_shim.pfkey.server import ServerSession

CODEC = Codec()
C, D = ip_address("198.51.100.1"), ip_address("198.51.100.2")
SELECTOR = Selector(AddressRange(A, A), AddressRange(B, B))
POLICY = Policy(SELECTOR, Direction.OUT, Action.PROTECT, 1000, (Template(Mode.TUNNEL, 7, A, B),))


@pytest.fixture
def kernel():
    return NaiveKernel()


@pytest.fixture
def session(kernel):
    return ServerSession(kernel, PipeSockets())


@pytest.fixture
def talk(session):
    return Talk.start(session)


def message(kind, *extensions, sequence=1, sa_type=SaType.ESP):
    return CODEC.encode(m.Message(kind, sa_type, 0, sequence, 77, extensions))


def ask(talk, kind, *extensions, **header):
    return CODEC.decode(talk.ask(message(kind, *extensions, **header)))


def told(talk):
    data = talk.hear()
    assert data is not None
    return CODEC.decode(data)


# MIGRATE


def moved(*ends):
    return Migration(Direction.OUT, SELECTOR, (Move(Mode.TUNNEL, 7, *ends),))


@pytest.mark.parametrize("private", [False, True])
def test_migrate(session, talk, kernel, private):
    watching = Talk.start(session, 2)
    if private:
        ask(talk, MessageType.REGISTER, p.Hello())
    ask(talk, MessageType.X_SPDADD, *policy_extensions(POLICY, private=False), sequence=2)
    told(watching)
    reply = ask(talk, MessageType.X_MIGRATE, *migration_extensions(moved(A, B, C, D)), m.KmAddress(C, D), sequence=3)
    assert (reply.errno, reply.sequence, reply.pid, migration_from(reply)) == (0, 3, 77, moved(A, B, C, D))
    assert kernel.spd[0].templates == (Template(Mode.TUNNEL, 7, C, D),)
    notice = told(watching)
    assert (notice.type, notice.require(m.KmAddress)) == (MessageType.X_MIGRATE, m.KmAddress(C, D))
    assert ask(talk, MessageType.X_MIGRATE, *migration_extensions(moved(A, B, C, D)), sequence=4).errno == errno.ENODATA


def request(mode=2, protocol=50, ends=(A, B)):
    return m.IpsecRequest(protocol, mode, 0, 7, *ends)


@pytest.mark.parametrize(
    ("requests", "number"),
    [
        ((), errno.EINVAL),
        ((request(),), errno.EINVAL),
        ((request(), request(mode=1)), errno.EINVAL),
        ((request(), request(protocol=51)), errno.EINVAL),
        ((request(protocol=51), request(protocol=51)), errno.EPROTONOSUPPORT),
        ((request(mode=9), request(mode=9)), errno.EINVAL),
        ((request(), request(ends=())), errno.EINVAL),
        ((request(), request(ends=(ip_address("0.0.0.0"), B))), errno.EINVAL),
        ((request(), request(ends=(C, D))) * 2, errno.EINVAL),
        ((request(), request(ends=(C, D))), errno.ENOENT),
    ],
)
def test_a_migrate_that_cannot_be(talk, kernel, requests, number):
    addresses = [it for it in policy_extensions(POLICY, private=False) if isinstance(it, m.Address)]
    policy = m.PolicyExtension(2, 2, requests=requests)
    assert ask(talk, MessageType.X_MIGRATE, *addresses, policy).errno == number


# SPDEXPIRE and lifetimes of policies


def test_a_policy_keeps_its_lifetimes_and_label(talk, kernel):
    policy = replace(POLICY, soft_seconds=60, hard_seconds=90, context=SecurityContext(1, 1, b"system_u:object_r:ipsec_spd_t:s0"))
    reply = ask(talk, MessageType.X_SPDSETIDX, *policy_extensions(policy, private=False))
    index = reply.require(m.PolicyExtension).id
    found = ask(talk, MessageType.X_SPDGET, m.PolicyExtension(0, Direction.OUT, index))
    assert policy_from(found) == replace(policy, index=index)
    assert ask(talk, MessageType.X_SPDSETIDX, *policy_extensions(policy, private=False)).errno == errno.EEXIST


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("private", [False, True])
def test_the_end_of_a_policy_is_told(session, talk, kernel, hard, private):
    ask(talk, MessageType.REGISTER, *([p.Hello()] if private else []))
    ends = {"hard_seconds": 90} if hard else {"soft_seconds": 60}
    kernel.emit(PolicyExpire(replace(POLICY, soft_seconds=60, hard_seconds=90, index=PolicyIndex(9)), hard))
    event = told(talk)
    assert (event.type, event.pid) == (MessageType.X_SPDEXPIRE, 0)
    assert event_from(event) == PolicyExpire(replace(POLICY, index=PolicyIndex(9), **ends), hard)


def test_the_newest_end_of_a_policy_waits(talk, kernel):
    ask(talk, MessageType.REGISTER)
    for hard in (False, True):
        kernel.emit(PolicyExpire(replace(POLICY, index=PolicyIndex(9), hard_seconds=1, soft_seconds=1), hard))
    assert event_from(told(talk)).hard
    assert talk.hear() is None


def test_too_many_templates(talk):
    extensions = (*policy_extensions(POLICY, private=False),)
    policy = replace(extensions[2], requests=(request(),) * 7)
    assert ask(talk, MessageType.X_SPDADD, *extensions[:2], policy).errno == errno.ELOOP


# The filter of a dump

V4 = [ip_address(number) for number in (0x0A000001, 0x0A000002, 0x0A800001, 0xC0000201)]
V6 = [ip_address("2001:db8::1"), ip_address("2001:db8:1::1")]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(V4), st.sampled_from(V4)) | st.tuples(st.sampled_from(V6), st.sampled_from(V6)), max_size=8),
    st.sampled_from([0, 2, 10, 99]),
    st.sampled_from(V4 + V6),
    st.integers(0, 128),
    st.sampled_from(V4 + V6),
    st.integers(0, 128),
)
def test_a_dump_holds_what_its_filter_lets_through(pairs, family, source, source_bits, destination, destination_bits):
    kernel = NaiveKernel()
    talk = Talk.start(ServerSession(kernel, PipeSockets()))
    for number, (here, there) in enumerate(pairs):
        kernel.add_sa(make_sa(0x1000 + number, source=here, destination=there), 0.0)

    def begins(address, prefix, bits):
        ours, theirs = (format(int.from_bytes(it.packed.ljust(16, b"\0"), "big"), "0128b") for it in (address, prefix))
        return ours[:bits] == theirs[:bits]

    expected = {
        0x1000 + number
        for number, (here, there) in enumerate(pairs)
        if begins(here, source, source_bits)
        and begins(there, destination, destination_bits)
        and (family not in (2, 10) or here.version == {2: 4, 10: 6}[family])
    }
    wanted = m.Filter(family, source.packed.ljust(16, b"\0"), destination.packed.ljust(16, b"\0"), source_bits, destination_bits)
    talk.say(message(MessageType.DUMP, wanted))
    entries = [CODEC.decode(data) for data in talk.hear_all()]
    if not expected:
        assert [entry.errno for entry in entries] == [errno.ENOENT]
    else:
        assert {status_from(entry).sa.spi for entry in entries} == expected
        assert entries[-1].sequence == 0


# Labels


def test_what_is_hung_on_an_sa_is_given_back(talk, kernel):
    labels = Labels(
        Identity(2, b"left.example", 7),
        Identity(3, b"user@right.example"),
        Sensitivity(1, 2, bytes(range(8)), 3, bytes(range(16))),
        SecurityContext(1, 1, b"system_u:object_r:ipsec_spd_t:s0"),
    )
    sa = make_sa(labels=labels)
    added = ask(talk, MessageType.ADD, *sa_extensions(sa, private=False, keys=True))
    found = ask(talk, MessageType.GET, *sa_id_extensions(sa.id))
    talk.say(message(MessageType.DUMP))
    for reply in (added, found, told(talk)):
        assert status_from(reply).sa.labels == labels
    assert kernel.table[sa.id].sa.labels == labels


def test_an_sa_without_labels_says_nothing_of_them(talk):
    reply = ask(talk, MessageType.ADD, *sa_extensions(make_sa(), private=False, keys=True))
    kinds = {extension.type for extension in reply.extensions}
    assert not kinds & {X.IDENTITY_SRC, X.IDENTITY_DST, X.SENSITIVITY, X.X_SEC_CTX}
