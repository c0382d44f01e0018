"""Message trees to the typed model: units, defaults, and complaints with option and place."""

from __future__ import annotations

import contextlib
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_shim.model import Action, AddressRange, Mode, PortRange, TrafficSelector, Unresolved
from vpnd.config import ConfigErrors, load_text
from vpnd.config.addresses import parse_ike_address, parse_remote_address, parse_traffic_selector
from vpnd.config.children import MAX_NAME
from vpnd.config.model import AuthMethod, AuthRound, ChildConfig, Childless, ConnectionConfig, StartAction, TsTemplate
from vpnd.config.options import CHILD, CONNECTION, LOCAL, REMOTE
from vpnd.config.tree import Plain, Section
from vpnd.config.validate import validate_connection
from vpnd.ike.iana import Group, ProtocolId
from vpnd.ike.identity import Identity
from vpnd.ike.proposal import default_proposals, number_proposals, parse_proposals


def connection(options: Plain) -> ConnectionConfig:
    return validate_connection(Section.of({"gw": options}))


def child(options: Plain) -> ChildConfig:
    return connection({"remote_addrs": ["192.0.2.2"], "children": {"net": options}}).children["net"]


def complaints(options: Plain) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        connection(options)
    return [str(error) for error in caught.value.errors]


def child_complaints(options: Plain) -> list[str]:
    return [text.removeprefix("connections.gw.children.net.") for text in complaints({"remote_addrs": ["192.0.2.2"], "children": {"net": options}})]


def test_defaults_are_those_of_swanctl_conf() -> None:
    found = connection({"children": {"net": {}}})
    assert found == ConnectionConfig(
        name="gw",
        proposals=number_proposals(default_proposals(ProtocolId.IKE)),
        local=(AuthRound(),),
        remote=(AuthRound(),),
        children={
            "net": ChildConfig(
                name="net",
                esp_proposals=number_proposals(default_proposals(ProtocolId.ESP)),
                local_ts=(TsTemplate(None),),
                remote_ts=(TsTemplate(None),),
            )
        },
    )
    assert (found.rekey_time, found.over_time, found.rand_time) == (14400, 1440, 1440)
    assert (found.local_addrs, found.remote_addrs, found.keyingtries, found.encap) == (("%any",), ("%any",), 1, None)


def test_a_whole_connection() -> None:
    found = connection(
        {
            "version": "2",
            "local_addrs": ["192.0.2.1", "2001:db8::1"],
            "remote_addrs": "192.0.2.0/24, 198.51.100.1-198.51.100.9,%any6",
            "local_port": "4500",
            "remote_port": "4500",
            "proposals": ["aes256gcm16-prfsha384-ecp384", "default"],
            "encap": "yes",
            "dpd_delay": "1m",
            "keyingtries": "0",
            "rekey_time": "1d",
            "rand_time": "10",
            "send_cert": "always",
            "send_certreq": "no",
            "local-1": {"auth": "pubkey", "id": "moon.example.org"},
            "remote-1": {"auth": "ike:rsa/pss-sha384", "id": "%any"},
            "children": {},
        }
    )
    assert found.remote_addrs == ("192.0.2.0/24", "198.51.100.1-198.51.100.9", "%any6")
    expected = number_proposals((*parse_proposals(ProtocolId.IKE, "aes256gcm16-prfsha384-ecp384"), *default_proposals(ProtocolId.IKE)))
    assert found.proposals == expected
    assert (found.local_port, found.remote_port, found.encap, found.dpd_delay, found.keyingtries) == (4500, 4500, True, 60, 0)
    assert (found.rekey_time, found.over_time, found.rand_time) == (86400, 8640, 10)
    assert (found.send_cert, found.send_certreq) == ("always", False)
    assert found.local == (AuthRound(AuthMethod.PUBKEY, Identity.parse("moon.example.org")),)
    assert found.remote == (AuthRound(AuthMethod.PUBKEY, None, signature_schemes=("ike:rsa/pss-sha384",)),)


