"""The `mpls` section: VRFs, peers and static LSPs, typed, with everything that two of them cannot share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Final, TypeVar

from kernel_shim.model import IPAddress, IPNetwork
from kernel_shim.mpls.diffserv import CLASSES, CODE_POINTS
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.labels import FIRST_LABEL, IMPLICIT_NULL, IPV4_EXPLICIT_NULL, IPV6_EXPLICIT_NULL, LAST_LABEL, ROUTER_ALERT, Label, LabelRange, LabelSet
from kernel_shim.mpls.lfib import MAX_PATHS, TtlModel
from kernel_shim.mpls.node import MAX_TUNNELS, MAX_VRFS
from vpnd.config.children import interface_name
from vpnd.config.errors import ConfigError
from vpnd.config.reader import Reader, account, boolean, integer, shown
from vpnd.config.tree import Section
from vpnd.mpls.model import DEFAULT_RANGE, FpmConfig, LabelMode, LspConfig, MplsConfig, PeerConfig, RemoteVrf, RouteTarget, VrfConfig, own_target

MAX_NAME: Final = 63  # octets; the channel's bound of a name
MAX_MEMBERS: Final = 255  # interfaces of one VRF
MAX_PUSHED: Final = 8  # labels; beneath them the VRF's own and an entropy label, all within the bound of a stack
MAX_TABLE: Final = 2**32 - 1
RESERVED_TABLES: Final = frozenset({253, 254, 255})  # default, main, local (linux/rtnetlink.h)

_NULLS: Final = {
    "explicit-null": IPV4_EXPLICIT_NULL,
    "ipv6-explicit-null": IPV6_EXPLICIT_NULL,
    "router-alert": ROUTER_ALERT,
    "implicit-null": IMPLICIT_NULL,
}
_MODELS: Final = {model.value: model for model in TtlModel}
_ENCAPSULATIONS: Final = {it.name.lower(): it for it in Encapsulation}
_TARGET: Final = re.compile(r"(?:target:)?(?:(?P<number>[0-9]{1,10})|(?P<address>[0-9.]{7,15})):(?P<assigned>[0-9]{1,10})")

_PLACE: Final = re.compile(r"(?:\[(?P<v6>[^]]+)\]|(?P<v4>[^:]+)):(?P<port>[0-9]+)")

T = TypeVar("T")


def validate_mpls(section: Section, errors: list[ConfigError]) -> MplsConfig:
    """Complaints go to `errors`."""
    reader = Reader(section, "mpls", errors)
    ttl = reader.choice("ttl", TtlModel.PIPE, _MODELS)
    config = MplsConfig(
        vrfs=dict(_each(reader, "vrfs", lambda below, name: _vrf(below, name, ttl))),
        peers=dict(_each(reader, "peers", lambda below, name: _peer(below, name, ttl))),
        lsps=dict(_each(reader, "lsps", _lsp)),
        label_range=_label_set(reader, "label_range") or DEFAULT_RANGE,
        dscp_to_tc=dict(reader.convert_all("dscp_to_tc", lambda text: _pair(text, CODE_POINTS, CLASSES))),
        tc_to_dscp=dict(reader.convert_all("tc_to_dscp", lambda text: _pair(text, CLASSES, CODE_POINTS))),
        fpm=_fpm(reader),
    )
    reader.finish()
    if len(config.vrfs) > MAX_VRFS:
        reader.complain(f"more than {MAX_VRFS} VRFs", "vrfs", at_key=True)
    if len(config.peers) > MAX_TUNNELS:
        reader.complain(f"more than {MAX_TUNNELS} peers", "peers", at_key=True)
    _Together(reader, config).check()
    return config


def _each(reader: Reader, option: str, read: Callable[[Reader, str], T]) -> Iterator[tuple[str, T]]:
    section = reader.children(option)
    for name, node in (section.entries if section is not None else {}).items():
        path = f"{reader.path}.{option}.{shown(name)}"
        if not isinstance(node, Section):
            reader.errors.append(ConfigError("a section was expected", path=path, position=node.key_position))
            continue
        below = Reader(node, path, reader.errors)
        if not name.isprintable() or not 0 < len(name.encode()) <= MAX_NAME:
            below.complain(f"a name has 1 to {MAX_NAME} printable characters", node=node, at_key=True)
        yield name, read(below, name)


def _fpm(reader: Reader) -> FpmConfig | None:
    place = reader.convert("fpm", None, _place)
    settle, grace = reader.seconds("fpm_settle", None), reader.seconds("fpm_grace", None)
    users = reader.convert_all("fpm_users", account)
    if place is None:
        return None
    return replace(place, settle=place.settle if settle is None else settle, grace=place.grace if grace is None else grace, users=users or place.users)


def _vrf(reader: Reader, name: str, ttl: TtlModel) -> VrfConfig:
    exports = frozenset(reader.convert_all("export", _target))
    imports = frozenset(reader.convert_all("import", _target))
    mode = reader.choice("labels", LabelMode.PER_VRF, {mode.value: mode for mode in LabelMode})
    vrf = VrfConfig(
        name=name,
        interface=reader.convert("interface", "", interface_name),
        table=reader.convert("table", 0, _table),
        members=reader.convert_all("members", interface_name),
        prefixes=_prefixes(reader),
        labels=mode,
        label=reader.convert("label", None, _label),
        ttl=reader.choice("ttl", ttl, _MODELS),
        rd=reader.convert("rd", "", _target),
        imports=imports or exports or frozenset((own_target(name),)),
        exports=exports or imports or frozenset((own_target(name),)),
    )
    reader.finish()
    if not vrf.interface:
        try:
            vrf = replace(vrf, interface=interface_name(f"vpn-{name}"))
        except ValueError:
            reader.complain(f"the option 'interface' is missing: 'vpn-{shown(name)}' is not the name of an interface")
    if vrf.members and not vrf.table:
        reader.complain("members need a table of the VRF's own: the option 'table' is missing", "members")
    if len(vrf.members) > MAX_MEMBERS:
        reader.complain(f"more than {MAX_MEMBERS} members", "members")
    if mode is LabelMode.PER_PREFIX and vrf.label is not None:
        reader.complain("a label of the whole VRF contradicts labels = per-prefix", "label")
    if mode is LabelMode.PER_PREFIX and not vrf.prefixes:
        reader.complain("labels = per-prefix needs prefixes", "labels")
    return vrf


def _peer(reader: Reader, name: str, ttl: TtlModel) -> PeerConfig:
    accept = _label_set(reader, "accept")
    peer = PeerConfig(
        name=name,
        local=reader.convert("local", None, _address),
        remote=reader.convert("remote", None, _address),
        encapsulation=reader.choice("encapsulation", Encapsulation.GRE, _ENCAPSULATIONS),
        managed=reader.boolean("managed", False),
        via=reader.text("via", ""),
        push=_pushed(reader),
        accept=accept,
        own_space=reader.choice("space", False, {"platform": False, "own": True}),
        ttl=reader.choice("ttl", ttl, _MODELS),
        entropy=reader.boolean("entropy", False),
        traffic_class=_traffic_class(reader),
        vrfs=dict(_each(reader, "vrfs", _remote_vrf)),
        next_hops=reader.convert_all("next_hops", _address),
    )
    reader.finish()
    if peer.via:
        for option in ("local", "remote", "encapsulation", "managed", "accept", "space"):
            if option in reader.section.entries:
                reader.complain(f"its packets travel as those of '{shown(peer.via)}' do: 'via' leaves no '{option}'", option, at_key=True)
        if not peer.push:
            reader.complain("'via' needs 'push': the labels that lead on from there", "via")
    elif peer.local is None or peer.remote is None:
        for option in ("local", "remote"):
            if option not in reader.section.entries:
                reader.complain(f"the option '{option}' is missing")
    elif peer.local.version != peer.remote.version:
        reader.complain("local and remote are of two address families", "remote")
    return peer


def _remote_vrf(reader: Reader, name: str) -> RemoteVrf:
    exports = frozenset(reader.convert_all("export", _target))
    imports = frozenset(reader.convert_all("import", _target))
    label = reader.convert("label", None, _label)
    if "label" not in reader.section.entries:
        reader.complain("the option 'label' is missing: the one that the peer gave this VRF")
    prefixes = _prefixes(reader)
    reader.finish()
    own = frozenset((own_target(name),))
    return RemoteVrf(name, prefixes, label or FIRST_LABEL, imports or exports or own, exports or imports or own)


def _lsp(reader: Reader, name: str) -> LspConfig:
    label = reader.convert("label", None, _label)
    if "label" not in reader.section.entries:
        reader.complain("the option 'label' is missing")
    lsp = LspConfig(
        name=name,
        label=label or FIRST_LABEL,
        sources=reader.convert_all("from", str),
        to=reader.convert_all("to", str),
        push=_pushed(reader),
        vrf=reader.text("vrf", ""),
        ttl=reader.choice("ttl", TtlModel.UNIFORM, _MODELS),
        traffic_class=_traffic_class(reader),
        entropy=reader.boolean("entropy", False),
    )
    reader.finish()
    if bool(lsp.to) == bool(lsp.vrf):
        reader.complain("one of 'to' and 'vrf' says where its packets go")
    elif lsp.vrf and lsp.push:
        reader.complain("labels are pushed for a peer only", "push")
    if lsp.entropy and not lsp.push:
        reader.complain("an entropy label needs a label above it", "entropy")
    if len(lsp.to) > MAX_PATHS:
        reader.complain(f"more than {MAX_PATHS} peers", "to")
    return lsp


class _Together:
    """What single sections cannot know: names that lead nowhere, and things that two of them have."""

    def __init__(self, reader: Reader, config: MplsConfig) -> None:
        self._reader, self._config = reader, config

    def check(self) -> None:
        self._check_vrfs()
        self._check_peers()
        self._check_lsps()

    def _at(self, *path: str) -> Reader:
        section = self._reader.section
        for name in path:
            section = section.section(name) or Section()
        return Reader(section, ".".join(("mpls", *map(shown, path))), self._reader.errors)

    def _check_vrfs(self) -> None:
        taken: dict[object, str] = {}
        for vrf in self._config.vrfs.values():
            held: list[tuple[str, object, str]] = [("interface", vrf.interface, f"interface {vrf.interface}")]
            held += [("members", member, f"interface {member}") for member in vrf.members]
            held += [("table", vrf.table, f"table {vrf.table}")] if vrf.table else []
            held += [("label", ("label", vrf.label), f"label {vrf.label}")] if vrf.label is not None else []
            for option, thing, words in held:
                if (owner := taken.setdefault(thing, vrf.name)) != vrf.name:
                    self._at("vrfs", vrf.name).complain(f"{words} is that of VRF '{shown(owner)}'", option)

    def _check_peers(self) -> None:
        peers, ends = self._config.peers, dict[tuple[IPAddress, IPAddress], str]()
        for peer in peers.values():
            reader = self._at("peers", peer.name)
            if peer.local is not None and peer.remote is not None and (owner := ends.setdefault((peer.local, peer.remote), peer.name)) != peer.name:
                reader.complain(f"between these addresses is the tunnel to '{shown(owner)}'", "remote")
            seen, at = {peer.name}, peer
            while at.via:
                if at.via not in peers:
                    if at is peer:
                        reader.complain(f"there is no peer '{shown(at.via)}'", "via")
                    break
                if at.via in seen:
                    reader.complain("it leads back to where it began", "via")
                    break
                seen.add(at.via)
                at = peers[at.via]

    def _check_lsps(self) -> None:
        config = self._config
        bound: dict[tuple[str, Label], str] = {("", vrf.label): f"VRF '{vrf.name}'" for vrf in config.vrfs.values() if vrf.label is not None}
        for lsp in config.lsps.values():
            reader = self._at("lsps", lsp.name)
            for option, names in (("from", lsp.sources), ("to", lsp.to)):
                for name in names:
                    if name not in config.peers or (option == "from" and config.peers[name].via):
                        reader.complain(f"there is no peer '{shown(name)}' with a tunnel" if option == "from" else f"there is no peer '{shown(name)}'", option)
            if lsp.vrf and lsp.vrf not in config.vrfs:
                reader.complain(f"there is no VRF '{shown(lsp.vrf)}'", "vrf")
            spaces = {name if name in config.peers and config.peers[name].own_space else "" for name in lsp.sources} or {""}
            for space in sorted(spaces):
                words = f"LSP '{lsp.name}'"
                if (owner := bound.setdefault((space, lsp.label), words)) != words:
                    reader.complain(f"label {lsp.label} is that of {shown(owner)}", "label")


# Values


def _label(text: str) -> Label:
    return Label(integer(text, FIRST_LABEL, LAST_LABEL))


def _pushed(reader: Reader) -> tuple[Label, ...]:
    labels = reader.convert_all("push", lambda text: _NULLS[text.lower()] if text.lower() in _NULLS else _label(text))
    if len(labels) > MAX_PUSHED:
        reader.complain(f"more than {MAX_PUSHED} labels", "push")
    return labels[:MAX_PUSHED]


def _label_set(reader: Reader, option: str) -> LabelSet | None:
    ranges = reader.convert_all(option, _label_range)
    return LabelSet(ranges) if option in reader.section.entries else None


def _label_range(text: str) -> LabelRange:
    first, dash, last = text.partition("-")
    found = LabelRange(_label(first.strip()), _label((last if dash else first).strip()))
    if found.last < found.first:
        raise ValueError(f"the range of labels {shown(text)} ends before it begins")
    return found


def _traffic_class(reader: Reader) -> int | None:
    return reader.convert("tc", None, lambda text: integer(text, 0, CLASSES - 1))


def _pair(text: str, first: int, second: int) -> tuple[int, int]:
    left, colon, right = text.partition(":")
    if not colon:
        raise ValueError(f"'{shown(text)}' is not a pair of numbers, such as 46:5")
    return integer(left.strip(), 0, first - 1), integer(right.strip(), 0, second - 1)


def _table(text: str) -> int:
    table = integer(text, 1, MAX_TABLE)
    if table in RESERVED_TABLES:
        raise ValueError(f"table {table} is the host's own")
    return table


def _address(text: str) -> IPAddress:
    try:
        address = ip_address(text)
    except ValueError:
        raise ValueError(f"'{shown(text)}' is not an address") from None
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"{address} is not the address of one node")
    return address


def _place(text: str) -> FpmConfig | None:
    """`yes`, `ADDRESS`, `ADDRESS:PORT` or `[ADDRESS]:PORT`."""
    with suppress(ValueError):
        return FpmConfig() if boolean(text) else None
    match = _PLACE.fullmatch(text)
    address = _address(match["v6"] or match["v4"] if match is not None else text)
    return FpmConfig(address, integer(match["port"], 1, 65535)) if match is not None else FpmConfig(address)


def _prefixes(reader: Reader) -> tuple[IPNetwork, ...]:
    return tuple(dict.fromkeys(reader.convert_all("prefixes", _prefix)))


def _prefix(text: str) -> IPNetwork:
    try:
        return ip_network(text)
    except ValueError:
        raise ValueError(f"'{shown(text)}' is not a prefix without host bits") from None


def _target(text: str) -> RouteTarget:
    """`65000:1`, `192.0.2.1:1`, `4200000000:1` (RFC 4360, RFC 5668); one spelling of each. Route distinguishers look the same."""
    match = _TARGET.fullmatch(text)
    if match is None:
        raise ValueError(f"'{shown(text)}' is not a route target, such as 65000:1")
    assigned = int(match["assigned"])
    if match["address"] is not None:
        administrator, wide = str(_address(match["address"])), False
    else:
        number = int(match["number"])
        administrator, wide = str(number), number < 1 << 16
        if number >= 1 << 32:
            raise ValueError(f"{number} is not the number of an autonomous system")
    if assigned >= (1 << 32 if wide else 1 << 16):
        raise ValueError(f"{assigned} does not fit beside {administrator}")
    return RouteTarget(f"{administrator}:{assigned}")
