"""How Linux' AF_KEY wants SAs and policies said, and how it tells them (net/key/af_key.c): each writer above its reader.

What is ours bears a mark, for a PF_KEY message has no other room for one that Linux keeps: a hard lifetime from the first use that
is decades long. Nothing that an SA or policy lacks here is weakened: `require_sa` and `require_policy` refuse it by name.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from kernel_shim.algorithms import EncryptionId, EspAlgorithm, IntegrityId
from kernel_shim.model import (
    AcquireSequence,
    Action,
    Capabilities,
    Direction,
    IPAddress,
    KernelError,
    Mode,
    Policy,
    ReqId,
    SaId,
    SaState,
    SaStatus,
    SecurityAssociation,
    Spi,
)
from kernel_shim.pfkey.constants import AUTH_OF_INTEGRITY, ENCRYPT_OF_ENCRYPTION, IPSEC_PROTO_ANY, ExtensionType
from kernel_shim.pfkey.event_messages import supported_bits
from kernel_shim.pfkey.messages import Address, Extension, LifetimeExtension, Message, Sa, Sa2, Supported
from kernel_shim.pfkey.policy_messages import policy_extensions, policy_from, require_selector_expressible
from kernel_shim.pfkey.sa_messages import BASE_REPLAY_WINDOW, addresses_from, mode_from, require_expressible, sa_extensions, status_from, unspecified

MAX_REQID: Final = 0x3FFF  # IPSEC_MANUAL_REQID_MAX (linux/ipsec.h): above it Linux puts a number of its own
OWNER: Final = 0x76706E64  # s: 63 years, "vpnd"

_HARD, _SOFT = ExtensionType.LIFETIME_HARD, ExtensionType.LIFETIME_SOFT

AF_KEY: Final = Capabilities(
    header_copies=False,
    name="pfkey",
    algorithms=frozenset(
        EspAlgorithm(cipher, bits, integrity)
        for cipher in (EncryptionId.AES_CBC, EncryptionId.AES_CTR)
        for bits in (128, 192, 256)
        for integrity in (IntegrityId.HMAC_SHA1_96, IntegrityId.HMAC_SHA2_384_192, IntegrityId.HMAC_SHA2_512_256)
    ),
    esn=False,
    maximum_replay_window=BASE_REPLAY_WINDOW,
    port_ranges=False,
    address_ranges=False,
    sa_selectors=False,  # the policies decide alone, by reqid
    acquire_flow=False,
    maximum_reqid=MAX_REQID,
)
"""No AEAD has a way in, and HMAC-SHA2-256 is cut to 96 bits where RFC 4868 has 128. REGISTER's reply may tell of less."""


def plain_capabilities(message: Message) -> Capabilities:
    """What a kernel without our extensions can do, from its reply to REGISTER: at most `AF_KEY`, whatever else it says."""
    auth, encrypt = (
        {it.id: it for it in supported.algorithms} if (supported := message.find(Supported, kind)) is not None else {}
        for kind in (ExtensionType.SUPPORTED_AUTH, ExtensionType.SUPPORTED_ENCRYPT)
    )

    def is_there(algorithm: EspAlgorithm) -> bool:
        cipher = encrypt.get(ENCRYPT_OF_ENCRYPTION[algorithm.encryption])
        bits = supported_bits(algorithm)
        return cipher is not None and cipher.minimum_bits <= bits <= cipher.maximum_bits and AUTH_OF_INTEGRITY[algorithm.integrity] in auth

    return replace(AF_KEY, algorithms=frozenset(filter(is_there, AF_KEY.algorithms)))


# SAs


def require_sa(sa: SecurityAssociation, capabilities: Capabilities) -> None:
    """KernelError(EOPNOTSUPP) that names what this kernel cannot do."""
    require_expressible(replace(sa, source_selectors=(), destination_selectors=()))
    _require_reqid(sa.reqid)
    if sa.algorithm not in capabilities.algorithms:
        raise KernelError(errno.EOPNOTSUPP, f"AF_KEY has no {sa.algorithm.encryption.name} {sa.algorithm.key_bits} with {sa.algorithm.integrity.name}")


