"""Message trees to the typed model: the one validator for files and for the control socket.

Every function raises ConfigErrors with all complaints; none changes or keeps its message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Final

from kernel_shim.model import Action, Mode, Unresolved
from vpnd.auth.signature import SignaturePolicy
from vpnd.config import options
from vpnd.config.addresses import parse_ike_address, parse_remote_address, parse_traffic_selector
from vpnd.config.credentials import certificate_der, read_credential_file
from vpnd.config.errors import ConfigError, ConfigErrors
from vpnd.config.model import AuthMethod, AuthRound, ChildConfig, ConnectionConfig, StartAction, TsTemplate
from vpnd.config.reader import Reader, integer, shown
from vpnd.config.tree import Section
from vpnd.ike.iana import ProtocolId
from vpnd.ike.identity import Identity
from vpnd.ike.proposal import Proposal, default_proposals, number_proposals, parse_proposals

MAX_NAME: Final = 200  # bytes: a name, a hyphen and an id fit a VICI name of 255
MAX_CHILDREN: Final = 10_000  # of one connection
MAX_SELECTORS: Final = 255  # of one side: their number is one octet on the wire (RFC 7296 section 3.13)
MAX_REPLAY_WINDOW: Final = 4096
DEFAULT_CHILD_REKEY: Final = 3600.0
DEFAULT_IKE_REKEY: Final = 14400.0

_MODES: Final = {"tunnel": Mode.TUNNEL, "transport": Mode.TRANSPORT, "pass": Mode.TUNNEL, "drop": Mode.TUNNEL}
_ACTIONS: Final = {"pass": Action.BYPASS, "drop": Action.DISCARD}
_FOREIGN_MODES: Final = ("beet", "iptfs", "transport_proxy")
_START_ACTIONS: Final = {"none": StartAction.NONE, "trap": StartAction.TRAP, "route": StartAction.TRAP, "start": StartAction.START}
_DPD_ACTIONS: Final = {
    "clear": StartAction.NONE,
    "none": StartAction.NONE,
    "trap": StartAction.TRAP,
    "hold": StartAction.TRAP,
    "route": StartAction.TRAP,
    "restart": StartAction.START,
    "start": StartAction.START,
}
_UNRESOLVED: Final = {mode.value: mode for mode in Unresolved}


def validate_connection(message: Section) -> ConnectionConfig:
    """The message of `load-conn`: one section, named like the connection."""
    errors: list[ConfigError] = []
    entries = list(message.entries.items())
    name, section = entries[0] if len(entries) == 1 else ("", None)
    if not isinstance(section, Section):
        raise ConfigErrors([ConfigError("exactly one section with a connection was expected", path="connections", position=message.position)])
    reader = Reader(section, f"connections.{shown(name)}", errors)
    _check_name(reader, name)
    connection = _connection(reader, name)
    if errors:
        raise ConfigErrors(errors)
    return connection


def _connection(reader: Reader, name: str) -> ConnectionConfig:
    reader.convert("version", 0, _version)
    rekey = reader.seconds("rekey_time", None)
    rekey = DEFAULT_IKE_REKEY if rekey is None else rekey
    over = reader.seconds("over_time", None)
    over = float(int(rekey / 10)) if over is None else over
    rand = reader.seconds("rand_time", None)
    reader.not_implemented(options.CONNECTION)
    local = _auth_rounds(reader, "local")
    remote = _auth_rounds(reader, "remote")
    connection = ConnectionConfig(
        name=name,
        proposals=_proposals(reader, "proposals", ProtocolId.IKE),
        local=local,
        remote=remote,
        children=_children(reader),
        local_addrs=reader.convert_all("local_addrs", parse_ike_address) or ("%any",),
        remote_addrs=reader.convert_all("remote_addrs", parse_remote_address) or ("%any",),
        local_port=reader.convert("local_port", 500, _local_port),
        remote_port=reader.integer("remote_port", 500, minimum=1, maximum=65535),
        encap=reader.boolean("encap", False),
        dpd_delay=reader.seconds("dpd_delay", 0.0) or 0.0,
        dpd_timeout=reader.seconds("dpd_timeout", 0.0) or 0.0,
        keyingtries=reader.integer("keyingtries", 1),
        rekey_time=rekey,
        over_time=over,
        rand_time=over if rand is None else rand,
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
        if child.action is Action.PROTECT and child.start_action is not StartAction.NONE and isinstance(node, Section):
            below = Reader(node, f"{reader.path}.children.{shown(child.name)}", reader.errors)
            below.complain("remote_addrs of the connection names no peer to ask: an address or a host name is needed", "start_action")


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


def _check_name(reader: Reader, name: str) -> None:
    if not name or len(name.encode()) > MAX_NAME or not name.isprintable():
        reader.complain(f"a name has 1 to {MAX_NAME} printable characters", node=reader.section, at_key=True)


def _version(text: str) -> int:
    version = integer(text, 0, 2)
    if version == 1:
        raise ValueError("IKEv1 is not implemented; 0 and 2 are IKEv2")
    return version


def _local_port(text: str) -> int:
    port = integer(text, 0, 65535)
    if port not in (500, 4500):
        raise ValueError(f"a local port other than 500 and 4500 ({port}) is not implemented yet")
    return port


def _proposals(reader: Reader, option: str, protocol: ProtocolId) -> tuple[Proposal, ...]:
    def parse(text: str) -> Sequence[Proposal]:
        return default_proposals(protocol) if text.lower() == "default" else parse_proposals(protocol, text)

    given = option in reader.section.entries
    proposals = [proposal for several in reader.convert_all(option, parse) for proposal in several]
    if not proposals and not given:
        proposals += default_proposals(protocol)
    elif given and not reader.items(option):
        reader.complain("no proposal is given", option)
    return number_proposals(tuple(dict.fromkeys(proposals)))


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


# Children


def _children(reader: Reader) -> dict[str, ChildConfig]:
    section = reader.children("children")
    if section is None:
        return {}
    path = f"{reader.path}.children"
    children: dict[str, ChildConfig] = {}
    for name, node in section.entries.items():
        if not isinstance(node, Section):
            reader.errors.append(ConfigError(f"unknown option '{shown(name)}'", path=path, position=node.key_position))
            continue
        below = Reader(node, f"{path}.{shown(name)}", reader.errors)
        _check_name(below, name)
        children[name] = _child(below, name)
    if len(children) > MAX_CHILDREN:
        reader.complain(f"more than {MAX_CHILDREN} children", "children", at_key=True)
    return children


def _child(reader: Reader, name: str) -> ChildConfig:
    mode = reader.convert("mode", "tunnel", _mode)
    action = _ACTIONS.get(mode, Action.PROTECT)
    start = reader.convert("start_action", StartAction.NONE, lambda text: _start_action(text, _START_ACTIONS))
    if action is not Action.PROTECT and start is StartAction.START:
        reader.complain(f"a child of mode {mode} cannot be started, only trapped", "start_action")
    rekey_time, life_time, rand_time = _lifetime(reader, "time", lambda option: reader.seconds(option, None), DEFAULT_CHILD_REKEY)
    rekey_bytes, life_bytes, rand_bytes = _lifetime(reader, "bytes", lambda option: reader.octets(option, None), 0)
    rekey_packets, life_packets, rand_packets = _lifetime(reader, "packets", lambda option: reader.convert(option, None, _packets), 0)
    reader.not_implemented(options.CHILD)
    child = ChildConfig(
        name=name,
        esp_proposals=_proposals(reader, "esp_proposals", ProtocolId.ESP),
        local_ts=_selectors(reader, "local_ts"),
        remote_ts=_selectors(reader, "remote_ts"),
        mode=_MODES[mode],
        start_action=start,
        dpd_action=reader.convert("dpd_action", StartAction.NONE, lambda text: _start_action(text, _DPD_ACTIONS)),
        action=action,
        rekey_time=float(rekey_time),
        life_time=float(life_time),
        rand_time=float(rand_time),
        rekey_bytes=int(rekey_bytes),
        life_bytes=int(life_bytes),
        rand_bytes=int(rand_bytes),
        rekey_packets=int(rekey_packets),
        life_packets=int(life_packets),
        rand_packets=int(rand_packets),
        replay_window=reader.integer("replay_window", 32, maximum=MAX_REPLAY_WINDOW),
        priority=reader.integer("priority", 0),
        reqid=reader.integer("reqid", 0),
        unresolved=reader.choice("unresolved", Unresolved.QUEUE, _UNRESOLVED),
    )
    _check_families(reader, child)
    reader.finish(list(options.CHILD))
    return child


def _packets(text: str) -> int:
    return integer(text, 0, 2**64 - 1)


def _mode(text: str) -> str:
    mode = text.lower()
    if mode in _FOREIGN_MODES:
        raise ValueError(f"the mode '{mode}' is not implemented yet")
    if mode not in _MODES:
        raise ValueError(f"'{shown(text)}' is not one of {', '.join(_MODES)}")
    return mode


def _start_action(text: str, actions: dict[str, StartAction]) -> StartAction:
    action = text.lower()
    if "|" in action or "," in action:
        raise ValueError(f"the combination '{shown(text)}' is not implemented yet")
    if action not in actions:
        raise ValueError(f"'{shown(text)}' is not one of {', '.join(actions)}")
    return actions[action]


def _lifetime(reader: Reader, unit: str, read: Callable[[str], float | None], default: float) -> tuple[float, float, float]:
    """Soft and hard lifetime and the random part: each missing one follows from the others, as swanctl.conf(5) says."""
    rekey, life, rand = read(f"rekey_{unit}"), read(f"life_{unit}"), read(f"rand_{unit}")
    if rekey is None:
        rekey = default if life is None else int(life) * 10 // 11
    if life is None:
        life = int(rekey) * 11 // 10
    if rand is None:
        rand = life - min(life, rekey)
    if life and life < rekey:
        reader.complain(f"life_{unit} is less than rekey_{unit}: the SA would go before its successor comes", f"life_{unit}")
    return rekey, life, rand


def _selectors(reader: Reader, option: str) -> tuple[TsTemplate, ...]:
    selectors = reader.convert_all(option, parse_traffic_selector)
    if len(selectors) > MAX_SELECTORS:
        reader.complain(f"more than {MAX_SELECTORS} traffic selectors", option)
    return tuple(dict.fromkeys(selectors)) or (TsTemplate(None),)


def _check_families(reader: Reader, child: ChildConfig) -> None:
    """Both sides must share an address family and a protocol, or no packet could ever match."""
    for local in child.local_ts:
        for remote in child.remote_ts:
            families = [side.addresses.addresses.version for side in (local, remote) if side.addresses]
            if len(set(families)) < 2 and (local.protocol == remote.protocol or 0 in (local.protocol, remote.protocol)):
                return
    reader.complain("local_ts and remote_ts share no address family and protocol", "remote_ts" if "remote_ts" in reader.section.entries else "local_ts")
