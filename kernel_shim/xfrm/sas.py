"""Security associations: `kernel_shim.model` to messages and back.

Reqids of ours have their top bit set in the kernel (`OURS`), so that nothing of another key manager is ever taken for ours.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kernel_shim.algorithms import AEAD_ICV, INTEGRITY_ICV, EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.model import (
    NO_LIFETIME,
    PROTOCOL_ESP,
    AcquireSequence,
    Direction,
    IPAddress,
    KernelError,
    Lifetime,
    Mode,
    ReqId,
    SaId,
    SaState,
    SaStatus,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
    TrafficSelector,
    UdpEncapsulation,
)
from kernel_shim.secret import NO_SECRET, Secret
from kernel_shim.xfrm.constants import (
    AEAD_NAMES,
    CIPHER_NAMES,
    INFINITE,
    INTEGRITY_NAMES,
    MAX_REPLAY_WINDOW,
    OURS,
    UDP_ENCAP_ESPINUDP,
    Attribute,
    MessageType,
    NetlinkFlag,
    SaDirection,
    StateFlag,
    XfrmMode,
)
from kernel_shim.xfrm.selectors import selector_from, selector_struct
from kernel_shim.xfrm.structs import (
    ALGORITHM,
    ALGORITHM_SIZED,
    ENCAPSULATION,
    NO_SELECTOR,
    OCTET,
    REPLAY,
    REPLAY_ESN,
    SPI_RANGE,
    LifetimeStruct,
    MalformedMessage,
    SaIdStruct,
    SaStruct,
    SelectorStruct,
    family_of,
    pack_address,
    unpack,
    unpack_address,
)
from kernel_shim.xfrm.wire import Message

_WORD: Final = 32  # bits of one word of a replay bitmap
_SMALL_WINDOW: Final = 32  # what fits the field of usersa_info
_OUTBOUND_WINDOW: Final = 32  # Linux before 6.10 wants a window on every SA with ESN
_NO_LIMIT: Final = LifetimeStruct(INFINITE, INFINITE, INFINITE, INFINITE, 0, 0)
_MODES: Final = {Mode.TRANSPORT: XfrmMode.TRANSPORT, Mode.TUNNEL: XfrmMode.TUNNEL}
_MODES_BACK: Final = {there: here for here, there in _MODES.items()}
_NOTHING_USED: Final = (0, 0, 0, 0)


def kernel_reqid(reqid: ReqId) -> int:
    if not 0 <= reqid < OURS:
        raise KernelError(errno.EINVAL, f"reqid {reqid} is beyond 31 bits")
    return OURS | reqid


def is_ours(number: int) -> bool:
    """Whether a kernel's reqid or policy index is one of ours."""
    return bool(number & OURS)


def reqid_from(number: int) -> ReqId:
    return ReqId(number & ~OURS)


def mode_number(mode: Mode) -> int:
    return _MODES[mode]


def mode_from(number: int) -> Mode:
    try:
        return _MODES_BACK[XfrmMode(number)]
    except ValueError:
        raise MalformedMessage(f"mode {number}") from None


# Requests


