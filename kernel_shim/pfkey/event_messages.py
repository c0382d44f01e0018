"""What a kernel reports of its own accord, as PF_KEY messages, and back: each writer above its reader.

`private` as in `sa_messages`. Events have pid 0 (RFC 2367 section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.model import (
    Acquire,
    AcquireSequence,
    Action,
    Capabilities,
    Direction,
    Endpoint,
    Expire,
    KernelEvent,
    Mode,
    NewMapping,
    PolicyExpire,
    PolicyIndex,
    ReqId,
    SaId,
    Spi,
)
from kernel_shim.pfkey.constants import (
    AUTH_OF_INTEGRITY,
    ENCRYPT_OF_ENCRYPTION,
    IPSEC_PROTO_ANY,
    REPLAY_WINDOW_MAX_BASE,
    ExtensionType,
    MessageType,
    SaType,
)
from kernel_shim.pfkey.messages import (
    Address,
    Algorithm,
    Combination,
    Extension,
    LifetimeExtension,
    Message,
    NatTPort,
    PolicyExtension,
    Proposal,
    Sa,
    Sa2,
    Supported,
)
from kernel_shim.pfkey.policy_messages import policy_extensions, policy_from
from kernel_shim.pfkey.private import FlowExtension, SelectorExtension
from kernel_shim.pfkey.sa_messages import addresses, addresses_from, host_address, mode_from, sa_id_extensions, sa_id_from, unspecified


def proposal_of(capabilities: Capabilities) -> Proposal:
    """What an ACQUIRE proposes: everything that the kernel can do and that keeps a secret, the strongest first (RFC 2367 section 2.3.7)."""
    secret = [algorithm for algorithm in capabilities.algorithms if algorithm.encryption is not EncryptionId.NULL]
    combinations = []
    for algorithm in sorted(secret, key=_weakness):
        auth_bits = algorithm.integrity_key_length * 8
        combinations.append(
            Combination(
                auth=AUTH_OF_INTEGRITY[algorithm.integrity],
                encrypt=ENCRYPT_OF_ENCRYPTION[algorithm.encryption],
                auth_minimum_bits=auth_bits,
                auth_maximum_bits=auth_bits,
                encrypt_minimum_bits=algorithm.key_bits,
                encrypt_maximum_bits=algorithm.key_bits,
            )
        )
    return Proposal(min(capabilities.maximum_replay_window, REPLAY_WINDOW_MAX_BASE), tuple(combinations))


def _weakness(algorithm: EspAlgorithm) -> tuple[bool, bool, int, int, int, int]:
    old = algorithm.integrity is IntegrityId.HMAC_SHA1_96
    return old, not algorithm.aead, -algorithm.icv_length, -algorithm.key_bits, -algorithm.encryption, algorithm.integrity


def supported_bits(algorithm: EspAlgorithm) -> int:
    """A cipher's key length in the reply to REGISTER: of AES-CTR with its nonce, of the AEADs without their salt (net/xfrm/xfrm_algo.c)."""
    return algorithm.key_bits + 32 if algorithm.encryption is EncryptionId.AES_CTR else algorithm.key_bits


def supported_extensions(capabilities: Capabilities) -> Iterator[Extension]:
    """SUPPORTED_AUTH and SUPPORTED_ENCRYPT of the reply to REGISTER."""
    auth: dict[int, Algorithm] = {}
    encrypt: dict[int, Algorithm] = {}
    for algorithm in capabilities.algorithms:
        number, bits = ENCRYPT_OF_ENCRYPTION[algorithm.encryption], supported_bits(algorithm)
        iv_length = algorithm.iv_length
        known = encrypt.get(number, Algorithm(number, iv_length, bits, bits))
        encrypt[number] = Algorithm(number, iv_length, min(bits, known.minimum_bits), max(bits, known.maximum_bits))
        if not algorithm.aead:
            auth_bits, auth_number = algorithm.integrity_key_length * 8, AUTH_OF_INTEGRITY[algorithm.integrity]
            auth[auth_number] = Algorithm(auth_number, 0, auth_bits, auth_bits)
    yield Supported(ExtensionType.SUPPORTED_AUTH, tuple(auth[number] for number in sorted(auth)))
    yield Supported(ExtensionType.SUPPORTED_ENCRYPT, tuple(encrypt[number] for number in sorted(encrypt)))


def acquire_message(acquire: Acquire, proposal: Proposal, *, private: bool) -> Message:
    """As Linux' pfkey_send_acquire. Addresses that the template leaves open are those of the flow; for our own clients, none."""
    return _event(MessageType.ACQUIRE, _acquire_extensions(acquire, proposal, private=private), acquire.sequence)


def _acquire_extensions(acquire: Acquire, proposal: Proposal, *, private: bool) -> Iterator[Extension]:
    flow, source, destination = acquire.flow, acquire.source, acquire.destination
    known = source or destination or (flow.source if flow is not None else None)
    version = known.version if known is not None else 4
    if flow is not None and flow.source.version == version and not private:
        source, destination = source or flow.source, destination or flow.destination
    yield from addresses(source or unspecified(version), destination or unspecified(version))
    yield PolicyExtension(Action.PROTECT, Direction.OUT, acquire.policy)
    yield proposal
    if private:
        yield Sa2(acquire.mode, 0, acquire.reqid)
        if acquire.selector is not None:
            yield SelectorExtension(acquire.selector)
        if flow is not None:
            yield FlowExtension(flow)


