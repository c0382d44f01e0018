"""SAs of the model as extensions of PF_KEY messages, and back: each writer above its reader.

`private` says whether the other side speaks our extensions (docs/pfkey-extensions.md). Where they are present they overrule what
the base extensions say. Readers raise PfKeyError; writers lose without `private` what PF_KEY cannot say, so a key
manager calls `require_expressible` first.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from kernel_shim.algorithms import AEAD_SALT, EncryptionId, EspAlgorithm
from kernel_shim.model import (
    DEFAULT_COPIES,
    NO_LABELS,
    AcquireSequence,
    Direction,
    IPAddress,
    KernelError,
    Labels,
    Lifetime,
    Mode,
    ReqId,
    SaId,
    SaState,
    SaStatus,
    SecurityAssociation,
    Spi,
    SpiRequest,
    UdpEncapsulation,
)
from kernel_shim.pfkey.constants import (
    AF_INET,
    AUTH_OF_INTEGRITY,
    ENCRYPT_OF_ENCRYPTION,
    ENCRYPTION_OF_ENCRYPT,
    INTEGRITY_OF_AUTH,
    IPSEC_MODE_ANY,
    IPSEC_MODE_BEET,
    REPLAY_WINDOW_MAX_BASE,
    UDP_ENCAP_ESPINUDP,
    AuthAlgorithm,
    EncryptAlgorithm,
    ExtensionType,
)
from kernel_shim.pfkey.dialects import LINUX
from kernel_shim.pfkey.messages import (
    Address,
    Extension,
    Filter,
    IdentityExtension,
    Key,
    LifetimeExtension,
    Message,
    NatTPort,
    NatTType,
    PfKeyError,
    Sa,
    Sa2,
    SecurityContextExtension,
    SensitivityExtension,
    SpiRange,
)
from kernel_shim.pfkey.private import AcquireReference, SaExtension, SaSelectors, SaStatusExtension
from kernel_shim.secret import NO_SECRET, Secret

_UINT32_MAX: Final = 0xFFFFFFFF
_MICROSECONDS: Final = 1_000_000
BASE_REPLAY_WINDOW: Final = 32  # what kernels without our extensions do at most (Linux' x->replay.bitmap)


def unspecified(version: int) -> IPAddress:
    """0.0.0.0 or ::, which stand for "not said" in an address extension that must be there."""
    return IPv4Address(0) if version == 4 else IPv6Address(0)


def host_address(kind: ExtensionType, address: IPAddress, port: int = 0) -> Address:
    return Address(kind, address, port, address.max_prefixlen)


def addresses(source: IPAddress, destination: IPAddress) -> Iterator[Extension]:
    yield host_address(ExtensionType.ADDRESS_SRC, source)
    yield host_address(ExtensionType.ADDRESS_DST, destination)


def addresses_from(message: Message) -> tuple[IPAddress, IPAddress]:
    """Source and destination; both must be there and of one family, as in Linux (present_and_same_family)."""
    source = message.require(Address, ExtensionType.ADDRESS_SRC).address
    destination = message.require(Address, ExtensionType.ADDRESS_DST).address
    if source.version != destination.version:
        raise PfKeyError("ADDRESS_DST", "not of the family of ADDRESS_SRC")
    return source, destination


def sa_id_extensions(sa: SaId) -> Iterator[Extension]:
    yield Sa(sa.spi)
    yield from addresses(unspecified(sa.destination.version), sa.destination)


def sa_id_from(message: Message) -> SaId:
    spi = message.require(Sa).spi
    _, destination = addresses_from(message)
    return SaId(destination, Spi(spi))


def mode_from(number: int) -> Mode:
    if number == IPSEC_MODE_ANY:
        return Mode.TRANSPORT  # as Linux: pfkey_mode_to_xfrm
    try:
        return Mode(number)
    except ValueError:
        raise PfKeyError("X_SA2.mode", str(number), errno.EOPNOTSUPP if number == IPSEC_MODE_BEET else errno.EINVAL) from None


def acquire_reference(acquire: AcquireSequence) -> Iterator[Extension]:
    if acquire:
        yield AcquireReference(acquire)


def acquire_from(message: Message, *, private: bool) -> AcquireSequence:
    """The ACQUIRE that a request answers: without our extensions it is in sadb_msg_seq (RFC 2367 section 2.1)."""
    reference = message.find(AcquireReference)
    if reference is not None:
        return AcquireSequence(reference.sequence)
    return AcquireSequence(0 if private else message.sequence)


# GETSPI


def spi_request_extensions(request: SpiRequest, *, private: bool) -> Iterator[Extension]:
    yield SpiRange(request.minimum, request.maximum)
    yield from addresses(request.source, request.destination)
    yield Sa2(request.mode, 0, request.reqid)
    if private:
        yield from acquire_reference(request.acquire)


def spi_request_from(message: Message, *, private: bool) -> SpiRequest:
    source, destination = addresses_from(message)
    spis = message.find(SpiRange) or SpiRange(0x100, 0xFFFFFFFF)
    if not 0 < spis.minimum <= spis.maximum:
        raise PfKeyError("SPIRANGE", f"{spis.minimum:#x}-{spis.maximum:#x}")
    sa2 = message.find(Sa2) or Sa2()
    return SpiRequest(source, destination, mode_from(sa2.mode), ReqId(sa2.reqid), spis.minimum, spis.maximum, acquire_from(message, private=private))


# ADD, UPDATE


def sa_extensions(sa: SecurityAssociation, *, private: bool, keys: bool, state: SaState = SaState.MATURE) -> Iterator[Extension]:
    """Keys go to a kernel only, never back from it."""
    algorithm = sa.algorithm
    yield Sa(
        sa.spi,
        min(sa.replay_window, REPLAY_WINDOW_MAX_BASE),
        state,
        AUTH_OF_INTEGRITY[algorithm.integrity],
        ENCRYPT_OF_ENCRYPTION[algorithm.encryption],
    )
    yield from addresses(sa.source, sa.destination)
    if keys and sa.integrity_key:
        yield Key(ExtensionType.KEY_AUTH, sa.integrity_key, len(sa.integrity_key) * 8)
    if keys and sa.encryption_key:
        yield Key(ExtensionType.KEY_ENCRYPT, sa.encryption_key, len(sa.encryption_key) * 8)
    yield Sa2(sa.mode, 0, sa.reqid)
    for kind, lifetime in ((ExtensionType.LIFETIME_HARD, sa.hard), (ExtensionType.LIFETIME_SOFT, sa.soft)):
        if lifetime != Lifetime() or not (keys or private):  # Linux has both in every reply
            yield LifetimeExtension(kind, min(lifetime.packets, _UINT32_MAX), lifetime.octets, lifetime.seconds)
    if sa.encapsulation is not None:
        yield NatTType(UDP_ENCAP_ESPINUDP)
        yield NatTPort(ExtensionType.X_NAT_T_SPORT, sa.encapsulation.source_port)
        yield NatTPort(ExtensionType.X_NAT_T_DPORT, sa.encapsulation.destination_port)
    if sa.labels is not NO_LABELS:
        yield from _label_extensions(sa.labels)
    if private:
        yield SaExtension(sa.direction, algorithm, sa.esn, sa.replay_window, sa.soft.packets, sa.hard.packets, sa.copies, sa.tfc_padding)
        yield from acquire_reference(sa.acquire)
        if sa.source_selectors:
            yield SaSelectors(ExtensionType.X_SA_SOURCES, sa.source_selectors)
        if sa.destination_selectors:
            yield SaSelectors(ExtensionType.X_SA_DESTINATIONS, sa.destination_selectors)


def sa_from(message: Message, direction: Direction, *, keys: bool) -> SecurityAssociation:
    """The SA of an ADD, UPDATE, GET or DUMP. `direction` is for those without X_SA. `keys` checks that they have the algorithm's length."""
    base = message.require(Sa)
    source, destination = addresses_from(message)
    private = message.find(SaExtension)
    encryption_key = _key(message, ExtensionType.KEY_ENCRYPT)
    integrity_key = _key(message, ExtensionType.KEY_AUTH)
    algorithm = private.algorithm if private is not None else _algorithm(base, len(encryption_key))
    if keys:
        _require_length("KEY_ENCRYPT", encryption_key, algorithm.encryption_key_length)
        _require_length("KEY_AUTH", integrity_key, algorithm.integrity_key_length)
    sa2 = message.find(Sa2) or Sa2()
    sources = message.find(SaSelectors, ExtensionType.X_SA_SOURCES)
    destinations = message.find(SaSelectors, ExtensionType.X_SA_DESTINATIONS)
    return SecurityAssociation(
        spi=Spi(base.spi),
        source=source,
        destination=destination,
        direction=private.direction if private is not None else direction,
        mode=mode_from(sa2.mode),
        reqid=ReqId(sa2.reqid),
        algorithm=algorithm,
        encryption_key=encryption_key,
        integrity_key=integrity_key,
        encapsulation=_encapsulation(message),
        replay_window=private.replay_window if private is not None else base.replay,
        esn=private is not None and private.esn,
        soft=_lifetime(message, ExtensionType.LIFETIME_SOFT, private.soft_packets if private is not None else None),
        hard=_lifetime(message, ExtensionType.LIFETIME_HARD, private.hard_packets if private is not None else None),
        source_selectors=sources.selectors if sources is not None else (),
        destination_selectors=destinations.selectors if destinations is not None else (),
        acquire=acquire_from(message, private=private is not None),
        labels=_labels(message),
        copies=private.copies if private is not None else DEFAULT_COPIES,
        tfc_padding=private.tfc_padding if private is not None else 0,
    )


