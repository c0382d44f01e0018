"""What FRR 8.4's zebra sends (captured), what may not be read, and the entries that follow."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_shim.model import IPAddress
from kernel_shim.mpls.fpm import FpmChange, FpmDecoder, FpmError, GroupChange, Hop, LabelChange, RouteChange
from kernel_shim.mpls.fpm_rib import FpmRib, Surroundings
from kernel_shim.mpls.labels import Label
from kernel_shim.mpls.lfib import Key, Nhlfe, ToInterface, ToPeer, ToVrf, TtlModel
from kernel_shim.mpls.node import LabelBinding, NodeEntry, VrfRoute

# zebra -M dplane_fpm_nl with `mpls lsp 100 192.0.2.2 200`, `mpls lsp 101 192.0.2.2 implicit-null`, `ip route 10.8.0.0/24 192.0.2.2`.
CAPTURED = bytes.fromhex(
    "01010044400000001800010500000000ee5822ae1c140000fec4000100000000080001000006410008001300000c81000a0012000200c000020200000800040003000000"
    "0101003c380000001800010500000000ee5822ae1c140000fec400010000000008000100000651000a0012000200c00002021200080004000300000001010034300000"
    "006800010500000000ee5822ae02000b0000000000080001000800000008000600c00002020800050003000000"
    "0101002c280000006800010500000000ee5822ae02000b000000000008000100030000000800050003000000"
    "01010038340000001800010500000000ee5822ae02180000fec4000100000000080001000a080000080006001400000008001e0008000000"
    "01010044400000001800010400000000ee5822ae0a400000fe0200010000000014000100fe800000000000000000000000000000080006001400000008001e0004000000"
)
GATEWAY = IPv4Address("192.0.2.2")
SAID: list[FpmChange] = [
    LabelChange(Label(100), (Hop(GATEWAY, 3, (Label(200),)),)),
    LabelChange(Label(101), (Hop(GATEWAY, 3),)),
    GroupChange(8, Hop(GATEWAY, 3)),
    GroupChange(3, Hop(None, 3)),
    RouteChange(254, IPv4Network("10.8.0.0/24"), (), 8),
    RouteChange(254, IPv6Network("fe80::/64"), (), 4),
]


def test_what_zebra_says_is_understood() -> None:
    assert FpmDecoder().feed(CAPTURED) == SAID


def test_a_route_that_is_replaced_goes_and_comes_in_one_frame() -> None:
    gone = bytes.fromhex("24000000190001050000000000000000" + "02180000fe00000100000000" + "080001000a080000")
    come = bytes.fromhex("2c000000180001050000000000000000" + "02180000fe00000100000000" + "080001000a080000" + "08001e0009000000")
    frame = (len(gone + come) + 4).to_bytes(2, "big")
    net = IPv4Network("10.8.0.0/24")
    assert FpmDecoder().feed(b"\1\1" + frame + gone + come) == [RouteChange(254, net, gone=True), RouteChange(254, net, (), 9)]
    with pytest.raises(FpmError):
        FpmDecoder().feed(b"\1\1" + (len(gone) + 8).to_bytes(2, "big") + gone + bytes(4))


@given(st.lists(st.integers(1, 60), max_size=30))
def test_frames_may_come_in_any_pieces(sizes: list[int]) -> None:
    decoder, at, found = FpmDecoder(), 0, list[FpmChange]()
    for size in [*sizes, len(CAPTURED)]:
        found += decoder.feed(CAPTURED[at : at + size])
        at += size
    assert found == SAID


@given(st.binary(max_size=200))
def test_garbage_is_an_error_or_nothing(data: bytes) -> None:
    with contextlib.suppress(FpmError):
        FpmDecoder().feed(data)


@given(st.integers(0, len(CAPTURED) - 1), st.integers(0, 255))
def test_damaged_frames_raise_nothing_else(at: int, value: int) -> None:
    damaged = bytearray(CAPTURED)
    damaged[at] = value
    with contextlib.suppress(FpmError):
        FpmDecoder().feed(bytes(damaged))


@pytest.mark.parametrize(
    "frame",
    [
        "02010008aabbccdd",  # another version
        "01010003",  # shorter than its header
        "01010008aabbccdd",  # no netlink header
        "01010014" + "ff000000180000000000000000000000",  # a lying length
        "01010028" + "24000000180000000000000000000000" + "022100000000000100000000" + "08000100" + "0a000000",  # /33
        "01010024" + "20000000180000000000000000000000" + "1c1400000000000100000000" + "04000100",  # a label that is none
    ],
)
def test_bad_frames_end_the_connection(frame: str) -> None:
    with pytest.raises(FpmError):
        FpmDecoder().feed(bytes.fromhex(frame))


def test_an_ipv6_route_of_an_ipv4_next_hop_leads_there() -> None:
    """bgpd's VPNv6 over an IPv4 session."""
    hop = (
        bytes.fromhex("01010038" + "34000000680001050000000000000000" + "0a00000000000000" + "0800010009000000" + "14000600")
        + bytes(10)
        + b"\xff\xff"
        + GATEWAY.packed
    )
    assert FpmDecoder().feed(hop) == [GroupChange(9, Hop(GATEWAY))]


