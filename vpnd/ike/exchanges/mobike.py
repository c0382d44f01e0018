"""MOBIKE (RFC 4555): an IKE SA and its CHILD_SAs move to other addresses, and what is needed to know which.

The original initiator decides (`look_around`, `candidates`) and says so (`update`); the responder answers, and checks that
the peer really is where its message came from (`_check_route`) before it sends data there. `move_children` serves NAT mappings, too.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from kernel_shim.model import PORT_NAT_T, Endpoint, IPAddress, Mode, SecurityAssociation, UdpEncapsulation
from vpnd.ike import succession
from vpnd.ike.effects import IkeMoved, MigrateSa, Reason
from vpnd.ike.gateway_id import reachable
from vpnd.ike.iana import Exchange, NotifyType
from vpnd.ike.nat import HASH_LENGTH, detect, detection_payloads
from vpnd.ike.session import Session
from vpnd.ike.state import Child, IkeSaState
from vpnd.ike.steps import Ask, Steps, Task, ask
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import NotifyPayload, Payload
from vpnd.peers import fixed_address

COOKIE2_LENGTH: Final = 32  # octets; RFC 4555 section 4.2.5: 8 to 64

MAX_ADDITIONAL: Final = 32  # addresses of a peer that are remembered, and of ours that are told
MAX_PATHS: Final = 16  # pairs of addresses over which one copy of a request goes
PROBE_COPY: Final = 2  # from this copy on a request goes over every path that there may be
MAX_UPDATES: Final = 16  # of one exchange; addresses that change faster wait for the next change

UPDATE: Final = "IKE_MOBIKE"
ROUTE_CHECK: Final = "IKE_ROUTE_CHECK"
ADDRESSES: Final = "IKE_ADDRESSES"

_LISTS: Final = (NotifyType.ADDITIONAL_IP4_ADDRESS, NotifyType.ADDITIONAL_IP6_ADDRESS, NotifyType.NO_ADDITIONAL_ADDRESSES)


# Both sides, in IKE_AUTH


def announcement(session: Session) -> list[Payload]:
    """RFC 4555 section 3.1."""
    return [NotifyPayload(NotifyType.MOBIKE_SUPPORTED), *_own_addresses(session)] if session.connection.mobike else []


def notice(session: Session, message: Message) -> None:
    """What the peer's IKE_AUTH says of it."""
    session.mobike = session.connection.mobike and message.notify(NotifyType.MOBIKE_SUPPORTED) is not None
    if session.mobike:
        _read_addresses(session, message)


def _additional(session: Session) -> tuple[IPAddress, ...]:
    return tuple(address for address in session.context.addresses() if address != session.local.address)[:MAX_ADDITIONAL]


def _own_addresses(session: Session) -> list[Payload]:
    """RFC 4555 section 3.4: those besides the one that the message comes from."""
    session.told_addresses = _additional(session)
    payloads: list[Payload] = [
        NotifyPayload(NotifyType.ADDITIONAL_IP4_ADDRESS if address.version == 4 else NotifyType.ADDITIONAL_IP6_ADDRESS, address.packed)
        for address in session.told_addresses
    ]
    return payloads or [NotifyPayload(NotifyType.NO_ADDITIONAL_ADDRESSES)]


def _read_addresses(session: Session, message: Message) -> None:
    """RFC 4555 section 3.6: the new list replaces the old one; without a list nothing changes."""
    found = [notify for kind in _LISTS for notify in message.notifies(kind)]
    if not found:
        return
    addresses: list[IPAddress] = []
    for notify in found[:MAX_ADDITIONAL]:
        if notify.type == NotifyType.ADDITIONAL_IP4_ADDRESS and len(notify.data) == 4:
            addresses.append(IPv4Address(notify.data))
        elif notify.type == NotifyType.ADDITIONAL_IP6_ADDRESS and len(notify.data) == 16:
            addresses.append(IPv6Address(notify.data))
    session.peer_addresses = tuple(dict.fromkeys(address for address in addresses if reachable(address)))


# The original initiator decides


def look_around(session: Session) -> None:
    """After a change of the host's addresses or routes."""
    if not session.mobike or session.established_at is None or session.state is not IkeSaState.ESTABLISHED:
        return
    if session.original_initiator and (path := _best_path(session)) is not None:
        move_to(session, *path)
    elif _additional(session) != session.told_addresses:
        _begin(session, ADDRESSES, _tell_addresses)


def _best_path(session: Session) -> tuple[Endpoint, Endpoint] | None:
    """Where to go; None to stay."""
    own = session.context.addresses()
    if session.local.address in own and session.local.address in map(fixed_address, session.connection.local_addrs):
        return None
    for remote in (session.remote.address, *session.peer_addresses):
        source = session.context.source_towards(remote)
        if source is not None and source in own:
            return None if (source, remote) == (session.local.address, session.remote.address) else _path(session, source, remote)
    return None


