"""The negotiation of a CHILD_SA, as IKE_AUTH and CREATE_CHILD_SA share it (RFC 7296 sections 1.2, 1.3.1 and 2.9), and the SAs that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from kernel_shim.algorithms import EspAlgorithm
from kernel_shim.model import (
    NO_MARK,
    AcquireSequence,
    Action,
    AddressRange,
    Direction,
    Lifetime,
    Mode,
    ReqId,
    SaId,
    SecurityAssociation,
    Spi,
    UdpEncapsulation,
)
from kernel_shim.secret import Secret
from vpnd.config.model import ChildConfig
from vpnd.ike.context import ChildRequest
from vpnd.ike.effects import NO_ACQUIRE, AllocateSpi, ChildSa, Reason
from vpnd.ike.iana import NotifyType, ProtocolId
from vpnd.ike.keymat import child_keys
from vpnd.ike.marking import NO_MARKING, Marking, NumbersExhausted
from vpnd.ike.narrowing import Selectors, narrow, of_flow, paired, resolve, substituted
from vpnd.ike.narrowing import within as only_narrows
from vpnd.ike.proposal import Proposal, accept, number_proposals, select
from vpnd.ike.proposal import within as within_kernel
from vpnd.ike.session import Session
from vpnd.ike.state import Child
from vpnd.ike.steps import Steps, allocate
from vpnd.ike.wire.message import Message
from vpnd.ike.wire.payloads import NotifyPayload, Payload, SaPayload, TsiPayload, TsrPayload

SPI_LENGTH: Final = 4
SMALLEST_SPI: Final = 256  # RFC 4303 section 2.1: 0 to 255 are reserved
_NO_PADDING: Final = NotifyPayload(NotifyType.ESP_TFC_PADDING_NOT_SUPPORTED)  # RFC 7296 section 1.3.1


class ChildRefused(Exception):
    """There will be no CHILD_SA. `notify` and `data` say so to the peer, `reason` and `detail` to us; `answer` is what the peer said."""

    def __init__(self, reason: Reason, notify: int, data: bytes = b"", detail: str = "", answer: int = 0) -> None:
        super().__init__(detail or reason.value)
        self.reason, self.notify, self.data, self.detail, self.answer = reason, notify, data, detail, answer

    @property
    def payload(self) -> NotifyPayload:
        return NotifyPayload(self.notify, self.data)


@dataclass(frozen=True, slots=True)
class Keying:
    """What the keys of a CHILD_SA come from. `initiator`: the exchange that makes it is ours. `shared`: of its key exchanges, in their order."""

    nonce_i: bytes
    nonce_r: bytes
    initiator: bool
    shared: tuple[Secret, ...] = ()


@dataclass(frozen=True, slots=True)
class Agreed:
    """What both sides know once the answer stands."""

    config: ChildConfig
    proposal: Proposal
    algorithm: EspAlgorithm
    reqid: int
    mode: Mode
    local_ts: Selectors
    remote_ts: Selectors
    spi_out: Spi
    acquire: AcquireSequence = NO_ACQUIRE
    padding: bool = False  # the peer takes TFC padding
    marking: Marking = NO_MARKING


# Ours to ask


@dataclass(frozen=True, slots=True)
class Offer:
    request: ChildRequest
    reqid: int
    proposals: tuple[Proposal, ...]
    local_ts: Selectors
    remote_ts: Selectors
    spi: SaId
    takes_padding: bool = False
    marking: Marking = NO_MARKING

    def payloads(self) -> list[Payload]:
        """SA, TSi, TSr and notifications; RFC 7296 section 1.3.1."""
        payloads: list[Payload] = [SaPayload(self.proposals), TsiPayload(self.local_ts), TsrPayload(self.remote_ts)]
        if self.request.child.mode is Mode.TRANSPORT:
            payloads.append(NotifyPayload(NotifyType.USE_TRANSPORT_MODE))
        return payloads if self.takes_padding else [*payloads, _NO_PADDING]


def reqid_of(session: Session, request: ChildRequest) -> int:
    return request.reqid or request.child.reqid or session.context.reqid(session.connection, request.child)


def _marking(session: Session, child: ChildConfig, like: Child | None) -> Marking:
    """Kept over a rekeying."""
    if like is not None:
        return like.sa.marking
    try:
        return session.context.marking(session.connection, child, session.if_ids)
    except NumbersExhausted as error:
        raise ChildRefused(Reason.NO_ADDITIONAL_SAS, NotifyType.NO_ADDITIONAL_SAS, detail=str(error)) from error


def allocation(session: Session, config: ChildConfig, reqid: int, acquire: AcquireSequence = NO_ACQUIRE) -> AllocateSpi:
    session.tokens += 1
    return AllocateSpi(session.tokens, config.name, session.path.local, session.path.remote, config.mode, reqid, acquire)


def make_offer(session: Session, request: ChildRequest, *, key_exchange: bool, like: Child | None = None) -> Steps[Offer]:
    """Reserve an SPI and say what we want. `like` is the CHILD_SA that it is to replace. Raises ChildRefused."""
    child = request.child
    proposals = _usable(session, child, key_exchange=key_exchange)
    if not proposals:
        raise ChildRefused(Reason.NO_PROPOSAL_CHOSEN, NotifyType.NO_PROPOSAL_CHOSEN, detail="the kernel supports none of the ESP proposals")
    check_encapsulation(session)
    local_ts, remote_ts = resolve(child.local_ts, session.path.local.address), resolve(child.remote_ts, session.path.remote.address)
    # RFC 7296 section 2.9.2: what it replaces, no less
    model = like.sa if like is not None else request.like
    if model is not None:
        local_ts, remote_ts = model.local_ts, model.remote_ts
    # RFC 7296 section 2.9: the packet that asked goes first
    first = of_flow(request.flow, local_ts, remote_ts) if request.flow is not None else None
    if first is not None:
        local_ts, remote_ts = (first[0], *local_ts), (first[1], *remote_ts)
    reqid, marking = reqid_of(session, request), _marking(session, child, like)
    spi = yield from allocate(session, allocation(session, child, reqid, request.acquire))
    if spi is None:
        raise ChildRefused(Reason.KERNEL_REFUSED, NotifyType.TEMPORARY_FAILURE, detail="no SPI")
    numbered = number_proposals(proposals, spi.spi.to_bytes(SPI_LENGTH, "big"))
    return Offer(request, reqid, numbered, local_ts, remote_ts, spi, session.context.capabilities.tfc_padding, marking)


def read_answer(session: Session, offer: Offer, message: Message) -> Agreed:
    """What the peer made of our offer. Raises ChildRefused for what only a faulty peer answers."""
    sa, tsi, tsr = message.first(SaPayload), message.first(TsiPayload), message.first(TsrPayload)
    if sa is None or tsi is None or tsr is None:
        raise ChildRefused(Reason.INVALID_SYNTAX, NotifyType.INVALID_SYNTAX, detail="the peer's answer has no SA, TSi or TSr")
    chosen = accept(offer.proposals, sa.proposals)
    if chosen is None:
        raise ChildRefused(Reason.NO_PROPOSAL_CHOSEN, NotifyType.NO_PROPOSAL_CHOSEN, detail="the peer chose what was not proposed")
    mode = Mode.TRANSPORT if message.notify(NotifyType.USE_TRANSPORT_MODE) else Mode.TUNNEL
    local_ts, remote_ts = _seen_from_here(session, tsi.selectors, tsr.selectors) if mode is Mode.TRANSPORT else (tsi.selectors, tsr.selectors)
    # RFC 7296 section 2.9: an answer narrows, it never widens
    pair = paired(local_ts, remote_ts)
    if pair is None or not only_narrows(local_ts, offer.local_ts) or not only_narrows(remote_ts, offer.remote_ts):
        raise ChildRefused(Reason.TS_UNACCEPTABLE, NotifyType.TS_UNACCEPTABLE, detail="the peer's selectors are not within ours")
    # RFC 7296 section 1.3.1: a responder may decline transport mode; our policies ask for exactly one mode
    if mode is not offer.request.child.mode:
        raise ChildRefused(Reason.NO_PROPOSAL_CHOSEN, NotifyType.NO_PROPOSAL_CHOSEN, detail="the peer declined the mode")
    spi, algorithm = _peer_spi(chosen), _algorithm(chosen)
    own = offer.request.acquire, _takes_padding(message), offer.marking
    return Agreed(offer.request.child, chosen, algorithm, offer.reqid, mode, pair[0], pair[1], spi, *own)


# The peer's to ask


@dataclass(frozen=True, slots=True)
class Asked:
    """What the peer wants, and which of our children that is."""

    agreed: Agreed
    tsi: Selectors  # as they go back
    tsr: Selectors
    takes_padding: bool = False


def choose(session: Session, message: Message, *, key_exchange: bool, ke_group: int | None = None, like: Child | None = None) -> Asked:
    """The child configuration for a peer's request, narrowed. `like` is the CHILD_SA that it replaces. Raises ChildRefused."""
    sa, tsi, tsr = message.first(SaPayload), message.first(TsiPayload), message.first(TsrPayload)
    if sa is None or tsi is None or tsr is None:
        raise ChildRefused(Reason.INVALID_SYNTAX, NotifyType.INVALID_SYNTAX, detail="no SA, TSi or TSr")
    check_encapsulation(session)
    offered = tuple(proposal for proposal in sa.proposals if proposal.protocol == ProtocolId.ESP and len(proposal.spi) == SPI_LENGTH)
    transport = message.notify(NotifyType.USE_TRANSPORT_MODE) is not None
    asked_local, asked_remote = _seen_from_here(session, tsr.selectors, tsi.selectors) if transport else (tsr.selectors, tsi.selectors)

    best: tuple[tuple[bool, ...], Asked] | None = None
    refusal = ChildRefused(Reason.TS_UNACCEPTABLE, NotifyType.TS_UNACCEPTABLE, detail=f"{_show(tsi.selectors)} === {_show(tsr.selectors)}")
    for config in [like.config] if like else session.connection.children.values():
        if config.action is not Action.PROTECT:
            continue
        local_ts = narrow(asked_local, resolve(config.local_ts, session.path.local.address))
        remote_ts = narrow(asked_remote, resolve(config.remote_ts, session.path.remote.address)) if local_ts else ()
        pair = paired(local_ts, remote_ts)
        if pair is None:
            continue
        mode = Mode.TRANSPORT if transport and config.mode is Mode.TRANSPORT else Mode.TUNNEL
        # RFC 7296 section 1.3.1: whether transport mode comes about is the responder's choice; our policies ask for exactly one mode
        if mode is not config.mode or (mode is Mode.TRANSPORT and not _between_hosts(session, pair)):
            refusal = ChildRefused(Reason.NO_PROPOSAL_CHOSEN, NotifyType.NO_PROPOSAL_CHOSEN, detail=f"{config.name} is for the other mode")
            continue
        usable = _usable(session, config, key_exchange=key_exchange)
        chosen = select(usable, offered, prefer_configured=True, group=ke_group)
        if chosen is None:
            refusal = ChildRefused(Reason.NO_PROPOSAL_CHOSEN, NotifyType.NO_PROPOSAL_CHOSEN, detail=f"none of the peer's ESP proposals fits {config.name}")
            continue
        # RFC 7296 section 2.9: the peer's first selectors tell what it needs most; then what it gets in full
        first = any(ours.contains(asked_local[0]) for ours in pair[0]) and any(ours.contains(asked_remote[0]) for ours in pair[1])
        whole = only_narrows(asked_local, pair[0]) and only_narrows(asked_remote, pair[1])
        score = (first, whole)
        if best is None or score > best[0]:
            agreed = Agreed(config, chosen, _algorithm(chosen), 0, mode, pair[0], pair[1], _peer_spi(chosen), padding=_takes_padding(message))
            best = score, Asked(agreed, pair[1], pair[0], session.context.capabilities.tfc_padding)
    if best is None:
        raise refusal
    asked = best[1]
    reqid = like.sa.reqid if like else reqid_of(session, ChildRequest(asked.agreed.config))
    return replace(asked, agreed=replace(asked.agreed, reqid=reqid, marking=_marking(session, asked.agreed.config, like)))


