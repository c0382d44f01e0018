"""The `mpls` section of a configuration file: what it means, and what is wrong with it, with its place."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.labels import Label, LabelRange, LabelSet
from kernel_shim.mpls.lfib import TtlModel
from vpnd.config import load_text
from vpnd.config.capabilities import EXPECTED, beyond, refused
from vpnd.config.errors import ConfigErrors
from vpnd.config.label_tunnels import unprotected
from vpnd.config.model import KernelChoice
from vpnd.mpls.model import LabelMode, LspConfig, MplsConfig, PeerConfig, RemoteVrf, VrfConfig, own_target

PATH = Path("/nowhere")


def mpls(text: str) -> MplsConfig:
    return load_text(f"mpls {{\n{text}\n}}", PATH).configuration.mpls


def test_everything_that_can_be_said() -> None:
    found = mpls("""
      ttl = short-pipe
      label_range = 1000-1999, 3000
      dscp_to_tc = 46:5, 10:1
      tc_to_dscp = 5:46
      vrfs {
        red {
          interface = vpn-r
          members = eth1, eth2
          table = 101
          label = 100
          prefixes = 10.0.0.0/25, fd00::/64
          rd = 65000:1
          import = target:65000:1, 192.0.2.1:7
          export = 4200000000:9
          ttl = uniform
        }
        blue { labels = per-prefix
          prefixes = 10.0.0.0/25 }
      }
      peers {
        pe2 {
          local = 192.0.2.1
          remote = 192.0.2.2
          encapsulation = udp
          managed = yes
          accept = 100-199, 300
          space = own
          entropy = yes
          tc = 3
          vrfs { red { label = 200
            prefixes = 10.0.0.128/25 } }
        }
        far { via = pe2
          push = 700, explicit-null }
      }
      lsps { through { label = 400
        from = pe2
        to = far
        push = implicit-null
        ttl = pipe } }
    """)
    target = own_target("red")
    assert found.vrfs["red"] == VrfConfig(
        name="red",
        interface="vpn-r",
        table=101,
        members=("eth1", "eth2"),
        prefixes=(ip_network("10.0.0.0/25"), ip_network("fd00::/64")),
        label=Label(100),
        ttl=TtlModel.UNIFORM,
        rd="65000:1",
        imports=frozenset({"65000:1", "192.0.2.1:7"}),
        exports=frozenset({"4200000000:9"}),
    )
    assert (found.vrfs["blue"].interface, found.vrfs["blue"].labels, found.vrfs["blue"].ttl) == ("vpn-blue", LabelMode.PER_PREFIX, TtlModel.SHORT_PIPE)
    assert found.peers["pe2"] == PeerConfig(
        name="pe2",
        local=ip_address("192.0.2.1"),
        remote=ip_address("192.0.2.2"),
        encapsulation=Encapsulation.UDP,
        managed=True,
        accept=LabelSet([LabelRange(Label(100), Label(199)), LabelRange(Label(300), Label(300))]),
        own_space=True,
        ttl=TtlModel.SHORT_PIPE,
        entropy=True,
        traffic_class=3,
        vrfs={"red": RemoteVrf("red", (ip_network("10.0.0.128/25"),), Label(200), frozenset({target}), frozenset({target}))},
    )
    assert (found.peers["far"].via, found.peers["far"].push) == ("pe2", (700, 0))
    assert found.lsps["through"] == LspConfig("through", Label(400), ("pe2",), ("far",), (Label(3),), ttl=TtlModel.PIPE)
    assert (found.dscp_to_tc, found.tc_to_dscp) == ({46: 5, 10: 1}, {5: 46})
    assert list(found.label_range) == [(1000, 1999), (3000, 3000)]


@pytest.mark.parametrize(
    ("text", "place", "complaint"),
    [
        ("ttl = sometimes", "<text>:2:7: mpls.ttl", "not one of"),
        ("vrf { }", "<text>:2:1: mpls.vrf", "did you mean 'vrfs'"),
        ("vrfs { red { label = 15 } }", "mpls.vrfs.red.label", "not within 16"),
        ("vrfs { red { table = 254 } }", "mpls.vrfs.red.table", "host's own"),
        ("vrfs { red { members = eth1 } }", "mpls.vrfs.red.members", "'table' is missing"),
        ("vrfs { red { prefixes = 10.0.0.1/24 } }", "mpls.vrfs.red.prefixes", "not a prefix"),
        ("vrfs { red { import = 65536:70000 } }", "mpls.vrfs.red.import", "does not fit"),
        ("vrfs { red { export = red } }", "mpls.vrfs.red.export", "not a route target"),
        ("vrfs { a-very-long-name { } }", "mpls.vrfs.a-very-long-name", "'interface' is missing"),
        ("vrfs { red { labels = per-prefix } }", "mpls.vrfs.red.labels", "needs prefixes"),
        ("vrfs { red { label = 20 }\n blue { label = 20 } }", "<text>:3:17: mpls.vrfs.blue.label", "is that of VRF 'red'"),
        ("vrfs { red { table = 5 }\n blue { table = 5 } }", "mpls.vrfs.blue.table", "is that of VRF 'red'"),
        ("vrfs { red { table = 5\n members = e1 }\n blue { table = 6\n members = e1 } }", "mpls.vrfs.blue.members", "is that of VRF 'red'"),
        ("peers { pe { local = 192.0.2.1 } }", "mpls.peers.pe", "'remote' is missing"),
        ("peers { pe { local = 192.0.2.1\n remote = ::1 } }", "mpls.peers.pe.remote", "two address families"),
        ("peers { pe { local = 0.0.0.0\n remote = 192.0.2.2 } }", "mpls.peers.pe.local", "not the address of one node"),
        ("peers { pe { via = p\n push = 20 } }", "mpls.peers.pe.via", "there is no peer 'p'"),
        ("peers { a { via = b\n push = 20 }\n b { via = a\n push = 21 } }", "mpls.peers.a.via", "leads back"),
        ("peers { pe { via = p\n push = 20\n accept = 30 } }", "mpls.peers.pe.accept", "leaves no 'accept'"),
        ("peers { a { local = ::1\n remote = ::2 }\n b { local = ::1\n remote = ::2 } }", "mpls.peers.b.remote", "is the tunnel to 'a'"),
        ("peers { a { local = ::1\n remote = ::2\n accept = 30-20 } }", "mpls.peers.a.accept", "ends before it begins"),
        ("peers { a { local = ::1\n remote = ::2\n vrfs { red { } } } }", "mpls.peers.a.vrfs.red", "'label' is missing"),
        ("lsps { one { label = 20 } }", "mpls.lsps.one", "one of 'to' and 'vrf'"),
        ("lsps { one { label = 20\n to = pe } }", "mpls.lsps.one.to", "no peer 'pe'"),
        ("lsps { one { label = 20\n vrf = red } }", "mpls.lsps.one.vrf", "no VRF 'red'"),
        ("vrfs { red { label = 20 } }\nlsps { one { label = 20\n vrf = red } }", "mpls.lsps.one.label", "is that of VRF 'red'"),
        ("dscp_to_tc = 64:1", "mpls.dscp_to_tc", "not within"),
        ("tc_to_dscp = 5", "mpls.tc_to_dscp", "not a pair"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, place: str, complaint: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        mpls(text)
    assert any(place in str(error) and complaint in str(error) and error.line for error in caught.value.errors), str(caught.value)


def test_a_kernel_without_labels_is_told_by_name() -> None:
    loaded = load_text("mpls { vrfs { red { } } }", PATH)
    for check in (beyond, refused):
        (error,) = check(loaded.configuration, EXPECTED[KernelChoice.PFKEY], loaded.tree)
        assert "forwards no labels" in str(error)
        assert error.line == 1
    assert beyond(loaded.configuration, EXPECTED[KernelChoice.USERSPACE], loaded.tree) == []


ON_LINUX = "vrfs { red { table = 101\n label = 100 } }\npeers { pe { local = 192.0.2.1\n remote = 192.0.2.2 } }"


@pytest.mark.parametrize(
    ("before", "after", "place", "complaint"),
    [
        ("vrfs", "dscp_to_tc = 46:5\nvrfs", "mpls.dscp_to_tc", "traffic class"),
        ("vrfs", "fpm = yes\nvrfs", "mpls.fpm", "routing daemon itself"),
        ("table = 101", "", "mpls.vrfs.red.table", "without a table"),
        ("label = 100", "label = 1048575", "mpls.vrfs.red.label", "1048575"),
        ("remote = 192.0.2.2", "remote = 192.0.2.2\n encapsulation = udp", "mpls.peers.pe.encapsulation", "not in UDP"),
        ("local = 192.0.2.1\n remote = 192.0.2.2", "local = ::1\n remote = ::2\n encapsulation = ip", "mpls.peers.pe.encapsulation", "GRE only"),
        ("remote = 192.0.2.2", "remote = 192.0.2.2\n space = own", "mpls.peers.pe.space", "one label space"),
        ("remote = 192.0.2.2", "remote = 192.0.2.2\n entropy = yes", "mpls.peers.pe.entropy", "no entropy labels"),
        ("remote = 192.0.2.2", "remote = 192.0.2.2\n tc = 5", "mpls.peers.pe.tc", "traffic class"),
        ("peers", "lsps { one { label = 1048575\n to = pe\n push = 200 } }\npeers", "mpls.lsps.one.label", "1048575"),
        ("peers", "lsps { one { label = 20\n to = pe\n push = 200\n tc = 1 } }\npeers", "mpls.lsps.one.tc", "traffic class"),
    ],
)
def test_what_linux_cannot_do_of_labels_is_said_with_its_place(before: str, after: str, place: str, complaint: str) -> None:
    for text, wrong in ((ON_LINUX, False), (ON_LINUX.replace(before, after), True)):
        loaded = load_text(f"mpls {{\n{text}\n}}", PATH)
        for check in (beyond, refused):
            errors = check(loaded.configuration, EXPECTED[KernelChoice.XFRM], loaded.tree)
            assert [error.path for error in errors] == ([place] if wrong else [])
            assert all(complaint in str(error) and "'xfrm'" in str(error) and error.line for error in errors)
            assert check(loaded.configuration, EXPECTED[KernelChoice.USERSPACE], loaded.tree) == []


CHILD = (
    "connections {{ gw {{ local_addrs = {local}\n remote_addrs = {remote}\n children {{ c {{ mode = {mode}\n local_ts = {near}\n remote_ts = {far} }} }} }} }}"
)
PEER = "mpls {{ peers {{ pe {{ local = 192.0.2.1\n remote = 192.0.2.2\n encapsulation = {encapsulation} {more} }} }} }}"


@pytest.mark.parametrize(
    ("encapsulation", "near", "far", "covered"),
    [
        ("gre", "dynamic[gre]", "dynamic[gre]", True),
        ("gre", "192.0.2.1[gre]", "192.0.2.0/24", True),
        ("gre", "192.0.2.1[gre]", "192.0.2.3[gre]", False),
        ("gre", "dynamic[udp]", "dynamic[udp]", False),
        ("ip", "dynamic[137]", "dynamic[137]", True),
        ("udp", "dynamic[udp]", "dynamic[udp/6635]", True),
        ("udp", "dynamic[udp/6635]", "dynamic[udp/6635]", False),
        ("udp", "dynamic[udp]", "dynamic[udp/6636]", False),
    ],
)
def test_a_tunnel_without_protection_is_complained_of(encapsulation: str, near: str, far: str, covered: bool) -> None:
    text = CHILD.format(local="%any", remote="192.0.2.2", mode="transport", near=near, far=far) + "\n" + PEER.format(encapsulation=encapsulation, more="")
    loaded = load_text(text, PATH)
    errors = unprotected(loaded.configuration, loaded.tree)
    assert [error.path for error in errors] == ([] if covered else ["mpls.peers.pe"])
    assert all(error.line == 6 for error in errors)


@pytest.mark.parametrize(
    ("remote", "mode", "more", "covered"),
    [
        ("192.0.2.3", "transport", "", False),
        ("192.0.2.0/24", "tunnel", "", True),
        ("gw.example", "transport", "", True),
        ("192.0.2.2", "pass", "", False),
        ("192.0.2.3", "transport", "\n managed = yes", True),
    ],
)
def test_whose_child_it_is_counts(remote: str, mode: str, more: str, covered: bool) -> None:
    text = CHILD.format(local="192.0.2.1", remote=remote, mode=mode, near="dynamic", far="dynamic") + "\n" + PEER.format(encapsulation="gre", more=more)
    loaded = load_text(text, PATH)
    assert (not unprotected(loaded.configuration, loaded.tree)) is covered
