"""From the `mpls` section to the entries of a label node: route targets, allow-lists, stacks, labels that stay."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_shim.model import IPNetwork
from kernel_shim.mpls.labels import Label
from kernel_shim.mpls.lfib import Nhlfe, Peer, ToInterface, ToPeer, ToVrf, TtlModel
from kernel_shim.mpls.node import Classes, LabelBinding, LabelNode, NodeEntry, VrfRoute
from vpnd.config import load_text
from vpnd.mpls.model import MplsConfig
from vpnd.mpls.plan import assign, entries


def mpls(text: str) -> MplsConfig:
    return load_text(f"mpls {{\n{text}\n}}", Path("/nowhere")).configuration.mpls


def planned(text: str) -> list[NodeEntry]:
    config = mpls(text)
    found = entries(config, assign(config))
    node = LabelNode(lambda _: None)
    for entry in found:
        node.put(entry)  # nothing of a valid configuration is refused
    assert len({entry.key for entry in found}) == len(found)
    return found


def routes(found: list[NodeEntry], vrf: str) -> dict[IPNetwork, tuple[Nhlfe, ...]]:
    return {entry.prefix: entry.paths for entry in found if isinstance(entry, VrfRoute) and entry.vrf == vrf}


def accepts(found: list[NodeEntry], peer: str) -> str:
    return next(str(entry.accepts) for entry in found if isinstance(entry, Peer) and entry.name == peer)


def pipe(peer: str, *labels: int) -> Nhlfe:
    return Nhlfe(ToPeer(peer), tuple(map(Label, labels)), TtlModel.PIPE)


ENDS = "local = 192.0.2.1\n remote = 192.0.2."
HERE, THERE, ELSEWHERE = (ip_network(text) for text in ("10.0.0.0/25", "10.0.0.128/25", "10.1.0.0/24"))


def test_vrfs_of_one_name_belong_together() -> None:
    found = planned(f"""
      vrfs {{ red {{ label = 100
          prefixes = {HERE} }}
        blue {{ label = 101 }} }}
      peers {{ pe2 {{ {ENDS}2
        vrfs {{ red {{ label = 200
            prefixes = {HERE}, {THERE} }} }} }} }}
    """)
    # its own prefix is nearer than the peer's
    assert routes(found, "red") == {HERE: (Nhlfe(ToInterface("red")),), THERE: (pipe("pe2", 200),)}
    assert routes(found, "blue") == {}
    assert accepts(found, "pe2") == "100"  # blue's label was never told to it
    bound = {entry.label: entry.paths[0].next_hop for entry in found if isinstance(entry, LabelBinding)}
    assert bound == {100: ToVrf("red"), 101: ToInterface("blue")}


def test_hub_and_spoke() -> None:
    spoke = "import = 65000:2\n export = 65000:1"
    hub = f"""
      vrfs {{ hub {{ label = 100
          prefixes = {HERE}
          import = 65000:1
          export = 65000:2 }} }}
      peers {{ s1 {{ {ENDS}2
          vrfs {{ site {{ label = 201
              prefixes = {THERE}
              {spoke} }} }} }}
        s2 {{ {ENDS}3
          vrfs {{ site {{ label = 202
              prefixes = {ELSEWHERE}
              {spoke} }} }} }} }}
    """
    found = planned(hub)
    assert routes(found, "hub") == {HERE: (Nhlfe(ToInterface("hub")),), THERE: (pipe("s1", 201),), ELSEWHERE: (pipe("s2", 202),)}
    assert accepts(found, "s1") == accepts(found, "s2") == "100"
    one_spoke = planned(f"""
      vrfs {{ site {{ label = 201
          prefixes = {THERE}
          {spoke} }} }}
      peers {{ hub {{ {ENDS}2
          vrfs {{ hub {{ label = 100
              prefixes = 10.0.0.0/8
              import = 65000:1
              export = 65000:2 }} }} }}
        s2 {{ {ENDS}3
          vrfs {{ site {{ label = 202
              prefixes = {ELSEWHERE}
              {spoke} }} }} }} }}
    """)
    # a spoke knows the hub, and no other spoke may send to it
    assert routes(one_spoke, "site") == {THERE: (Nhlfe(ToInterface("site")),), ip_network("10.0.0.0/8"): (pipe("hub", 100),)}
    assert (accepts(one_spoke, "hub"), accepts(one_spoke, "s2")) == ("201", "none")


def test_equal_paths_leaks_and_peers_behind_others() -> None:
    found = planned(f"""
      vrfs {{ red {{ label = 100
          prefixes = {HERE}
          import = 1:1, 1:2
          export = 1:1 }}
        shared {{ label = 101
          prefixes = 172.16.0.0/16
          export = 1:2
          import = 1:1 }} }}
      peers {{
        p1 {{ {ENDS}2 }}
        pe2 {{ {ENDS}3
          vrfs {{ red {{ label = 200
              prefixes = {THERE}
              export = 1:1 }} }} }}
        pe9 {{ via = p1
          push = 700
          vrfs {{ red {{ label = 300
              prefixes = {THERE}
              export = 1:1 }} }} }}
      }}
      lsps {{ transit {{ label = 400
          from = pe2
          to = pe9
          push = 401 }} }}
    """)
    assert routes(found, "red")[THERE] == (pipe("pe2", 200), pipe("p1", 700, 300))
    assert routes(found, "red")[ip_network("172.16.0.0/16")] == (Nhlfe(ToVrf("shared")),)
    assert routes(found, "shared")[HERE] == (Nhlfe(ToVrf("red")),)
    assert (accepts(found, "p1"), accepts(found, "pe2")) == ("100", "100, 400")
    (transit,) = (entry for entry in found if isinstance(entry, LabelBinding) and entry.label == 400)
    assert transit.paths == (Nhlfe(ToPeer("p1"), (Label(700), Label(401))),)


def test_a_peers_own_space_holds_what_it_may_send() -> None:
    found = planned(f"""
      vrfs {{ red {{ label = 100 }}
        blue {{ label = 101 }} }}
      peers {{ pe2 {{ {ENDS}2
          space = own
          vrfs {{ red {{ label = 200
              prefixes = {THERE} }} }} }} }}
      lsps {{ up {{ label = 101
          from = pe2
          to = pe2
          push = 500 }} }}
    """)
    bound = {(entry.space, int(entry.label)) for entry in found if isinstance(entry, LabelBinding)}
    assert bound == {("", 100), ("", 101), ("pe2", 100), ("pe2", 101)}


def test_classes() -> None:
    (classes,) = (entry for entry in planned("dscp_to_tc = 10:7\n tc_to_dscp = 7:11") if isinstance(entry, Classes))
    assert (classes.map.traffic_class(10), classes.map.dscp(7), classes.map.traffic_class(46)) == (7, 11, 5)


NAMES = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=30, unique=True)


@settings(max_examples=60)
@given(before=NAMES, more=NAMES)
def test_labels_stay_and_are_nobody_elses(before: list[str], more: list[str]) -> None:
    def config(names: list[str]) -> MplsConfig:
        vrfs = "\n".join(f"{name} {{ interface = i{at} }}" for at, name in enumerate(names))
        return mpls(f"label_range = 100-120, 200-260\n vrfs {{ {vrfs} }}")

    first = assign(config(before))
    assert len(set(first.values())) == len(before)
    after = assign(config(list(dict.fromkeys([*more, *before]))), first)
    assert len(set(after.values())) == len(after)
    assert all(after[name] == label for name, label in first.items())
    assert all(100 <= label <= 120 or 200 <= label <= 260 for label in after.values())


def test_a_label_follows_from_its_name() -> None:
    one = assign(mpls("vrfs { red { }\n blue { } }"))
    other = assign(mpls("vrfs { green { }\n blue { }\n red { } }"))
    assert (one["red"], one["blue"]) == (other["red"], other["blue"])
    assert len(set(other.values())) == 3