def sa_message(sa: SecurityAssociation, *, update: bool) -> Message:
    """`update`: keys for an SPI that ALLOCSPI reserved, or new lifetimes. KernelError(EINVAL) that names what Linux cannot do."""
    flags = 0
    selector = _sa_selector(sa)
    if selector.family == 0 and sa.mode is Mode.TUNNEL:
        flags |= StateFlag.AF_UNSPEC
    attributes = _algorithms(sa)
    if sa.encapsulation is not None:
        ports = sa.encapsulation
        attributes[Attribute.ENCAP] = ENCAPSULATION.pack(
            UDP_ENCAP_ESPINUDP, ports.source_port.to_bytes(2, "big"), ports.destination_port.to_bytes(2, "big"), bytes(16)
        )
    window = sa.replay_window
    if not 0 <= window <= MAX_REPLAY_WINDOW:
        raise KernelError(errno.EINVAL, f"replay window of {window}: this kernel has at most {MAX_REPLAY_WINDOW}")
    if sa.esn and not window:
        if sa.direction is Direction.IN:
            raise KernelError(errno.EINVAL, "extended sequence numbers without a replay window")
        window = _OUTBOUND_WINDOW
    if sa.esn:
        flags |= StateFlag.ESN
    if sa.esn or window > _SMALL_WINDOW:
        words = -(-window // _WORD)
        attributes[Attribute.REPLAY_ESN_VAL] = REPLAY_ESN.pack(words, 0, 0, 0, 0, window) + bytes(4 * words)
        window = 0
    # The ACQUIRE's number takes the larval SA away that it left; an inbound SA has its own, found by its SPI.
    seq = sa.acquire if sa.direction is Direction.OUT else 0
    body = SaStruct(
        selector,
        pack_address(sa.destination),
        sa.spi,
        PROTOCOL_ESP,
        pack_address(sa.source),
        _lifetime(sa.soft, sa.hard),
        *_NOTHING_USED,
        seq,
        kernel_reqid(sa.reqid),
        family_of(sa.destination.version),
        _MODES[sa.mode],
        window,
        flags,
    )
    return Message(MessageType.UPDSA if update else MessageType.NEWSA, body.pack(), attributes, NetlinkFlag.REQUEST | NetlinkFlag.ACK)


def spi_message(request: SpiRequest) -> Message:
    """ALLOCSPI; the kernel answers with a NEWSA."""
    return _allocation(request.source, request.destination, request.mode, request.reqid, 0, request.minimum, request.maximum)


def claim_message(acquire: AcquireSequence, source: IPAddress, destination: IPAddress, mode: Mode, reqid: ReqId, spi: Spi) -> Message:
    """ALLOCSPI that gives the larval SA of an ACQUIRE an SPI, by which it can then be deleted; nothing else names it."""
    return _allocation(source, destination, mode, reqid, acquire, spi, spi)


def _allocation(source: IPAddress, destination: IPAddress, mode: Mode, reqid: ReqId, seq: int, first: int, last: int) -> Message:
    family = family_of(destination.version)
    info = SaStruct(
        NO_SELECTOR,
        pack_address(destination),
        0,
        PROTOCOL_ESP,
        pack_address(source),
        _NO_LIMIT,
        *_NOTHING_USED,
        seq,
        kernel_reqid(reqid),
        family,
        _MODES[mode],
        0,
        0,
    )
    return Message(MessageType.ALLOCSPI, info.pack() + SPI_RANGE.pack(first, last), {}, NetlinkFlag.REQUEST | NetlinkFlag.ACK)


def sa_id_message(kind: MessageType, sa: SaId) -> Message:
    """GETSA or DELSA."""
    body = SaIdStruct(pack_address(sa.destination), sa.spi, family_of(sa.destination.version), sa.protocol)
    return Message(kind, body.pack(), {}, NetlinkFlag.REQUEST | NetlinkFlag.ACK)


def sa_dump_message() -> Message:
    return Message(MessageType.GETSA, SaIdStruct(bytes(16), 0, 0, 0).pack(), {}, NetlinkFlag.REQUEST | NetlinkFlag.DUMP)


def _sa_selector(sa: SecurityAssociation) -> SelectorStruct:
    """The one selector that a Linux SA can have. Of several, or of one that is no prefix, the policies decide alone."""
    if len(sa.source_selectors) != 1 or len(sa.destination_selectors) != 1:
        return NO_SELECTOR
    try:
        return selector_struct(Selector.between(sa.source_selectors[0], sa.destination_selectors[0]))
    except (KernelError, ValueError):
        return NO_SELECTOR


def _lifetime(soft: Lifetime, hard: Lifetime) -> LifetimeStruct:
    return LifetimeStruct(
        soft.octets or INFINITE, hard.octets or INFINITE, soft.packets or INFINITE, hard.packets or INFINITE, int(soft.seconds), int(hard.seconds)
    )


def _algorithms(sa: SecurityAssociation) -> dict[int, bytes]:
    algorithm = sa.algorithm
    if len(sa.encryption_key) != algorithm.encryption_key_length or len(sa.integrity_key) != algorithm.integrity_key_length:
        raise KernelError(errno.EINVAL, f"key length of {algorithm.encryption.name}")
    key = sa.encryption_key.reveal()
    if algorithm.aead:
        sized = ALGORITHM_SIZED.pack(AEAD_NAMES[algorithm.encryption].encode(), 8 * len(key), 8 * algorithm.icv_length)
        return {Attribute.ALG_AEAD: sized + key}
    attributes: dict[int, bytes] = {Attribute.ALG_CRYPT: ALGORITHM.pack(CIPHER_NAMES[algorithm.encryption].encode(), 8 * len(key)) + key}
    if algorithm.integrity is not IntegrityId.NONE:
        own = sa.integrity_key.reveal()
        name = INTEGRITY_NAMES[algorithm.integrity].encode()
        attributes[Attribute.ALG_AUTH_TRUNC] = ALGORITHM_SIZED.pack(name, 8 * len(own), 8 * algorithm.icv_length) + own
    return attributes


# Replies


@dataclass(frozen=True, slots=True)
class KernelSa:
    """What the kernel told of an SA. `direction` None: it did not say; `algorithm` None: the SA is larval."""

    id: SaId
    source: IPAddress
    mode: Mode
    reqid: int  # the kernel's own
    direction: Direction | None
    algorithm: EspAlgorithm | None
    encryption_key: Secret
    integrity_key: Secret
    encapsulation: UdpEncapsulation | None
    selector: Selector | None
    esn: bool
    replay_window: int
    soft: Lifetime
    hard: Lifetime
    octets: int
    packets: int
    added: int
    used: int
    sent: int
    received: int
    acquire: AcquireSequence  # of a larval SA that an ACQUIRE left

    def status(self, direction: Direction) -> SaStatus:
        """In the words of the model; a larval SA, which has no algorithm yet, shows the null cipher."""
        selector = self.selector
        sources: tuple[TrafficSelector, ...] = ()
        destinations: tuple[TrafficSelector, ...] = ()
        if selector is not None:
            sources = (TrafficSelector(selector.source, selector.protocol, selector.source_ports),)
            destinations = (TrafficSelector(selector.destination, selector.protocol, selector.destination_ports),)
        sa = SecurityAssociation(
            spi=self.id.spi,
            source=self.source,
            destination=self.id.destination,
            direction=direction,
            mode=self.mode,
            reqid=reqid_from(self.reqid),
            algorithm=self.algorithm or EspAlgorithm(EncryptionId.NULL, 0),
            encryption_key=self.encryption_key,
            integrity_key=self.integrity_key,
            encapsulation=self.encapsulation,
            replay_window=self.replay_window,
            esn=self.esn,
            soft=self.soft,
            hard=self.hard,
            source_selectors=sources,
            destination_selectors=destinations,
            acquire=self.acquire,
        )
        state = SaState.MATURE if self.algorithm else SaState.LARVAL
        sequence = self.sent if direction is Direction.OUT else self.received
        return SaStatus(sa, state, self.octets, self.packets, float(self.added), float(self.used) or None, sequence)


def reqid_of(body: bytes) -> int:
    """The kernel's reqid in a usersa_info."""
    return SaStruct.unpack(body).reqid


def sa_from(body: bytes, attributes: Mapping[int, bytes]) -> KernelSa:
    """From a usersa_info and its attributes. MalformedMessage also for an algorithm, mode or selector that we have no word for."""
    info = SaStruct.unpack(body)
    algorithm, encryption_key, integrity_key = _algorithm_from(attributes)
    encapsulation = None
    if (data := attributes.get(Attribute.ENCAP)) is not None:
        kind, source, destination, _ = unpack(ENCAPSULATION, data, "encap_tmpl")
        if kind == UDP_ENCAP_ESPINUDP:
            encapsulation = UdpEncapsulation(int.from_bytes(source, "big"), int.from_bytes(destination, "big"))
    window, sent, received = info.replay_window, 0, 0
    if (data := attributes.get(Attribute.REPLAY_ESN_VAL)) is not None:
        _, oseq, seq, oseq_hi, seq_hi, window = unpack(REPLAY_ESN, data, "replay_state_esn")
        sent, received = oseq_hi << 32 | oseq, seq_hi << 32 | seq
    elif (data := attributes.get(Attribute.REPLAY_VAL)) is not None:
        sent, received, _ = unpack(REPLAY, data, "replay_state")
    return KernelSa(
        id=SaId(unpack_address(info.daddr, info.family), Spi(info.spi), info.proto),
        source=unpack_address(info.saddr, info.family),
        mode=mode_from(info.mode),
        reqid=info.reqid,
        direction=_direction_from(attributes),
        algorithm=algorithm,
        encryption_key=encryption_key,
        integrity_key=integrity_key,
        encapsulation=encapsulation,
        selector=_selector_from(info.selector, attributes),
        esn=bool(info.flags & StateFlag.ESN),
        replay_window=window,
        soft=_lifetime_from(info.lifetime.soft_seconds, info.lifetime.soft_octets, info.lifetime.soft_packets),
        hard=_lifetime_from(info.lifetime.hard_seconds, info.lifetime.hard_octets, info.lifetime.hard_packets),
        octets=info.octets,
        packets=info.packets,
        added=info.add_time,
        used=info.use_time,
        sent=sent,
        received=received,
        acquire=AcquireSequence(info.seq),
    )


def _direction_from(attributes: Mapping[int, bytes]) -> Direction | None:
    data = attributes.get(Attribute.SA_DIR)
    if data is None:
        return None
    (number,) = unpack(OCTET, data, "SA direction")
    return {SaDirection.IN: Direction.IN, SaDirection.OUT: Direction.OUT}.get(number)


def _selector_from(struct: SelectorStruct, attributes: Mapping[int, bytes]) -> Selector | None:
    """None where the selector takes every packet, or is one that no policy of ours could have."""
    if not struct.family or not (struct.prefixlen_s or struct.prefixlen_d or struct.proto):
        return None
    # a larval SA's names the device of the packet that asked
    struct = struct._replace(ifindex=0, user=0)
    return selector_from(struct, {kind: attributes[kind] for kind in (Attribute.MARK, Attribute.IF_ID) if kind in attributes})


def _lifetime_from(seconds: int, octets: int, packets: int) -> Lifetime:
    lifetime = Lifetime(seconds, 0 if octets == INFINITE else octets, 0 if packets == INFINITE else packets)
    return NO_LIFETIME if lifetime == NO_LIFETIME else lifetime


def _algorithm_from(attributes: Mapping[int, bytes]) -> tuple[EspAlgorithm | None, Secret, Secret]:
    if (data := attributes.get(Attribute.ALG_AEAD)) is not None:
        name, key, icv = _sized(data)
        for encryption, known in AEAD_NAMES.items():
            if known == name and AEAD_ICV[encryption] == icv:
                return _algorithm(encryption, key, IntegrityId.NONE), Secret(key), NO_SECRET
        raise MalformedMessage(f"an AEAD named {name} with {icv} octets of ICV")
    if (data := attributes.get(Attribute.ALG_CRYPT)) is None:
        return None, NO_SECRET, NO_SECRET
    name, key = _plain(data)
    cipher = next((encryption for encryption, known in CIPHER_NAMES.items() if known == name), None)
    if cipher is None:
        raise MalformedMessage(f"a cipher named {name}")
    integrity, own = IntegrityId.NONE, b""
    if (data := attributes.get(Attribute.ALG_AUTH_TRUNC)) is not None:
        name, own, icv = _sized(data)
        integrity = next((i for i, known in INTEGRITY_NAMES.items() if known == name and INTEGRITY_ICV[i] == icv), IntegrityId.NONE)
        if integrity is IntegrityId.NONE:
            raise MalformedMessage(f"an integrity algorithm named {name} with {icv} octets of ICV")
    return _algorithm(cipher, key, integrity), Secret(key), Secret(own)


def _algorithm(encryption: EncryptionId, key: bytes, integrity: IntegrityId) -> EspAlgorithm:
    bits = 8 * (len(key) - EspAlgorithm(encryption, 0).encryption_key_length)  # less the salt
    if bits < 0:
        raise MalformedMessage(f"a key of {len(key)} octets for {encryption.name}")
    return EspAlgorithm(encryption, bits, integrity)


def _plain(data: bytes) -> tuple[str, bytes]:
    name, bits = unpack(ALGORITHM, data, "xfrm_algo")
    return _name(name), _key(data, ALGORITHM.size, bits)


def _sized(data: bytes) -> tuple[str, bytes, int]:
    """Name, key, and octets of ICV."""
    name, bits, icv = unpack(ALGORITHM_SIZED, data, "xfrm_algo_aead")
    return _name(name), _key(data, ALGORITHM_SIZED.size, bits), icv // 8


def _name(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("ascii", "replace")


def _key(data: bytes, at: int, bits: int) -> bytes:
    key = data[at : at + bits // 8]
    if bits % 8 or len(key) != bits // 8:
        raise MalformedMessage(f"a key of {bits} bits in {len(data) - at} octets")
    return key
