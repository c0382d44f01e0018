"""A configuration with its credentials: directories beside the file, secrets, passphrases, the daemon's own section."""

from __future__ import annotations

import contextlib
import datetime
import os
from pathlib import Path
from typing import cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernel_shim.algorithms import EncryptionId, EspAlgorithm
from kernel_shim.dataplane.engine import Engine, EngineConfig
from kernel_shim.dataplane.output import Sink
from kernel_shim.model import Capabilities, Mode, Unresolved
from vpnd.config import ConfigErrors, load, load_text
from vpnd.config.capabilities import EXPECTED, beyond
from vpnd.config.credentials import MAX_CREDENTIAL, certificate_der, is_authority, load_private_key, validate_certificate, validate_key, validate_shared
from vpnd.config.model import DaemonConfig, KernelChoice, LogFormat, SharedSecret
from vpnd.config.tree import Section
from vpnd.ike.identity import Identity

PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8
PLAIN = serialization.NoEncryption()
EC_KEY = ec.generate_private_key(ec.SECP256R1())
EC_PEM = EC_KEY.private_bytes(PEM, PKCS8, PLAIN)


def certificate(name: str, *, authority: bool = False) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(EC_KEY.public_key())
        .serial_number(1)
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .sign(EC_KEY, hashes.SHA256())
    )


MOON = certificate("moon")
ROOT = certificate("root", authority=True)


def der(of: x509.Certificate) -> bytes:
    return of.public_bytes(serialization.Encoding.DER)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, files in {
        "x509": {"moon.pem": MOON.public_bytes(PEM)},
        "x509ca": {"root.der": der(ROOT)},
        "private": {"moon.pem": EC_PEM},
    }.items():
        (tmp_path / name).mkdir()
        for file, data in files.items():
            (tmp_path / name / file).write_bytes(data)
    return tmp_path


def complaints(text: str, directory: Path) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load_text(text, directory, "f")
    return [str(error) for error in caught.value.errors]


def test_credentials_beside_the_file_are_loaded(directory: Path) -> None:
    (directory / "swanctl.conf").write_text(
        """connections { gw {
          local { certs = moon.pem }
          remote { cacerts = root.der }
        } }
        secrets { ike-a { secret = "a b"
                          id-1 = moon
                          id-2 = %any }
                  ike-b { secret = 0x00FF }
                  ppk-c { secret = 0sAAEC
                          id = ppk.example } }"""
    )
    loaded = load(directory / "swanctl.conf")
    configuration = loaded.configuration
    assert configuration.certificates == (der(MOON),)
    assert configuration.authorities == (der(ROOT),)
    assert [key.data for key in configuration.private_keys] == [EC_PEM]
    assert configuration.connections["gw"].local[0].certs == (der(MOON),)
    assert configuration.connections["gw"].remote[0].cacerts == (der(ROOT),)
    assert configuration.shared["ike-a"].data == b"a b"
    assert [str(owner) for owner in configuration.shared["ike-a"].owners] == []  # %any among them: for all
    assert configuration.shared["ike-b"].data == b"\x00\xff"
    assert configuration.shared["ppk-c"] == SharedSecret("ppk-c", b"\0\1\2", (Identity.parse("ppk.example"),), ppk=True)
    assert not configuration.shared["ike-b"].ppk


def test_a_certificate_by_absolute_path_and_inline(directory: Path, tmp_path: Path) -> None:
    path = directory / "x509" / "moon.pem"
    text = f"connections {{ gw {{ local {{ certs = {path}, 0x{der(MOON).hex()} }}\n remote {{ cacert1 {{ file = {directory / 'x509ca' / 'root.der'} }} }} }} }}"
    connection = load_text(text, directory).configuration.connections["gw"]
    assert connection.local[0].certs == (der(MOON), der(MOON))
    assert connection.remote[0].cacerts == (der(ROOT),)