def acquire_from(message: Message) -> Acquire:
    source, destination = addresses_from(message)
    policy = message.find(PolicyExtension)
    sa2 = message.find(Sa2) or Sa2(Mode.TUNNEL)
    selector, flow = message.find(SelectorExtension), message.find(FlowExtension)
    return Acquire(
        AcquireSequence(message.sequence),
        PolicyIndex(policy.id if policy is not None else 0),
        ReqId(sa2.reqid),
        mode_from(sa2.mode),
        None if source.is_unspecified else source,
        None if destination.is_unspecified else destination,
        selector.selector if selector is not None else None,
        flow.flow if flow is not None else None,
    )


def expire_message(expire: Expire) -> Message:
    """RFC 2367 section 3.1.8; which lifetime is there says which one ended."""
    kind = ExtensionType.LIFETIME_HARD if expire.hard else ExtensionType.LIFETIME_SOFT
    current = LifetimeExtension(ExtensionType.LIFETIME_CURRENT)
    extensions = (*sa_id_extensions(expire.sa), current, LifetimeExtension(kind), Sa2(0, 0, expire.reqid))
    return _event(MessageType.EXPIRE, extensions)


def expire_from(message: Message) -> Expire:
    hard = message.find(LifetimeExtension, ExtensionType.LIFETIME_HARD) is not None
    if not hard:
        message.require(LifetimeExtension, ExtensionType.LIFETIME_SOFT)
    return Expire(sa_id_from(message), ReqId((message.find(Sa2) or Sa2()).reqid), hard)


def new_mapping_message(mapping: NewMapping, *, private: bool) -> Message:
    """As Linux' pfkey_send_new_mapping: old address and port as source, new ones as destination. Only ours say the SA's own destination."""
    return _event(MessageType.X_NAT_T_NEW_MAPPING, _new_mapping_extensions(mapping, private=private))


def _new_mapping_extensions(mapping: NewMapping, *, private: bool) -> Iterator[Extension]:
    yield Sa(mapping.sa.spi)
    yield Address(ExtensionType.ADDRESS_SRC, mapping.old.address, 0, mapping.old.address.max_prefixlen, IPSEC_PROTO_ANY)
    yield NatTPort(ExtensionType.X_NAT_T_SPORT, mapping.old.port)
    yield Address(ExtensionType.ADDRESS_DST, mapping.new.address, 0, mapping.new.address.max_prefixlen, IPSEC_PROTO_ANY)
    yield NatTPort(ExtensionType.X_NAT_T_DPORT, mapping.new.port)
    if private:
        yield host_address(ExtensionType.X_SA_DESTINATION, mapping.sa.destination)
        yield Sa2(0, 0, mapping.reqid)


def new_mapping_from(message: Message) -> NewMapping:
    """Without X_SA_DESTINATION the SA's destination is unspecified: its SPI must find it."""
    old, new = addresses_from(message)
    destination = message.find(Address, ExtensionType.X_SA_DESTINATION)
    return NewMapping(
        SaId(destination.address if destination is not None else unspecified(old.version), Spi(message.require(Sa).spi)),
        ReqId((message.find(Sa2) or Sa2()).reqid),
        Endpoint(old, message.require(NatTPort, ExtensionType.X_NAT_T_SPORT).port),
        Endpoint(new, message.require(NatTPort, ExtensionType.X_NAT_T_DPORT).port),
    )


def policy_expire_message(expire: PolicyExpire, *, private: bool) -> Message:
    """base, address(SD), policy, lifetime(C and H or S), as KAME has it (sys/netkey/key.c, key_spdexpire); Linux sends none over PF_KEY."""
    kind, seconds = (ExtensionType.LIFETIME_HARD, expire.policy.hard_seconds) if expire.hard else (ExtensionType.LIFETIME_SOFT, expire.policy.soft_seconds)
    policy = replace(expire.policy, soft_seconds=0, hard_seconds=0)
    extensions = (*policy_extensions(policy, private=private), LifetimeExtension(ExtensionType.LIFETIME_CURRENT), LifetimeExtension(kind, addtime=seconds))
    return Message(MessageType.X_SPDEXPIRE, extensions=extensions)


def policy_expire_from(message: Message) -> PolicyExpire:
    hard = message.find(LifetimeExtension, ExtensionType.LIFETIME_HARD) is not None
    if not hard:
        message.require(LifetimeExtension, ExtensionType.LIFETIME_SOFT)
    return PolicyExpire(policy_from(message), hard)


def event_message(event: KernelEvent, proposal: Proposal, *, private: bool) -> Message:
    if isinstance(event, Acquire):
        return acquire_message(event, proposal, private=private)
    if isinstance(event, Expire):
        return expire_message(event)
    if isinstance(event, PolicyExpire):
        return policy_expire_message(event, private=private)
    return new_mapping_message(event, private=private)


def event_from(message: Message) -> KernelEvent | None:
    """The event that a message tells of; None when it is not one. PfKeyError when it is one and lacks a part."""
    if message.pid != 0 or message.errno != 0:
        return None
    if message.type == MessageType.ACQUIRE:
        return acquire_from(message)
    if message.type == MessageType.EXPIRE:
        return expire_from(message)
    if message.type == MessageType.X_NAT_T_NEW_MAPPING:
        return new_mapping_from(message)
    if message.type == MessageType.X_SPDEXPIRE:
        return policy_expire_from(message)
    return None


def _event(kind: MessageType, extensions: Iterable[Extension], sequence: int = 0) -> Message:
    return Message(kind, SaType.ESP, 0, sequence, 0, tuple(extensions))