def test_a_whole_child() -> None:
    found = child(
        {
            "mode": "transport",
            "local_ts": ["10.1.0.0/16[tcp/80-90]", "dynamic[udp/domain]"],
            "remote_ts": ["10.2.0.1-10.2.0.9"],
            "esp_proposals": ["aes128gcm16-esn", "aes256-sha512"],
            "start_action": "trap",
            "dpd_action": "restart",
            "rekey_time": "1h",
            "rekey_bytes": "1G",
            "life_packets": "1100",
            "replay_window": "128",
            "priority": "5",
            "reqid": "9",
            "unresolved": "eagain",
        }
    )
    assert (found.mode, found.action, found.start_action, found.dpd_action) == (Mode.TRANSPORT, Action.PROTECT, StartAction.TRAP, StartAction.START)
    assert (found.rekey_time, found.life_time, found.rand_time) == (3600, 3960, 360)
    assert (found.rekey_bytes, found.life_bytes) == (1 << 30, (1 << 30) * 11 // 10)
    assert (found.rekey_packets, found.life_packets, found.rand_packets) == (1000, 1100, 100)
    assert (found.replay_window, found.priority, found.reqid, found.unresolved) == (128, 5, 9, Unresolved.EAGAIN)
    network = TrafficSelector(AddressRange(ip_address("10.1.0.0"), ip_address("10.1.255.255")), 6, PortRange(80, 90))
    assert found.local_ts == (TsTemplate(network, 6, PortRange(80, 90)), TsTemplate(None, 17, PortRange(53, 53)))
    assert [str(proposal) for proposal in found.esp_proposals] == [
        str(proposal) for text in ("aes128gcm16-esn", "aes256-sha512") for proposal in parse_proposals(ProtocolId.ESP, text)
    ]
    assert [proposal.number for proposal in found.esp_proposals] == [1, 2]


def test_shunts() -> None:
    assert child({"mode": "pass", "start_action": "trap"}).action is Action.BYPASS
    assert child({"mode": "DROP"}).action is Action.DISCARD
    assert child_complaints({"mode": "drop", "start_action": "start"}) == ["start_action: a child of mode drop cannot be started, only trapped"]


@pytest.mark.parametrize(
    ("options", "rekey", "life"),
    [
        ({}, 3600, 3960),
        ({"life_time": "1100"}, 1000, 1100),
        ({"rekey_time": "30m"}, 1800, 1980),
        ({"rekey_time": "0"}, 0, 0),
        ({"rekey_time": "0", "life_time": "60s"}, 0, 60),
        ({"rekey_time": "2H", "life_time": "0x10 D"}, 7200, 16 * 86400),
    ],
)
def test_lifetimes_follow_from_each_other(options: dict[str, str], rekey: float, life: float) -> None:
    found = child(options)
    assert (found.rekey_time, found.life_time) == (rekey, life)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remote_adrs": "x"}, "connections.gw.remote_adrs: unknown option 'remote_adrs', did you mean 'remote_addrs'?"),
        ({"xyzzy": "x"}, "connections.gw.xyzzy: unknown option 'xyzzy'"),
        ({"xyzzy": {}}, "connections.gw.xyzzy: unknown section 'xyzzy'"),
        ({"version": "1"}, "connections.gw.version: IKEv1 is not implemented; 0 and 2 are IKEv2"),
        ({"mediation": "yes"}, "connections.gw.mediation: the option 'mediation' (yes) is not implemented yet"),
        ({"vips": ["0.0.0.0"]}, "connections.gw.vips: the option 'vips' is not implemented yet"),
        ({"reauth_time": "1y"}, "connections.gw.reauth_time: '1y' is not a time, such as 90s, 15m, 4h or 1d"),
        ({"dpd_delay": "5 x"}, "connections.gw.dpd_delay: '5 x' is not a time, such as 90s, 15m, 4h or 1d"),
        ({"dpd_delay": "-5"}, "connections.gw.dpd_delay: '-5' is not a time, such as 90s, 15m, 4h or 1d"),
        ({"dpd_delay": "99999d"}, "connections.gw.dpd_delay: '99999d' is longer than 2147483647 seconds"),
        ({"dpd_delay": ["1"]}, "connections.gw.dpd_delay: one value was expected"),
        ({"encap": "maybe"}, "connections.gw.encap: 'maybe' is none of yes, no and auto"),
        ({"send_cert": "alway"}, "connections.gw.send_cert: 'alway' is not one of ifasked, always, never, did you mean 'always'?"),
        ({"remote_port": "65536"}, "connections.gw.remote_port: 65536 is not within 1 to 65535"),
        ({"local_port": "501"}, "connections.gw.local_port: a local port other than 500 and 4500 (501) is not implemented yet"),
        (
            {"local_addrs": "vpn.example.org"},
            "connections.gw.local_addrs: 'vpn.example.org' is not an address, prefix or range",
        ),
        ({"local": "x"}, "connections.gw.local: unknown option 'local'"),
        ({"children": "x"}, "connections.gw.children: a section was expected"),
        ({"children": {"net": "x"}}, "connections.gw.children: unknown option 'net'"),
        ({"local": {"auth": "eap-tls"}}, "connections.gw.local.auth: authentication by 'eap-tls' is not implemented yet"),
        ({"local": {"auth": "magic"}}, "connections.gw.local.auth: 'magic' is not an authentication method, such as psk or pubkey"),
        ({"remote": {"auth": "pubkey-md5"}}, "connections.gw.remote.auth: unknown signature constraint 'md5' in 'pubkey-md5'"),
        ({"remote": {"groups": ["a"]}}, "connections.gw.remote.groups: the option 'groups' is not implemented yet"),
        ({"remote": {"revocation": "strict"}}, "connections.gw.remote.revocation: the option 'revocation' (strict) is not implemented yet"),
        ({"local-a": {}, "local-b": {}}, "connections.gw.local-b: a second local authentication round is not implemented yet"),
        ({"local": {"cacerts": ["x"]}}, "connections.gw.local.cacerts: unknown option 'cacerts', did you mean 'certs'?"),
        ({"local": {"cert1": {"file": "relative.pem"}}}, "connections.gw.local.cert1.file: the path of a file must be absolute here"),
        ({"local": {"cert1": {"handle": "01"}}}, "connections.gw.local.cert1.handle: the option 'handle' (01) is not implemented yet"),
    ],
)
def test_complaints_of_connections(options: Plain, message: str) -> None:
    assert complaints(options)[0] == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moode": "tunnel"}, "moode: unknown option 'moode', did you mean 'mode'?"),
        ({"mode": "beet"}, "mode: the mode 'beet' is not implemented yet"),
        ({"mode": "tunel"}, "mode: 'tunel' is not one of tunnel, transport, pass, drop"),
        ({"start_action": "trap|stop"}, "start_action: 'trap|stop' is not one of none, trap, route, start, or trap|start"),
        ({"close_action": "stop"}, "close_action: 'stop' is not one of none, trap, route, start, clear, hold, restart, or trap|start"),
        ({"mark_in": "%same"}, "mark_in: '%same' is no mark for this option"),
        ({"mark_out": "%unique/0xf0"}, "mark_out: the mask of %unique/0xf0 leaves out low bits, in which the numbers are"),
        ({"set_mark_in": "%unique"}, "set_mark_in: '%unique' is no mark for this option"),
        ({"mark_out": "3/1"}, "mark_out: the mark 3/1 has bits that its mask leaves out"),
        ({"if_id_in": "%uniq"}, "if_id_in: '%uniq' is neither a number nor one of %unique, %unique-dir"),
        ({"policies": "no"}, "policies: the option 'policies' (no) is not implemented yet"),
        ({"updown": "/bin/sh"}, "updown: the option 'updown' (/bin/sh) is not implemented yet"),
        ({"replay_window": "4097"}, "replay_window: 4097 is not within 0 to 4096"),
        ({"replay_window": "31"}, "replay_window: 31 is neither 0 nor within 32 to 4096"),
        ({"rekey_bytes": "1T"}, "rekey_bytes: '1T' is not a volume, such as 1000, 500K, 20M or 1G"),
        ({"rekey_time": "2h", "life_time": "1h"}, "life_time: life_time is not more than rekey_time: the SA would go before its successor comes"),
        ({"unresolved": "hold"}, "unresolved: 'hold' is not one of queue, eagain, block, drop"),
        ({"local_ts": ["10.0.0.0/33"]}, "local_ts: '10.0.0.0/33' is not a prefix, an address range or 'dynamic'"),
        ({"local_ts": ["10.0.0.0/8[tcp/80"]}, "local_ts: '10.0.0.0/8[tcp/80' has no closing ']' at its end"),
        ({"local_ts": ["10.0.0.0/8[tcp/90-80]"]}, "local_ts: the port range 90-80 ends before it begins"),
        ({"local_ts": ["10.0.0.0/8[tpc]"]}, "local_ts: 'tpc' is not a number"),
        ({"local_ts": ["10.0.0.0/8"], "remote_ts": ["::/0"]}, "remote_ts: local_ts and remote_ts share no address family and protocol"),
        ({"local_ts": ["dynamic[tcp]"], "remote_ts": ["dynamic[udp]"]}, "remote_ts: local_ts and remote_ts share no address family and protocol"),
        ({"esp_proposals": []}, "esp_proposals: no proposal is given"),
    ],
)
def test_complaints_of_children(options: Plain, message: str) -> None:
    assert child_complaints(options)[0] == message


