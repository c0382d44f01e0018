"""How the entries of a label node look on the wire: X_LABELS, a count and one entry after the other (docs/pfkey-extensions.md)."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from struct import Struct
from typing import Final

from kernel_shim.mpls.diffserv import CLASSES, CODE_POINTS, ClassMap
from kernel_shim.mpls.encapsulation import Encapsulation
from kernel_shim.mpls.labels import Label, LabelRange, LabelSet
from kernel_shim.mpls.lfib import MAX_PATHS, NextHop, Nhlfe, Paths, Peer, ToInterface, ToPeer, ToStack, ToVrf, TtlModel
from kernel_shim.mpls.node import Classes, LabelBinding, NodeEntry, Tunnel, Vrf, VrfRoute
from kernel_shim.pfkey.constants import MAX_LABEL_ENTRIES, MAX_LABEL_NAME, MAX_LABEL_RANGES, ExtensionType
from kernel_shim.pfkey.messages import PfKeyError
from kernel_shim.pfkey.private import LabelEntries
from kernel_shim.pfkey.wire import Reader, Writer

_COUNT: Final = Struct("=Hxx")
_OCTET: Final = Struct("=B")
_WORD: Final = Struct("=I")
_VRF_TABLE: Final = Struct("=IB")
_TUNNEL: Final = Struct("=BBB")
_RANGE: Final = Struct("=II")
_PREFIX: Final = Struct("=BB")
_PATH: Final = Struct("=BBBBB")

_CLASSES: Final = Struct(f"={CODE_POINTS + CLASSES}B")

_VRF, _TUNNEL_KIND, _PEER, _LABEL, _ROUTE, _CLASS_MAP = 1, 2, 3, 4, 5, 6
_HOPS: Final = (ToPeer, ToInterface, ToVrf, ToStack)
_MODELS: Final = tuple(TtlModel)
_ENCAPSULATIONS: Final = {int(it): it for it in Encapsulation}
_MANAGED: Final = 1
_ENTROPY: Final = 1
_OWN_CLASS: Final = 255  # no traffic class is said


def read_labels(reader: Reader, _kind: ExtensionType) -> LabelEntries:
    (count,) = reader.take(_COUNT)
    if not 0 < count <= MAX_LABEL_ENTRIES:
        raise reader.fail(f"{count} entries")
    entries = []
    for _ in range(count):
        try:
            entries.append(_read_entry(reader))
        except ValueError as error:
            raise reader.fail(str(error)) from None
    reader.pad()
    return LabelEntries(tuple(entries))


def write_labels(writer: Writer, extension: LabelEntries) -> None:
    if not 0 < len(extension.entries) <= MAX_LABEL_ENTRIES:
        raise PfKeyError(ExtensionType.X_LABELS.name, f"{len(extension.entries)} entries")
    writer.put(_COUNT, len(extension.entries))
    for entry in extension.entries:
        _write_entry(writer, entry)
    writer.pad()


def _read_entry(reader: Reader) -> NodeEntry:
    """ValueError for values that mean nothing."""
    (kind,) = reader.take(_OCTET)
    if kind == _VRF:
        name, interface, (table, members) = _read_name(reader), _read_name(reader), reader.take(_VRF_TABLE)
        return Vrf(name, interface, table, tuple(_read_name(reader) for _ in range(members)))
    if kind == _TUNNEL_KIND:
        peer = _read_name(reader)
        number, encapsulation, flags = reader.take(_TUNNEL)
        if encapsulation not in _ENCAPSULATIONS:
            raise ValueError(f"encapsulation {encapsulation}")
        version = reader.version(number)
        return Tunnel(peer, reader.address(version), reader.address(version), _ENCAPSULATIONS[encapsulation], bool(flags & _MANAGED))
    if kind == _PEER:
        name, space = _read_name(reader), _read_name(reader)
        (ranges,) = reader.take(_COUNT)
        if ranges > MAX_LABEL_RANGES:
            raise ValueError(f"{ranges} ranges of labels")
        return Peer(name, LabelSet(LabelRange(*reader.take(_RANGE)) for _ in range(ranges)), space)
    if kind == _LABEL:
        space, (label,) = _read_name(reader), reader.take(_WORD)
        return LabelBinding(Label(label), _read_paths(reader), space)
    if kind == _ROUTE:
        vrf, (number, length) = _read_name(reader), reader.take(_PREFIX)
        address = reader.address(reader.version(number))
        prefix = IPv4Network((int(address), length)) if number == 4 else IPv6Network((int(address), length))
        return VrfRoute(vrf, prefix, _read_paths(reader))
    if kind == _CLASS_MAP:
        values = reader.take(_CLASSES)
        return Classes(ClassMap(values[:CODE_POINTS], values[CODE_POINTS:]))
    raise ValueError(f"entry of kind {kind}")


def _write_entry(writer: Writer, entry: NodeEntry) -> None:
    if isinstance(entry, Vrf):
        writer.put(_OCTET, _VRF)
        _write_name(writer, entry.name)
        _write_name(writer, entry.interface)
        writer.put(_VRF_TABLE, entry.table, len(entry.members))
        for member in entry.members:
            _write_name(writer, member)
    elif isinstance(entry, Tunnel):
        writer.put(_OCTET, _TUNNEL_KIND)
        _write_name(writer, entry.peer)
        writer.put(_TUNNEL, entry.local.version, entry.encapsulation, entry.managed * _MANAGED)
        writer.address(entry.local)
        writer.address(entry.remote)
    elif isinstance(entry, Peer):
        writer.put(_OCTET, _PEER)
        _write_name(writer, entry.name)
        _write_name(writer, entry.space)
        ranges = list(entry.accepts)
        if len(ranges) > MAX_LABEL_RANGES:
            raise PfKeyError(ExtensionType.X_LABELS.name, f"{len(ranges)} ranges of labels")
        writer.put(_COUNT, len(ranges))
        for label_range in ranges:
            writer.put(_RANGE, *label_range)
    elif isinstance(entry, LabelBinding):
        writer.put(_OCTET, _LABEL)
        _write_name(writer, entry.space)
        writer.put(_WORD, entry.label)
        _write_paths(writer, entry.paths)
    elif isinstance(entry, Classes):
        to_class, to_dscp = entry.map.tables
        writer.put(_OCTET, _CLASS_MAP)
        writer.put(_CLASSES, *to_class, *to_dscp)
    else:
        writer.put(_OCTET, _ROUTE)
        _write_name(writer, entry.vrf)
        writer.put(_PREFIX, entry.prefix.version, entry.prefix.prefixlen)
        writer.address(entry.prefix.network_address)
        _write_paths(writer, entry.paths)


def _read_name(reader: Reader) -> str:
    (length,) = reader.take(_OCTET)
    if length > MAX_LABEL_NAME:
        raise ValueError(f"name of {length} octets")
    return reader.text(length)


def _write_name(writer: Writer, name: str) -> None:
    encoded = name.encode()
    if len(encoded) > MAX_LABEL_NAME:
        raise PfKeyError(ExtensionType.X_LABELS.name, f"name of {len(encoded)} octets")
    writer.put(_OCTET, len(encoded))
    writer.octets(encoded)


def _read_paths(reader: Reader) -> Paths:
    (count,) = reader.take(_OCTET)
    if not 1 <= count <= MAX_PATHS:
        raise ValueError(f"{count} paths")
    return tuple(_read_path(reader) for _ in range(count))


def _read_path(reader: Reader) -> Nhlfe:
    hop, model, traffic_class, flags, labels = reader.take(_PATH)
    if hop >= len(_HOPS) or model >= len(_MODELS):
        raise ValueError(f"next hop of kind {hop} with TTL model {model}")
    next_hop: NextHop = _HOPS[hop](_read_name(reader))
    push = tuple(Label(reader.take(_WORD)[0]) for _ in range(labels))
    return Nhlfe(next_hop, push, _MODELS[model], None if traffic_class == _OWN_CLASS else traffic_class, bool(flags & _ENTROPY))


def _write_paths(writer: Writer, paths: Paths) -> None:
    writer.put(_OCTET, len(paths))
    for path in paths:
        hop = path.next_hop
        tc = _OWN_CLASS if path.traffic_class is None else path.traffic_class
        writer.put(_PATH, _HOPS.index(type(hop)), _MODELS.index(path.ttl), tc, path.entropy * _ENTROPY, len(path.push))
        _write_name(writer, hop.peer if isinstance(hop, ToPeer) else hop.vrf)
        for label in path.push:
            writer.put(_WORD, label)