def test_what_is_wrong_with_credentials(directory: Path) -> None:
    (directory / "x509" / "bad.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n")
    (directory / "x509ca" / "leaf.pem").write_bytes(MOON.public_bytes(PEM))
    (directory / "private" / "bad.pem").write_bytes(b"garbage")
    (directory / "rsa").mkdir()
    (directory / "rsa" / "ec.pem").write_bytes(EC_PEM)
    (directory / "x509crl").mkdir()
    (directory / "x509crl" / "a.crl").write_bytes(b"x")
    found = complaints("connections { gw { local { certs = none.pem } } }", directory)
    assert found[0].startswith("f:1:36: connections.gw.local.certs: cannot read ")
    assert any("bad.pem: not an X.509 certificate" in text for text in found)
    assert any("leaf.pem: the CA certificate lacks the CA basic constraint" in text for text in found)
    assert any("private/bad.pem: not a private key" in text for text in found)
    assert any("ec.pem: the key is of another type" in text for text in found)
    assert any("a.crl: credentials in x509crl/ are not implemented yet" in text for text in found)
    assert len(found) == 6


@pytest.mark.parametrize("key", [EC_KEY, rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate()])
def test_an_encrypted_key_needs_its_passphrase(directory: Path, key: ec.EllipticCurvePrivateKey) -> None:
    encrypted = key.private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"open sesame"))
    (directory / "private" / "moon.pem").write_bytes(encrypted)
    secrets = "secrets {{ private-moon {{ file = moon.pem\n secret = {} }} }}"
    (loaded,) = load_text(secrets.format('"open sesame"'), directory).configuration.private_keys
    assert load_private_key(loaded.data).private_bytes(PEM, PKCS8, PLAIN) == key.private_bytes(PEM, PKCS8, PLAIN)
    (wrong,) = complaints(secrets.format("wrong"), directory)
    assert wrong.endswith("moon.pem: no configured passphrase opens the private key")
    (none,) = complaints("", directory)
    assert none.endswith("moon.pem: the private key is encrypted and no passphrase for it is configured")


@pytest.mark.parametrize(
    ("secrets", "message"),
    [
        ("ike { }", "f:1:11: secrets.ike: the option 'secret' is missing"),
        ("ike { secret = }", "f:1:11: secrets.ike: the option 'secret' is missing"),
        ('ike { secret = "" }', "f:1:26: secrets.ike.secret: the secret is empty"),
        ("ike { secret = 0xhidden }", "f:1:26: secrets.ike.secret: hex digits were expected after '0x'"),
        ("ike { secret = 0s.hidden }", "f:1:26: secrets.ike.secret: base64 was expected after '0s'"),
        ("ike { secrett = x }", "f:1:17: secrets.ike.secrett: unknown option 'secrett', did you mean 'secret'?"),
        ("eap-a { secret = x }", "f:1:11: secrets.eap-a: secrets of type 'eap' are not implemented yet"),
        ("ikea = x", "f:1:11: secrets.ikea: a section was expected"),
        ("xyz { secret = x }", "f:1:11: secrets.xyz: a section of secrets begins with its kind, such as 'ike'"),
        ("private { secret = x }", "f:1:11: secrets.private: the option 'file' is missing"),
        ("private { file = none.pem\n secret = x }", "f:1:28: secrets: there is no file 'none.pem' in private/"),
    ],
)
def test_what_is_wrong_with_secrets(tmp_path: Path, secrets: str, message: str) -> None:
    found = complaints(f"secrets {{ {secrets}\n }}", tmp_path)
    assert message in found
    assert not any("hidden" in text for text in found)


def test_secrets_are_in_no_repr(tmp_path: Path) -> None:
    loaded = load_text("secrets { ike { secret = open-sesame } }", tmp_path)
    assert "sesame" not in repr(loaded)
    assert "sesame" not in repr(loaded.tree)


def test_top_level_sections(tmp_path: Path) -> None:
    assert complaints("conections {}\nx = y", tmp_path) == [
        "f:1:1: conections: unknown section 'conections', did you mean 'connections'?",
        "f:2:1: x: unknown option 'x'",
    ]
    assert load_text("templates { a {} }\nconnections { b : templates.a {} }", tmp_path).warnings == ()
    assert load_text("unused {}", tmp_path, "f").warnings == ("f:1:1: unused: nothing refers to this section",)
    assert complaints("pools { p { addrs = 10.0.0.0/8 } }", tmp_path) == ["f:1:9: pools.p: pools are not implemented yet"]
    load_text("pools {}\nauthorities {}", tmp_path)


# The daemon's own section