def test_a_bad_proposal_names_the_option_and_the_word() -> None:
    (text,) = child_complaints({"esp_proposals": ["aes128gcm16", "aes128-rot13"]})
    assert text.startswith("esp_proposals: ")
    assert "rot13" in text


def test_all_complaints_are_made_at_once() -> None:
    assert len(complaints({"vips": ["x"], "a": "b", "encap": "x", "local": {"auth": "x"}, "children": {"net": {"mode": "x"}}})) == 5


def test_defaults_that_are_said_are_harmless() -> None:
    connection(
        {
            "aggressive": "no",
            "pull": "yes",
            "mobike": "no",
            "fragmentation": "no",
            "ocsp": "reply",
            "dscp": "000000",
            "mediation": "no",
            "remote": {"revocation": "relaxed", "round": "0"},
            "children": {
                "net": {
                    "hostaccess": "no",
                    "policies": "yes",
                    "ipcomp": "no",
                    "sha256_96": "no",
                    "tfc_padding": "0",
                    "hw_offload": "auto",
                    "copy_df": "yes",
                    "copy_dscp": "out",
                    "dpd_action": "clear",
                }
            },
        }
    )


def test_how_keys_come_about() -> None:
    config = connection({"childless": "prefer", "ppk_id": "ppk.example", "ppk_required": "yes", "proposals": ["aes256gcm16-sha384-x25519-ke1_mlkem768"]})
    assert config.childless is Childless.PREFER
    assert (str(config.ppk_id), config.ppk_required) == ("ppk.example", True)
    assert config.proposals[0].additional == (Group.ML_KEM_768,)
    assert connection({"ppk_id": "%any"}).ppk_id is None
    assert connection({"resumption": "yes"}).resumption
    assert not connection({}).resumption
    assert len(complaints({"childless": "sometimes", "ppk_required": "perhaps"})) == 2


