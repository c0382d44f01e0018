"""How the extensions of RFC 2367 and Linux look on the wire: a reader and its writer side by side, then the table of them.

A reader gets what follows length and type of one extension and must consume it; both are in 64-bit words, except for
sadb_x_ipsecrequest_len, which counts octets (net/key/af_key.c, parse_ipsecrequests).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from struct import Struct
from typing import Any, Final, NamedTuple

from kernel_shim.model import Identity, IPAddress, SecurityContext, Sensitivity
from kernel_shim.pfkey.constants import MAX_ALGORITHMS, MAX_COMBINATIONS, MAX_LABEL, MAX_REQUESTS, WORD, ExtensionType
from kernel_shim.pfkey.messages import (
    Address,
    Algorithm,
    Combination,
    Filter,
    IdentityExtension,
    IpsecRequest,
    Key,
    KmAddress,
    LifetimeExtension,
    NatTFragment,
    NatTPort,
    NatTType,
    PolicyExtension,
    Proposal,
    Sa,
    Sa2,
    SaReplay,
    SecurityContextExtension,
    SensitivityExtension,
    SpiRange,
    Supported,
)
from kernel_shim.pfkey.wire import Reader, Writer
from kernel_shim.secret import Secret


class Layout(NamedTuple):
    """`write` takes the extension that `read` gives."""

    read: Callable[[Reader, ExtensionType], Any]
    write: Callable[[Writer, Any], None]


_SA: Final = Struct("=BBBBI")


def read_sa(reader: Reader, _: ExtensionType) -> Sa:
    spi = reader.network_32()
    replay, state, auth, encrypt, flags = reader.take(_SA)
    return Sa(spi, replay, state, reader.dialect.auth.of(auth), reader.dialect.encrypt.of(encrypt), flags)


def write_sa(writer: Writer, sa: Sa) -> None:
    writer.network_32(sa.spi)
    auth, encrypt = writer.dialect.auth.to(sa.auth, "sadb_sa_auth"), writer.dialect.encrypt.to(sa.encrypt, "sadb_sa_encrypt")
    writer.put(_SA, sa.replay, sa.state, auth, encrypt, sa.flags)


_LIFETIME: Final = Struct("=IQQQ")


def read_lifetime(reader: Reader, kind: ExtensionType) -> LifetimeExtension:
    return LifetimeExtension(kind, *reader.take(_LIFETIME))


def write_lifetime(writer: Writer, lifetime: LifetimeExtension) -> None:
    writer.put(_LIFETIME, lifetime.allocations, lifetime.octets, lifetime.addtime, lifetime.usetime)


_ADDRESS: Final = Struct("=BBxx")


def read_address(reader: Reader, kind: ExtensionType) -> Address:
    protocol, prefix_length = reader.take(_ADDRESS)
    address, port = reader.sockaddr()
    if reader.dialect.plain_addresses:
        protocol, prefix_length = 0, address.max_prefixlen
    if prefix_length > address.max_prefixlen:
        raise reader.fail(f"prefix of {prefix_length} bits", "prefixlen")
    reader.pad()
    return Address(kind, address, port, prefix_length, protocol)


def write_address(writer: Writer, address: Address) -> None:
    protocol, prefix_length = (0, 0) if writer.dialect.plain_addresses else (address.protocol, address.prefix_length)
    writer.put(_ADDRESS, protocol, prefix_length)
    writer.sockaddr(address.address, address.port)
    writer.pad()


_KEY: Final = Struct("=Hxx")


def read_key(reader: Reader, kind: ExtensionType) -> Key:
    (bits,) = reader.take(_KEY)
    if bits == 0:
        raise reader.fail("a key of no bits", "bits")
    key = reader.octets((bits + 7) // 8)
    reader.pad()
    return Key(kind, Secret(key), bits)


def write_key(writer: Writer, key: Key) -> None:
    writer.put(_KEY, key.bits)
    writer.octets(key.key.reveal())
    writer.pad()


_SUPPORTED: Final = Struct("=xxxx")
_ALGORITHM: Final = Struct("=BBHHxx")


def read_supported(reader: Reader, kind: ExtensionType) -> Supported:
    reader.take(_SUPPORTED)
    if reader.remaining > MAX_ALGORITHMS * _ALGORITHM.size:
        raise reader.fail("too many algorithms")
    numbers = reader.dialect.auth if kind is ExtensionType.SUPPORTED_AUTH else reader.dialect.encrypt
    algorithms = []
    while reader.remaining:
        number, *rest = reader.take(_ALGORITHM)
        algorithms.append(Algorithm(numbers.of(number), *rest))
    return Supported(kind, tuple(algorithms))


def write_supported(writer: Writer, supported: Supported) -> None:
    writer.put(_SUPPORTED)
    numbers = writer.dialect.auth if supported.type is ExtensionType.SUPPORTED_AUTH else writer.dialect.encrypt
    for algorithm in supported.algorithms:
        writer.put(_ALGORITHM, numbers.to(algorithm.id, "sadb_alg_id"), algorithm.iv_length, algorithm.minimum_bits, algorithm.maximum_bits)


_SPI_RANGE: Final = Struct("=IIxxxx")


def read_spi_range(reader: Reader, _: ExtensionType) -> SpiRange:
    return SpiRange(*reader.take(_SPI_RANGE))


def write_spi_range(writer: Writer, spis: SpiRange) -> None:
    writer.put(_SPI_RANGE, spis.minimum, spis.maximum)


_PROPOSAL: Final = Struct("=Bxxx")
_NUMBERED_PROPOSAL: Final = Struct("=xBxx")
_COMBINATION: Final = Struct("=BBHHHHHxxxxIIQQQQQQ")


def read_proposal(reader: Reader, _: ExtensionType) -> Proposal:
    (replay,) = reader.take(_NUMBERED_PROPOSAL if reader.dialect.numbered_proposals else _PROPOSAL)
    if reader.remaining > MAX_COMBINATIONS * _COMBINATION.size:
        raise reader.fail("too many combinations")
    combinations = []
    while reader.remaining:
        auth, encrypt, *rest = reader.take(_COMBINATION)
        combinations.append(Combination(reader.dialect.auth.of(auth), reader.dialect.encrypt.of(encrypt), *rest))
    return Proposal(replay, tuple(combinations))


def write_proposal(writer: Writer, proposal: Proposal) -> None:
    auth, encrypt = writer.dialect.auth, writer.dialect.encrypt
    writer.put(_NUMBERED_PROPOSAL if writer.dialect.numbered_proposals else _PROPOSAL, proposal.replay)
    for c in proposal.combinations:
        writer.put(
            _COMBINATION,
            *(auth.to(c.auth, "sadb_comb_auth"), encrypt.to(c.encrypt, "sadb_comb_encrypt"), c.flags),
            *(c.auth_minimum_bits, c.auth_maximum_bits, c.encrypt_minimum_bits, c.encrypt_maximum_bits),
            *(c.soft_allocations, c.hard_allocations, c.soft_octets, c.hard_octets),
            *(c.soft_addtime, c.hard_addtime, c.soft_usetime, c.hard_usetime),
        )


_SA2: Final = Struct("=BxxxII")


def read_sa2(reader: Reader, _: ExtensionType) -> Sa2:
    return Sa2(*reader.take(_SA2))


def write_sa2(writer: Writer, sa2: Sa2) -> None:
    writer.put(_SA2, sa2.mode, sa2.sequence, sa2.reqid)


_POLICY: Final = Struct("=HBxII")
_REQUEST_LENGTH: Final = Struct("=H")
_REQUEST: Final = Struct("=HBBxxIxxxx")
_SHORT_REQUEST: Final = Struct("=HBBH")


def read_policy(reader: Reader, _: ExtensionType) -> PolicyExtension:
    action, direction, index, priority = reader.take(_POLICY)
    requests: list[IpsecRequest] = []
    while reader.remaining:
        if len(requests) == MAX_REQUESTS:
            raise reader.fail(f"more than {MAX_REQUESTS} requests")
        requests.append(_read_request(reader))
    return PolicyExtension(action, direction, index, priority, tuple(requests))


def write_policy(writer: Writer, policy: PolicyExtension) -> None:
    writer.put(_POLICY, policy.action, policy.direction, policy.id, policy.priority)
    for request in policy.requests:
        _write_request(writer, request)


def _read_request(reader: Reader) -> IpsecRequest:
    (length,) = reader.take(_REQUEST_LENGTH)
    with reader.restrict_to(max(0, length - _REQUEST_LENGTH.size), "X_POLICY.ipsecrequest"):
        protocol, mode, level, reqid = reader.take(_SHORT_REQUEST if reader.dialect.short_requests else _REQUEST)
        source: IPAddress | None = None
        destination: IPAddress | None = None
        if reader.remaining:
            source, _ = reader.sockaddr()
            destination, _ = reader.sockaddr()
            if source.version != destination.version:
                raise reader.fail("endpoints of two families")
            reader.pad()
    return IpsecRequest(protocol, mode, level, reqid, source, destination)


def _write_request(writer: Writer, request: IpsecRequest) -> None:
    at = len(writer)
    writer.put(_REQUEST_LENGTH, 0)
    writer.put(_SHORT_REQUEST if writer.dialect.short_requests else _REQUEST, request.protocol, request.mode, request.level, request.reqid)
    if request.source is not None and request.destination is not None:
        writer.sockaddr(request.source)
        writer.sockaddr(request.destination)
        writer.pad()
    writer.patch(at, _REQUEST_LENGTH, len(writer) - at)


_IDENTITY: Final = Struct("=HxxQ")


def read_identity(reader: Reader, kind: ExtensionType) -> IdentityExtension:
    number, identifier = reader.take(_IDENTITY)
    name = _label(reader, reader.remaining)
    return IdentityExtension(kind, Identity(number, name.rstrip(b"\0"), identifier))


def _label(reader: Reader, count: int) -> bytes:
    if count > MAX_LABEL:
        raise reader.fail(f"{count} octets, {MAX_LABEL} at most")
    return reader.octets(count)


def write_identity(writer: Writer, identity: IdentityExtension) -> None:
    """The name ends with a zero octet when there is one (RFC 2367 section 2.3.5)."""
    it = identity.identity
    writer.put(_IDENTITY, it.type, it.id)
    if it.name:
        writer.octets(it.name + b"\0")
        writer.pad()


_SENSITIVITY: Final = Struct("=IBBBBxxxx")


def read_sensitivity(reader: Reader, _: ExtensionType) -> SensitivityExtension:
    domain, level, words, integrity_level, integrity_words = reader.take(_SENSITIVITY)
    compartments, integrity = reader.octets(words * WORD), reader.octets(integrity_words * WORD)
    return SensitivityExtension(Sensitivity(domain, level, compartments, integrity_level, integrity))


def write_sensitivity(writer: Writer, extension: SensitivityExtension) -> None:
    it = extension.sensitivity
    words, integrity_words = -(-len(it.compartments) // WORD), -(-len(it.integrity_compartments) // WORD)
    writer.put(_SENSITIVITY, it.domain, it.level, words, it.integrity_level, integrity_words)
    writer.octets(it.compartments.ljust(words * WORD, b"\0"))
    writer.octets(it.integrity_compartments.ljust(integrity_words * WORD, b"\0"))


_SEC_CTX: Final = Struct("=BBH")


def read_sec_ctx(reader: Reader, _: ExtensionType) -> SecurityContextExtension:
    algorithm, domain, length = reader.take(_SEC_CTX)
    context = _label(reader, length)
    reader.pad()
    return SecurityContextExtension(SecurityContext(algorithm, domain, context))


def write_sec_ctx(writer: Writer, extension: SecurityContextExtension) -> None:
    it = extension.context
    writer.put(_SEC_CTX, it.algorithm, it.domain, len(it.context))
    writer.octets(it.context)
    writer.pad()


_RESERVED_32: Final = Struct("=xxxx")


def read_kmaddress(reader: Reader, _: ExtensionType) -> KmAddress:
    reader.take(_RESERVED_32)
    local, _port = reader.sockaddr()
    remote, _port = reader.sockaddr()
    if local.version != remote.version:
        raise reader.fail("addresses of two families")
    reader.pad()
    return KmAddress(local, remote)


def write_kmaddress(writer: Writer, kmaddress: KmAddress) -> None:
    writer.put(_RESERVED_32)
    writer.sockaddr(kmaddress.local)
    writer.sockaddr(kmaddress.remote)
    writer.pad()


_FILTER: Final = Struct("=16s16sHBB")
_ADDRESS_BITS: Final = 128


def read_filter(reader: Reader, _: ExtensionType) -> Filter:
    source, destination, family, source_prefix, destination_prefix = reader.take(_FILTER)
    if max(source_prefix, destination_prefix) > _ADDRESS_BITS:
        raise reader.fail(f"prefixes of {source_prefix} and {destination_prefix} bits")
    return Filter(family, source, destination, source_prefix, destination_prefix)


def write_filter(writer: Writer, it: Filter) -> None:
    writer.put(_FILTER, it.source, it.destination, it.family, it.source_prefix, it.destination_prefix)


_REPLAY: Final = Struct("=I")


def read_sa_replay(reader: Reader, _: ExtensionType) -> SaReplay:
    return SaReplay(*reader.take(_REPLAY))


def write_sa_replay(writer: Writer, replay: SaReplay) -> None:
    writer.put(_REPLAY, replay.packets)


_NAT_T_TYPE: Final = Struct("=Bxxx")


def read_nat_t_type(reader: Reader, _: ExtensionType) -> NatTType:
    return NatTType(*reader.take(_NAT_T_TYPE))


def write_nat_t_type(writer: Writer, nat_t: NatTType) -> None:
    writer.put(_NAT_T_TYPE, nat_t.encapsulation)


def read_nat_t_port(reader: Reader, kind: ExtensionType) -> NatTPort:
    port = reader.network_16()
    reader.octets(2)
    return NatTPort(kind, port)


def write_nat_t_port(writer: Writer, nat_t: NatTPort) -> None:
    writer.network_16(nat_t.port)
    writer.octets(bytes(2))


_NAT_T_FRAG: Final = Struct("=Hxx")


def read_nat_t_frag(reader: Reader, _: ExtensionType) -> NatTFragment:
    return NatTFragment(*reader.take(_NAT_T_FRAG))


def write_nat_t_frag(writer: Writer, fragment: NatTFragment) -> None:
    writer.put(_NAT_T_FRAG, fragment.octets)


LAYOUTS: Final[Mapping[ExtensionType, Layout]] = {
    ExtensionType.SA: Layout(read_sa, write_sa),
    ExtensionType.LIFETIME_CURRENT: Layout(read_lifetime, write_lifetime),
    ExtensionType.LIFETIME_HARD: Layout(read_lifetime, write_lifetime),
    ExtensionType.LIFETIME_SOFT: Layout(read_lifetime, write_lifetime),
    ExtensionType.ADDRESS_SRC: Layout(read_address, write_address),
    ExtensionType.ADDRESS_DST: Layout(read_address, write_address),
    ExtensionType.ADDRESS_PROXY: Layout(read_address, write_address),
    ExtensionType.KEY_AUTH: Layout(read_key, write_key),
    ExtensionType.KEY_ENCRYPT: Layout(read_key, write_key),
    ExtensionType.PROPOSAL: Layout(read_proposal, write_proposal),
    ExtensionType.SUPPORTED_AUTH: Layout(read_supported, write_supported),
    ExtensionType.SUPPORTED_ENCRYPT: Layout(read_supported, write_supported),
    ExtensionType.SPIRANGE: Layout(read_spi_range, write_spi_range),
    ExtensionType.X_POLICY: Layout(read_policy, write_policy),
    ExtensionType.X_SA2: Layout(read_sa2, write_sa2),
    ExtensionType.X_NAT_T_TYPE: Layout(read_nat_t_type, write_nat_t_type),
    ExtensionType.X_NAT_T_SPORT: Layout(read_nat_t_port, write_nat_t_port),
    ExtensionType.X_NAT_T_DPORT: Layout(read_nat_t_port, write_nat_t_port),
    ExtensionType.X_NAT_T_OA: Layout(read_address, write_address),
    ExtensionType.X_SA_DESTINATION: Layout(read_address, write_address),
    ExtensionType.IDENTITY_SRC: Layout(read_identity, write_identity),
    ExtensionType.IDENTITY_DST: Layout(read_identity, write_identity),
    ExtensionType.SENSITIVITY: Layout(read_sensitivity, write_sensitivity),
    ExtensionType.X_SEC_CTX: Layout(read_sec_ctx, write_sec_ctx),
    ExtensionType.X_KMADDRESS: Layout(read_kmaddress, write_kmaddress),
    ExtensionType.X_FILTER: Layout(read_filter, write_filter),
    ExtensionType.X_NAT_T_OAR: Layout(read_address, write_address),
    ExtensionType.X_NAT_T_FRAG: Layout(read_nat_t_frag, write_nat_t_frag),
    ExtensionType.X_SA_REPLAY: Layout(read_sa_replay, write_sa_replay),
    ExtensionType.X_NEW_ADDRESS_SRC: Layout(read_address, write_address),
    ExtensionType.X_NEW_ADDRESS_DST: Layout(read_address, write_address),
    ExtensionType.X_UDPENCAP: Layout(read_nat_t_port, write_nat_t_port),
}
