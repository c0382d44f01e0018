"""IKE fragmentation (RFC 7383) between two peers: negotiation, loss, repetition, narrower paths, bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.ike_pair import Datagram, Pair, agree, child, connection, mirrored, psk

from vpnd.config.model import Fragmentation
from vpnd.ike import fragments
from vpnd.ike.context import IkeSettings
from vpnd.ike.effects import Reason
from vpnd.ike.fragments import MAX_FRAGMENTS, REASSEMBLY_SECONDS, Reassembly, ReassemblyBudget
from vpnd.ike.iana import Exchange, NotifyType, Payload
from vpnd.ike.wire.message import decode_message
from vpnd.ike.wire.payloads import SkfPayload, VendorIdPayload

LONG = 3000  # octets of an identity, so that IKE_AUTH does not fit a datagram


def long_pair(at_a: Fragmentation = Fragmentation.YES, at_b: Fragmentation = Fragmentation.YES, size: int = 1280, length: int = LONG) -> Pair:
    a, b = psk("a" * length), psk("b" * length)
    pair = Pair(connection("to-b", a, b, [child()], fragmentation=at_a), connection("to-a", b, a, [mirrored(child())], fragmentation=at_b))
    for peer in pair.peers:
        peer.settings = IkeSettings(fragment_size=size)
    return pair


def fragment_of(datagram: Datagram) -> SkfPayload | None:
    last = decode_message(datagram.data).encrypted
    return last if isinstance(last, SkfPayload) else None


def watched(pair: Pair, drop: Callable[[Datagram], bool] = lambda datagram: False) -> list[Datagram]:
    seen: list[Datagram] = []

    def look(datagram: Datagram) -> bool:
        seen.append(datagram)
        return drop(datagram)

    pair.connect(look)
    return seen


def of(seen: list[Datagram], sender: str) -> list[Datagram]:
    return [datagram for datagram in seen if datagram.sender == sender and datagram.data[18] == Exchange.IKE_AUTH]


@pytest.mark.parametrize("at_a", list(Fragmentation))
@pytest.mark.parametrize("at_b", list(Fragmentation))
def test_who_fragments(at_a: Fragmentation, at_b: Fragmentation) -> None:
    pair = long_pair(at_a, at_b)
    seen = watched(pair)
    agree(pair, 1)
    both = Fragmentation.NO not in (at_a, at_b)
    for name, own in (("a", at_a), ("b", at_b)):
        announced = decode_message(next(datagram.data for datagram in seen if datagram.sender == name)).notify(NotifyType.IKEV2_FRAGMENTATION_SUPPORTED)
        assert (announced is not None) == (own is not Fragmentation.NO)
        pieces = of(seen, name)
        assert (len(pieces) > 1) == (both and own is not Fragmentation.ACCEPT)
        for piece in pieces if len(pieces) > 1 else ():
            assert len(piece.data) <= 1280 - 28


def test_fragments_are_numbered_from_one_and_only_the_first_names_the_first_payload() -> None:
    pieces = [fragment_of(datagram) for datagram in of(watched(long_pair()), "a")]
    assert all(pieces)
    total = len(pieces)
    assert [(piece.number, piece.total, piece.first) for piece in pieces if piece] == [
        (number, total, Payload.IDI if number == 1 else Payload.NONE) for number in range(1, total + 1)
    ]


@pytest.mark.parametrize(("version", "size", "packet"), [(4, 0, 576), (6, 0, 1280), (4, 1280, 1280), (6, 1400, 1400)])
def test_the_size_counts_the_whole_packet(version: int, size: int, packet: int) -> None:
    pair = long_pair(size=size)
    if version == 6:
        pair.a.address, pair.b.address = "2001:db8::1", "2001:db8::2"
    longest = max(len(datagram.data) for datagram in of(watched(pair), "a"))
    assert packet - 32 < longest + (28 if version == 4 else 48) <= packet
    agree(pair, 1)


def test_any_order_will_do() -> None:
    pair = long_pair()
    pair.a.start(pair.b.endpoint, pair.now, child())
    pair.step()
    pair.step()
    pair.flight.reverse()
    pair.settle()
    agree(pair, 1)


def test_one_lost_fragment_costs_one_repetition() -> None:
    pair = long_pair()
    lost: list[Datagram] = []

    def second(datagram: Datagram) -> bool:
        piece = fragment_of(datagram)
        if piece is not None and piece.number == 2 and not any(one.sender == datagram.sender for one in lost):
            lost.append(datagram)
            return True
        return False

    pair.connect(second)
    assert not pair.b.sad
    assert pair.b.reassembly.held
    pair.wait(5, second)  # a's repetition completes the request; b's answer loses a fragment, too
    pair.wait(8, second)
    agree(pair, 1)
    assert len(lost) == 2
    assert pair.a.reassembly.held == pair.b.reassembly.held == 0


def test_of_a_repeated_request_only_the_first_fragment_is_answered() -> None:
    """RFC 7383 section 2.6.1."""
    pair = long_pair()
    seen = watched(pair)
    request, answer = of(seen, "a"), of(seen, "b")
    for datagram in request:
        pair.deliver(datagram)
        answers = len(pair.flight)
        assert answers == (len(answer) if fragment_of(datagram).number == 1 else 0)  # type: ignore[union-attr]
        pair.flight.clear()
    agree(pair, 1)


def test_a_path_that_ICMP_calls_narrow() -> None:
    pair = long_pair()
    seen = watched(pair, lambda datagram: len(datagram.data) > 700)
    before = fragment_of(of(seen, "a")[0])
    pair.a.narrowest = pair.b.narrowest = 700
    pair.wait(5, lambda datagram: seen.append(datagram) or len(datagram.data) > 700)  # type: ignore[func-returns-value]
    agree(pair, 1)
    after = fragment_of(of(seen, "a")[-1])
    assert before
    assert after
    assert after.total > before.total


def test_a_path_that_swallows_what_is_too_long_in_silence() -> None:
    """Neither side is told: the second copy goes out in pieces that every path carries, and the answer is cut like the request."""
    pair = long_pair()

    def narrow(datagram: Datagram) -> bool:
        return len(datagram.data) > 600

    pair.connect(narrow)
    pair.wait(40, narrow)
    agree(pair, 1)


def test_nobody_talks_a_path_down_below_what_every_path_carries() -> None:
    pair = long_pair()
    pair.a.narrowest = 68
    assert len(of(watched(pair), "a")[0].data) > 500
    agree(pair, 1)


def test_a_request_cut_anew_replaces_what_came_of_the_old_cut() -> None:
    pair = long_pair()
    pair.connect(lambda datagram: (piece := fragment_of(datagram)) is not None and piece.number == 3)
    held = pair.b.reassembly.held
    pair.a.narrowest = 576
    pair.wait(5, lambda datagram: (piece := fragment_of(datagram)) is not None and datagram.sender == "a" and piece.number > 1)
    assert 0 < pair.b.reassembly.held < held
    pair.wait(10)
    agree(pair, 1)


def test_a_late_piece_of_a_coarser_cut_does_not_undo_a_finer_one() -> None:
    """RFC 7383 section 2.6: fewer fragments than are known of is out of date."""
    pair = long_pair()
    pair.connect()
    coarse = long_request(pair)
    pair.a.narrowest = 576
    fine = long_request(pair)
    assert len(coarse) < len(fine)
    for piece in fine[:-1]:
        pair.deliver(piece)
    held = pair.b.reassembly.held
    pair.deliver(coarse[-1])
    assert pair.b.reassembly.held == held
    pair.deliver(fine[-1])
    assert pair.b.reassembly.held == 0
    assert [datagram.data[18] for datagram in pair.flight] == [Exchange.INFORMATIONAL]
    agree(pair, 1)


def test_a_message_comes_whole_while_pieces_of_it_are_held() -> None:
    pair = long_pair()
    pair.connect()
    pieces = long_request(pair)
    for piece in pieces[:-1]:
        pair.deliver(piece)
    pair.a.sa.fragmentation = False
    (whole,) = long_request(pair)
    pair.deliver(whole)
    assert pair.b.reassembly.held == 0
    # the rest of it is late, and only the first piece of a message is answered again
    answered = len(pair.flight)
    pair.deliver(pieces[-1])
    assert len(pair.flight) == answered == 1
    assert pair.b.reassembly.held == 0
    agree(pair, 1)


def test_an_incomplete_message_is_given_up() -> None:
    pair = long_pair()
    pair.connect()
    (first, *_rest) = long_request(pair)
    pair.deliver(first)
    assert pair.b.reassembly.held
    pair.wait(REASSEMBLY_SECONDS + 1)
    assert pair.b.reassembly.held == 0
    agree(pair, 1)


def test_the_answer_is_cut_smaller_when_its_request_keeps_coming() -> None:
    """A request that fits its path says nothing of what becomes of a long answer."""
    pair = long_pair()
    pair.connect(lambda datagram: datagram.sender == "b" and len(datagram.data) > 600)
    pair.wait(25, lambda datagram: datagram.sender == "b" and len(datagram.data) > 600)
    agree(pair, 1)


def long_request(pair: Pair, exchange: int = Exchange.INFORMATIONAL, number: int = 2) -> list[Datagram]:
    sa = pair.a.sa
    message = sa._seal(exchange, number, (VendorIdPayload(bytes(5000)),), response=False)
    return [Datagram("a", sa.local, sa.remote, data) for data in message.datagrams]


@pytest.mark.parametrize("fault", ["flipped", "renumbered", "other_total", "reflected"])
def test_a_forged_fragment_does_no_harm(fault: str) -> None:
    pair = long_pair()
    pair.a.start(pair.b.endpoint, pair.now, child())
    pair.step()
    pair.step()
    pieces = list(pair.flight)
    pair.flight.clear()
    good = pieces[1].data
    bad = bytearray(good)
    if fault == "flipped":
        bad[-1] ^= 1
    elif fault == "renumbered":
        bad[33] = 3
    elif fault == "other_total":
        bad[35] = 100
    else:
        bad[19] ^= 0x08
    pair.deliver(pieces[0])
    held = pair.b.reassembly.held
    pair.deliver(replace(pieces[1], data=bytes(bad)))
    assert pair.b.reassembly.held == held
    for piece in pieces[1:]:
        pair.deliver(piece)
    pair.settle()
    agree(pair, 1)


def test_the_same_fragment_twice_counts_once() -> None:
    pair = long_pair()
    pair.a.start(pair.b.endpoint, pair.now, child())
    pair.step()
    pair.step()
    first = pair.flight[0]
    for _ in range(3):
        pair.deliver(first)
    assert pair.b.reassembly.held < 1280
    pair.settle()
    agree(pair, 1)


def test_who_did_not_agree_to_fragments_gets_none_read() -> None:
    pair = long_pair(at_b=Fragmentation.NO)
    pair.a.start(pair.b.endpoint, pair.now, child())
    pair.step()
    pair.step()
    pair.flight.clear()
    pair.a.sa.fragmentation = True
    for datagram in long_request(pair, Exchange.IKE_AUTH, 1)[:-1]:
        pair.deliver(datagram)
    assert pair.b.reassembly.held == 0


def test_an_unfinished_message_goes_with_its_half_open_ike_sa() -> None:
    pair = long_pair()
    pair.connect(lambda datagram: (piece := fragment_of(datagram)) is not None and piece.number == 1)
    assert pair.b.reassembly.held
    pair.wait(31, lambda datagram: True)
    assert pair.b.closed is Reason.HALF_OPEN_TIMEOUT
    assert pair.b.reassembly.held == 0


def test_the_budget_of_all_ike_sas() -> None:
    pair = long_pair()
    pair.b.reassembly = ReassemblyBudget(2 * 1000)  # strangers have half of it: less than a fragment
    pair.connect()
    assert not pair.b.sad
    assert pair.b.reassembly.held <= 1000


def piece(number: int, total: int) -> SkfPayload:
    return SkfPayload(0, number, total, b"")


def test_bounds_of_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = ReassemblyBudget()
    reassembly = Reassembly(budget)
    assert not reassembly.wants(0, piece(1, MAX_FRAGMENTS + 1))
    monkeypatch.setattr(fragments, "MAX_REASSEMBLED", 100)
    reassembly.add(0, piece(1, 3), bytes(60), b"", authenticated=True, now=0)
    assert budget.held == 60
    assert reassembly.add(0, piece(2, 3), bytes(60), b"", authenticated=True, now=0) is None
    assert budget.held == 0


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6), st.integers(1, 6), st.integers(0, 9), st.booleans()), max_size=40))
@settings(max_examples=100, deadline=None)
def test_whatever_comes_the_account_is_right(steps: list[tuple[int, int, int, int, bool]]) -> None:
    budget = ReassemblyBudget(40)
    reassembly = Reassembly(budget)
    for now, (message, number, total, length, authenticated) in enumerate(steps):
        fragment = piece(min(number, total), total)
        if reassembly.wants(message, fragment):
            whole = reassembly.add(message, fragment, bytes([fragment.number]) * length, b"", authenticated=authenticated, now=now)
            if whole is not None:
                assert list(whole.chain) == sorted(whole.chain)
        assert 0 <= budget.held <= 40
    reassembly.clear()
    assert budget.held == 0
