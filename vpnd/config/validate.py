"""Message trees to the typed model: the one validator for files and for the control socket.

Every function raises ConfigErrors with all complaints; none changes or keeps its message.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Final

from kernel_shim.model import Action
from vpnd.auth.signature import SignaturePolicy
from vpnd.config import options
from vpnd.config.addresses import parse_ike_address, parse_remote_address
from vpnd.config.children import check_name, read_children, read_if_ids, read_proposals
from vpnd.config.credentials import certificate_der, read_credential_file
from vpnd.config.errors import ConfigError, ConfigErrors
from vpnd.config.lifetimes import ike_lifetime
from vpnd.config.model import AuthMethod, AuthRound, Childless, ConnectionConfig, Fragmentation, RedirectIn, UniquePolicy
from vpnd.config.reader import Reader, boolean, integer, shown
from vpnd.config.tree import Section
from vpnd.ike.gateway_id import GatewayId
from vpnd.ike.iana import ProtocolId
from vpnd.ike.identity import Identity

_FRAGMENTATION: Final = {
    **{mode.value: mode for mode in Fragmentation},
    **dict.fromkeys(("true", "enabled", "1"), Fragmentation.YES),
    **dict.fromkeys(("false", "disabled", "0"), Fragmentation.NO),
}


def validate_connection(message: Section) -> ConnectionConfig:
    """The message of `load-conn`: one section, named like the connection."""
    errors: list[ConfigError] = []
    entries = list(message.entries.items())
    name, section = entries[0] if len(entries) == 1 else ("", None)
    if not isinstance(section, Section):
        raise ConfigErrors([ConfigError("exactly one section with a connection was expected", path="connections", position=message.position)])
    reader = Reader(section, f"connections.{shown(name)}", errors)
    check_name(reader, name)
    connection = _connection(reader, name)
    if errors:
        raise ConfigErrors(errors)
    return connection


def _connection(reader: Reader, name: str) -> ConnectionConfig:
    reader.convert("version", 0, _version)
    lifetime = ike_lifetime(reader)
    if_ids = read_if_ids(reader)
    reader.not_implemented(options.CONNECTION)
    local = _auth_rounds(reader, "local")
    remote = _auth_rounds(reader, "remote")
    connection = ConnectionConfig(
        name=name,
        proposals=read_proposals(reader, "proposals", ProtocolId.IKE),
        local=local,
        remote=remote,
        children=read_children(reader, if_ids),
        local_addrs=reader.convert_all("local_addrs", parse_ike_address) or ("%any",),
        remote_addrs=reader.convert_all("remote_addrs", parse_remote_address) or ("%any",),
        local_port=reader.convert("local_port", 500, _local_port),
        remote_port=reader.integer("remote_port", 500, minimum=1, maximum=65535),
        encap=reader.convert("encap", None, _encapsulation),
        dpd_delay=reader.seconds("dpd_delay", 0.0) or 0.0,
        dpd_timeout=reader.seconds("dpd_timeout", 0.0) or 0.0,
        keyingtries=reader.integer("keyingtries", 1),
        unique=reader.choice("unique", UniquePolicy.NO, {policy.value: policy for policy in UniquePolicy}),
        rekey_time=lifetime.rekey,
        reauth_time=lifetime.reauth,
        over_time=lifetime.over,
        rand_time=lifetime.rand,
        fragmentation=reader.choice("fragmentation", Fragmentation.YES, _FRAGMENTATION),
        redirect=reader.convert("redirect", None, GatewayId.parse),
        redirect_in=reader.choice("redirect_in", RedirectIn.AUTH, {when.value: when for when in RedirectIn}),
        mobike=reader.boolean("mobike", True),
        follow_nat=reader.boolean("follow_nat", True),
        childless=reader.choice("childless", Childless.ALLOW, {policy.value: policy for policy in Childless}),
        resumption=reader.boolean("resumption", False),
        ppk_id=reader.convert("ppk_id", None, _ppk_id),
        ppk_required=reader.boolean("ppk_required", False),
        send_cert=reader.choice("send_cert", "ifasked", {value: value for value in ("ifasked", "always", "never")}),
        send_certreq=reader.boolean("send_certreq", True),
    )
    reader.finish([*options.CONNECTION, "local", "remote", "children"])
    _check_peer(reader, connection)
    return connection


def _check_peer(reader: Reader, connection: ConnectionConfig) -> None:
    """Who is to be asked for an SA needs an address or a name."""
    section = reader.section.entries.get("children")
    if not isinstance(section, Section) or any(map(_is_one_peer, connection.remote_addrs)):
        return
    for child in connection.children.values():
        node = section.entries[child.name]
        if child.action is Action.PROTECT and child.start_action and isinstance(node, Section):
            below = Reader(node, f"{reader.path}.children.{shown(child.name)}", reader.errors)
            below.complain("remote_addrs of the connection names no peer to ask: an address or a host name is needed", "start_action")


def _ppk_id(text: str) -> Identity | None:
    identity = _identity(text)
    return None if identity.any else identity


def _is_one_peer(pattern: str) -> bool:
    try:
        return not ip_address(pattern).is_unspecified
    except ValueError:
        pass
    try:
        parse_ike_address(pattern)
    except ValueError:
        return True  # a host name
    return False


def _version(text: str) -> int:
    version = integer(text, 0, 2)
    if version == 1:
        raise ValueError("IKEv1 is not implemented; 0 and 2 are IKEv2")
    return version


def _encapsulation(text: str) -> bool | None:
    try:
        return None if text.lower() == "auto" else boolean(text)
    except ValueError:
        raise ValueError(f"'{shown(text)}' is none of yes, no and auto") from None


def _local_port(text: str) -> int:
    port = integer(text, 0, 65535)
    if port not in (500, 4500):
        raise ValueError(f"a local port other than 500 and 4500 ({port}) is not implemented yet")
    return port


# Authentication


def _auth_rounds(reader: Reader, side: str) -> tuple[AuthRound, ...]:
    rounds = []
    for name, section in reader.section.sections():
        if name.lower().startswith(side):
            reader.mark_read(name)
            rounds.append(_auth_round(Reader(section, f"{reader.path}.{shown(name)}", reader.errors), side))
            if len(rounds) == 2:
                reader.complain(f"a second {side} authentication round is not implemented yet", name, at_key=True)
    return tuple(rounds[:1]) or (AuthRound(),)


def _auth_round(reader: Reader, side: str) -> AuthRound:
    default: tuple[AuthMethod, tuple[str, ...]] = (AuthMethod.PUBKEY, ())
    method, schemes = reader.convert("auth", default, _auth)
    identity = reader.convert("id", None, _identity)
    if side == "local" and identity is not None and "*" in (reader.section.text("id") or ""):
        reader.complain("our own identity cannot have a wildcard", "id")
    reader.integer("round", 0, maximum=255)  # their order, of one
    certs = [*_certificates(reader, "certs"), *_certificate_sections(reader, "cert")]
    cacerts = [*_certificates(reader, "cacerts"), *_certificate_sections(reader, "cacert")] if side == "remote" else []
    tables = options.LOCAL if side == "local" else options.REMOTE
    reader.not_implemented(tables)
    reader.finish([*tables, "cert", *(["cacert", "cacerts"] if side == "remote" else [])])
    return AuthRound(
        auth=method,
        id=None if identity is None or identity.any else identity,
        certs=tuple(certs),
        cacerts=tuple(cacerts),
        signature_schemes=schemes,
    )


def _auth(text: str) -> tuple[AuthMethod, tuple[str, ...]]:
    lowered = text.lower()
    if lowered == "psk":
        return AuthMethod.PSK, ()
    if lowered == "pubkey":
        return AuthMethod.PUBKEY, ()
    if lowered.startswith(("eap", "xauth")):
        raise ValueError(f"authentication by '{shown(text)}' is not implemented yet")
    if lowered.startswith(("ike:", "pubkey", "rsa", "ecdsa", "ed25519")):
        SignaturePolicy.of((lowered,))
        return AuthMethod.PUBKEY, (lowered,)
    raise ValueError(f"'{shown(text)}' is not an authentication method, such as psk or pubkey")


def _identity(text: str) -> Identity:
    if not text.isprintable():
        raise ValueError("an identity with characters that cannot be printed")
    return Identity.parse(text)


def _certificates(reader: Reader, option: str) -> list[bytes]:
    found = []
    for item in reader.items(option):
        try:
            found.append(certificate_der(item.value))
        except ValueError as error:
            reader.complain(str(error), option, item)
    return found


def _certificate_sections(reader: Reader, prefix: str) -> list[bytes]:
    """`cert<suffix> { file = /absolute/path }`."""
    found = []
    for name, section in reader.section.sections():
        if not name.lower().startswith(prefix) or name in ("certs", "cacerts"):
            continue
        reader.mark_read(name)
        below = Reader(section, f"{reader.path}.{shown(name)}", reader.errors)
        below.not_implemented(options.CERTIFICATE)
        der = below.convert("file", None, lambda path: certificate_der(read_credential_file(path)))
        if "file" not in section.entries:
            below.complain("the option 'file' is missing")
        if der is not None:
            found.append(der)
        below.finish()
    return found