def answer_payloads(asked: Asked, spi: SaId) -> list[Payload]:
    """SA, TSi, TSr and notifications."""
    payloads: list[Payload] = [SaPayload((asked.agreed.proposal.with_spi(spi.spi.to_bytes(SPI_LENGTH, "big")),)), TsiPayload(asked.tsi), TsrPayload(asked.tsr)]
    if asked.agreed.mode is Mode.TRANSPORT:
        payloads.append(NotifyPayload(NotifyType.USE_TRANSPORT_MODE))
    return payloads if asked.takes_padding else [*payloads, _NO_PADDING]


# What comes of it


def build(session: Session, agreed: Agreed, spi_in: SaId, keying: Keying, replaces: Child | None = None) -> Child:
    """Both SAs, with keys (RFC 7296 section 2.17)."""
    crypto, config, algorithm, marking = session.keys, agreed.config, agreed.algorithm, agreed.marking
    keys = child_keys(crypto.suite.prf, crypto.keys.d, algorithm, keying.nonce_i, keying.nonce_r, keying.shared)
    first, second = (keys.initiator_encryption, keys.initiator_integrity), (keys.responder_encryption, keys.responder_integrity)
    own, peers = (first, second) if keying.initiator else (second, first)
    soft, hard = _lifetimes(session, config)
    # its SPI is that of the address which was ours when the exchange began; should we have moved, the SA does so as soon as it stands
    local, remote, encapsulated = session.path
    local = local._replace(address=spi_in.destination)

    def one(direction: Direction, spi: Spi, pair: tuple[Secret, Secret]) -> SecurityAssociation:
        inbound = direction is Direction.IN
        source, destination = (remote, local) if inbound else (local, remote)
        return SecurityAssociation(
            spi=spi,
            source=source.address,
            destination=destination.address,
            direction=direction,
            mode=agreed.mode,
            reqid=ReqId(agreed.reqid),
            algorithm=algorithm,
            encryption_key=pair[0],
            integrity_key=pair[1],
            encapsulation=UdpEncapsulation(source.port, destination.port) if encapsulated else None,
            replay_window=min(config.replay_window, session.context.capabilities.maximum_replay_window),
            esn=agreed.proposal.esn,
            soft=soft,
            hard=hard,
            source_selectors=agreed.remote_ts if inbound else agreed.local_ts,
            destination_selectors=agreed.local_ts if inbound else agreed.remote_ts,
            acquire=agreed.acquire,
            copies=config.copies,
            tfc_padding=config.tfc_padding if agreed.padding and not inbound else 0,
            if_id=marking.if_id_in if inbound else marking.if_id_out,
            # as in strongSwan, what is decrypted need not be marked already
            mark=(marking.mark_in if config.mark_in_sa else NO_MARK) if inbound else marking.mark_out,
            set_mark=marking.set_mark_in if inbound else marking.set_mark_out,
        )

    sa = ChildSa(
        id=session.context.new_child_id(),
        name=config.name,
        reqid=agreed.reqid,
        mode=agreed.mode,
        local_ts=agreed.local_ts,
        remote_ts=agreed.remote_ts,
        inbound=one(Direction.IN, spi_in.spi, peers),
        outbound=one(Direction.OUT, agreed.spi_out, own),
        encapsulated=encapsulated,
        marking=marking,
    )
    child = Child(sa, config, agreed.proposal, session.now, keying.initiator, place=sa.id, lowest=min(keying.nonce_i, keying.nonce_r))
    child.founded, child.founded_at = keying.initiator, session.now
    if replaces is not None:
        child.founded, child.founded_at = replaces.founded, replaces.founded_at
        child.place, child.generation, child.replaces = replaces.place, replaces.generation + 1, replaces.sa.id
    return child