def test_daemon_defaults(tmp_path: Path) -> None:
    assert load_text("", tmp_path).daemon == DaemonConfig()


def test_a_whole_daemon_section(tmp_path: Path) -> None:
    daemon = load_text(
        """vpnd {
          kernel = userspace
          shim_socket = /run/a/shim.sock
          start_shim = no
          control_socket = /run/a/vici.sock
          control_mode = 0600
          control_owner = root
          control_group = 12
          listen = 192.0.2.1, 2001:db8::1
          log_level = debug
          log_format = json
          cookie_threshold = 0
          half_open_limit = 50
          half_open_timeout = 10s
          keep_alive = 0
          retransmit_timeout = 0.5
          retransmit_base = 1
          retransmit_tries = 3
          retransmit_limit = 20
        }""",
        tmp_path,
    ).daemon
    assert (daemon.kernel, daemon.start_shim, str(daemon.control_socket), daemon.control_mode) == (KernelChoice.USERSPACE, False, "/run/a/vici.sock", 0o600)
    assert (daemon.control_owner, daemon.control_group, [str(address) for address in daemon.listen]) == ("root", "12", ["192.0.2.1", "2001:db8::1"])
    assert (daemon.log_level, daemon.log_format, daemon.cookie_threshold, daemon.half_open_limit) == ("debug", LogFormat.JSON, 0, 50)
    assert (daemon.half_open_timeout, daemon.keep_alive) == (10, 0)
    assert (daemon.retransmit_timeout, daemon.retransmit_base, daemon.retransmit_tries, daemon.retransmit_limit) == (0.5, 1, 3, 20)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("kernel = linux", "kernel: 'linux' is not one of userspace, xfrm, pfkey, auto"),
        ("kernell = xfrm", "kernell: unknown option 'kernell', did you mean 'kernel'?"),
        ("control_socket = vici.sock", "control_socket: 'vici.sock' is not an absolute path of at most 107 bytes"),
        ("control_mode = 0999", "control_mode: '0999' is not a file mode, such as 0660"),
        ("control_group = a b", "control_group: 'a b' is neither a user's or group's name nor a number"),
        ("listen = ::", "listen: '::' is not the address of a host"),
        ("listen = eth0", "listen: 'eth0' is not an address"),
        ("retransmit_base = 0.5", "retransmit_base: 0.5 is not within 1 to 10"),
        ("retransmit_timeout = 4s", "retransmit_timeout: '4s' is not a number"),
        ("half_open_timeout = 0", "half_open_timeout: a time above 0 was expected"),
        ("metrics_listen = 127.0.0.1", "metrics_listen: the option 'metrics_listen' (127.0.0.1) is not implemented yet"),
    ],
)
def test_what_is_wrong_with_the_daemon_section(tmp_path: Path, option: str, message: str) -> None:
    (found,) = complaints(f"vpnd {{\n {option}\n}}", tmp_path)
    assert found.split(": ", 1)[1] == f"vpnd.{message}"


# Capabilities


def test_what_a_kernel_cannot_do_is_named_with_its_place(tmp_path: Path) -> None:
    text = """connections { gw { children {
      net {
        esp_proposals = aes128gcm16, aes128ccm16
        mode = transport
        remote_ts = 10.0.0.1-10.0.0.6[tcp/80-90]
        replay_window = 64
        unresolved = block
      }
      bypass { mode = pass }
    } } }"""
    loaded = load_text(text, tmp_path, "f")
    weak = Capabilities(
        "weak",
        frozenset({EspAlgorithm(EncryptionId.AES_GCM_16, 128)}),
        modes=frozenset({Mode.TUNNEL}),
        maximum_replay_window=32,
        port_ranges=False,
        address_ranges=False,
        unresolved_modes=frozenset({Unresolved.QUEUE}),
    )
    path = "connections.gw.children.net"
    found = [str(error) for error in beyond(loaded.configuration, weak, loaded.tree)]
    assert f"f:4:16: {path}.mode: the kernel 'weak' has no transport mode" in found
    assert f"f:6:25: {path}.replay_window: the kernel 'weak' has replay windows of at most 32" in found
    assert f"f:7:22: {path}.unresolved: the kernel 'weak' does not know 'block' for packets without an SA" in found
    assert f"f:5:21: {path}.remote_ts: the kernel 'weak' has no port ranges in its policies" in found
    assert f"f:5:21: {path}.remote_ts: the kernel 'weak' has no address ranges in its policies, only prefixes" in found
    assert any(text.startswith(f"f:3:25: {path}.esp_proposals: the kernel 'weak' can do nothing of the proposal AES_CCM_16") for text in found)
    assert len(found) == 6