def test_other_frames_and_messages_are_passed_over() -> None:
    assert FpmDecoder().feed(bytes.fromhex("0102000812345678") + bytes.fromhex("01010014" + "10000000030000000000000000000000") + CAPTURED) == SAID


# ---------------------------------------------------------------- entries

PE2, PE3 = ip_address("192.0.2.2"), ip_address("192.0.2.3")
AROUND = Surroundings({101: "red", 102: "blue"}.get, {11: "red", 12: "blue"}.get, {PE2: "pe2", PE3: "pe3"}.get, complete=frozenset({"red"}))
NET = ip_network("10.0.1.0/24")


def labels(*numbers: int) -> tuple[Label, ...]:
    return tuple(map(Label, numbers))


def test_a_vpn_route_leads_to_its_peer_with_its_labels() -> None:
    rib = FpmRib(AROUND)
    rib.apply(RouteChange(101, NET, (Hop(PE2, 3, labels(500, 600)),)))
    route = VrfRoute("red", NET, (Nhlfe(ToPeer("pe2"), labels(500, 600), TtlModel.PIPE),))
    assert rib.take_changes() == {route.key: route}
    assert rib.take_changes() == {}
    rib.apply(RouteChange(101, NET, gone=True))
    assert rib.take_changes() == {route.key: None}
    assert not len(rib)


def test_a_group_that_comes_late_or_changes_changes_its_routes() -> None:
    rib = FpmRib(AROUND)
    rib.apply(RouteChange(101, NET, group=9))
    assert rib.take_changes() == {}
    rib.apply(GroupChange(7, Hop(PE2, 3, labels(500))))
    rib.apply(GroupChange(8, Hop(PE3, 3, labels(600))))
    rib.apply(GroupChange(9, members=(7, 8)))
    both = tuple(Nhlfe(ToPeer(peer), labels(label), TtlModel.PIPE) for peer, label in (("pe2", 500), ("pe3", 600)))
    assert list(rib.take_changes().values()) == [VrfRoute("red", NET, both)]
    rib.apply(GroupChange(8, gone=True))
    assert list(rib.take_changes().values()) == [VrfRoute("red", NET, both[:1])]
    rib.apply(GroupChange(7, gone=True))
    assert list(rib.take_changes().values()) == [None]


def test_groups_in_circles_end() -> None:
    rib = FpmRib(AROUND)
    rib.apply(GroupChange(1, members=(2,)))
    rib.apply(GroupChange(2, members=(1,)))
    rib.apply(RouteChange(101, NET, group=1))
    assert rib.take_changes() == {}


def test_labels_lead_on_or_into_a_vrf() -> None:
    rib = FpmRib(AROUND)
    rib.apply(LabelChange(Label(100), (Hop(PE2, 3, labels(200)),)))
    rib.apply(LabelChange(Label(101), (Hop(PE2, 3),)))
    rib.apply(LabelChange(Label(102), (Hop(None, 11),)))
    rib.apply(LabelChange(Label(103), (Hop(None, 99),)))
    rib.apply(LabelChange(Label(104), (Hop(None, 12),)))
    rib.apply(LabelChange(Label(3), (Hop(PE2, 3),)))
    assert list(rib.entries()) == [
        LabelBinding(Label(100), (Nhlfe(ToPeer("pe2"), labels(200), TtlModel.PIPE),)),
        LabelBinding(Label(101), (Nhlfe(ToPeer("pe2"), ttl=TtlModel.PIPE),)),
        LabelBinding(Label(102), (Nhlfe(ToVrf("red"), ttl=TtlModel.PIPE),)),
        LabelBinding(Label(104), (Nhlfe(ToInterface("blue"), ttl=TtlModel.PIPE),)),
    ]
    assert rib.unresolved == 1


def test_own_and_leaked_routes_of_a_vrf() -> None:
    rib = FpmRib(AROUND)
    rib.apply(RouteChange(101, NET, (Hop(None, 5),)))
    rib.apply(RouteChange(101, ip_network("10.2.0.0/16"), (Hop(ip_address("10.0.1.9"), 5),)))
    rib.apply(RouteChange(101, ip_network("10.3.0.0/16"), (Hop(None, 12),)))
    rib.apply(RouteChange(101, ip_network("10.4.0.0/16"), (Hop(PE2, 3),)))  # a peer could not tell whose it is
    rib.apply(RouteChange(101, ip_network("fe80::/64"), (Hop(None, 5),)))  # of one link
    rib.apply(RouteChange(254, ip_network("10.5.0.0/16"), (Hop(PE2, 3, labels(100)),)))  # no VRF's table
    assert {str(entry.prefix): entry.paths[0].next_hop for entry in rib.entries() if isinstance(entry, VrfRoute)} == {
        "10.0.1.0/24": ToInterface("red"),
        "10.2.0.0/16": ToInterface("red"),
        "10.3.0.0/16": ToInterface("blue"),
    }


