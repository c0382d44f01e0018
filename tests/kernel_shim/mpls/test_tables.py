"""Tables whose entries share equal paths, against plain dicts."""

from __future__ import annotations

from ipaddress import IPv4Network

from hypothesis import given
from hypothesis import strategies as st

from kernel_shim.mpls.tables import LabelTable, RouteTable, SharedPaths

paths = st.lists(st.sampled_from("abc"), max_size=2).map(tuple)
labels = st.sampled_from([16, 17, 1023, 1024, 5000, (1 << 20) - 1])
networks = st.sampled_from([IPv4Network(text) for text in ("10.0.0.0/8", "10.0.0.0/24", "10.0.1.0/24", "0.0.0.0/0")])


@given(st.lists(st.tuples(st.integers(0, 1), labels, networks, paths), max_size=40))
def test_labels_and_routes_hold_what_was_put(steps: list[tuple[int, int, IPv4Network, tuple[str, ...]]]) -> None:
    """Two of each kind share; () takes away."""
    shared = SharedPaths[str]()
    spaces, vrfs = [LabelTable(shared) for _ in range(2)], [RouteTable(32, shared) for _ in range(2)]
    bound: list[dict[int, tuple[str, ...]]] = [{}, {}]
    routed: list[dict[IPv4Network, tuple[str, ...]]] = [{}, {}]
    for which, label, network, way in steps:
        assert spaces[which].put(label, way) == bound[which].pop(label, ())
        assert (vrfs[which].put(network, way) if way else vrfs[which].take(network)) == routed[which].pop(network, ())
        if way:
            bound[which][label] = routed[which][network] = way
        for space, model in zip(spaces, bound, strict=True):
            assert dict(space.items()) == model
            assert bool(space) == bool(model)
            assert space.find(label) == model.get(label)
        for vrf, known in zip(vrfs, routed, strict=True):
            assert {IPv4Network((address, length)): way for length, address, way in vrf.items()} == known
        assert len(shared) == 1 + len({way for model in (*bound, *routed) for way in model.values()})