def add_extensions(sa: SecurityAssociation) -> Iterator[Extension]:
    """Of ADD and UPDATE. Both lifetimes must come together; keys too, also where only lifetimes or ports change."""
    yield from (extension for extension in sa_extensions(sa, private=False, keys=True) if not isinstance(extension, LifetimeExtension))
    yield LifetimeExtension(_HARD, sa.hard.packets, sa.hard.octets, sa.hard.seconds, OWNER)
    yield LifetimeExtension(_SOFT, sa.soft.packets, sa.soft.octets, sa.soft.seconds)
    inner = sa.source_selectors[0].addresses.version if sa.source_selectors else sa.source.version
    if inner != sa.source.version:
        # Only the proxy address tells Linux that what is inside is of the other family (pfkey_msg2xfrm_state).
        yield Address(ExtensionType.ADDRESS_PROXY, unspecified(inner), 0, 0, IPSEC_PROTO_ANY)


@dataclass(frozen=True, slots=True)
class Larval:
    """An SA that has no keys yet: reserved by a GETSPI, or left by an ACQUIRE, and then its SPI is 0. `added` is in seconds of the Unix epoch."""

    source: IPAddress
    destination: IPAddress
    spi: Spi
    mode: Mode
    reqid: ReqId
    added: int

    @property
    def id(self) -> SaId:
        return SaId(self.destination, self.spi)

    def status(self, direction: Direction, acquire: AcquireSequence) -> SaStatus:
        """With the null cipher, as of XfrmChannel."""
        algorithm = EspAlgorithm(EncryptionId.NULL, 0)
        sa = SecurityAssociation(self.spi, self.source, self.destination, direction, self.mode, self.reqid, algorithm, replay_window=0, acquire=acquire)
        return SaStatus(sa, SaState.LARVAL, added=float(self.added))


def told_sa(message: Message) -> SaStatus | Larval | None:
    """One of ours, direction OUT; every larval SA; None for others'. Of a GET or DUMP, whose replies hold the keys."""
    base = message.require(Sa)
    if base.state == SaState.LARVAL:
        sa2 = message.find(Sa2) or Sa2()
        current = message.find(LifetimeExtension, ExtensionType.LIFETIME_CURRENT)
        return Larval(*addresses_from(message), Spi(base.spi), mode_from(sa2.mode), ReqId(sa2.reqid), current.addtime if current is not None else 0)
    if not _is_ours(message):
        return None
    return status_from(_without_mark(message))


# Policies


def require_policy(policy: Policy) -> None:
    require_selector_expressible(policy.selector)
    for template in policy.templates:
        _require_reqid(template.reqid)


def spd_extensions(policy: Policy) -> Iterator[Extension]:
    yield from policy_extensions(as_kept(policy), private=False)
    yield LifetimeExtension(_HARD, usetime=OWNER)


def told_policy(message: Message) -> Policy | None:
    """As `as_kept`; None for others'."""
    return policy_from(_without_mark(message)) if _is_ours(message) else None


def as_kept(policy: Policy) -> Policy:
    """What Linux keeps of a policy: a template has addresses in tunnel mode only (parse_ipsecrequest)."""
    templates = tuple(template if template.mode is Mode.TUNNEL else replace(template, source=None, destination=None) for template in policy.templates)
    return replace(policy, templates=templates if policy.action is Action.PROTECT else ())


def _require_reqid(reqid: ReqId) -> None:
    if not 0 < reqid <= MAX_REQID:
        raise KernelError(errno.EOPNOTSUPP, f"AF_KEY has reqids of 1 to {MAX_REQID}, not {reqid}")


def _is_ours(message: Message) -> bool:
    hard = message.find(LifetimeExtension, _HARD)
    return hard is not None and hard.usetime == OWNER


def _without_mark(message: Message) -> Message:
    def unmarked(extension: Extension) -> Extension:
        if isinstance(extension, LifetimeExtension) and extension.type is _HARD:
            return replace(extension, usetime=0)
        return extension

    return replace(message, extensions=tuple(unmarked(extension) for extension in message.extensions))