def check_encapsulation(session: Session) -> None:
    if session.context.capabilities.encapsulation_required and not session.path.encapsulated:
        detail = "the kernel needs UDP encapsulation, and the peer does not do NAT traversal"
        raise ChildRefused(Reason.KERNEL_REFUSED, NotifyType.NO_PROPOSAL_CHOSEN, detail=detail)


def _usable(session: Session, config: ChildConfig, *, key_exchange: bool) -> tuple[Proposal, ...]:
    proposals: Sequence[Proposal] = within_kernel(config.esp_proposals, session.context.capabilities)
    # RFC 7296 section 1.2: IKE_AUTH has no KE payload, so its CHILD_SA has no key exchange transform
    return tuple(proposals) if key_exchange else tuple(proposal.without_key_exchange() for proposal in proposals)


def _takes_padding(message: Message) -> bool:
    return message.notify(NotifyType.ESP_TFC_PADDING_NOT_SUPPORTED) is None


def _peer_spi(chosen: Proposal) -> Spi:
    spi = int.from_bytes(chosen.spi, "big")
    if len(chosen.spi) != SPI_LENGTH or spi < SMALLEST_SPI:
        raise ChildRefused(Reason.INVALID_SYNTAX, NotifyType.INVALID_SYNTAX, detail="the peer's SPI is reserved")
    return Spi(spi)


