"""Policies of the model as extensions of the SADB_X_SPD messages, and back: each writer above its reader.

`private` as in `sa_messages`. Without X_SELECTOR a selector is what Linux reads from two addresses: a prefix, one port or any, and for
ICMP the type as source port and the code as destination port, 0 for any (net/key/af_key.c, include/net/xfrm.h).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Final

from kernel_shim.model import (
    ANY_PORT,
    ANY_PROTOCOL,
    NO_MARK,
    PROTOCOL_ESP,
    PROTOCOL_ICMP,
    PROTOCOL_ICMPV6,
    Action,
    AddressRange,
    Direction,
    IPAddress,
    KernelError,
    Level,
    Migration,
    Mode,
    Move,
    Policy,
    PolicyIndex,
    PortRange,
    ReqId,
    Selector,
    Template,
    Unresolved,
)
from kernel_shim.pfkey.constants import IPSEC_POLICY_IPSEC, IPSEC_PROTO_ANY, MAX_TEMPLATES, ExtensionType
from kernel_shim.pfkey.messages import (
    Address,
    Extension,
    IpsecRequest,
    LifetimeExtension,
    Message,
    PfKeyError,
    PolicyExtension,
    SecurityContextExtension,
)
from kernel_shim.pfkey.private import SelectorExtension, UnresolvedExtension
from kernel_shim.pfkey.sa_messages import unspecified

_ICMP: Final = (PROTOCOL_ICMP, PROTOCOL_ICMPV6)
PROTOCOL_AH: Final = 51
PROTOCOL_IPCOMP: Final = 108
_DIRECTION_BITS: Final = 7  # of an index: XFRM_POLICY_IN, _OUT, _FWD are 0, 1, 2


def policy_extensions(policy: Policy, *, private: bool) -> Iterator[Extension]:
    requests = tuple(_request(template, policy.selector.version) for template in policy.templates)
    yield from selector_extensions(policy.selector, private=private)
    yield PolicyExtension(policy.action, policy.direction, policy.index, policy.priority, requests)
    for kind, seconds in ((ExtensionType.LIFETIME_HARD, policy.hard_seconds), (ExtensionType.LIFETIME_SOFT, policy.soft_seconds)):
        if seconds:
            yield LifetimeExtension(kind, addtime=seconds)
    if policy.context is not None:
        yield SecurityContextExtension(policy.context)
    if private:
        yield UnresolvedExtension(policy.unresolved)


def policy_from(message: Message) -> Policy:
    """The policy of an SPDADD, SPDUPDATE, SPDGET or SPDDUMP."""
    extension = message.require(PolicyExtension)
    if extension.action > IPSEC_POLICY_IPSEC:
        raise PfKeyError("X_POLICY.type", str(extension.action))
    action = Action(extension.action)
    selector = selector_from(message)
    if action is Action.PROTECT and not extension.requests:
        raise PfKeyError("X_POLICY", "protects with no template")  # Linux would let such packets pass in clear
    if len(extension.requests) > MAX_TEMPLATES:
        raise PfKeyError("X_POLICY", f"more than {MAX_TEMPLATES} templates", errno.ELOOP)
    context = message.find(SecurityContextExtension)
    unresolved = message.find(UnresolvedExtension)
    return Policy(
        selector,
        direction_from(extension),
        action,
        extension.priority,
        tuple(_template(request) for request in extension.requests) if action is Action.PROTECT else (),
        unresolved.mode if unresolved is not None else Unresolved.QUEUE,
        PolicyIndex(extension.id),
        _seconds(message, ExtensionType.LIFETIME_SOFT),
        _seconds(message, ExtensionType.LIFETIME_HARD),
        context.context if context is not None else None,
    )


def _seconds(message: Message, kind: ExtensionType) -> int:
    """A bound from the policy's first use is met by counting from its addition; Linux takes bounds in octets and packets and does not keep them."""
    lifetime = message.find(LifetimeExtension, kind)
    if lifetime is None:
        return 0
    if lifetime.octets or lifetime.allocations:
        raise PfKeyError(kind.name, "a policy has lifetimes in seconds only", errno.EOPNOTSUPP)
    return min(filter(None, (lifetime.addtime, lifetime.usetime)), default=0)