def test_the_default_proposals_are_within_the_userspace_kernel(tmp_path: Path) -> None:
    loaded = load_text("connections { gw { children { net { unresolved = block\n replay_window = 4096 } } } }", tmp_path)
    assert beyond(loaded.configuration, EXPECTED[KernelChoice.USERSPACE], loaded.tree) == []


def test_what_check_measures_against_is_what_the_userspace_kernel_says() -> None:
    assert EXPECTED[KernelChoice.USERSPACE] == Engine(EngineConfig(plain_esp=True), os.urandom, cast(Sink, None)).capabilities()


# Messages of the control socket


def test_messages_with_credentials() -> None:
    assert validate_certificate(Section.of({"type": "X509", "flag": "NONE", "data": MOON.public_bytes(PEM)})) == (der(MOON), False)
    assert validate_certificate(Section.of({"type": "x509ca", "data": der(ROOT)})) == (der(ROOT), True)
    assert validate_certificate(Section.of({"type": "X509", "data": der(ROOT)})) == (der(ROOT), True)
    assert validate_key(Section.of({"type": "ECDSA", "data": EC_PEM})).data == EC_PEM
    assert validate_shared(Section.of({"type": "ike", "data": "x", "owners": ["moon"]})).name == "~moon"
    for validate, message, why in (
        (validate_certificate, {"type": "X509", "flag": "CA", "data": der(MOON)}, "lacks the CA basic constraint"),
        (validate_certificate, {"type": "X509_CRL", "data": b"x"}, "'x509_crl' are not implemented yet"),
        (validate_certificate, {"type": "X509"}, "data is missing"),
        (validate_certificate, {"data": der(MOON)}, "type is missing"),
        (validate_key, {"type": "any", "data": b"x"}, "not a private key"),
        (validate_key, {"type": "bliss", "data": EC_PEM}, "'bliss' are not implemented yet"),
        (validate_key, {"type": "rsa", "data": EC_PEM}, "of another type"),
        (validate_shared, {"type": "ike"}, "secret is missing"),
        (validate_shared, {"data": "x"}, "type is missing"),
        (validate_shared, {"type": "ike", "data": "x", "ownrs": ["a"]}, "unknown option 'ownrs', did you mean 'owners'"),
    ):
        with pytest.raises(ConfigErrors, match=why):
            validate(Section.of(message))  # type: ignore[operator]


def test_credential_files_have_a_bound(tmp_path: Path) -> None:
    (tmp_path / "x509").mkdir()
    (tmp_path / "x509" / "long.pem").write_bytes(b"x" * (MAX_CREDENTIAL + 1))
    (found,) = complaints("", tmp_path)
    assert found.endswith(f"long.pem is longer than {MAX_CREDENTIAL} bytes")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_directory_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir(mode=0)
    (found,) = complaints("", tmp_path)
    assert "cannot read" in found


@pytest.mark.property
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.text(st.sampled_from('abcdikevpnsr{}=:,"\\ \n#'), max_size=80), st.sampled_from(["", "vpnd {", "secrets {", "connections { a {", "pools {"]))
def test_no_file_raises_anything_else(tmp_path: Path, text: str, before: str) -> None:
    with contextlib.suppress(ConfigErrors):
        load_text(before + text + "}" * before.count("{"), tmp_path)


@pytest.mark.property
@settings(max_examples=150)
@given(st.binary(max_size=60), st.integers(0, 400))
def test_no_bytes_as_credentials_raise_anything_else(data: bytes, at: int) -> None:
    for whole in (der(ROOT), EC_PEM, b""):
        damaged = whole[:at] + data + whole[at + len(data) :]
        with contextlib.suppress(ValueError):
            is_authority(certificate_der(damaged))
        with contextlib.suppress(ValueError):
            load_private_key(damaged)