def _label_extensions(labels: Labels) -> Iterator[Extension]:
    if labels.source is not None:
        yield IdentityExtension(ExtensionType.IDENTITY_SRC, labels.source)
    if labels.destination is not None:
        yield IdentityExtension(ExtensionType.IDENTITY_DST, labels.destination)
    if labels.sensitivity is not None:
        yield SensitivityExtension(labels.sensitivity)
    if labels.context is not None:
        yield SecurityContextExtension(labels.context)


def _labels(message: Message) -> Labels:
    source, destination = (message.find(IdentityExtension, kind) for kind in (ExtensionType.IDENTITY_SRC, ExtensionType.IDENTITY_DST))
    sensitivity, context = message.find(SensitivityExtension), message.find(SecurityContextExtension)
    if source is None and destination is None and sensitivity is None and context is None:
        return NO_LABELS
    return Labels(
        source.identity if source is not None else None,
        destination.identity if destination is not None else None,
        sensitivity.sensitivity if sensitivity is not None else None,
        context.context if context is not None else None,
    )


def require_expressible(sa: SecurityAssociation) -> None:
    """KernelError(EOPNOTSUPP) that names what plain PF_KEY cannot say of `sa`; nothing is weakened silently."""
    beyond = {
        "extended sequence numbers": sa.esn,
        f"a replay window of {sa.replay_window}": sa.replay_window > BASE_REPLAY_WINDOW,
        "traffic selectors of an SA": bool(sa.source_selectors or sa.destination_selectors),
        f"{sa.algorithm.encryption.name}": sa.algorithm.encryption is EncryptionId.CHACHA20_POLY1305,
        "choice of what IP headers copy": sa.copies != DEFAULT_COPIES,
        "TFC padding": bool(sa.tfc_padding),
        "packet lifetimes beyond 32 bits": max(sa.soft.packets, sa.hard.packets) > _UINT32_MAX,
    }
    for what, is_asked in beyond.items():
        if is_asked:
            raise KernelError(errno.EOPNOTSUPP, f"this kernel's PF_KEY has no {what}")