def migration_extensions(migration: Migration) -> Iterator[Extension]:
    """MIGRATE: each template comes twice, as it is and as it will be."""
    yield from selector_extensions(migration.selector, private=False)
    requests = []
    for move in migration.moves:
        requests.append(IpsecRequest(PROTOCOL_ESP, move.mode, Level.REQUIRE, move.reqid, move.old_source, move.old_destination))
        requests.append(IpsecRequest(PROTOCOL_ESP, move.mode, Level.REQUIRE, move.reqid, move.new_source, move.new_destination))
    yield PolicyExtension(Action.PROTECT, migration.direction, requests=tuple(requests))


def migration_from(message: Message) -> Migration:
    """As Linux' pfkey_migrate; KMADDRESS is for the key managers that are told."""
    extension = message.require(PolicyExtension)
    requests = extension.requests
    if not requests or len(requests) % 2:
        raise PfKeyError("X_POLICY", f"{len(requests)} requests, which are no pairs")
    try:
        direction = Direction(extension.direction)
    except ValueError:
        raise PfKeyError("X_POLICY.dir", str(extension.direction)) from None
    moves = tuple(_move(old, new) for old, new in zip(requests[::2], requests[1::2], strict=True))
    if len({(move.mode, move.reqid, move.old_source, move.old_destination) for move in moves}) != len(moves):
        raise PfKeyError("X_POLICY", "two requests of the same addresses")
    return Migration(direction, selector_from(message), moves)


def _move(old: IpsecRequest, new: IpsecRequest) -> Move:
    if (old.protocol, old.mode) != (new.protocol, new.mode):
        raise PfKeyError("X_POLICY.ipsecrequest", "protocol or mode would change")
    if old.protocol != PROTOCOL_ESP:
        raise PfKeyError("X_POLICY.ipsecrequest_proto", str(old.protocol), errno.EPROTONOSUPPORT)
    if old.mode not in tuple(Mode):
        raise PfKeyError("X_POLICY.ipsecrequest_mode", str(old.mode))
    if old.source is None or old.destination is None or new.source is None or new.destination is None:
        raise PfKeyError("X_POLICY.ipsecrequest", "without endpoints")
    if new.source.is_unspecified or new.destination.is_unspecified:
        raise PfKeyError("X_POLICY.ipsecrequest", "to no address")
    return Move(Mode(old.mode), ReqId(old.reqid), old.source, old.destination, new.source, new.destination)


def direction_from(extension: PolicyExtension) -> Direction:
    """The direction, which an index also holds when the field is 0 (Linux' xfrm_policy_id2dir)."""
    number = extension.direction or (extension.id & _DIRECTION_BITS) + 1
    try:
        return Direction(number)
    except ValueError:
        raise PfKeyError("X_POLICY.dir", str(number)) from None


def require_policy_expressible(policy: Policy) -> None:
    """KernelError(EOPNOTSUPP) that names what plain PF_KEY cannot say of `policy`."""
    require_selector_expressible(policy.selector)
    if policy.unresolved is not Unresolved.QUEUE:
        raise KernelError(errno.EOPNOTSUPP, f"this kernel's PF_KEY has no unresolved = {policy.unresolved.value}")


def require_selector_expressible(selector: Selector) -> None:
    beyond = {
        f"selector {selector}": _plain_selector(selector) != selector,
        "if_id": selector.if_id != 0,
        "mark": selector.mark != NO_MARK,
    }
    for what, is_asked in beyond.items():
        if is_asked:
            raise KernelError(errno.EOPNOTSUPP, f"this kernel's PF_KEY has no {what}")


# Selectors


def selector_extensions(selector: Selector, *, private: bool) -> Iterator[Extension]:
    """With ranges, the address extensions hold the smallest prefix around them."""
    protocol = selector.protocol or IPSEC_PROTO_ANY
    source_port, destination_port = _plain_ports(selector)
    yield Address(ExtensionType.ADDRESS_SRC, *_cover(selector.source, source_port), protocol)
    yield Address(ExtensionType.ADDRESS_DST, *_cover(selector.destination, destination_port), protocol)
    if private:
        yield SelectorExtension(selector)


