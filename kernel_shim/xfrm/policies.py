"""Policies: `kernel_shim.model` to messages and back."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kernel_shim.model import (
    PROTOCOL_ESP,
    Action,
    Direction,
    IPAddress,
    KernelError,
    Level,
    Policy,
    PolicyIndex,
    ReqId,
    Selector,
    Template,
)
from kernel_shim.xfrm.constants import (
    AF_INET,
    INFINITE,
    MAX_TEMPLATES,
    OURS,
    Attribute,
    MessageType,
    NetlinkFlag,
    PolicyAction,
    PolicyDirection,
)
from kernel_shim.xfrm.modes import mode_from, mode_number
from kernel_shim.xfrm.ownership import is_ours, kernel_reqid, reqid_from
from kernel_shim.xfrm.selectors import selector_attributes, selector_from, selector_struct
from kernel_shim.xfrm.structs import (
    NO_SELECTOR,
    TEMPLATE,
    LifetimeStruct,
    MalformedMessage,
    PolicyIdStruct,
    PolicyStruct,
    TemplateStruct,
    family_of,
    pack_address,
    unpack_address,
    version_of,
)
from kernel_shim.xfrm.wire import Message

FIRST_INDEX: Final = OURS
LAST_INDEX: Final = 0xFFFFFFF8
INDEX_STEP: Final = 8  # the lowest three bits of an index are its direction (xfrm_policy.c, xfrm_gen_index)

_FOR_EVER: Final = LifetimeStruct(INFINITE, INFINITE, INFINITE, INFINITE, 0, 0)
_DIRECTIONS: Final = {Direction.IN: PolicyDirection.IN, Direction.OUT: PolicyDirection.OUT, Direction.FORWARD: PolicyDirection.FORWARD}
_DIRECTIONS_BACK: Final[Mapping[int, Direction]] = {there: here for here, there in _DIRECTIONS.items()}


def direction_number(direction: Direction) -> int:
    return _DIRECTIONS[direction]


def direction_from(number: int) -> Direction | None:
    """None for a policy of a single socket."""
    return _DIRECTIONS_BACK.get(number)


# Requests


def policy_message(policy: Policy, *, replace: bool, index: int = 0) -> Message:
    """NEWPOLICY, or UPDPOLICY with `replace`. `index` is a wish, without its direction bits; a replaced policy keeps its own.

    KernelError(EINVAL) that names what Linux cannot express.
    """
    direction = _DIRECTIONS[policy.direction]
    protect = policy.action is Action.PROTECT
    if protect and not 1 <= len(policy.templates) <= MAX_TEMPLATES:
        raise KernelError(errno.EINVAL, f"a protecting policy with {len(policy.templates)} templates")
    action = PolicyAction.BLOCK if policy.action is Action.DISCARD else PolicyAction.ALLOW
    body = PolicyStruct(selector_struct(policy.selector), _FOR_EVER, policy.priority, index | direction if index else 0, direction, action)
    attributes = selector_attributes(policy.selector)
    if protect:
        attributes[Attribute.TMPL] = b"".join(_template_struct(template, policy.selector.version).pack() for template in policy.templates)
    kind = MessageType.UPDPOLICY if replace else MessageType.NEWPOLICY
    return Message(kind, body.pack(), attributes, NetlinkFlag.REQUEST | NetlinkFlag.ACK)


def policy_id_message(kind: MessageType, direction: Direction, selector: Selector) -> Message:
    """GETPOLICY or DELPOLICY, by selector."""
    body = PolicyIdStruct(selector_struct(selector), 0, _DIRECTIONS[direction])
    return Message(kind, body.pack(), selector_attributes(selector), NetlinkFlag.REQUEST | NetlinkFlag.ACK)


def policy_dump_message() -> Message:
    return Message(MessageType.GETPOLICY, PolicyIdStruct(NO_SELECTOR, 0, 0).pack(), {}, NetlinkFlag.REQUEST | NetlinkFlag.DUMP)


def socket_bypass(version: int, direction: Direction) -> bytes:
    """What `setsockopt` takes as IP_XFRM_POLICY or IPV6_XFRM_POLICY so that a socket's own packets pass every policy."""
    selector = NO_SELECTOR._replace(family=family_of(version))
    return PolicyStruct(selector, _FOR_EVER, 0, 0, _DIRECTIONS[direction], PolicyAction.ALLOW).pack()


def _template_struct(template: Template, inner_version: int) -> TemplateStruct:
    known = template.destination or template.source
    family = family_of(known.version if known is not None else inner_version)
    return TemplateStruct(
        pack_address(template.destination),
        0,
        template.protocol,
        family,
        pack_address(template.source),
        kernel_reqid(template.reqid) if template.reqid else 0,
        mode_number(template.mode),
        optional=int(template.level is Level.USE),
    )


# Replies


@dataclass(frozen=True, slots=True)
class KernelPolicy:
    """A policy as the kernel told it. `ours`: by its index or by its templates' reqid."""

    policy: Policy
    ours: bool


def policy_from(message: Message) -> KernelPolicy | None:
    """From NEWPOLICY; None for the policy of a single socket. MalformedMessage also for what our policies never are."""
    info = PolicyStruct.unpack(message.body)
    direction = direction_from(info.dir)
    if direction is None:
        return None
    templates = templates_from(message.attributes.get(Attribute.TMPL, b""))
    ours = is_ours(info.number) or any(is_ours(reqid) for reqid, _ in templates)
    action = Action.DISCARD if info.action == PolicyAction.BLOCK else Action.PROTECT if templates else Action.BYPASS
    selector = selector_from(info.selector, message.attributes)
    policy = Policy(selector, direction, action, info.priority, tuple(template for _, template in templates), index=PolicyIndex(info.number))
    return KernelPolicy(policy, ours)


def templates_from(data: bytes) -> list[tuple[int, Template]]:
    """The templates of an XFRMA_TMPL, each with the kernel's own reqid."""
    if len(data) % TEMPLATE.size or len(data) > MAX_TEMPLATES * TEMPLATE.size:
        raise MalformedMessage(f"templates of {len(data)} octets")
    found = []
    for at in range(0, len(data), TEMPLATE.size):
        struct = TemplateStruct.unpack(data, at)
        # the kernel takes 0 for IPv4, as old programs leave it
        family = struct.family or AF_INET
        version_of(family)
        level = Level.USE if struct.optional else Level.UNIQUE
        source, destination = _outer(struct.saddr, family), _outer(struct.daddr, family)
        reqid = reqid_from(struct.reqid) if is_ours(struct.reqid) else ReqId(struct.reqid)
        found.append((struct.reqid, Template(mode_from(struct.mode), reqid, source, destination, struct.proto or PROTOCOL_ESP, level)))
    return found


def _outer(address: bytes, family: int) -> IPAddress | None:
    return unpack_address(address, family) if any(address) else None