def test_every_option_that_is_to_come_says_so() -> None:
    for table, wrap in (
        (CONNECTION, lambda options: options),
        (LOCAL, lambda options: {"local": options}),
        (REMOTE, lambda options: {"remote": options}),
        (CHILD, lambda options: {"children": {"net": options}}),
    ):
        for name in table:
            assert any(f"'{name}' (something else) is not implemented yet" in text for text in complaints(wrap({name: "something else"}))), name


def test_names_fit_the_control_protocol() -> None:
    validate_connection(Section.of({"n" * MAX_NAME: {}}))
    for name in ("n" * (MAX_NAME + 1), "a\nb"):
        with pytest.raises(ConfigErrors, match="printable characters"):
            validate_connection(Section.of({name: {}}))
    for message in ({}, {"a": {}, "b": {}}, {"a": "b"}):
        with pytest.raises(ConfigErrors, match="exactly one section"):
            validate_connection(Section.of(message))  # type: ignore[arg-type]


def test_complaints_about_a_file_say_where(tmp_path: Path) -> None:
    lines = ["connections {", "  gw {", "    mediation = yes", "    children {", "      net {"]
    lines += ["        remote_ts = 10.0.0.0/8, 1.2.3", "        modee = tunnel", "      }", "    }", "  }", "}"]
    with pytest.raises(ConfigErrors) as caught:
        load_text("\n".join(lines), tmp_path, "f")
    assert str(caught.value).split("\n") == [
        "f:3:5: connections.gw.mediation: the option 'mediation' (yes) is not implemented yet",
        "f:6:21: connections.gw.children.net.remote_ts: '1.2.3' is not a prefix, an address range or 'dynamic'",
        "f:7:9: connections.gw.children.net.modee: unknown option 'modee', did you mean 'mode'?",
    ]