def _path(session: Session, local: IPAddress, remote: IPAddress) -> tuple[Endpoint, Endpoint]:
    port = session.remote.port if remote == session.remote.address else PORT_NAT_T
    return Endpoint(local, PORT_NAT_T), Endpoint(remote, port)


def candidates(session: Session) -> Iterator[tuple[Endpoint, Endpoint]]:
    """RFC 4555 section 3.10: paths besides the one in use that may work."""
    found = 0
    for remote in (session.remote.address, *session.peer_addresses):
        for local in session.context.addresses():
            if local.version == remote.version and (local, remote) != (session.local.address, session.remote.address) and found < MAX_PATHS:
                found += 1
                yield _path(session, local, remote)


def is_candidate(session: Session, local: Endpoint, remote: Endpoint) -> bool:
    return (local, remote) in candidates(session)


def move_to(session: Session, local: Endpoint, remote: Endpoint) -> None:
    """RFC 4555 section 3.5: from now on everything goes this way, what is under way included; then the peer is told."""
    session.local, session.remote = local, remote
    session.repeat_request()
    if session.active is None or session.active.name != UPDATE:
        _begin(session, UPDATE, update)


def _begin(session: Session, name: str, steps: object) -> None:
    if not any(task.name == name for task in session.queue):
        session.queue.appendleft(Task(name, steps))  # type: ignore[arg-type]


def update(session: Session, task: Task) -> Steps[None]:
    """HDR, SK { N(UPDATE_SA_ADDRESSES), N(NAT_DETECTION_SOURCE_IP), N(NAT_DETECTION_DESTINATION_IP), [N(ADDITIONAL_*),] N(COOKIE2) } -->"""
    refused: set[tuple[Endpoint, Endpoint]] = set()
    for _ in range(MAX_UPDATES):
        path = session.local, session.remote
        # RFC 4555 section 3.7: an answer that bears the cookie was written by who got the request there, and not in advance
        cookie = NotifyPayload(NotifyType.COOKIE2, session.context.entropy(COOKIE2_LENGTH))
        payloads = [NotifyPayload(NotifyType.UPDATE_SA_ADDRESSES), *_detection(session), *_own_addresses(session), cookie]
        response = yield from ask(Ask(Exchange.INFORMATIONAL, tuple(payloads)))
        if path != (session.local, session.remote):
            continue  # it moved on meanwhile
        # RFC 4555 section 3.5: the peer, or a NAT on the way, does not let us use this one
        if response.notify(NotifyType.UNACCEPTABLE_ADDRESSES) or response.notify(NotifyType.UNEXPECTED_NAT_DETECTED):
            refused.add(path)
            other = next((other for other in candidates(session) if other not in refused), None)
            if other is None:
                session.close(Reason.ADDRESS_REFUSED, f"{session.describe()}: refused {session.local} and every other address")
                return
            session.local, session.remote = other
            continue
        if not _returned(session, cookie, response):
            return
        _take_detection(session, response)
        move_children(session)
        return


def _returned(session: Session, cookie: NotifyPayload, response: Message) -> bool:
    """Without its cookie the IKE SA is closed."""
    echo = response.notify(NotifyType.COOKIE2)
    if echo is not None and hmac.compare_digest(echo.data, cookie.data):
        return True
    session.close(Reason.INVALID_SYNTAX, f"{session.describe()}: did not return COOKIE2")
    return False


def _tell_addresses(session: Session, task: Task) -> Steps[None]:
    """RFC 4555 section 3.6."""
    yield from ask(Ask(Exchange.INFORMATIONAL, tuple(_own_addresses(session))))


def probe(session: Session) -> Sequence[Payload]:
    """What a liveness check says in addition: behind a NAT we want to see whether its mapping changed (RFC 4555 section 3.8)."""
    return _detection(session) if session.mobike and session.original_initiator and session.nat_local else ()


def notice_mapping(session: Session, response: Message) -> None:
    """The answer to such a check."""
    hash_of_us = response.notify(NotifyType.NAT_DETECTION_DESTINATION_IP)
    if hash_of_us is None or not session.mobike or not session.original_initiator:
        return
    if session.mapping_hash and not hmac.compare_digest(session.mapping_hash, hash_of_us.data):
        _begin(session, UPDATE, update)
    session.mapping_hash = hash_of_us.data


def _detection(session: Session) -> tuple[NotifyPayload, NotifyPayload]:
    fake = session.context.entropy(HASH_LENGTH) if session.force_encapsulation else None
    return detection_payloads(session.wire_spi_i, session.wire_spi_r, session.local, session.remote, fake)


