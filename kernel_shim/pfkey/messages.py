"""PF_KEY messages and the extensions of RFC 2367 and Linux, as values.

A message is its base header and its extensions, each at most once. SPIs, ports, lengths and ids are host integers, times are whole seconds
of the Unix epoch (in a LIFETIME_CURRENT) or of an SA's life. Extensions that share a layout share a class and differ in `type`.
"""

from __future__ import annotations

import builtins
import errno
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from kernel_shim.model import Identity, IPAddress, KernelError, SecurityContext, Sensitivity
from kernel_shim.pfkey.constants import ExtensionType, MessageType
from kernel_shim.secret import Secret

_E = TypeVar("_E", bound="Extension")


class PfKeyError(KernelError):
    """A message that is not well-formed. `errno` is what goes into sadb_msg_errno, `field` the part that is wrong."""

    def __init__(self, field: str, reason: str, number: int = errno.EINVAL) -> None:
        super().__init__(number, f"{field}: {reason}")
        self.field = field


@dataclass(frozen=True, slots=True)
class Extension:
    """What a message carries beside its header."""


@dataclass(frozen=True, slots=True)
class UnknownExtension(Extension):
    """An extension that this codec has no layout for; `body` is what follows its type, padding included."""

    number: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Sa(Extension):
    """RFC 2367 section 2.3.1. `replay` is the window in packets."""

    type: ClassVar[ExtensionType] = ExtensionType.SA
    spi: int
    replay: int = 0
    state: int = 0
    auth: int = 0
    encrypt: int = 0
    flags: int = 0


@dataclass(frozen=True, slots=True)
class LifetimeExtension(Extension):
    """RFC 2367 section 2.3.2. Linux counts packets in `allocations`."""

    type: ExtensionType
    allocations: int = 0
    octets: int = 0
    addtime: int = 0
    usetime: int = 0


@dataclass(frozen=True, slots=True)
class Address(Extension):
    """RFC 2367 section 2.3.3; also X_NAT_T_OA, X_NAT_T_OAR and X_NEW_ADDRESS_ of the BSDs, and our X_SA_DESTINATION. `protocol` is 0 or 255 for any."""

    type: ExtensionType
    address: IPAddress
    port: int = 0
    prefix_length: int = 0
    protocol: int = 0


@dataclass(frozen=True, slots=True)
class Key(Extension):
    """RFC 2367 section 2.3.4. `bits` of `key` are meant; the octets hold them all."""

    type: ExtensionType
    key: Secret
    bits: int


@dataclass(frozen=True, slots=True)
class Algorithm:
    """sadb_alg; lengths in bits, `iv_length` in octets."""

    id: int
    iv_length: int = 0
    minimum_bits: int = 0
    maximum_bits: int = 0


@dataclass(frozen=True, slots=True)
class Supported(Extension):
    """RFC 2367 section 2.3.8."""

    type: ExtensionType
    algorithms: tuple[Algorithm, ...] = ()


@dataclass(frozen=True, slots=True)
class SpiRange(Extension):
    """RFC 2367 section 2.3.9."""

    type: ClassVar[ExtensionType] = ExtensionType.SPIRANGE
    minimum: int
    maximum: int


@dataclass(frozen=True, slots=True)
class Combination:
    """sadb_comb: one way to protect a flow; lengths in bits."""

    auth: int = 0
    encrypt: int = 0
    flags: int = 0
    auth_minimum_bits: int = 0
    auth_maximum_bits: int = 0
    encrypt_minimum_bits: int = 0
    encrypt_maximum_bits: int = 0
    soft_allocations: int = 0
    hard_allocations: int = 0
    soft_octets: int = 0
    hard_octets: int = 0
    soft_addtime: int = 0
    hard_addtime: int = 0
    soft_usetime: int = 0
    hard_usetime: int = 0


@dataclass(frozen=True, slots=True)
class Proposal(Extension):
    """RFC 2367 section 2.3.7."""

    type: ClassVar[ExtensionType] = ExtensionType.PROPOSAL
    replay: int = 0
    combinations: tuple[Combination, ...] = ()


@dataclass(frozen=True, slots=True)
class Sa2(Extension):
    """SADB_X_EXT_SA2: mode and request id."""

    type: ClassVar[ExtensionType] = ExtensionType.X_SA2
    mode: int = 0
    sequence: int = 0
    reqid: int = 0