def selector_from(message: Message) -> Selector:
    private = message.find(SelectorExtension)
    if private is not None:
        return private.selector
    source = message.require(Address, ExtensionType.ADDRESS_SRC)
    destination = message.require(Address, ExtensionType.ADDRESS_DST)
    return _selector_of(source, destination)


def _selector_of(source: Address, destination: Address) -> Selector:
    if source.address.version != destination.address.version:
        raise PfKeyError("ADDRESS_DST", "not of the family of ADDRESS_SRC")
    protocol = ANY_PROTOCOL if source.protocol == IPSEC_PROTO_ANY else source.protocol
    if protocol in _ICMP:
        source_ports = destination_ports = _icmp_ports(source.port, destination.port)
    else:
        source_ports, destination_ports = (PortRange(port, port) if port else ANY_PORT for port in (source.port, destination.port))
    return Selector(_network(source), _network(destination), protocol, source_ports, destination_ports)


def _network(address: Address) -> AddressRange:
    return AddressRange.of(ip_network((address.address, address.prefix_length), strict=False))


def _cover(addresses: AddressRange, port: int) -> tuple[IPAddress, int, int]:
    """The smallest prefix around a range: its address, the port, the prefix length."""
    host_bits = (int(addresses.first) ^ int(addresses.last)).bit_length()
    network = ip_network((addresses.first, addresses.first.max_prefixlen - host_bits), strict=False)
    return network.network_address, port, network.prefixlen


def _plain_ports(selector: Selector) -> tuple[int, int]:
    source, destination = selector.source_ports, selector.destination_ports
    if selector.protocol in _ICMP:
        kind = source.low >> 8
        if source.any or kind != source.high >> 8:
            return 0, 0
        return kind, source.low & 0xFF if source.low == source.high else 0
    return source.low if source.low == source.high else 0, destination.low if destination.low == destination.high else 0


def _icmp_ports(kind: int, code: int) -> PortRange:
    if kind > 0xFF or code > 0xFF:
        raise PfKeyError("ADDRESS_SRC.port", f"no ICMP type and code: {kind}, {code}")
    if kind == 0:
        return ANY_PORT
    return PortRange(kind << 8 | code, kind << 8 | (code or 0xFF))


def _plain_selector(selector: Selector) -> Selector:
    """What is left of a selector without our extensions, if_id and mark aside."""
    source, destination = selector_extensions(selector, private=False)
    assert isinstance(source, Address)
    assert isinstance(destination, Address)
    plain = _selector_of(source, destination)
    return Selector(plain.source, plain.destination, plain.protocol, plain.source_ports, plain.destination_ports, selector.if_id, selector.mark)


# Templates


def _request(template: Template, version: int) -> IpsecRequest:
    source, destination = template.source, template.destination
    if source is None and destination is None and template.mode is Mode.TRANSPORT:
        return IpsecRequest(template.protocol, template.mode, template.level, template.reqid)
    family = (source or destination or unspecified(version)).version
    return IpsecRequest(
        *(template.protocol, template.mode, template.level, template.reqid),
        source or unspecified(family),
        destination or unspecified(family),
    )


def _template(request: IpsecRequest) -> Template:
    if request.protocol != PROTOCOL_ESP:
        other = request.protocol in (PROTOCOL_AH, PROTOCOL_IPCOMP)
        raise PfKeyError("X_POLICY.ipsecrequest_proto", str(request.protocol), errno.EPROTONOSUPPORT if other else errno.EINVAL)
    try:
        mode, level = Mode(request.mode), Level(request.level)
    except ValueError:
        raise PfKeyError("X_POLICY.ipsecrequest", f"mode {request.mode}, level {request.level}") from None
    if mode is Mode.TUNNEL and request.source is None:
        raise PfKeyError("X_POLICY.ipsecrequest", "tunnel mode without endpoints")
    return Template(mode, ReqId(request.reqid), _specified(request.source), _specified(request.destination), request.protocol, level)


def _specified(address: IPAddress | None) -> IPAddress | None:
    return None if address is None or address.is_unspecified else address