def _algorithm(chosen: Proposal) -> EspAlgorithm:
    try:
        return chosen.esp_algorithm()
    except ValueError as error:
        raise ChildRefused(Reason.NO_PROPOSAL_CHOSEN, NotifyType.NO_PROPOSAL_CHOSEN, detail="not an algorithm that kernels know") from error


def _lifetimes(session: Session, config: ChildConfig) -> tuple[Lifetime, Lifetime]:
    """A random part comes off the soft lifetime, so that tunnels made together are not renewed together (RFC 7296 section 2.8)."""

    def earlier(value: float, spread: float) -> int:
        return max(1, round(value - spread * session.random())) if value else 0

    soft = Lifetime(
        earlier(config.rekey_time, config.rand_time), earlier(config.rekey_bytes, config.rand_bytes), earlier(config.rekey_packets, config.rand_packets)
    )
    return soft, Lifetime(round(config.life_time), config.life_bytes, config.life_packets)


def _between_hosts(session: Session, pair: tuple[Selectors, Selectors]) -> bool:
    """RFC 4301 section 4.1: transport mode is for the traffic of the two hosts themselves."""
    local, remote = AddressRange.host(session.path.local.address), AddressRange.host(session.path.remote.address)
    return all(selector.addresses == local for selector in pair[0]) and all(selector.addresses == remote for selector in pair[1])


def _seen_from_here(session: Session, local_ts: Selectors, remote_ts: Selectors) -> tuple[Selectors, Selectors]:
    # RFC 7296 section 2.23.1: addresses that a NAT changed become those that we see; each side says them as it sees them
    if session.nat_local:
        local_ts = substituted(local_ts, session.path.local.address)
    if session.nat_remote:
        remote_ts = substituted(remote_ts, session.path.remote.address)
    return local_ts, remote_ts


def _show(selectors: Selectors) -> str:
    return " ".join(str(selector) for selector in selectors[:4])
