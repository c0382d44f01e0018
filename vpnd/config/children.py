"""The `children` of a connection, and what both sections share: names and proposals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

from kernel_shim.model import NO_MARK, TFC_TO_MTU, Action, HeaderCopies, Mark, Mode, Unresolved
from vpnd.config import options
from vpnd.config.addresses import parse_traffic_selector
from vpnd.config.errors import ConfigError
from vpnd.config.lifetimes import child_lifetimes
from vpnd.config.model import ALL_BITS, ChildConfig, SameMark, StartAction, TsTemplate, Unique, UniqueMark
from vpnd.config.reader import Reader, integer, shown
from vpnd.config.tree import Section
from vpnd.ike.iana import ProtocolId
from vpnd.ike.proposal import Proposal, default_proposals, number_proposals, parse_proposals

MAX_NAME: Final = 200  # bytes: a name, a hyphen and an id fit a VICI name of 255
MAX_CHILDREN: Final = 10_000  # of one connection
MAX_SELECTORS: Final = 255  # of one side: their number is one octet on the wire (RFC 7296 section 3.13)
MAX_SHARED: Final = 1024  # different lists of proposals that are remembered
SMALLEST_REPLAY_WINDOW: Final = 32
MAX_REPLAY_WINDOW: Final = 4096
MAX_INTERFACE_NAME: Final = 15  # octets; IFNAMSIZ less one

_MODES: Final = {"tunnel": Mode.TUNNEL, "transport": Mode.TRANSPORT, "pass": Mode.TUNNEL, "drop": Mode.TUNNEL}
_ACTIONS: Final = {"pass": Action.BYPASS, "drop": Action.DISCARD}
_FOREIGN_MODES: Final = ("beet", "iptfs", "transport_proxy")
_START_ACTIONS: Final = {"none": StartAction.NONE, "trap": StartAction.TRAP, "route": StartAction.TRAP, "start": StartAction.START}
_END_ACTIONS: Final = {**_START_ACTIONS, "clear": StartAction.NONE, "hold": StartAction.TRAP, "restart": StartAction.START}
"""What `dpd_action` and `close_action` may say, old names included."""
_NO_SELECTING_MARK: Final[Mark | UniqueMark] = NO_MARK
_NO_SETTING_MARK: Final[Mark | SameMark] = NO_MARK
_UNIQUE: Final = {"%unique": False, "%unique-dir": True}  # whether each direction has its own
_UNRESOLVED: Final = {mode.value: mode for mode in Unresolved}


def check_name(reader: Reader, name: str) -> None:
    if not name or len(name.encode()) > MAX_NAME or not name.isprintable():
        reader.complain(f"a name has 1 to {MAX_NAME} printable characters", node=reader.section, at_key=True)


def read_proposals(reader: Reader, option: str, protocol: ProtocolId) -> tuple[Proposal, ...]:
    def parse(text: str) -> Sequence[Proposal]:
        return default_proposals(protocol) if text.lower() == "default" else parse_proposals(protocol, text)

    given = option in reader.section.entries
    proposals = [proposal for several in reader.convert_all(option, parse) for proposal in several]
    if not proposals and not given:
        proposals += default_proposals(protocol)
    elif given and not reader.items(option):
        reader.complain("no proposal is given", option)
    return _shared(number_proposals(tuple(dict.fromkeys(proposals))))


@lru_cache(maxsize=MAX_SHARED)
def _shared(proposals: tuple[Proposal, ...]) -> tuple[Proposal, ...]:
    """One object for all that are equal: thousands of connections have the same, and are then compared with an offer once."""
    return proposals


def read_children(reader: Reader, if_ids: tuple[int | Unique, int | Unique]) -> dict[str, ChildConfig]:
    """`if_ids`: those of the connection, in and out, for children without."""
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
        check_name(below, name)
        children[name] = _child(below, name, if_ids)
    if len(children) > MAX_CHILDREN:
        reader.complain(f"more than {MAX_CHILDREN} children", "children", at_key=True)
    return children


def _child(reader: Reader, name: str, if_ids: tuple[int | Unique, int | Unique]) -> ChildConfig:
    mode = reader.convert("mode", "tunnel", _mode)
    action = _ACTIONS.get(mode, Action.PROTECT)
    start = reader.convert("start_action", StartAction.NONE, lambda text: _action(text, _START_ACTIONS))
    if action is not Action.PROTECT and StartAction.START in start:
        reader.complain(f"a child of mode {mode} cannot be started, only trapped", "start_action")
    if_id_in, if_id_out = read_if_ids(reader, if_ids)
    times, volumes, packets = child_lifetimes(reader)
    reader.not_implemented(options.CHILD)
    child = ChildConfig(
        name=name,
        esp_proposals=read_proposals(reader, "esp_proposals", ProtocolId.ESP),
        local_ts=_selectors(reader, "local_ts"),
        remote_ts=_selectors(reader, "remote_ts"),
        mode=_MODES[mode],
        start_action=start,
        dpd_action=reader.convert("dpd_action", StartAction.NONE, lambda text: _action(text, _END_ACTIONS)),
        close_action=reader.convert("close_action", StartAction.NONE, lambda text: _action(text, _END_ACTIONS)),
        action=action,
        rekey_time=times.rekey,
        life_time=times.life,
        rand_time=times.rand,
        rekey_bytes=int(volumes.rekey),
        life_bytes=int(volumes.life),
        rand_bytes=int(volumes.rand),
        rekey_packets=int(packets.rekey),
        life_packets=int(packets.life),
        rand_packets=int(packets.rand),
        inactivity=reader.seconds("inactivity", 0.0) or 0.0,
        replay_window=reader.convert("replay_window", 32, _replay_window),
        priority=reader.integer("priority", 0),
        reqid=reader.integer("reqid", 0),
        copies=_copies(reader),
        tfc_padding=reader.convert("tfc_padding", 0, _tfc_padding),
        mark_in=reader.convert("mark_in", _NO_SELECTING_MARK, selecting_mark),
        mark_out=reader.convert("mark_out", _NO_SELECTING_MARK, selecting_mark),
        mark_in_sa=reader.boolean("mark_in_sa", False),
        set_mark_in=reader.convert("set_mark_in", _NO_SETTING_MARK, setting_mark),
        set_mark_out=reader.convert("set_mark_out", _NO_SETTING_MARK, setting_mark),
        if_id_in=if_id_in,
        if_id_out=if_id_out,
        xfrm_interface=reader.convert("xfrm_interface", "", interface_name),
        xfrm_routes=reader.boolean("xfrm_routes", True),
        unresolved=reader.choice("unresolved", Unresolved.QUEUE, _UNRESOLVED),
    )
    if child.xfrm_interface and (not child.if_id_out or child.if_id_in != child.if_id_out or isinstance(child.if_id_out, Unique)):
        reader.complain("an XFRM interface has one number: if_id_in and if_id_out are needed, and the same", "xfrm_interface")
    if needs_ike_sa(child) and (StartAction.TRAP in start or action is not Action.PROTECT):
        reader.complain("without an IKE SA there is no interface id for the policies of a trap or shunt: give the child its own", "start_action")
    _check_families(reader, child)
    reader.finish(list(options.CHILD))
    return child


def _replay_window(text: str) -> int:
    """RFC 4303 section 3.4.3: none, or 32 packets at least."""
    window = integer(text, 0, MAX_REPLAY_WINDOW)
    if 0 < window < SMALLEST_REPLAY_WINDOW:
        raise ValueError(f"{window} is neither 0 nor within {SMALLEST_REPLAY_WINDOW} to {MAX_REPLAY_WINDOW}")
    return window


def _copies(reader: Reader) -> HeaderCopies:
    dscp = reader.choice("copy_dscp", "out", {value: value for value in ("out", "in", "yes", "no")})
    return HeaderCopies(
        dscp_out=dscp in ("out", "yes"),
        dscp_in=dscp in ("in", "yes"),
        ecn=reader.boolean("copy_ecn", True),
        df=reader.boolean("copy_df", True),
    )


def _tfc_padding(text: str) -> int:
    return TFC_TO_MTU if text.lower() == "mtu" else integer(text, 0, 65535)


def _mode(text: str) -> str:
    mode = text.lower()
    if mode in _FOREIGN_MODES:
        raise ValueError(f"the mode '{mode}' is not implemented yet")
    if mode not in _MODES:
        raise ValueError(f"'{shown(text)}' is not one of {', '.join(_MODES)}")
    return mode


def _action(text: str, actions: Mapping[str, StartAction]) -> StartAction:
    """One word, or several joined by `|`."""
    wanted = StartAction.NONE
    for word in text.lower().split("|"):
        if (one := actions.get(word.strip())) is None:
            raise ValueError(f"'{shown(text)}' is not one of {', '.join(actions)}, or trap|start")
        wanted |= one
    return wanted


def interface_name(text: str) -> str:
    """What the kernel takes as the name of a link (net/core/dev.c, dev_valid_name)."""
    if not text.isascii() or not text.isprintable() or not 0 < len(text) <= MAX_INTERFACE_NAME or text in (".", "..") or set(text) & set('/: %"*\\'):
        raise ValueError(f"'{shown(text)}' is not the name of an interface: 1 to {MAX_INTERFACE_NAME} letters without blank and /:%\"*\\")
    return text


def read_if_ids(reader: Reader, inherited: tuple[int | Unique, int | Unique] | None = None) -> tuple[int | Unique, int | Unique]:
    """`if_id_in` and `if_id_out`; `inherited` None: these are the connection's. As in strongSwan, one `%unique-dir` makes the other `%unique` one, too."""
    of_ike_sa = inherited is None

    def convert(text: str) -> int | Unique:
        each_way = _UNIQUE.get(text.lower())
        if each_way is None and text.startswith("%"):
            raise ValueError(f"'{shown(text)}' is neither a number nor one of {', '.join(_UNIQUE)}")
        return integer(text) if each_way is None else Unique(each_way, of_ike_sa)

    default = inherited or (0, 0)
    found = reader.convert("if_id_in", default[0], convert), reader.convert("if_id_out", default[1], convert)
    each_way = Unique(True, of_ike_sa) in found
    inbound, outbound = (Unique(True, of_ike_sa) if each_way and if_id == Unique(False, of_ike_sa) else if_id for if_id in found)
    return inbound, outbound