def _take_detection(session: Session, message: Message) -> None:
    if detect(message, session.wire_spi_i, session.wire_spi_r, session.local, session.remote) is not None:
        session.notice_nat(message, session.wire_spi_i, session.wire_spi_r, session.local, session.remote)
    if (hash_of_us := message.notify(NotifyType.NAT_DETECTION_DESTINATION_IP)) is not None:
        session.mapping_hash = hash_of_us.data


# The other side answers


def answer(session: Session, request: Message) -> list[Payload]:
    """What an INFORMATIONAL request has to do with addresses, and the payloads of its answer."""
    if not session.mobike:
        return []
    cookie = request.notify(NotifyType.COOKIE2)
    # RFC 4555 section 3.7
    echo: list[Payload] = [NotifyPayload(NotifyType.COOKIE2, cookie.data)] if cookie is not None else []
    _read_addresses(session, request)
    local, remote = session.arrived
    # RFC 4555 section 3.5: only the original initiator updates
    if request.notify(NotifyType.UPDATE_SA_ADDRESSES) is not None and not session.original_initiator:
        refusal = _refusal(request, local, remote)
        if refusal is not None:
            return [NotifyPayload(refusal), *echo]
        elsewhere = remote != session.remote
        if elsewhere:
            session.proven = session.path
            session.claims += 1
        session.local, session.remote = local, remote
        _take_detection(session, request)
        session.repeat_request()
        if session.proven is None:
            move_children(session)
        elif not any(task.name == ROUTE_CHECK for task in (session.active, *session.queue) if task):
            _begin(session, ROUTE_CHECK, _check_route)
    # RFC 4555 section 3.8: who asks is told what the NATs did to its message
    if request.notify(NotifyType.NAT_DETECTION_SOURCE_IP) is not None:
        fake = session.context.entropy(HASH_LENGTH) if session.force_encapsulation else None
        echo += detection_payloads(session.wire_spi_i, session.wire_spi_r, local, remote, fake)
    return echo


def _refusal(request: Message, local: Endpoint, remote: Endpoint) -> NotifyType | None:
    allowed = request.notify(NotifyType.NO_NATS_ALLOWED)
    # RFC 4555 section 3.9: source, destination and both ports as they were sent
    seen = remote.address.packed + local.address.packed + remote.port.to_bytes(2, "big") + local.port.to_bytes(2, "big")
    if allowed is not None and not hmac.compare_digest(allowed.data, seen):
        return NotifyType.UNEXPECTED_NAT_DETECTED
    return None if reachable(remote.address) else NotifyType.UNACCEPTABLE_ADDRESSES


def _check_route(session: Session, task: Task) -> Steps[None]:
    """RFC 4555 section 3.7: no data goes where a peer only claims to be, lest it floods a third party."""
    for _ in range(MAX_UPDATES):
        # a copy of the request may have gone to where the peer was in between, so only a cookie that is younger than its last claim proves that
        claims = session.claims
        cookie = NotifyPayload(NotifyType.COOKIE2, session.context.entropy(COOKIE2_LENGTH))
        # libreswan 5.2 returns a cookie only to who asks what the NATs did, too (section 3.8), which anybody may
        response = yield from ask(Ask(Exchange.INFORMATIONAL, (*_detection(session), cookie)))
        if not _returned(session, cookie, response):
            return
        if claims == session.claims:
            session.proven = None
            move_children(session)
            return


# CHILD_SAs


def move_children(session: Session) -> None:
    """The CHILD_SAs follow the IKE SA to its addresses and ports, with or without UDP encapsulation, as it is now."""
    for child in list(session.children.values()):
        move_child(session, child)
    session.emit(IkeMoved(session.local, session.remote))


def move_child(session: Session, child: Child) -> None:
    inbound, outbound = _moved(session, child.sa.inbound, inward=True), _moved(session, child.sa.outbound, inward=False)
    if (inbound, outbound) == (child.sa.inbound, child.sa.outbound):
        return
    # RFC 4555 section 1.1: transport mode is between the addresses themselves; with only a port that changed it goes on
    if child.sa.mode is Mode.TRANSPORT and (inbound.source, inbound.destination) != (child.sa.inbound.source, child.sa.inbound.destination):
        succession.close(session, child, Reason.ADDRESS_CHANGED)
        return
    session.emit(MigrateSa(child.sa.id, child.sa.inbound, inbound))
    if child.sends:
        session.emit(MigrateSa(child.sa.id, child.sa.outbound, outbound))
    child.sa = replace(child.sa, inbound=inbound, outbound=outbound, encapsulated=session.path.encapsulated)


def _moved(session: Session, sa: SecurityAssociation, *, inward: bool) -> SecurityAssociation:
    local, remote, encapsulated = session.path
    source, destination = (remote, local) if inward else (local, remote)
    encapsulation = UdpEncapsulation(source.port, destination.port) if encapsulated else None
    return replace(sa, source=source.address, destination=destination.address, encapsulation=encapsulation)
