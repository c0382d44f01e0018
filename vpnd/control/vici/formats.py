"""Statuses to message trees, with strongSwan's keys, order and spelling (src/libcharon/plugins/vici/vici_query.c)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from importlib import metadata
from typing import Final

from cryptography import x509

from kernel_shim.model import ANY_PROTOCOL, NO_MARK, PROTOCOL_ICMP, PROTOCOL_ICMPV6, Action, AddressRange, Endpoint, Mode, PortRange, TrafficSelector
from vpnd.config.addresses import PORT_NAMES, PROTOCOL_NAMES
from vpnd.config.model import ALL_BITS, AuthMethod, AuthRound, ChildConfig, ConnectionConfig, TsTemplate
from vpnd.config.tree import Items, Node, Scalar, Section
from vpnd.control.backend import ChildState, ChildStatus, DaemonStats, IkeState, IkeStatus, LogLine, PolicyStatus
from vpnd.control.vici.codec import encode_message
from vpnd.ike.iana import ADDITIONAL_KEY_EXCHANGE_TYPES, Encryption, Group, Integrity, PrfId, TransformType
from vpnd.ike.identity import Identity
from vpnd.ike.marking import Marking
from vpnd.ike.proposal import Proposal

CHILDREN_LENGTH: Final = 400 * 1024  # octets of children in one event: the rest of the IKE SA or connection fits the segment beside them

_MODES: Final = {Mode.TRANSPORT: "TRANSPORT", Mode.TUNNEL: "TUNNEL"}
_SHUNTS: Final = {Action.BYPASS: "PASS", Action.DISCARD: "DROP"}
_AUTHENTICATION: Final = {AuthMethod.PSK: "pre-shared key", AuthMethod.PUBKEY: "public key"}
_WITH_SAS: Final = (ChildState.INSTALLED, ChildState.REKEYING, ChildState.REKEYED, ChildState.DELETING, ChildState.DELETED)
_SPELLED: Final = {Encryption.TRIPLE_DES_CBC.name: "3DES_CBC"}  # what no identifier can be


class Builder:
    """Collects entries in order; None is left out."""

    def __init__(self) -> None:
        self.section = Section()

    def add(self, key: str, value: str | int | None) -> None:
        if value is not None:
            self.section.entries[key] = Scalar(str(value).encode())

    def flag(self, key: str, value: bool) -> None:
        if value:
            self.add(key, "yes")

    def items(self, key: str, values: Sequence[str]) -> None:
        self.section.entries[key] = Items(tuple(Scalar(value.encode()) for value in values))

    def node(self, key: str, node: Node) -> None:
        self.section.entries[key] = node


# list-sas, ike-updown, child-updown, ike-rekey, child-rekey


def list_sa_events(ike: IkeStatus) -> Iterator[Section]:
    """One event, or several when the children do not fit one message."""
    children = {f"{child.name}-{child.unique_id}": child_sa(child) for child in ike.children}
    for part in _parts(children):
        section = ike_sa(ike)
        section.entries["child-sas"] = part
        yield Section({ike.name: section})


def updown_event(up: bool, ike: IkeStatus, *, with_children: bool) -> Section:
    builder = Builder()
    builder.flag("up", up)
    section = ike_sa(ike)
    if with_children:
        section.entries["child-sas"] = Section({f"{child.name}-{child.unique_id}": child_sa(child) for child in ike.children})
    builder.node(ike.name, section)
    return builder.section


def ike_rekey_event(old: IkeStatus, new: IkeStatus) -> Section:
    return Section({new.name: Section({"old": ike_sa(old), "new": ike_sa(new)})})


def child_rekey_event(ike: IkeStatus, old: ChildStatus, new: ChildStatus) -> Section:
    section = ike_sa(ike)
    section.entries["child-sas"] = Section({old.name: Section({"old": child_sa(old), "new": child_sa(new)})})
    return Section({ike.name: section})


def ike_update_event(ike: IkeStatus, local: Endpoint, remote: Endpoint) -> Section:
    """The new addresses, and the IKE SA with the old ones."""
    builder = Builder()
    for name, end in (("local", local), ("remote", remote)):
        builder.add(f"{name}-host", str(end.address))
        builder.add(f"{name}-port", end.port)
    builder.node(ike.name, ike_sa(ike))
    return builder.section


def alert_event(kind: str, ike: IkeStatus | None) -> Section:
    builder = Builder()
    builder.add("type", kind)
    if ike is not None:
        builder.node("ike-sa", Section({ike.name: ike_sa(ike)}))
    return builder.section


def ike_sa(ike: IkeStatus) -> Section:
    """An IKE SA without its children."""
    builder = Builder()
    builder.add("uniqueid", ike.unique_id)
    builder.add("version", 2)
    builder.add("state", ike.state.value)
    builder.add("local-host", str(ike.local.address))
    builder.add("local-port", ike.local.port)
    builder.add("local-id", _identity(ike.local_id))
    builder.add("remote-host", str(ike.remote.address))
    builder.add("remote-port", ike.remote.port)
    builder.add("remote-id", _identity(ike.remote_id))
    builder.flag("initiator", ike.initiator)
    builder.add("initiator-spi", f"{ike.spi_initiator:016x}")
    builder.add("responder-spi", f"{ike.spi_responder:016x}")
    builder.flag("nat-local", ike.nat_local)
    builder.flag("nat-remote", ike.nat_remote)
    builder.flag("nat-fake", ike.nat_fake)
    builder.flag("nat-any", ike.nat_any)
    if ike.proposal:
        _algorithms(builder, ike.proposal)
    builder.flag("ppk", ike.ppk)
    if ike.state is IkeState.ESTABLISHED:
        builder.add("established", _whole(ike.established))
        builder.add("rekey-time", _whole(ike.rekey_in))
        builder.add("reauth-time", _whole(ike.reauth_in))
    for key, tasks in (("tasks-queued", ike.tasks_queued), ("tasks-active", ike.tasks_active)):
        if tasks:
            builder.items(key, tasks)
    return builder.section


def child_sa(child: ChildStatus) -> Section:
    builder = Builder()
    builder.add("name", child.name)
    builder.add("uniqueid", child.unique_id)
    builder.add("reqid", child.reqid)
    builder.add("state", child.state.value)
    builder.add("mode", _MODES[child.mode])
    if child.state in _WITH_SAS:
        builder.add("protocol", "ESP")
        builder.flag("encap", child.encapsulated)
        builder.add("spi-in", f"{child.spi_in:08x}")
        builder.add("spi-out", f"{child.spi_out:08x}")
        _marking(builder, child.marking)
        if child.proposal:
            _algorithms(builder, child.proposal)
            if any(transform.id for transform in child.proposal.of_type(TransformType.ESN)):
                builder.add("esn", 1)
        builder.add("bytes-in", child.bytes_in)
        builder.add("packets-in", child.packets_in)
        builder.add("use-in", _whole(child.used_in))
        builder.add("bytes-out", child.bytes_out)
        builder.add("packets-out", child.packets_out)
        builder.add("use-out", _whole(child.used_out))
        builder.add("rekey-time", _whole(child.rekey_in))
        builder.add("life-time", _whole(child.life_in))
        builder.add("install-time", _whole(child.installed))
    builder.items("local-ts", [selector(ts) for ts in child.local_ts])
    builder.items("remote-ts", [selector(ts) for ts in child.remote_ts])
    return builder.section


def _marking(builder: Builder, marking: Marking) -> None:
    """Numbers in hexadecimal, a mask only where it leaves bits out."""
    for way, mark in (("in", marking.mark_in), ("out", marking.mark_out)):
        if mark != NO_MARK:
            builder.add(f"mark-{way}", f"{mark.value:08x}")
            builder.add(f"mark-mask-{way}", None if mark.mask == ALL_BITS else f"{mark.mask:08x}")
    for way, if_id in (("in", marking.if_id_in), ("out", marking.if_id_out)):
        builder.add(f"if-id-{way}", f"{if_id:08x}" if if_id else None)


def _algorithms(builder: Builder, proposal: Proposal) -> None:
    if encryption := proposal.first(TransformType.ENCR):
        builder.add("encr-alg", algorithm_name(Encryption, encryption.id))
        builder.add("encr-keysize", encryption.key_length or None)
    integrity = proposal.first(TransformType.INTEG)
    if integrity and integrity.id != Integrity.NONE:
        builder.add("integ-alg", algorithm_name(Integrity, integrity.id))
        builder.add("integ-keysize", integrity.key_length or None)
    if prf := proposal.first(TransformType.PRF):
        builder.add("prf-alg", "PRF_" + algorithm_name(PrfId, prf.id))
    group = proposal.first(TransformType.KE)
    if group and group.id != Group.NONE:
        builder.add("dh-group", algorithm_name(Group, group.id))
    for number, kind in enumerate(ADDITIONAL_KEY_EXCHANGE_TYPES, 1):
        additional = proposal.first(kind)
        if additional and additional.id != Group.NONE:
            builder.add(f"ake{number}", algorithm_name(Group, additional.id))


def algorithm_name(names: type[Encryption] | type[Integrity] | type[PrfId] | type[Group], number: int) -> str:
    try:
        name = names(number).name
    except ValueError:
        return f"({number})"  # as strongSwan prints a number without a name
    return _SPELLED.get(name, name)


def _identity(identity: Identity | None) -> str:
    return "%any" if identity is None else str(identity)


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


# list-policies, list-conns


def list_policy_event(policy: PolicyStatus) -> Section:
    builder = Builder()
    builder.add("child", policy.child)
    builder.add("reqid", policy.reqid or None)
    builder.add("ike", policy.connection)
    builder.add("mode", policy.mode)
    builder.items("local-ts", [selector(ts) for ts in policy.local_ts])
    builder.items("remote-ts", [selector(ts) for ts in policy.remote_ts])
    return Section({f"{policy.connection}/{policy.child}": builder.section})


def list_conn_events(connection: ConnectionConfig) -> Iterator[Section]:
    """One event, or several when the children do not fit one message."""
    for part in _parts({child.name: _child_config(child) for child in connection.children.values()}):
        section = _connection(connection)
        section.entries["children"] = part
        yield Section({connection.name: section})


def _connection(connection: ConnectionConfig) -> Section:
    builder = Builder()
    builder.items("local_addrs", connection.local_addrs)
    builder.items("remote_addrs", connection.remote_addrs)
    builder.add("local_port", connection.local_port)
    builder.add("remote_port", connection.remote_port)
    builder.add("version", "IKEv2")
    builder.add("reauth_time", _whole(connection.reauth_time))
    builder.add("rekey_time", _whole(connection.rekey_time))
    builder.add("unique", f"UNIQUE_{connection.unique.name}")
    builder.add("dpd_delay", _whole(connection.dpd_delay) or None)
    builder.add("dpd_timeout", _whole(connection.dpd_timeout) or None)
    for side, rounds in (("local", connection.local), ("remote", connection.remote)):
        for number, each in enumerate(rounds, 1):
            builder.node(f"{side}-{number}", _auth_round(each))
    return builder.section


def _auth_round(each: AuthRound) -> Section:
    builder = Builder()
    builder.add("class", _AUTHENTICATION[each.auth])
    builder.add("id", None if each.id is None else str(each.id))
    builder.items("groups", [])
    builder.items("cert_policy", [])
    builder.items("certs", [_subject(der) for der in each.certs])
    builder.items("cacerts", [_subject(der) for der in each.cacerts])
    return builder.section


@lru_cache(maxsize=1024)
def _subject(der: bytes) -> str:
    return str(Identity.of_dn(x509.load_der_x509_certificate(der).subject.public_bytes()))


def _child_config(child: ChildConfig) -> Section:
    builder = Builder()
    builder.add("mode", _SHUNTS.get(child.action) or _MODES[child.mode])
    builder.add("rekey_time", _whole(child.rekey_time))
    builder.add("rekey_bytes", child.rekey_bytes)
    builder.add("rekey_packets", child.rekey_packets)
    builder.add("dpd_action", child.dpd_action.text)
    builder.add("close_action", child.close_action.text)
    builder.items("local-ts", [template(ts) for ts in child.local_ts])
    builder.items("remote-ts", [template(ts) for ts in child.remote_ts])
    builder.add("priority", child.priority or None)
    return builder.section


def _parts(children: dict[str, Section]) -> Iterator[Section]:
    """The children in sections that fit a message; one empty section when there are none."""
    part = Section()
    length = 0
    for name, child in children.items():
        child_length = len(encode_message(Section({name: child})))
        if part.entries and length + child_length > CHILDREN_LENGTH:
            yield part
            part, length = Section(), 0
        part.entries[name] = child
        length += child_length
    yield part


# Traffic selectors, as printf's %R of src/libstrongswan/selectors/traffic_selector.c


def selector(ts: TrafficSelector) -> str:
    return _addresses(ts.addresses) + _protocol_and_ports(ts.protocol, ts.ports)


def template(ts: TsTemplate) -> str:
    return ("dynamic" if ts.addresses is None else _addresses(ts.addresses.addresses)) + _protocol_and_ports(ts.protocol, ts.ports)


def _addresses(addresses: AddressRange) -> str:
    size = int(addresses.last) - int(addresses.first) + 1
    if size & (size - 1) == 0 and int(addresses.first) % size == 0:
        return f"{addresses.first}/{addresses.first.max_prefixlen - (size.bit_length() - 1)}"
    return f"{addresses.first}..{addresses.last}"


def _protocol_and_ports(protocol: int, ports: PortRange) -> str:
    if protocol == ANY_PROTOCOL and ports.any:
        return ""
    name = PROTOCOL_NAMES.get(protocol, str(protocol)) if protocol else "0"
    if ports.any:
        return f"[{name}]"
    if protocol in (PROTOCOL_ICMP, PROTOCOL_ICMPV6):
        shown = _icmp(ports.low) if ports.low == ports.high else f"{_icmp(ports.low)}-{_icmp(ports.high)}"
    else:
        shown = PORT_NAMES.get(ports.low, str(ports.low)) if ports.low == ports.high else f"{ports.low}-{ports.high}"
    return f"[{name}/{shown}]"


def _icmp(port: int) -> str:
    return f"{port >> 8}({port & 0xFF})" if port & 0xFF else str(port >> 8)


# version, stats, log


def version() -> Section:
    system = os.uname()
    return Section.of({"daemon": "vpnd", "version": metadata_version(), "sysname": system.sysname, "release": system.release, "machine": system.machine})


def metadata_version() -> str:
    try:
        return metadata.version("vpnd")
    except metadata.PackageNotFoundError:
        return "0"


def stats(figures: DaemonStats) -> Section:
    """strongSwan's keys; there are no worker threads and job queues here, so theirs are 0."""
    idle = {"critical": 0, "high": 0, "medium": 0, "low": 0}
    return Section.of(
        {
            "uptime": {"running": _duration(int(figures.uptime)), "since": datetime.fromtimestamp(figures.since).strftime("%b %d %H:%M:%S %Y")},
            "workers": {"total": 1, "idle": 0, "active": idle},
            "queues": idle,
            "scheduled": 0,
            "ikesas": {"total": figures.ike_total, "half-open": figures.ike_half_open},
            "plugins": ["vici"],
        }
    )


def _duration(seconds: int) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds > 2 * length:
            return f"{seconds // length} {unit}s"
    return f"{seconds} second{'s' if seconds != 1 else ''}"


def log_event(line: LogLine, *, thread: bool) -> Section:
    """`control-log` (without thread) and `log` (with it: there is one, 0)."""
    builder = Builder()
    builder.add("group", line.group)
    builder.add("level", line.level)
    if thread:
        builder.add("thread", 0)
    builder.add("ikesa-name", line.ike_name)
    builder.add("ikesa-uniqueid", line.ike_id)
    builder.add("msg", line.text)
    return builder.section
