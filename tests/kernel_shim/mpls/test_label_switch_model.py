"""Random LFIBs and packets against the naive forwarder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network
from struct import unpack_from

from hypothesis import example, given, settings
from hypothesis import strategies as st
from naive_labels import ENTROPY, LIMIT, SENDER, Dead, Inner, Naive, Out, Stack, ilms, in_ipv6, inners, label_stacks, lfib_of, routing

from kernel_shim.mpls.forward import Forwarder
from kernel_shim.mpls.labels import Entry, Label, MalformedStack, read_stack, write_stack
from kernel_shim.mpls.lfib import NextHop, Nhlfe, Paths, ToPeer
from kernel_shim.mpls.switch import AsIp, LabelSwitch, Outcome, Sent, read_dscp
from kernel_shim.packet.checksum import checksum, partial_sum, pseudo_header_sum
from kernel_shim.reasons import DropReason


def anonymous(stack: Iterable[tuple[int, int, int]]) -> Stack:
    """Entropy labels that look like ours as what they stand for."""
    entries = tuple(stack)
    ours = [number for number, entry in enumerate(entries) if number and entries[number - 1][0] == 7 and entry[0] >= 16 and entry[1:] == (0, 0)]
    return tuple((ENTROPY, 0, 0) if number in ours else entry for number, entry in enumerate(entries))


def split(sent: Sent, labels: int) -> tuple[object, Stack, bytes]:
    """Next hop, stack of that many labels, what is under it."""
    if not labels:
        return (ToPeer(sent.next_hop.peer) if isinstance(sent.next_hop, AsIp) else sent.next_hop), (), sent.packet
    try:
        entries = read_stack(sent.packet)
    except MalformedStack:  # it went another way, without labels
        return sent.next_hop, (), sent.packet
    return sent.next_hop, anonymous((int(label), tc, ttl) for label, tc, ttl in entries), sent.packet[4 * len(entries) :]


def is_out(outcome: Outcome, out: Out) -> bool:
    stack = anonymous(out.stack)
    found = [split(sent, len(stack)) for sent in outcome.sent]
    if outcome.reason is not None or any((hop, seen) != (out.hop, stack) for hop, seen, _ in found):
        return False
    whole = out.inner.packet()
    if len(found) == 1:
        return found[0][2] == whole and (not out.inner.version or read_dscp(whole) == out.inner.dscp)
    data = b""
    for number, (_, _, piece) in enumerate(found):
        length, _, place = unpack_from("!HHH", piece, 2)
        more = number < len(found) - 1
        right = 4 * len(stack) + len(piece) <= LIMIT and length == len(piece) and place == len(data) // 8 | more << 13
        if not right or checksum(partial_sum(piece[:20])) or piece[8:10] + piece[12:20] != whole[8:10] + whole[12:20]:
            return False
        data += piece[20:]
    return len(found) > 1 and data == whole[20:]


def is_dead(outcome: Outcome, dead: Dead, came: Stack) -> bool:
    if outcome.reason is not dead.reason:
        return False
    if not outcome.sent:
        return not dead.told or None in dead.told
    (sent,) = outcome.sent
    return any(is_error(split(sent, len(way[1])), *way, dead, came) for way in dead.told if way is not None)


def is_error(found: tuple[object, Stack, bytes], hop: NextHop, labels: Stack, dead: Dead, came: Stack) -> bool:
    """RFC 792, 4443 and, for the stack that came, 4884 and 4950."""
    _, _, error = found
    if found[:2] != (hop, anonymous(labels)):
        return False
    kinds = {DropReason.MPLS_TTL_EXPIRED: ((11, 0), (3, 0)), DropReason.MPLS_TOO_BIG: ((3, 4), (2, 0)), DropReason.MPLS_NO_ROUTE: ((3, 1), (1, 3))}
    if error[0] >> 4 == 4:
        body, kind, pseudo, to = error[20:], kinds[dead.reason][0], 0, error[16:20] == SENDER.packed
        mtu, words = int.from_bytes(body[6:8], "big"), body[5]
        quoted = words * 4
    else:
        body, kind, to = error[40:], kinds[dead.reason][1], error[24:40] == in_ipv6(SENDER).packed
        pseudo = pseudo_header_sum(error[8:40], 58, len(body))
        mtu = int.from_bytes(body[4:8], "big") if dead.reason is DropReason.MPLS_TOO_BIG else 0
        quoted = 0 if mtu else body[4] * 8
    shown = body[8 + quoted + 8 :] if quoted else b""
    expected = b"" if kind == (2, 0) else write_stack([Entry(Label(label), tc, ttl) for label, tc, ttl in came])
    if quoted and quoted < 128:  # RFC 4884 section 4
        return False
    return to and tuple(body[:2]) == kind and checksum(partial_sum(body) + pseudo) == 0 and mtu == dead.mtu and shown == expected


TO_LABELS_OR_IP = {19: (Nhlfe(ToPeer("p3"), (Label(77),)), Nhlfe(ToPeer("p2")))}


@settings(max_examples=100)
@example(TO_LABELS_OR_IP, {}, [(((19, 0, 64),), Inner(IPv4Address(f"10.1.2.{last}"), ttl, 0)) for last in range(4) for ttl in (62, 63)])
@given(ilms, routing, st.lists(st.tuples(label_stacks, inners), min_size=1, max_size=6))
def test_the_switch_does_what_the_naive_forwarder_does(
    ilm: Mapping[int, Paths], routes: Mapping[tuple[str, IPv4Network], Paths], packets: list[tuple[Stack, Inner]]
) -> None:
    switch, naive = LabelSwitch(Forwarder(lfib_of(ilm, routes)), lambda _peer: LIMIT), Naive(ilm, routes)
    for stack, inner in packets:
        packet = write_stack([Entry(Label(label), tc, ttl) for label, tc, ttl in stack]) + inner.packet()
        outcome = switch.from_peer("p1", packet, 0.0)
        may = list(naive.receive(stack, inner))
        assert any(is_out(outcome, end) if isinstance(end, Out) else is_dead(outcome, end, stack) for end in may), (outcome, may)
        assert switch.from_peer("p1", packet, 0.0) == outcome  # one flow takes one way