def needs_ike_sa(child: ChildConfig) -> bool:
    """Whether its policies have an interface id that only an IKE SA brings."""
    return any(isinstance(if_id, Unique) and if_id.of_ike_sa for if_id in (child.if_id_in, child.if_id_out))


def selecting_mark(text: str) -> Mark | UniqueMark:
    """`value`, `value/mask`, or with `%unique` or `%unique-dir` as the value."""
    value, slash, mask = text.partition("/")
    each_way = _UNIQUE.get(value.strip().lower())
    if each_way is None:
        return _mark(text)
    bits = integer(mask.strip()) if slash else ALL_BITS
    if not bits or bits & (bits + 1):
        raise ValueError(f"the mask of {shown(text)} leaves out low bits, in which the numbers are")
    return UniqueMark(each_way, bits)


def setting_mark(text: str) -> Mark | SameMark:
    """`value`, `value/mask`, or with `%same` as the value."""
    value, slash, mask = text.partition("/")
    if value.strip().lower() == "%same":
        return SameMark(integer(mask.strip()) if slash else ALL_BITS)
    return _mark(text)


def _mark(text: str) -> Mark:
    value, slash, mask = text.partition("/")
    if value.startswith("%"):
        raise ValueError(f"'{shown(value)}' is no mark for this option")
    found = Mark(integer(value.strip()), integer(mask.strip()) if slash else ALL_BITS)
    if found.value & ~found.mask:
        raise ValueError(f"the mark {shown(text)} has bits that its mask leaves out")
    return found if found.mask and (found.value or slash) else NO_MARK


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
