"""The control server driven by the PyPI package `vici`, by Debian's swanctl and by our client, on a real UNIX socket."""

from __future__ import annotations

import datetime
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import vici
from control_fakes import ChildRekeyed, ChildUpDown, FakeBackend, IkeRekeyed, IkeUpDown, LogLine, ServedBackend, child_status, ike_status
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from vici.exception import CommandException, EventUnknownException, SessionException

from vpnd.config import load
from vpnd.config.model import PrivateKeySource
from vpnd.control.client import CommandFailed, ViciClient

SWANCTL = shutil.which("swanctl") or "/usr/sbin/swanctl"
needs_swanctl = pytest.mark.skipif(not Path(SWANCTL).exists(), reason="swanctl is not installed")

PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8

CONFIG = """
defaults { dpd_delay = 30s }
connections {
  gw : defaults {
    local_addrs = 192.0.2.1
    remote_addrs = 192.0.2.2, %any
    proposals = aes256-sha256-x25519, aes128gcm16-prfsha256-ecp256
    local { auth = psk
            id = moon.example.org }
    remote { auth = psk
             id = "sun.example.org" }
    children {
      net {
        local_ts = 10.1.0.0/16[tcp/80]
        remote_ts = 10.2.0.0/16,dynamic
        esp_proposals = aes128gcm16
        life_time = 1h
      }
      web { remote_ts = 10.9.0.0/24
            mode = transport }
    }
  }
}
secrets {
  ike-1 { id-a = moon.example.org
          id-b = sun.example.org
          secret = 0sdmVyeSBzZWNyZXQ= }
}
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedBackend]:
    daemon = ServedBackend(tmp_path / "vici.sock")
    yield daemon
    daemon.stop()


@pytest.fixture
def session(served: ServedBackend) -> Iterator[vici.Session]:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(served.path))
    yield vici.Session(connection)
    connection.close()


def make_certificate(key: ec.EllipticCurvePrivateKey, name: str, *, authority: bool = False) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(begin).not_valid_after(begin + datetime.timedelta(days=3650))
    builder = builder.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(PEM)


def swanctl(served: ServedBackend, *arguments: str, status: int = 0) -> str:
    done = subprocess.run([SWANCTL, *arguments, "--uri", f"unix://{served.path}"], capture_output=True, text=True, timeout=30, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == status, output
    return output


# The PyPI package


def test_version_and_stats(session: vici.Session) -> None:
    version = session.version()
    assert list(version) == ["daemon", "version", "sysname", "release", "machine"]
    assert version["daemon"] == b"vpnd"
    stats = session.stats()
    assert stats["uptime"]["running"] == b"5 minutes"
    assert stats["ikesas"] == {"total": b"0", "half-open": b"1"}
    assert list(stats) == ["uptime", "workers", "queues", "scheduled", "ikesas", "plugins"]


def test_list_sas_has_strongswans_keys_in_strongswans_order(served: ServedBackend, session: vici.Session) -> None:
    served.backend.sas.append(ike_status())
    (event,) = list(session.list_sas())
    sa = event["gw"]
    assert list(sa) == [
        *("uniqueid", "version", "state", "local-host", "local-port", "local-id", "remote-host", "remote-port", "remote-id"),
        *("initiator", "initiator-spi", "responder-spi", "nat-fake", "nat-any"),
        *("encr-alg", "encr-keysize", "integ-alg", "prf-alg", "dh-group", "established", "rekey-time", "child-sas"),
    ]
    assert sa["initiator-spi"] == b"1122334455667788"
    assert sa["responder-spi"] == b"00000000000000ff"
    assert sa["encr-alg"] == b"AES_CBC"
    assert sa["integ-alg"] == b"HMAC_SHA2_256_128"
    assert sa["prf-alg"] == b"PRF_HMAC_SHA2_256"
    assert sa["dh-group"] == b"CURVE_25519"
    assert sa["established"] == b"60"
    assert list(sa["child-sas"]) == ["net-7"]
    child = sa["child-sas"]["net-7"]
    assert list(child) == [
        *("name", "uniqueid", "reqid", "state", "mode", "protocol", "encap", "spi-in", "spi-out", "encr-alg", "encr-keysize"),
        *("bytes-in", "packets-in", "use-in", "bytes-out", "packets-out", "rekey-time", "life-time", "install-time", "local-ts", "remote-ts"),
    ]
    assert child["spi-out"] == b"0000abcd"
    assert child["remote-ts"] == [b"10.2.0.0/16", b"10.3.0.1/32"]


def test_list_sas_filters(served: ServedBackend, session: vici.Session) -> None:
    served.backend.sas += [ike_status("a", 1), ike_status("b", 2)]
    assert [list(event) for event in session.list_sas({"ike": "b"})] == [["b"]]
    assert [list(event) for event in session.list_sas({"ike-id": "1"})] == [["a"]]
    with pytest.raises(CommandException, match="not a number"):
        list(session.list_sas({"ike-id": "x"}))


def test_more_children_than_one_message_holds_come_in_several_events(served: ServedBackend, session: vici.Session) -> None:
    served.backend.sas.append(ike_status(children=[child_status(f"child-with-a-long-name-{number:05}", number) for number in range(2000)]))
    events = list(session.list_sas())
    assert len(events) > 1
    assert len({name for event in events for name in event["gw"]["child-sas"]}) == 2000


def test_connections_are_loaded_listed_and_unloaded(served: ServedBackend, session: vici.Session) -> None:
    session.load_conn(
        {
            "gw": {
                "remote_addrs": ["192.0.2.2"],
                "proposals": ["default"],
                "local": {"auth": "psk", "id": "moon"},
                "remote": {"auth": "psk"},
                "children": {"net": {"local_ts": ["10.1.0.0/16[udp/53]", "dynamic"], "remote_ts": ["10.2.0.1-10.2.0.9"], "mode": "tunnel"}},
            }
        }
    )
    assert session.get_conns()["conns"] == [b"gw"]
    (event,) = list(session.list_conns())
    connection = event["gw"]
    assert list(connection) == [
        *("local_addrs", "remote_addrs", "local_port", "remote_port", "version", "reauth_time", "rekey_time", "unique"),
        *("local-1", "remote-1", "children"),
    ]
    assert connection["local_addrs"] == [b"%any"]
    assert connection["version"] == b"IKEv2"
    assert connection["local-1"] == {"class": b"pre-shared key", "id": b"moon", "groups": [], "cert_policy": [], "certs": [], "cacerts": []}
    child = connection["children"]["net"]
    assert list(child) == [*("mode", "rekey_time", "rekey_bytes", "rekey_packets", "dpd_action", "close_action", "local-ts", "remote-ts")]
    assert child["local-ts"] == [b"10.1.0.0/16[udp/domain]", b"dynamic"]
    assert child["remote-ts"] == [b"10.2.0.1..10.2.0.9"]
    session.unload_conn({"name": "gw"})
    assert session.get_conns()["conns"] == []
    with pytest.raises(CommandException, match="not found"):
        session.unload_conn({"name": "gw"})


def test_a_connection_that_asks_too_much_is_refused_with_its_path(session: vici.Session) -> None:
    with pytest.raises(CommandException, match=r"connections.gw.children.net.ipcomp: the option 'ipcomp' \(yes\) is not implemented yet"):
        session.load_conn({"gw": {"children": {"net": {"ipcomp": "yes"}}}})
    with pytest.raises(CommandException, match="unknown option 'remote_adrs', did you mean 'remote_addrs'"):
        session.load_conn({"gw": {"remote_adrs": ["192.0.2.2"]}})


def test_shared_secrets(served: ServedBackend, session: vici.Session) -> None:
    session.load_shared({"id": "one", "type": "IKE", "data": b"\x00\x01secret", "owners": ["moon", "sun"]})
    session.load_shared({"type": "ike", "data": "other"})
    assert session.get_shared()["keys"] == [b"one"]
    assert served.backend.shared["one"].data == b"\x00\x01secret"
    assert [str(owner) for owner in served.backend.shared["one"].owners] == ["moon", "sun"]
    session.unload_shared({"id": "one"})
    assert session.get_shared()["keys"] == []
    with pytest.raises(CommandException, match="'eap' are not implemented yet"):
        session.load_shared({"type": "EAP", "data": "x"})
    session.clear_creds()
    assert served.backend.shared == {}


def test_initiate_streams_its_log_and_terminate_counts(served: ServedBackend, session: vici.Session) -> None:
    lines = [line["msg"] for line in session.initiate({"child": "net", "timeout": "2500"})]
    assert lines == [b"initiating net"]
    assert served.backend.called == ["initiate net None 2.5"]
    assert [line["msg"] for line in session.terminate({"child": "net"})] == [b"deleting"]
    assert served.backend.sas == []
    with pytest.raises(CommandException, match="no matching SAs to terminate found"):
        list(session.terminate({"ike": "gw"}))
    with pytest.raises(CommandException, match="establishing CHILD_SA 'bad' failed"):
        list(session.initiate({"child": "bad"}))
    with pytest.raises(CommandException, match="internal error"):
        list(session.initiate({"child": "broken"}))
    assert [line["msg"] for line in session.initiate({"child": "net", "loglevel": "2"})] == [b"initiating net", b"details that nobody asked for"]


def test_initiate_without_waiting(served: ServedBackend, session: vici.Session) -> None:
    assert list(session.initiate({"child": "slow", "timeout": "-1"})) == []
    served.call(served.backend.initiating.wait())
    assert not served.backend.cancelled.is_set()


def test_policies(session: vici.Session) -> None:
    session.install({"child": "net", "ike": "gw"})
    (event,) = list(session.list_policies({"trap": "yes"}))
    assert list(event["gw/net"]) == ["child", "reqid", "ike", "mode", "local-ts", "remote-ts"]
    assert list(session.list_policies({"drop": "yes", "pass": "yes"})) == []
    assert list(session.list_policies()) == []
    session.uninstall({"child": "net"})
    with pytest.raises(CommandException, match="policy 'net' not found"):
        session.uninstall({"child": "net"})


def test_what_does_not_exist_yet_says_so(session: vici.Session) -> None:
    with pytest.raises(CommandException, match="'load-pool' is not implemented yet"):
        session.load_pool({"pool": {"addrs": "10.0.0.0/8"}})
    assert session.get_pools() == {}
    assert session.get_authorities() == {"authorities": []}
    session.flush_certs()


def test_unknown_commands_and_events(session: vici.Session) -> None:
    with pytest.raises(SessionException):
        session.request("no-such-command")
    with pytest.raises(EventUnknownException):
        list(session.listen(["no-such-event"]))
    assert session.version()["daemon"] == b"vpnd"


def test_events_of_the_daemon(served: ServedBackend, session: vici.Session) -> None:
    seen: list[tuple[bytes, dict[str, object]]] = []
    first = threading.Event()

    def listen() -> None:
        for label, event in session.listen(["ike-updown", "child-updown", "ike-rekey", "child-rekey", "log"]):
            seen.append((label, event))
            first.set()
            if label == b"child-updown":
                return

    thread = threading.Thread(target=listen)
    thread.start()
    while not first.is_set():  # it has registered for all once it sees the last of them
        served.publish(LogLine("IKE", 1, "gw", 4, "hello"))
        first.wait(0.05)
    served.publish(IkeUpDown(True, ike_status()))
    served.publish(IkeRekeyed(ike_status(), ike_status(unique_id=5)))
    served.publish(ChildRekeyed(ike_status(), child_status(), child_status(unique_id=8)))
    served.publish(ChildUpDown(False, ike_status()))
    thread.join(20)
    assert {label for label, _ in seen[:-4]} == {b"log"}
    assert seen[0][1] == {"group": b"IKE", "level": b"1", "thread": b"0", "ikesa-name": b"gw", "ikesa-uniqueid": b"4", "msg": b"hello"}
    up, ike, child, down = seen[-4:]
    assert ike[0] == b"ike-rekey"
    assert [ike[1]["gw"][each]["uniqueid"] for each in ("old", "new")] == [b"4", b"5"]  # type: ignore[index]
    assert child[0] == b"child-rekey"
    assert [child[1]["gw"]["child-sas"]["net"][each]["uniqueid"] for each in ("old", "new")] == [b"7", b"8"]  # type: ignore[index]
    assert up[0] == b"ike-updown"
    assert list(up[1]) == ["up", "gw"]
    assert "child-sas" not in up[1]["gw"]  # type: ignore[operator]
    assert down[0] == b"child-updown"
    assert list(down[1]) == ["gw"]
    assert list(down[1]["gw"]["child-sas"]) == ["net-7"]  # type: ignore[index]


# swanctl


@needs_swanctl
def test_swanctl_load_all(served: ServedBackend, tmp_path: Path) -> None:
    config = tmp_path / "swanctl.conf"
    config.write_text(CONFIG)
    served.backend.shared["stale"] = None  # type: ignore[assignment]
    output = swanctl(served, "--load-all", "--noprompt", "--file", str(config))
    assert "loaded ike secret 'ike-1'" in output
    assert "successfully loaded 1 connections, 0 unloaded" in output
    connection = served.backend.conns["gw"]
    assert connection.dpd_delay == 30
    assert list(connection.children) == ["net", "web"]
    assert connection.children["net"].life_time == 3600
    assert served.backend.shared["ike-1"].data == b"very secret"
    assert list(served.backend.shared) == ["ike-1"]
    assert "loaded connection 'gw'" in swanctl(served, "--load-conns", "--file", str(config))
    config.write_text(CONFIG.replace("dpd_delay = 30s", "mediation = yes"))
    assert "'mediation' (yes) is not implemented yet" in swanctl(served, "--load-conns", "--file", str(config), status=22)


@needs_swanctl
def test_swanctl_lists(served: ServedBackend, tmp_path: Path) -> None:
    config = tmp_path / "swanctl.conf"
    config.write_text(CONFIG)
    swanctl(served, "--load-conns", "--file", str(config))
    served.backend.sas.append(ike_status())
    raw = swanctl(served, "--list-sas", "--raw")
    assert raw.startswith("list-sa event {gw {uniqueid=4 version=2 state=ESTABLISHED local-host=192.0.2.1 local-port=4500 local-id=moon.example.org ")
    assert re.search(r"child-sas \{net-7 \{name=net uniqueid=7 reqid=3 state=INSTALLED mode=TUNNEL protocol=ESP encap=yes spi-in=c1234567", raw)
    assert "bytes-in=840 packets-in=10 use-in=1 bytes-out=84 packets-out=1" in raw
    listed = swanctl(served, "--list-sas")
    assert "gw: #4, ESTABLISHED, IKEv2, 1122334455667788_i* 00000000000000ff_r" in listed
    assert "AES_CBC-256/HMAC_SHA2_256_128/PRF_HMAC_SHA2_256/CURVE_25519" in listed
    assert "net: #7, reqid 3, INSTALLED, TUNNEL-in-UDP, ESP:AES_GCM_16-128" in listed
    connections = swanctl(served, "--list-conns")
    assert "gw: IKEv2" in connections
    assert "local:  10.1.0.0/16[tcp/http]" in connections
    assert "net: TUNNEL" in connections
    assert "web: TRANSPORT" in connections


@needs_swanctl
def test_swanctl_control(served: ServedBackend) -> None:
    assert "initiate completed successfully" in swanctl(served, "--initiate", "--child", "net")
    assert "terminate completed successfully" in swanctl(served, "--terminate", "--child", "net")
    assert "initiate failed: establishing CHILD_SA 'bad' failed" in swanctl(served, "--initiate", "--child", "bad", status=1)
    assert "no matching SAs" in swanctl(served, "--terminate", "--ike", "gw", status=1)
    assert "uptime: 5 minutes" in swanctl(served, "--stats")
    assert "vpnd" in swanctl(served, "--version", "--daemon")
    swanctl(served, "--install", "--child", "net")
    assert "net, TUNNEL" in swanctl(served, "--list-pols", "--trap").replace("gw/", "")
    assert "no matching SAs to rekey found" in swanctl(served, "--rekey", "--child", "net", status=1)
    swanctl(served, "--initiate", "--child", "net")
    assert "rekey completed successfully" in swanctl(served, "--rekey", "--child", "net", "--ike-id", "4")
    assert served.backend.called[-1] == "rekey net None None 4"


@needs_swanctl
def test_swanctl_sends_what_the_file_loader_makes_of_the_same_files(served: ServedBackend, tmp_path: Path) -> None:
    config = tmp_path / "swanctl.conf"
    config.write_text(
        CONFIG.replace("local { auth = psk", "local { certs = moon.pem").replace("remote { auth = psk", "remote { cacerts = root.pem")
        + 'secrets { private-locked { file = locked.pem\nsecret = "open sesame" } }'
    )
    key, locked = ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)
    for directory, name, data in (
        ("x509", "moon.pem", make_certificate(key, "moon")),
        ("x509ca", "root.pem", make_certificate(key, "root", authority=True)),
        ("private", "moon.pem", key.private_bytes(PEM, PKCS8, serialization.NoEncryption())),
        ("private", "locked.pem", locked.private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"open sesame"))),
    ):
        (tmp_path / directory).mkdir(exist_ok=True)
        (tmp_path / directory / name).write_bytes(data)
    stale = ec.generate_private_key(ec.SECP256R1()).private_bytes(PEM, PKCS8, serialization.NoEncryption())
    served.backend.load_key(PrivateKeySource(stale))
    output = swanctl(served, "--load-all", "--noprompt", "--file", str(config))
    assert not [line for line in output.splitlines() if "failed" in line and not line.startswith("opening directory")]
    backend, configuration = served.backend, load(config).configuration
    assert backend.conns == configuration.connections
    assert backend.shared == configuration.shared
    assert set(backend.certificates) == {(der, False) for der in configuration.certificates} | {(der, True) for der in configuration.authorities}
    assert set(backend.keys) == {FakeBackend.load_key(backend, each) for each in configuration.private_keys}
    assert len(backend.keys) == 2


# Ours


def test_our_client(served: ServedBackend) -> None:
    with ViciClient(served.path, 10) as client:
        served.backend.sas.append(ike_status())
        (event,) = client.streamed("list-sas", "list-sa")
        assert event.section("gw")
        expected = {"kernel": "userspace", "kernel-reasons": ["userspace: works"], "policies": "0", "counters": {"ike.sent": "5"}}
        assert client.request("x-stats").plain() == expected
        client.request("x-wait", {"child": "net", "timeout": 1000})
        with pytest.raises(CommandFailed, match="not up"):
            client.request("x-wait", {"child": "bad"})
        with pytest.raises(CommandFailed, match="does not know the command"):
            client.request("x-unknown")
        client.register("log")
        served.publish(LogLine("IKE", 1, None, None, "hello"))
        name, body = next(client.events())
        assert (name, body.text("msg")) == ("log", "hello")
