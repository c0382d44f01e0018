"""What the kernel reports of its own accord: ACQUIRE, EXPIRE, MAPPING, MIGRATE, REPORT and AE."""

from __future__ import annotations

from dataclasses import dataclass

from kernel_shim.model import PROTOCOL_ESP, Acquire, AcquireSequence, Endpoint, Expire, Flow, KernelEvent, NewMapping, PolicyIndex, ReqId, SaId, Spi
from kernel_shim.xfrm.constants import AF_INET, Attribute, MessageType
from kernel_shim.xfrm.migrate import Migration, migration_from
from kernel_shim.xfrm.ownership import is_ours, reqid_from
from kernel_shim.xfrm.policies import templates_from
from kernel_shim.xfrm.replay import SaEvent, event_from
from kernel_shim.xfrm.selectors import flow_from, selector_from
from kernel_shim.xfrm.structs import (
    OCTET,
    REPORT_HEAD,
    SA_SIZE,
    AcquireStruct,
    MalformedMessage,
    MappingStruct,
    SaStruct,
    SelectorStruct,
    TemplateStruct,
    unpack,
    unpack_address,
)
from kernel_shim.xfrm.wire import Message


@dataclass(frozen=True, slots=True)
class Report:
    """A packet that a policy would have had protected came without protection; only Mobile IPv6's route optimisation is told so."""

    protocol: int
    flow: Flow


@dataclass(frozen=True, slots=True)
class Notice:
    """`ours`: whether it is about a policy or SA of ours."""

    event: KernelEvent | Migration | Report | SaEvent
    ours: bool


def notice_from(message: Message) -> Notice | None:
    """None for messages that are no event of ours to hear, such as the end of a larval SA that never had an SPI."""
    if message.type == MessageType.ACQUIRE:
        return _acquire(message)
    if message.type == MessageType.EXPIRE:
        return _expire(message)
    if message.type == MessageType.MAPPING:
        return _mapping(message)
    if message.type == MessageType.MIGRATE:
        migration = migration_from(message)
        return Notice(migration, any(is_ours(move.reqid) for move in migration.moves))
    if message.type == MessageType.REPORT:
        (protocol,) = unpack(OCTET, message.body, "user_report")
        return Notice(Report(protocol, flow_from(SelectorStruct.unpack(message.body, REPORT_HEAD.size))), ours=False)
    if message.type == MessageType.NEWAE:
        event = event_from(message)
        return Notice(event, is_ours(event.reqid))
    return None


def _acquire(message: Message) -> Notice | None:
    told = AcquireStruct.unpack(message.body)
    templates = templates_from(message.require(Attribute.TMPL))
    if not templates:
        raise MalformedMessage("an ACQUIRE without a template")
    if told.proto != PROTOCOL_ESP:
        return None
    number, template = templates[0]
    # The larval SA's own addresses, filled in where the template leaves them open (a tunnel from any address of ours).
    family = TemplateStruct.unpack(message.require(Attribute.TMPL)).family or AF_INET
    source = unpack_address(told.saddr, family) if any(told.saddr) else None
    destination = unpack_address(told.daddr, family) if any(told.daddr) else None
    event = Acquire(
        sequence=AcquireSequence(told.seq),
        policy=PolicyIndex(told.policy.number),
        reqid=reqid_from(number) if is_ours(number) else ReqId(number),
        mode=template.mode,
        source=source,
        destination=destination,
        selector=selector_from(told.policy.selector, message.attributes),
        flow=flow_from(told.selector),
    )
    return Notice(event, is_ours(number))


def _expire(message: Message) -> Notice | None:
    info = SaStruct.unpack(message.body)
    if info.spi == 0 or info.proto != PROTOCOL_ESP:
        return None
    (hard,) = unpack(OCTET, message.body[SA_SIZE:], "user_expire")
    sa = SaId(unpack_address(info.daddr, info.family), Spi(info.spi), info.proto)
    return Notice(Expire(sa, reqid_from(info.reqid), bool(hard)), is_ours(info.reqid))


def _mapping(message: Message) -> Notice:
    told = MappingStruct.unpack(message.body)
    family = told.id.family
    sa = SaId(unpack_address(told.id.daddr, family), Spi(told.id.spi), told.id.proto)
    old = Endpoint(unpack_address(told.old_saddr, family), told.old_sport)
    new = Endpoint(unpack_address(told.new_saddr, family), told.new_sport)
    return Notice(NewMapping(sa, reqid_from(told.reqid), old, new), is_ours(told.reqid))
