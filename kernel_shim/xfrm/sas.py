"""Security associations to messages: what a key manager asks for."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from kernel_shim.algorithms import IntegrityId
from kernel_shim.model import (
    NO_MARK,
    PROTOCOL_ESP,
    AcquireSequence,
    Direction,
    IPAddress,
    KernelError,
    Lifetime,
    Mark,
    Mode,
    ReqId,
    SaId,
    SecurityAssociation,
    Selector,
    Spi,
    SpiRequest,
)
from kernel_shim.xfrm.constants import (
    AEAD_NAMES,
    CIPHER_NAMES,
    INFINITE,
    INTEGRITY_NAMES,
    MAX_REPLAY_WINDOW,
    UDP_ENCAP_ESPINUDP,
    Attribute,
    ExtraFlag,
    MessageType,
    NetlinkFlag,
    OffloadFlag,
    SaDirection,
    StateFlag,
)
from kernel_shim.xfrm.modes import mode_number
from kernel_shim.xfrm.ownership import kernel_reqid
from kernel_shim.xfrm.replay import ReplayState, Usage
from kernel_shim.xfrm.selectors import if_id_attributes, mark_attributes, selector_struct, set_mark_attributes
from kernel_shim.xfrm.structs import (
    ALGORITHM,
    ALGORITHM_SIZED,
    ENCAPSULATION,
    NO_SELECTOR,
    NUMBER,
    OCTET,
    OFFLOAD,
    SPI_RANGE,
    LifetimeStruct,
    SaIdStruct,
    SaStruct,
    SelectorStruct,
    family_of,
    pack_address,
)
from kernel_shim.xfrm.wire import Message

_SMALL_WINDOW: Final = 32  # what fits the field of usersa_info
_OUTBOUND_WINDOW: Final = 32  # Linux before 6.10 wants a window on every SA with ESN
_NO_LIMIT: Final = LifetimeStruct(INFINITE, INFINITE, INFINITE, INFINITE, 0, 0)
_NOTHING_USED: Final = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Continuation:
    """What an SA that is made anew takes over from the one in whose place it stands."""

    replay: ReplayState
    usage: Usage


def sa_message(sa: SecurityAssociation, *, update: bool, directed: bool = False, device: int = 0, continues: Continuation | None = None) -> Message:
    """`update`: keys for an SPI that ALLOCSPI reserved, or new lifetimes. KernelError(EINVAL) that names what Linux cannot do.

    `directed`: the kernel knows XFRMA_SA_DIR (Linux 6.10), and then no replay window on an outbound SA. `device`: the index of `sa.offload`.
    """
    flags = 0
    selector = _sa_selector(sa)
    if selector.family == 0 and sa.mode is Mode.TUNNEL:
        flags |= StateFlag.AF_UNSPEC
    attributes = _algorithms(sa) | mark_attributes(sa.mark) | set_mark_attributes(sa.set_mark) | if_id_attributes(sa.if_id)
    inbound = sa.direction is Direction.IN
    if sa.encapsulation is not None:
        ports = sa.encapsulation
        attributes[Attribute.ENCAP] = ENCAPSULATION.pack(
            UDP_ENCAP_ESPINUDP, ports.source_port.to_bytes(2, "big"), ports.destination_port.to_bytes(2, "big"), bytes(16)
        )
    if device:
        kind = (OffloadFlag.IPV6 if sa.destination.version == 6 else 0) | (OffloadFlag.INBOUND if inbound else 0)
        attributes[Attribute.OFFLOAD_DEV] = OFFLOAD.pack(device, kind)
    if directed:
        attributes[Attribute.SA_DIR] = OCTET.pack(SaDirection.IN if inbound else SaDirection.OUT)
    if sa.esn:
        flags |= StateFlag.ESN
    if sa.mode is Mode.TUNNEL:
        flags |= _header_flags(sa, attributes)
    window = 0 if directed and not inbound else _window(sa)
    wide = sa.esn or window > _SMALL_WINDOW
    if continues is not None:
        attributes |= continues.usage.attributes() | continues.replay.attributes()
    elif wide:
        attributes |= ReplayState.empty(window).attributes()
    # The ACQUIRE's number takes the larval SA away that it left; an inbound SA has its own, found by its SPI.
    seq = 0 if inbound else sa.acquire
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
        mode_number(sa.mode),
        0 if wide else window,
        flags,
    )
    return Message(MessageType.UPDSA if update else MessageType.NEWSA, body.pack(), attributes, NetlinkFlag.REQUEST | NetlinkFlag.ACK)


def _header_flags(sa: SecurityAssociation, attributes: dict[int, bytes]) -> int:
    """What of the outer header follows the inner one; one flag has an attribute of its own."""
    copies = sa.copies
    if not copies.dscp_out:
        attributes[Attribute.SA_EXTRA_FLAGS] = NUMBER.pack(ExtraFlag.DONT_ENCAP_DSCP)
    if sa.tfc_padding and sa.direction is Direction.OUT:
        attributes[Attribute.TFCPAD] = NUMBER.pack(sa.tfc_padding)
    flags = StateFlag.DECAP_DSCP if copies.dscp_in else 0
    return flags | (0 if copies.ecn else StateFlag.NO_ECN) | (0 if copies.df else StateFlag.NO_PMTU_DISCOVERY)


def _window(sa: SecurityAssociation) -> int:
    if not 0 <= sa.replay_window <= MAX_REPLAY_WINDOW:
        raise KernelError(errno.EINVAL, f"replay window of {sa.replay_window}: this kernel has at most {MAX_REPLAY_WINDOW}")
    if sa.esn and not sa.replay_window:
        if sa.direction is Direction.IN:
            raise KernelError(errno.EINVAL, "extended sequence numbers without a replay window")
        return _OUTBOUND_WINDOW
    return sa.replay_window


@dataclass(frozen=True, slots=True)
class Larval:
    """What tells the larval SA that an ACQUIRE left from others."""

    acquire: AcquireSequence
    source: IPAddress
    destination: IPAddress
    mode: Mode
    reqid: ReqId
    mark: Mark = NO_MARK
    if_id: int = 0


def spi_message(request: SpiRequest) -> Message:
    """ALLOCSPI; the kernel answers with a NEWSA."""
    return _allocation(request.source, request.destination, request.mode, request.reqid, 0, (request.minimum, request.maximum), {})


def claim_message(larval: Larval, spi: Spi) -> Message:
    """ALLOCSPI that gives the larval SA of an ACQUIRE an SPI, by which it can then be deleted; nothing else names it."""
    attributes = mark_attributes(larval.mark) | if_id_attributes(larval.if_id)
    return _allocation(larval.source, larval.destination, larval.mode, larval.reqid, larval.acquire, (spi, spi), attributes)


def _allocation(source: IPAddress, destination: IPAddress, mode: Mode, reqid: ReqId, seq: int, spis: tuple[int, int], attributes: dict[int, bytes]) -> Message:
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
        mode_number(mode),
        0,
        0,
    )
    return Message(MessageType.ALLOCSPI, info.pack() + SPI_RANGE.pack(*spis), attributes, NetlinkFlag.REQUEST | NetlinkFlag.ACK)


def sa_id_message(kind: MessageType, sa: SaId, mark: Mark = NO_MARK) -> Message:
    """GETSA or DELSA. An SA with a mark is found only by one that fits."""
    body = SaIdStruct(pack_address(sa.destination), sa.spi, family_of(sa.destination.version), sa.protocol)
    return Message(kind, body.pack(), mark_attributes(mark), NetlinkFlag.REQUEST | NetlinkFlag.ACK)


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
