"""What happens on an IKE SA that stands: further CHILD_SAs, deletion, liveness, loss and repetition, refusals of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address

import pytest
from lab.ike_pair import Datagram, Pair, agree, child, connection, mirrored, psk, selectors
from sk_messages import open_message

from kernel_shim.model import AcquireSequence, Direction, Flow, Spi
from vpnd.config.model import ChildConfig
from vpnd.ike.context import IkeSettings, Retransmission
from vpnd.ike.effects import AllocateSpi, ChildClosed, ChildDenied, ChildEstablished, ChildFailed, Reason, RekeyFailed, RemoveSa
from vpnd.ike.exchanges.create_child_sa import CREATE_RETRIES
from vpnd.ike.iana import Exchange
from vpnd.ike.sa import ChildSaState, IkeSaState
from vpnd.ike.state import MAX_TASKS
from vpnd.ike.transport import SPI_TIMEOUT
from vpnd.ike.wire.message import decode_message

FIRST = child("first", "10.1.0.0/16", "10.2.0.0/16")
SECOND = child("second", "10.3.0.0/16", "10.4.0.0/16")
PFS = child("pfs", "10.5.0.0/16", "10.6.0.0/16", "aes128gcm16-x25519")


def pair_of(*children: ChildConfig, **options: object) -> Pair:
    """`a` has brought up the first of them."""
    a = connection("to-b", psk("a.example"), psk("b.example"), children, **options)
    b = connection("to-a", psk("b.example"), psk("a.example"), [mirrored(config) for config in children])
    pair = Pair(a, b)
    pair.connect()
    agree(pair, 1)
    pair.log.clear()
    return pair


@pytest.mark.parametrize("config", [SECOND, PFS])
@pytest.mark.parametrize("asks", ["a", "b"])
def test_a_further_child_from_either_side(asks: str, config: ChildConfig) -> None:
    pair = pair_of(FIRST, config)
    peer = pair.a if asks == "a" else pair.b
    wanted = peer.connections[0].children[config.name]
    # CREATE_CHILD_SA { SA, Ni, [KEi], TSi, TSr } -->  <-- CREATE_CHILD_SA { SA, Nr, [KEr], TSi, TSr }
    peer.run(peer.sa, peer.sa.create_child(wanted, pair.now, acquire=AcquireSequence(7)), pair.now)
    pair.settle()
    assert len(pair.log) == 2
    agree(pair, 2)
    assert pair.a.up == pair.b.up == ["first", config.name]
    established = peer.happened(ChildEstablished)[-1]
    assert isinstance(established, ChildEstablished)
    assert established.child.inbound.acquire == established.child.outbound.acquire == 7
    keys = {sa.encryption_key for sa in pair.a.sad.values()}
    assert len(keys) == 4


def test_a_child_with_another_group_than_the_peer_wants() -> None:
    config = child("pfs", esp="aes128gcm16-x25519-ecp256")
    a = connection("to-b", psk("a"), psk("b"), [FIRST, config])
    b = connection("to-a", psk("b"), psk("a"), [mirrored(FIRST), mirrored(child("pfs", esp="aes128gcm16-ecp256"))])
    pair = Pair(a, b)
    pair.connect()
    pair.log.clear()
    pair.a.run(pair.a.sa, pair.a.sa.create_child(config, pair.now), pair.now)
    # CREATE_CHILD_SA { KE(x25519) } -->  <-- { N(INVALID_KE_PAYLOAD) }  CREATE_CHILD_SA { KE(ecp256) } -->  <-- { ... }
    pair.settle()
    assert len(pair.log) == 4
    agree(pair, 2)


def test_both_ask_for_the_same_child_at_once() -> None:
    pair = pair_of(FIRST, SECOND)
    for peer in pair.peers:
        peer.run(peer.sa, peer.sa.create_child(peer.connections[0].children["second"], pair.now), pair.now)
    pair.settle()
    agree(pair, 3)  # two exchanges made two CHILD_SAs; both sides know both


def test_many_children_follow_one_another_in_a_window_of_one() -> None:
    children = [child(f"c{number}", f"10.{number}.0.0/16", f"172.16.{number}.0/24") for number in range(20)]
    pair = pair_of(*children)
    for config in children[1:]:
        pair.a.run(pair.a.sa, pair.a.sa.create_child(config, pair.now), pair.now)
    assert len(pair.flight) == 1
    assert len(pair.a.sa.tasks_queued) == 18
    pair.settle()
    agree(pair, 20)
    assert pair.a.up == [config.name for config in children]


def test_children_asked_for_before_the_ike_sa_stands_come_one_after_another() -> None:
    children = [FIRST, SECOND, PFS]
    pair = Pair(
        connection("to-b", psk("a"), psk("b"), children),
        connection("to-a", psk("b"), psk("a"), [mirrored(config) for config in children]),
    )
    pair.a.start(pair.b.endpoint, pair.now, SECOND, FIRST)
    pair.a.run(pair.a.sa, pair.a.sa.create_child(PFS, pair.now), pair.now)
    pair.settle()
    agree(pair, 3)
    assert pair.a.up == ["second", "first", "pfs"]


def test_the_packet_that_asked_goes_first_and_chooses_the_child() -> None:
    flow = Flow(ip_address("10.1.2.3"), ip_address("10.2.9.9"), 6, 40000, 443)
    wide = child("wide", "10.0.0.0/8", "10.0.0.0/8")
    others = [mirrored(child("other", "10.7.0.0/16", "10.8.0.0/16")), mirrored(child("right", "10.1.0.0/16", "10.2.0.0/16"))]
    pair = Pair(connection("to-b", psk("a"), psk("b"), [wide]), connection("to-a", psk("b"), psk("a"), others))
    sa = pair.a.start(pair.b.endpoint, pair.now)
    pair.a.run(sa, sa.create_child(wide, pair.now, flow=flow, acquire=AcquireSequence(3)), pair.now)
    pair.settle()
    # IKE_AUTH { ..., TSi(10.1.2.3 tcp/40000, 10.0.0.0/8), TSr(10.2.9.9 tcp/443, 10.0.0.0/8) } -->  <-- { TSi(10.1/16), TSr(10.2/16) }
    agree(pair, 1)
    assert pair.b.up == ["right"]
    (entry,) = pair.a.sa.children.values()
    assert entry.sa.local_ts == selectors("10.1.0.0/16")
    assert entry.sa.remote_ts == selectors("10.2.0.0/16")


@pytest.mark.parametrize(
    ("ours", "theirs", "result"),
    [
        (("10.1.0.0/16", "10.2.0.0/16"), ("10.1.2.0/24", "10.2.0.0/16"), ("10.1.2.0/24", "10.2.0.0/16")),
        (("10.1.0.0/16[tcp]", "0.0.0.0/0"), ("10.0.0.0/8[tcp/80-90]", "10.2.0.0/16"), ("10.1.0.0/16[tcp/80-90]", "10.2.0.0/16")),
        (("10.1.0.0/16,10.9.0.0/16", "10.2.0.0/16"), ("10.1.0.0/24,10.9.9.0/24", "10.2.0.0/16"), ("10.1.0.0/24,10.9.9.0/24", "10.2.0.0/16")),
        (("2001:db8:1::/48,10.1.0.0/16", "2001:db8:2::/48"), ("2001:db8:1:1::/64", "::/0"), ("2001:db8:1:1::/64", "2001:db8:2::/48")),
        (("dynamic", "10.2.0.0/16"), ("192.0.2.0/24", "10.2.0.0/16"), ("192.0.2.1/32", "10.2.0.0/16")),
    ],
)
def test_narrowing(ours: tuple[str, str], theirs: tuple[str, str], result: tuple[str, str]) -> None:
    pair = Pair(connection("to-b", psk("a"), psk("b"), [child("n", *ours)]), connection("to-a", psk("b"), psk("a"), [mirrored(child("n", *theirs))]))
    pair.connect()
    agree(pair, 1)
    (entry,) = pair.a.sa.children.values()
    assert (entry.sa.local_ts, entry.sa.remote_ts) == (selectors(result[0]), selectors(result[1]))


def test_selectors_without_common_ground() -> None:
    pair = pair_of(FIRST)
    lost = child("lost", "10.77.0.0/16", "10.88.0.0/16")
    pair.a.run(pair.a.sa, pair.a.sa.create_child(lost, pair.now, reqid=9), pair.now)
    pair.settle()
    # <-- CREATE_CHILD_SA { N(TS_UNACCEPTABLE) }
    assert pair.a.failed == [Reason.TS_UNACCEPTABLE]
    assert pair.b.happened(ChildDenied)
    agree(pair, 1)


# Deletion


@pytest.mark.parametrize("asks", ["a", "b"])
def test_a_child_is_deleted_by_either_side(asks: str) -> None:
    pair = pair_of(FIRST)
    peer, other = (pair.a, pair.b) if asks == "a" else (pair.b, pair.a)
    (child_id,) = peer.sa.children
    # INFORMATIONAL { D(SPI) } -->  <-- INFORMATIONAL { D(SPI) }
    peer.run(peer.sa, peer.sa.delete_child(child_id, pair.now), pair.now)
    assert peer.sa.children[child_id].state is ChildSaState.DELETING
    pair.settle()
    agree(pair, 0)
    assert [event.reason for event in peer.happened(ChildClosed) if isinstance(event, ChildClosed)] == [Reason.DELETED]
    assert [event.reason for event in other.happened(ChildClosed) if isinstance(event, ChildClosed)] == [Reason.PEER_DELETED]
    assert peer.closed is other.closed is None
    pair.a.run(pair.a.sa, pair.a.sa.create_child(FIRST, pair.now), pair.now)
    pair.settle()
    agree(pair, 1)


def test_both_delete_the_same_child_at_once() -> None:
    pair = pair_of(FIRST)
    for peer in pair.peers:
        (child_id,) = peer.sa.children
        peer.run(peer.sa, peer.sa.delete_child(child_id, pair.now), pair.now)
    answers = []

    def note(datagram: Datagram) -> bool:
        message = decode_message(datagram.data)
        if message.header.response:
            receiver = pair.b if datagram.sender == "a" else pair.a
            answers.append(open_message(datagram.data, message, receiver.sa.keys.receive).payloads)
        return False

    # INFORMATIONAL { D } -->  <-- INFORMATIONAL { D }; both answers are empty
    pair.settle(note)
    assert answers == [(), ()]
    agree(pair, 0)
    assert len(pair.a.happened(ChildClosed)) == len(pair.b.happened(ChildClosed)) == 1
    assert pair.a.closed is pair.b.closed is None


@pytest.mark.parametrize("asks", ["a", "b"])
def test_the_ike_sa_is_deleted_by_either_side(asks: str) -> None:
    pair = pair_of(FIRST)
    peer, other = (pair.a, pair.b) if asks == "a" else (pair.b, pair.a)
    # INFORMATIONAL { D(IKE) } -->  <-- INFORMATIONAL { }
    peer.run(peer.sa, peer.sa.delete(pair.now), pair.now)
    assert peer.sa.state is IkeSaState.DELETING
    pair.settle()
    agree(pair, 0)
    assert peer.closed is Reason.DELETED
    assert other.closed is Reason.PEER_DELETED
    assert peer.up == other.up == []


def test_both_delete_the_ike_sa_at_once() -> None:
    pair = pair_of(FIRST)
    for peer in pair.peers:
        peer.run(peer.sa, peer.sa.delete(pair.now), pair.now)
    pair.settle()
    agree(pair, 0)
    assert pair.a.closed
    assert pair.b.closed


def test_a_delete_that_nobody_answers_still_ends() -> None:
    pair = pair_of(FIRST)
    pair.a.run(pair.a.sa, pair.a.sa.delete(pair.now), pair.now)
    pair.wait(60.0, drop=lambda datagram: True)
    assert pair.a.closed is Reason.DELETED
    assert not pair.a.sad


def test_deletion_waits_for_no_queue() -> None:
    pair = pair_of(FIRST, SECOND, PFS)
    for config in (SECOND, PFS):
        pair.a.run(pair.a.sa, pair.a.sa.create_child(config, pair.now), pair.now)
    pair.a.run(pair.a.sa, pair.a.sa.delete(pair.now), pair.now)
    pair.settle()
    agree(pair, 0)
    assert pair.a.failed == [Reason.DELETED]  # of the one that waited; the other was on the wire already
    assert pair.a.closed is Reason.DELETED


def test_a_hard_expiry_closes_at_once_and_tells_the_peer() -> None:
    pair = pair_of(FIRST)
    (child_id,) = pair.a.sa.children
    pair.a.run(pair.a.sa, pair.a.sa.child_expired(child_id, pair.now), pair.now)
    assert pair.a.up == []
    pair.settle()
    agree(pair, 0)
    assert pair.b.closed is None
    pair.a.run(pair.a.sa, pair.a.sa.create_child(FIRST, pair.now), pair.now)
    pair.settle()
    agree(pair, 1)


def test_an_ike_sa_that_cannot_be_rekeyed_ends_after_its_lifetime() -> None:
    pair = pair_of(FIRST, rekey_time=1000.0, over_time=100.0, rand_time=0.0)
    pair.b.sa.connection = replace(pair.b.sa.connection, proposals=())
    pair.wait(1099.0)
    # CREATE_CHILD_SA { SA, Ni, KEi } -->  <-- { N(NO_PROPOSAL_CHOSEN) }
    assert {event.reason for event in pair.a.happened(RekeyFailed) if isinstance(event, RekeyFailed)} == {Reason.NO_PROPOSAL_CHOSEN}
    assert pair.a.closed is None
    pair.wait(1.0)
    assert pair.a.closed is Reason.EXPIRED
    assert pair.b.closed is Reason.PEER_DELETED


def test_abort_says_nothing() -> None:
    pair = pair_of(FIRST)
    pair.a.run(pair.a.sa, pair.a.sa.abort(pair.now, Reason.SHUTDOWN), pair.now)
    assert not pair.flight
    assert not pair.a.sad
    assert pair.a.closed is Reason.SHUTDOWN
    assert pair.a.sa.receive(b"", pair.a.endpoint, pair.b.endpoint, pair.now) == []
    assert pair.a.sa.timer(pair.now + 1e6) == []


# Liveness


def test_a_quiet_peer_is_probed_and_a_live_one_stays() -> None:
    pair = pair_of(FIRST, dpd_delay=10.0)
    pair.wait(35.0)
    # INFORMATIONAL { } -->  <-- INFORMATIONAL { }
    assert pair.log == ["a: INFORMATIONAL request 2", "b: INFORMATIONAL response 2"] + [
        line for number in (3, 4) for line in (f"a: INFORMATIONAL request {number}", f"b: INFORMATIONAL response {number}")
    ]
    agree(pair, 1)


def test_signs_of_life_put_the_probe_off() -> None:
    pair = pair_of(FIRST, dpd_delay=10.0)
    pair.wait(9.0)
    pair.a.sa.heard(pair.now)
    pair.wait(9.0)
    assert pair.log == []


def test_a_dead_peer_is_found() -> None:
    pair = pair_of(FIRST, dpd_delay=10.0)
    pair.a.settings = IkeSettings(retransmission=Retransmission(timeout=1.0, base=2.0, tries=2))
    pair.wait(10.0 + 1 + 2 + 4, drop=lambda datagram: True)
    assert pair.a.closed is Reason.PEER_SILENT
    assert not pair.a.sad
    assert pair.a.up == []


def test_probe_on_demand() -> None:
    pair = pair_of(FIRST)
    pair.a.run(pair.a.sa, pair.a.sa.probe(pair.now), pair.now)
    pair.a.run(pair.a.sa, pair.a.sa.probe(pair.now), pair.now)
    pair.settle()
    assert len(pair.log) == 2


# Loss and repetition


def _course(pair: Pair, disturb: Callable[[Datagram], bool]) -> None:
    """A whole life: up, a second CHILD_SA from each side, one deleted, all deleted."""
    pair.a.start(pair.b.endpoint, pair.now, FIRST)
    pair.wait(60.0, disturb)
    agree(pair, 1)
    pair.a.run(pair.a.sa, pair.a.sa.create_child(PFS, pair.now), pair.now)
    pair.wait(60.0, disturb)
    agree(pair, 2)
    pair.b.run(pair.b.sa, pair.b.sa.create_child(mirrored(SECOND), pair.now), pair.now)
    pair.wait(60.0, disturb)
    agree(pair, 3)
    pair.b.run(pair.b.sa, pair.b.sa.delete_child(next(iter(pair.b.sa.children)), pair.now), pair.now)
    pair.wait(60.0, disturb)
    agree(pair, 2)
    pair.a.run(pair.a.sa, pair.a.sa.probe(pair.now), pair.now)
    pair.wait(60.0, disturb)
    agree(pair, 2)


def _three() -> Pair:
    children = [FIRST, SECOND, PFS]
    return Pair(
        connection("to-b", psk("a"), psk("b"), children),
        connection("to-a", psk("b"), psk("a"), [mirrored(config) for config in children]),
    )


def test_the_course_without_loss() -> None:
    pair = _three()
    _course(pair, lambda datagram: False)
    assert len(pair.log) == 12


@pytest.mark.parametrize("lost", range(12))
def test_any_one_message_may_be_lost(lost: int) -> None:
    pair, seen = _three(), [0]

    def drop(datagram: Datagram) -> bool:
        seen[0] += 1
        return seen[0] == lost + 1

    _course(pair, drop)


def test_every_message_may_be_lost_twice() -> None:
    pair = _three()
    pair.a.settings = pair.b.settings = IkeSettings(retransmission=Retransmission(timeout=1.0, base=1.5, tries=5))
    copies: dict[bytes, int] = {}

    def drop(datagram: Datagram) -> bool:
        copies[datagram.data] = copies.get(datagram.data, 0) + 1
        return copies[datagram.data] <= 2

    _course(pair, drop)


def test_every_message_may_arrive_again_and_late() -> None:
    pair, seen = _three(), []

    def repeat(datagram: Datagram) -> bool:
        seen.append(datagram)
        for old in seen[-6:]:
            pair.deliver(old)
        return False

    _course(pair, repeat)
    answers = [event for event in pair.b.events if isinstance(event, ChildEstablished)]
    assert len(answers) == 3


def test_a_repeated_request_gets_the_same_octets() -> None:
    pair = pair_of(FIRST, SECOND)
    pair.a.run(pair.a.sa, pair.a.sa.create_child(SECOND, pair.now), pair.now)
    request = pair.take()
    pair.deliver(request)
    first = pair.take()
    pair.deliver(request)
    second = pair.take()
    assert first.data == second.data
    assert not pair.flight
    pair.deliver(first)
    pair.settle()
    agree(pair, 2)


def test_a_retransmission_while_the_kernel_thinks_is_ignored() -> None:
    pair = pair_of(FIRST, SECOND)
    pair.b.hold_spis = True
    pair.a.run(pair.a.sa, pair.a.sa.create_child(SECOND, pair.now), pair.now)
    pair.wait(15.0)
    assert [line for line in pair.log if line.startswith("b")] == []
    assert len(pair.log) == 3
    assert len(pair.b.waiting) == 1
    pair.b.give_spis(pair.now)
    pair.settle()
    agree(pair, 2)


# The kernel


def test_the_kernel_gives_no_spi() -> None:
    pair = pair_of(FIRST, SECOND)
    pair.b.refuse_spi = True
    pair.a.run(pair.a.sa, pair.a.sa.create_child(SECOND, pair.now), pair.now)
    pair.wait(10.0)
    # CREATE_CHILD_SA { ... } -->  <-- { N(TEMPORARY_FAILURE) }, and the same again, later and later
    assert len(pair.log) == 2 * (1 + CREATE_RETRIES)
    assert pair.a.failed == [Reason.TEMPORARY_FAILURE]
    pair.b.refuse_spi, pair.a.refuse_spi = False, True
    pair.a.run(pair.a.sa, pair.a.sa.create_child(SECOND, pair.now), pair.now)
    assert pair.a.failed[1:] == [Reason.KERNEL_REFUSED]
    agree(pair, 1)


def test_a_kernel_that_never_answers_costs_one_child() -> None:
    pair = pair_of(FIRST, SECOND)
    pair.a.hold_spis = True
    pair.a.run(pair.a.sa, pair.a.sa.create_child(SECOND, pair.now), pair.now)
    pair.wait(SPI_TIMEOUT)
    assert pair.a.failed == [Reason.KERNEL_REFUSED]
    # the answer comes after all: the SPI goes back
    (sa, request) = pair.a.waiting.pop()
    assert isinstance(request, AllocateSpi)
    effects = sa.spi_allocated(request.token, Spi(0x9999), pair.now)
    assert [type(effect) for effect in effects] == [RemoveSa]
    pair.a.hold_spis = False
    pair.a.run(pair.a.sa, pair.a.sa.create_child(SECOND, pair.now), pair.now)
    pair.settle()
    agree(pair, 2)


def test_an_ike_sa_that_ends_while_the_kernel_thinks_gives_the_spi_back() -> None:
    pair = pair_of(FIRST, SECOND)
    pair.a.hold_spis = pair.b.hold_spis = True
    pair.a.run(pair.a.sa, pair.a.sa.create_child(SECOND, pair.now), pair.now)
    pair.a.run(pair.a.sa, pair.a.sa.abort(pair.now, Reason.SHUTDOWN), pair.now)
    assert pair.a.failed == [Reason.SHUTDOWN]
    pair.a.give_spis(pair.now)
    assert not pair.a.larval
    assert not pair.a.sad


@pytest.mark.parametrize("direction", [Direction.IN, Direction.OUT])
@pytest.mark.parametrize("refuses", ["a", "b"])
@pytest.mark.parametrize("exchange", ["IKE_AUTH", "CREATE_CHILD_SA"])
def test_a_refused_sa_leaves_nothing_on_either_side(exchange: str, refuses: str, direction: Direction) -> None:
    pair = _three()
    peer = pair.a if refuses == "a" else pair.b
    stands = 0
    if exchange == "CREATE_CHILD_SA":
        pair.a.start(pair.b.endpoint, pair.now, FIRST)
        pair.settle()
        stands = 1
    peer.refuse_install = lambda sa: sa.direction is direction
    if exchange == "CREATE_CHILD_SA":
        pair.a.run(pair.a.sa, pair.a.sa.create_child(PFS, pair.now), pair.now)
    else:
        pair.a.start(pair.b.endpoint, pair.now, PFS)
    pair.settle()
    agree(pair, stands)
    assert pair.a.established()
    assert pair.b.established()
    assert pair.a.closed is pair.b.closed is None
    if refuses == "a":
        assert pair.a.failed == [Reason.KERNEL_REFUSED]
    else:
        assert pair.b.happened(ChildDenied)
    peer.refuse_install = lambda sa: False
    pair.a.run(pair.a.sa, pair.a.sa.create_child(SECOND, pair.now), pair.now)
    pair.settle()
    agree(pair, stands + 1)


# Order


def test_the_ids_and_windows_of_the_two_directions_are_apart() -> None:
    pair = pair_of(FIRST, SECOND, PFS)
    pair.a.run(pair.a.sa, pair.a.sa.create_child(SECOND, pair.now), pair.now)
    pair.b.run(pair.b.sa, pair.b.sa.create_child(mirrored(PFS), pair.now), pair.now)
    assert [str(datagram) for datagram in pair.flight] == ["a: CREATE_CHILD_SA request 2", "b: CREATE_CHILD_SA request 0"]
    pair.settle()
    agree(pair, 3)


def test_requests_before_authentication_are_ignored() -> None:
    pair = _three()
    pair.a.start(pair.b.endpoint, pair.now, FIRST)
    pair.step()
    pair.step()
    auth = pair.take()
    # an INFORMATIONAL of the peer's that overtakes its IKE_AUTH answer
    pair.deliver(auth)
    answer = pair.take()
    pair.b.run(pair.b.sa, pair.b.sa.probe(pair.now), pair.now)
    probe = pair.take()
    pair.deliver(probe)
    assert not pair.flight
    pair.deliver(answer)
    pair.deliver(probe)
    pair.settle()
    agree(pair, 1)


def test_plain_requests_on_an_established_ike_sa_are_dropped() -> None:
    pair = pair_of(FIRST)
    header = bytearray(28)
    header[0:8], header[8:16] = pair.a.sa.wire_spi_i, pair.a.sa.wire_spi_r
    header[16:28] = bytes([0, 0x20, Exchange.INFORMATIONAL, 0x08, 0, 0, 0, 2, 0, 0, 0, 28])
    assert pair.b.sa.receive(bytes(header), pair.b.endpoint, pair.a.endpoint, pair.now) == []
    pair.a.run(pair.a.sa, pair.a.sa.probe(pair.now), pair.now)
    pair.settle()
    assert len(pair.log) == 2


def test_a_child_asked_of_a_dying_ike_sa_fails_at_once() -> None:
    pair = pair_of(FIRST, SECOND)
    pair.a.run(pair.a.sa, pair.a.sa.delete(pair.now), pair.now)
    effects = pair.a.sa.create_child(SECOND, pair.now, acquire=AcquireSequence(5))
    (failed,) = effects
    assert isinstance(failed, ChildFailed)
    assert failed.acquire == 5


def test_a_long_queue_that_fails_at_once_is_worked_off() -> None:
    pair = pair_of(FIRST, SECOND)
    pair.a.run(pair.a.sa, pair.a.sa.probe(pair.now), pair.now)
    for _ in range(3000):
        pair.a.run(pair.a.sa, pair.a.sa.create_child(replace(SECOND, esp_proposals=()), pair.now), pair.now)
    pair.settle()
    assert pair.a.failed == [Reason.NO_PROPOSAL_CHOSEN] * 3000
    agree(pair, 1)


def test_the_queue_is_bounded() -> None:
    pair = pair_of(FIRST, SECOND)
    pair.a.run(pair.a.sa, pair.a.sa.probe(pair.now), pair.now)
    for _ in range(MAX_TASKS + 2):
        pair.a.run(pair.a.sa, pair.a.sa.create_child(SECOND, pair.now), pair.now)
    assert pair.a.failed == [Reason.TEMPORARY_FAILURE] * 2
    pair.a.run(pair.a.sa, pair.a.sa.abort(pair.now, Reason.SHUTDOWN), pair.now)
    assert len(pair.a.failed) == MAX_TASKS + 2


@pytest.mark.parametrize("arrives", ["never", "late"])
def test_a_child_that_the_responder_deletes_before_its_answer_arrives(arrives: str) -> None:
    pair = pair_of(FIRST, SECOND)
    pair.a.run(pair.a.sa, pair.a.sa.create_child(SECOND, pair.now), pair.now)
    pair.step()
    answer = pair.take()
    child_id = max(pair.b.sa.children)
    # the answer is lost or late; INFORMATIONAL { D(SPI) } --> overtakes it
    pair.b.run(pair.b.sa, pair.b.sa.delete_child(child_id, pair.now), pair.now)
    pair.settle()
    if arrives == "late":
        pair.deliver(answer)
    pair.wait(10.0)
    agree(pair, 1)
    assert pair.a.failed == [Reason.PEER_DELETED if arrives == "late" else Reason.TEMPORARY_FAILURE]