def _key(message: Message, kind: ExtensionType) -> Secret:
    key = message.find(Key, kind)
    return key.key if key is not None else NO_SECRET


def _require_length(field: str, key: Secret, octets: int) -> None:
    if len(key) != octets:
        raise PfKeyError(field, f"{len(key)} octets, {octets} expected")


def _algorithm(base: Sa, key_octets: int) -> EspAlgorithm:
    """Linux answers ENOSYS to an algorithm that it does not have, and EINVAL to numbers beyond its tables."""
    if base.encrypt > max(EncryptAlgorithm) or base.auth > max(AuthAlgorithm):
        raise PfKeyError("SA", f"encryption {base.encrypt} with authentication {base.auth}")
    if base.encrypt not in ENCRYPTION_OF_ENCRYPT or base.auth not in INTEGRITY_OF_AUTH:
        raise PfKeyError("SA", f"encryption {base.encrypt} with authentication {base.auth} is not known", errno.ENOSYS)
    encryption = ENCRYPTION_OF_ENCRYPT[base.encrypt]
    salt = 4 if encryption is EncryptionId.AES_CTR else AEAD_SALT.get(encryption, 0)
    return EspAlgorithm(encryption, max(0, key_octets - salt) * 8, INTEGRITY_OF_AUTH[base.auth])