def test_a_new_connection_sweeps_what_it_does_not_say_again() -> None:
    rib = FpmRib(AROUND)
    first, second = (RouteChange(101, ip_network(f"10.{number}.0.0/16"), (Hop(PE2, 3, labels(500)),)) for number in (1, 2))
    rib.begin()
    rib.apply(first)
    rib.apply(second)
    rib.take_changes()
    rib.begin()
    rib.apply(second)
    assert rib.take_changes() == {}, "what stays is not touched"
    assert rib.sweep() == 1
    (key,) = rib.take_changes()
    assert key == Key("route", ("red", first.prefix))
    assert len(rib) == 1


def test_a_daemon_that_started_anew_gives_the_numbers_of_its_next_hops_to_others() -> None:
    rib = FpmRib(AROUND)
    rib.begin()
    rib.apply(GroupChange(7, Hop(PE2, 3, labels(500))))
    rib.apply(GroupChange(8, members=(7,)))
    rib.apply(RouteChange(101, NET, group=8))
    (old,) = rib.take_changes().values()
    rib.begin()
    rib.apply(GroupChange(7, Hop(PE3, 3, labels(600))))
    rib.apply(GroupChange(8, Hop(PE3, 3, labels(600))))
    assert rib.take_changes() == {}, "the old route would carry packets to another customer"
    rib.surround(AROUND)
    assert list(rib.entries()) == [old]
    rib.apply(RouteChange(101, NET, group=8))
    assert list(rib.take_changes().values()) == [VrfRoute("red", NET, (Nhlfe(ToPeer("pe3"), labels(600), TtlModel.PIPE),))]


def test_another_meaning_of_the_surroundings_is_followed() -> None:
    rib = FpmRib(AROUND)
    rib.apply(RouteChange(101, NET, (Hop(PE2, 3, labels(500)),)))
    rib.take_changes()
    rib.surround(replace(AROUND, vrf_of_table={101: "green"}.get))
    changes = rib.take_changes()
    assert changes[Key("route", ("red", NET))] is None
    assert changes[Key("route", ("green", NET))] is not None


hops = st.builds(Hop, st.sampled_from([PE2, PE3, ip_address("198.51.100.1"), None]), st.sampled_from([0, 3, 11, 12]), st.sampled_from([(), labels(500)]))
changes = st.one_of(
    st.builds(
        RouteChange,
        st.sampled_from([101, 102, 254]),
        st.sampled_from([NET, ip_network("10.2.0.0/16")]),
        st.lists(hops, max_size=2).map(tuple),
        st.integers(0, 4),
        st.booleans(),
    ),
    st.builds(LabelChange, st.sampled_from(labels(100, 101)), st.lists(hops, max_size=2).map(tuple), st.integers(0, 4), st.booleans()),
    st.builds(GroupChange, st.integers(1, 4), st.one_of(st.none(), hops), st.lists(st.integers(1, 4), max_size=2).map(tuple), st.booleans()),
)


@given(st.lists(changes, max_size=40), st.integers(0, 1 << 30))
def test_what_was_told_on_the_way_adds_up(told: list[FpmChange], seed: int) -> None:
    """The changes that were taken, at any moments, give the entries; and one who hears only the end of it has the same."""
    rib, heard, dice = FpmRib(AROUND), dict[Key, NodeEntry](), random.Random(seed)

    def hear() -> None:
        for key, entry in rib.take_changes().items():
            if entry is None:
                heard.pop(key, None)
            else:
                heard[key] = entry

    for change in told:
        rib.apply(change)
        if dice.random() < 0.3:
            hear()
    hear()
    assert heard == {entry.key: entry for entry in rib.entries()}
    late = FpmRib(AROUND)
    final: dict[object, FpmChange] = {}
    for change in told:
        name = (
            change.number if isinstance(change, GroupChange) else (change.table, change.prefix) if isinstance(change, RouteChange) else ("label", change.label)
        )
        final[name] = change
    for change in sorted(final.values(), key=lambda it: not isinstance(it, GroupChange)):
        late.apply(change)
    assert {entry.key: set(getattr(entry, "paths", ())) for entry in late.entries()} == {entry.key: set(getattr(entry, "paths", ())) for entry in rib.entries()}


def test_the_address_of_a_peer_is_asked_for_as_it_is() -> None:
    asked: list[IPAddress] = []

    def peer_of(address: IPAddress) -> str | None:
        asked.append(address)
        return None

    FpmRib(replace(AROUND, peer_of=peer_of)).apply(LabelChange(Label(100), (Hop(PE2, 3, labels(200)),)))
    assert asked == [PE2]
