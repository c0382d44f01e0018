from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_shim.model import IPAddress, IPNetwork
from kernel_shim.mpls.forward import Departure, Forwarder, choose, entropy_label
from kernel_shim.mpls.labels import FIRST_LABEL, IMPLICIT_NULL, LAST_LABEL, Label
from kernel_shim.mpls.lfib import MAX_PATHS, PLATFORM, Lfib, Nhlfe, ToInterface, ToPeer, ToStack, ToVrf
from kernel_shim.mpls.switch import flow_hash


def to(peer: str, *labels: int) -> Nhlfe:
    return Nhlfe(ToPeer(peer), tuple(map(Label, labels)))


prefixes4 = st.builds(lambda word, length: IPv4Network((word >> (32 - length) << (32 - length), length)), st.integers(0, 2**32 - 1), st.integers(0, 32))
prefixes6 = st.builds(lambda word, length: IPv6Network((word >> (128 - length) << (128 - length), length)), st.integers(0, 2**128 - 1), st.integers(0, 128))
near = st.sampled_from([ip_network(text) for text in ("10.0.0.0/8", "10.0.0.0/24", "10.0.0.0/25", "10.0.0.128/25", "10.0.0.1/32", "0.0.0.0/0")])
prefixes = st.one_of(near, prefixes4, prefixes6)


@given(
    st.lists(st.tuples(st.sampled_from(["red", "blue"]), prefixes, st.booleans()), max_size=30),
    st.lists(st.one_of(st.sampled_from([ip_address("10.0.0.1"), ip_address("10.0.0.200"), ip_address("10.9.9.9")]), st.ip_addresses()), max_size=10),
)
def test_the_longest_match_wins(changes: list[tuple[str, IPNetwork, bool]], addresses: list[IPAddress]) -> None:
    """Against a list that is searched from end to end."""
    lfib, model = Lfib(), dict[tuple[str, IPNetwork], Nhlfe]()
    for number, (vrf, prefix, add) in enumerate(changes):
        if add:
            path = to(f"peer{number}", 100)
            lfib.route(vrf, prefix, (path,))
            model[vrf, prefix] = path
        else:
            assert lfib.unroute(vrf, prefix) == (model.pop((vrf, prefix), None) is not None)
    for vrf in ("red", "blue"):
        assert {prefix: path for prefix, (path,) in lfib.routes(vrf)} == {prefix: path for (owner, prefix), path in model.items() if owner == vrf}
        inside = [prefix.network_address for owner, prefix in model if owner == vrf]
        for address in addresses + inside:
            matching = [(prefix.prefixlen, path) for (owner, prefix), path in model.items() if owner == vrf and address in prefix]
            expected = max(matching, key=lambda match: match[0])[1] if matching else None
            found = lfib.outgoing(vrf, address)
            assert (found[0] if found else None) == expected
    assert lfib.vrfs() == {vrf for vrf, _ in model}


def test_every_change_has_a_generation_of_its_own() -> None:
    lfib = Lfib()
    seen = [lfib.generation]
    for change in (
        lambda: lfib.bind(Label(100), (to("a", 200),)),
        lambda: lfib.route("red", ip_network("10.0.0.0/8"), (to("a", 200),)),
        lambda: lfib.unroute("red", ip_network("10.0.0.0/8")),
        lambda: lfib.unbind(Label(100)),
    ):
        change()
        assert lfib.generation not in seen
        seen.append(lfib.generation)


def test_label_spaces_are_apart() -> None:
    lfib = Lfib()
    lfib.bind(Label(100), (to("a", 200),))
    lfib.bind(Label(100), (to("b", 200),), space="eth1")
    assert lfib.incoming(Label(100)) == (to("a", 200),)
    assert lfib.incoming(Label(100), "eth1") == (to("b", 200),)
    assert lfib.incoming(Label(100), "eth2") is None
    assert lfib.unbind(Label(100), "eth1")
    assert not lfib.unbind(Label(100), "eth1")
    assert lfib.incoming(Label(100)) is not None


@pytest.mark.parametrize("label", [0, 15, LAST_LABEL + 1, -1])
def test_special_labels_cannot_be_bound(label: int) -> None:
    with pytest.raises(ValueError, match="cannot be bound"):
        Lfib().bind(Label(label), (to("a", 100),))