@dataclass(frozen=True, slots=True)
class IpsecRequest:
    """sadb_x_ipsecrequest, a template of a policy; `source` and `destination` come together or not at all."""

    protocol: int
    mode: int
    level: int = 0
    reqid: int = 0
    source: IPAddress | None = None
    destination: IPAddress | None = None


@dataclass(frozen=True, slots=True)
class PolicyExtension(Extension):
    """SADB_X_EXT_POLICY."""

    type: ClassVar[ExtensionType] = ExtensionType.X_POLICY
    action: int
    direction: int
    id: int = 0
    priority: int = 0
    requests: tuple[IpsecRequest, ...] = ()


@dataclass(frozen=True, slots=True)
class IdentityExtension(Extension):
    """RFC 2367 section 2.3.5: IDENTITY_SRC and _DST."""

    type: ExtensionType
    identity: Identity


@dataclass(frozen=True, slots=True)
class SensitivityExtension(Extension):
    """RFC 2367 section 2.3.6."""

    type: ClassVar[ExtensionType] = ExtensionType.SENSITIVITY
    sensitivity: Sensitivity


@dataclass(frozen=True, slots=True)
class SecurityContextExtension(Extension):
    """SADB_X_EXT_SEC_CTX."""

    type: ClassVar[ExtensionType] = ExtensionType.X_SEC_CTX
    context: SecurityContext


@dataclass(frozen=True, slots=True)
class KmAddress(Extension):
    """SADB_X_EXT_KMADDRESS, in MIGRATE: the addresses that the key managers of both ends will use."""

    type: ClassVar[ExtensionType] = ExtensionType.X_KMADDRESS
    local: IPAddress
    remote: IPAddress


@dataclass(frozen=True, slots=True)
class Filter(Extension):
    """SADB_X_EXT_FILTER, in DUMP: outer addresses by prefix. Without a family both prefixes are taken over the address' octets, as Linux does."""

    type: ClassVar[ExtensionType] = ExtensionType.X_FILTER
    family: int
    source: bytes
    destination: bytes
    source_prefix: int = 0
    destination_prefix: int = 0


@dataclass(frozen=True, slots=True)
class SaReplay(Extension):
    """SADB_X_EXT_SA_REPLAY (FreeBSD): a window of more than sadb_sa_replay can say, in packets."""

    type: ClassVar[ExtensionType] = ExtensionType.X_SA_REPLAY
    packets: int


@dataclass(frozen=True, slots=True)
class NatTFragment(Extension):
    """SADB_X_EXT_NAT_T_FRAG (FreeBSD, NetBSD): ESP in UDP is fragmented before it is encrypted, to this many octets."""

    type: ClassVar[ExtensionType] = ExtensionType.X_NAT_T_FRAG
    octets: int


@dataclass(frozen=True, slots=True)
class NatTType(Extension):
    """SADB_X_EXT_NAT_T_TYPE: 2 is UDP_ENCAP_ESPINUDP."""

    type: ClassVar[ExtensionType] = ExtensionType.X_NAT_T_TYPE
    encapsulation: int


@dataclass(frozen=True, slots=True)
class NatTPort(Extension):
    """SADB_X_EXT_NAT_T_SPORT and _DPORT, and X_UDPENCAP of OpenBSD."""

    type: ExtensionType
    port: int


@dataclass(frozen=True, slots=True)
class Message:
    """The base header (RFC 2367 section 2.1) and the extensions, in their order. `sequence` and `pid` name an exchange."""

    type: int
    sa_type: int = 0
    errno: int = 0
    sequence: int = 0
    pid: int = 0
    extensions: tuple[Extension, ...] = ()

    def find(self, kind: builtins.type[_E], extension: ExtensionType | None = None) -> _E | None:
        """The extension of that class and, where classes are shared, of that type."""
        for candidate in self.extensions:
            if isinstance(candidate, kind) and (extension is None or getattr(candidate, "type", None) is extension):
                return candidate
        return None

    def require(self, kind: builtins.type[_E], extension: ExtensionType | None = None) -> _E:
        """As `find`; PfKeyError(EINVAL) when it is missing."""
        found = self.find(kind, extension)
        if found is None:
            name = extension.name if extension is not None else kind.__name__
            raise PfKeyError(name, f"missing from {message_name(self.type)}")
        return found


def message_name(number: int) -> str:
    """The name of a message type, or its number."""
    try:
        return MessageType(number).name
    except ValueError:
        return str(number)