def test_a_file_and_the_messages_of_the_control_socket_give_the_same_connection(tmp_path: Path) -> None:
    loaded = load_text(
        """connections { gw {
          remote_addrs = 192.0.2.1, 192.0.2.2
          local { auth = psk
                  id = moon }
          children { net {
            local_ts = dynamic, 10.1.0.0/16
            mode = transport } } } }""",
        tmp_path,
    )
    assert loaded.configuration.connections["gw"] == connection(
        {
            "remote_addrs": ["192.0.2.1", "192.0.2.2"],
            "local": {"auth": "psk", "id": "moon"},
            "children": {"net": {"local_ts": ["dynamic", "10.1.0.0/16"], "mode": "transport"}},
        }
    )


# Addresses


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("%any", "%any"),
        ("0.0.0.0", "%any4"),
        ("::", "%any6"),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("192.0.2.9/24", "192.0.2.0/24"),
        ("192.0.2.1-192.0.2.9", "192.0.2.1-192.0.2.9"),
        ("VPN-1.Example.org.", "vpn-1.example.org"),
        ("gateway", "gateway"),
    ],
)
def test_ike_addresses(text: str, spelled: str) -> None:
    assert parse_remote_address(text) == spelled
    assert parse_remote_address(spelled) == spelled


@pytest.mark.parametrize("text", ["", "192.0.2.256", "192.0.2", "192.0.2.9-192.0.2.1", "192.0.2.0/33", "a b", "-a", "a..b", "%any5", "x" * 64])
def test_what_is_no_ike_address(text: str) -> None:
    with pytest.raises(ValueError, match="is not an address, prefix, range or host name"):
        parse_remote_address(text)


@pytest.mark.parametrize(
    ("text", "protocol", "ports"),
    [
        ("10.0.0.0/8[tcp]", 6, PortRange()),
        ("10.0.0.0/8[/80]", 0, PortRange(80, 80)),
        ("10.0.0.0/8[any/any]", 0, PortRange()),
        ("10.0.0.0/8[132/1000-2000]", 132, PortRange(1000, 2000)),
        ("10.0.0.0/8[icmp/8]", 1, PortRange(0x0800, 0x08FF)),
        ("10.0.0.0/8[icmp/0x0801]", 1, PortRange(0x0801, 0x0801)),
        ("::/0[ipv6-icmp/133-137]", 58, PortRange(133 << 8, 137 << 8 | 0xFF)),
    ],
)
def test_protocols_and_ports(text: str, protocol: int, ports: PortRange) -> None:
    found = parse_traffic_selector(text)
    assert (found.protocol, found.ports) == (protocol, ports)


words = st.sampled_from(["yes", "no", "0", "1h", "psk", "dynamic", "tunnel", "10.0.0.0/8", "%any", "trap", "1G", "default"]) | st.text(max_size=12)
nodes = words | st.lists(words, max_size=3) | st.dictionaries(st.sampled_from(["auth", "id", "file", "cert1"]), words, max_size=3)
options = st.sampled_from(sorted({*CONNECTION, *CHILD, *REMOTE} | {"local", "remote", "children", "proposals", "local_ts", "remote_ts", "mode", "rekey_time"}))


@pytest.mark.property
@settings(max_examples=200)
@given(st.dictionaries(options, nodes, max_size=6), st.dictionaries(options, nodes, max_size=6))
def test_no_message_raises_anything_else(gateway: dict[str, object], below: dict[str, object]) -> None:
    with contextlib.suppress(ConfigErrors):
        connection({**gateway, "children": {"net": below}})  # type: ignore[dict-item]


@pytest.mark.property
@settings(max_examples=200)
@given(st.text(st.sampled_from("0123456789abcdefx.:/-[]% tcpicmpudy,"), max_size=24))
def test_no_address_raises_anything_else(text: str) -> None:
    for parse in (parse_ike_address, parse_remote_address, parse_traffic_selector):
        with contextlib.suppress(ValueError):
            parse(text)