def test_nonsense_is_refused() -> None:
    lfib = Lfib()
    with pytest.raises(ValueError, match="paths"):
        lfib.bind(Label(100), ())
    with pytest.raises(ValueError, match="paths"):
        lfib.bind(Label(100), (to("a", 100),) * (MAX_PATHS + 1))
    with pytest.raises(ValueError, match="back"):
        lfib.route("red", ip_network("10.0.0.0/8"), (Nhlfe(ToVrf("red")),))
    with pytest.raises(ValueError, match="back"):
        lfib.route("red", ip_network("10.0.0.0/8"), (Nhlfe(ToStack()),))
    with pytest.raises(ValueError, match="labels"):
        to("a", 7)
    with pytest.raises(ValueError, match="peer"):
        Nhlfe(ToInterface("red"), (Label(100),))
    with pytest.raises(ValueError, match="entropy"):
        Nhlfe(ToPeer("a"), (IMPLICIT_NULL,), entropy=True)
    with pytest.raises(ValueError, match="class"):
        Nhlfe(ToPeer("a"), (Label(100),), traffic_class=8)
    assert not len(lfib)
    assert not lfib.vrfs()


def test_flows_spread_over_equal_paths_and_stay_when_one_goes() -> None:
    paths = tuple(to(name, 100) for name in ("a", "b", "c", "d"))
    before = {flow: choose(paths, lambda flow=flow: flow) for flow in range(4000)}  # type: ignore[misc]
    for path in paths:
        assert 800 < sum(chosen == path for chosen in before.values()) < 1200
    after = {flow: choose(paths[:3], lambda flow=flow: flow) for flow in range(4000)}  # type: ignore[misc]
    assert all(after[flow] == chosen for flow, chosen in before.items() if chosen != paths[3])


def test_departures_take_equal_paths_by_flow() -> None:
    lfib = Lfib()
    lfib.route("red", ip_network("10.0.0.0/8"), (to("a", 100), to("b", 100)))
    forwarder = Forwarder(lfib)
    hops = set()
    for number in range(64):
        found = forwarder.depart("red", IPv4Address("10.1.2.3"), lambda number=number: number)  # type: ignore[misc]
        assert isinstance(found, Departure)
        hops.add(found.next_hop)
    assert hops == {ToPeer("a"), ToPeer("b")}


def test_all_fragments_of_a_datagram_are_one_flow() -> None:
    def fragment(offset: int, more: bool, data: bytes) -> memoryview:
        header = bytearray.fromhex("4500001c0007000040110000c0000201c0000202")
        header[6:8] = (offset // 8 | more << 13).to_bytes(2, "big")
        return memoryview(header + data)

    first, second = fragment(0, True, b"\x10\x00\x20\x00abcd"), fragment(8, False, b"other!!!")
    assert flow_hash(first) == flow_hash(second)
    whole = [fragment(0, False, port.to_bytes(2, "big") + b"\x20\x00abcd") for port in range(8)]
    assert len(set(map(flow_hash, whole))) == 8


@given(st.integers(0, 2**32 - 1))
def test_an_entropy_label_is_no_special_label(flow: int) -> None:
    assert FIRST_LABEL <= entropy_label(flow) <= LAST_LABEL


def test_many_labels_and_routes_are_found() -> None:
    lfib, random_ = Lfib(), random.Random(7)
    path = (to("a", 100),)
    for label in range(16, 20016):
        lfib.bind(Label(label), path)
    for number in range(20000):
        lfib.route("red", IPv6Network((random_.getrandbits(64) << 64 | number, 128)), path)
    assert len(lfib) == 20000
    assert lfib.incoming(Label(20015)) is path
    assert lfib.outgoing("red", IPv6Address(1)) is None


def test_a_route_of_a_vrf_to_a_peer_needs_a_label() -> None:
    """Else the peer could not tell whose packet it is."""
    for path in (to("a"), to("a", IMPLICIT_NULL)):
        with pytest.raises(ValueError, match="label"):
            Lfib().route("red", ip_network("10.0.0.0/8"), (path,))
        Lfib().route(PLATFORM, ip_network("10.0.0.0/8"), (path,))


def test_labels_and_routes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernel_shim.mpls.lfib.MAX_LABELS", 2)
    monkeypatch.setattr("kernel_shim.mpls.lfib.MAX_ROUTES", 2)
    lfib, path = Lfib(), (to("a", 100),)
    for _ in range(2):  # replacing adds nothing
        lfib.bind(Label(100), path)
        lfib.bind(Label(100), path, "p5")
        lfib.route("red", ip_network("10.0.0.0/8"), path)
        lfib.route("blue", ip_network("2001:db8::/32"), path)
    with pytest.raises(ValueError, match="more than 2 labels"):
        lfib.bind(Label(101), path)
    with pytest.raises(ValueError, match="more than 2 routes"):
        lfib.route("red", ip_network("10.0.0.0/24"), path)
    lfib.unbind(Label(100))
    lfib.unroute("red", ip_network("10.0.0.0/8"))
    lfib.bind(Label(101), path)
    lfib.route("red", ip_network("10.0.0.0/24"), path)