def _encapsulation(message: Message) -> UdpEncapsulation | None:
    kind = message.find(NatTType)
    if kind is None or kind.encapsulation == 0:
        return None
    if kind.encapsulation != UDP_ENCAP_ESPINUDP:
        raise PfKeyError("X_NAT_T_TYPE", str(kind.encapsulation), errno.EOPNOTSUPP)
    source = message.require(NatTPort, ExtensionType.X_NAT_T_SPORT)
    destination = message.require(NatTPort, ExtensionType.X_NAT_T_DPORT)
    return UdpEncapsulation(source.port, destination.port)


def _lifetime(message: Message, kind: ExtensionType, packets: int | None) -> Lifetime:
    """The model counts from the SA's addition; a bound from its first use is met by counting earlier."""
    lifetime = message.find(LifetimeExtension, kind)
    if lifetime is None:
        return Lifetime(packets=packets or 0)
    seconds = min(filter(None, (lifetime.addtime, lifetime.usetime)), default=0)
    return Lifetime(seconds, lifetime.octets, lifetime.allocations if packets is None else packets)


# GET, DUMP and the replies


def passes(wanted: Filter, sa: SecurityAssociation) -> bool:
    """As Linux' __xfrm_state_filter_match."""
    if wanted.family in (AF_INET, LINUX.af_inet6) and (wanted.family == AF_INET) != (sa.source.version == 4):
        return False
    return _begins(sa.source, wanted.source, wanted.source_prefix) and _begins(sa.destination, wanted.destination, wanted.destination_prefix)


def _begins(address: IPAddress, octets: bytes, bits: int) -> bool:
    shift = 128 - bits
    return int.from_bytes(address.packed.ljust(16, b"\0"), "big") >> shift == int.from_bytes(octets, "big") >> shift


def status_extensions(status: SaStatus, *, private: bool) -> Iterator[Extension]:
    yield from sa_extensions(status.sa, private=private, keys=False, state=status.state)
    used = status.used or 0.0
    yield LifetimeExtension(ExtensionType.LIFETIME_CURRENT, min(status.packets, _UINT32_MAX), status.octets, int(status.added), int(used))
    if private:
        yield SaStatusExtension(status.sequence, status.packets, round(status.added * _MICROSECONDS), round(used * _MICROSECONDS))


def status_from(message: Message) -> SaStatus:
    # In a dump sadb_msg_seq counts entries.
    sa = sa_from(message if message.find(SaExtension) is not None else replace(message, sequence=0), Direction.OUT, keys=False)
    try:
        state = SaState(message.require(Sa).state)
    except ValueError:
        raise PfKeyError("SA.state", str(message.require(Sa).state)) from None
    current = message.find(LifetimeExtension, ExtensionType.LIFETIME_CURRENT) or LifetimeExtension(ExtensionType.LIFETIME_CURRENT)
    exact = message.find(SaStatusExtension)
    if exact is None:
        used = float(current.usetime) if current.usetime else None
        return SaStatus(sa, state, current.octets, current.allocations, float(current.addtime), used)
    used = exact.used / _MICROSECONDS if exact.used else None
    return SaStatus(sa, state, current.octets, exact.packets, exact.added / _MICROSECONDS, used, exact.sequence)
