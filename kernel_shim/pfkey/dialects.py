"""The PF_KEY of each kernel, where it is not that of Linux.

Base extensions (below 17) and message types below 12 are the same everywhere. What differs: extensions and message types above, families of
addresses, the head of a policy's request, algorithms that came late, and on OpenBSD the SA types. Sources, beside Linux'
include/uapi/linux/pfkeyv2.h: FreeBSD sys/net/pfkeyv2.h of 13, NetBSD sys/net/pfkeyv2.h of 9, OpenBSD sys/net/pfkeyv2.h of 7.5, and the
sys/socket.h of each.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from kernel_shim.pfkey.constants import AuthAlgorithm, EncryptAlgorithm, ExtensionType, MessageType, SaType
from kernel_shim.pfkey.messages import PfKeyError

FOREIGN: Final = 256  # added to a number of the dialect that means none of ours; the fields have 8 bits


class Numbering:
    """From our numbers (those of Linux) to the dialect's and back. `differing` is what is not the same; None: the dialect has no such thing."""

    __slots__ = ("_of", "_to")

    def __init__(self, differing: Mapping[int, int | None] | None = None) -> None:
        self._to: Final = dict(differing or {})
        self._of: Final = {number: number + FOREIGN for number in self._to}
        self._of.update({theirs: ours for ours, theirs in self._to.items() if theirs is not None})

    def to(self, number: int, field: str) -> int:
        """PfKeyError(EOPNOTSUPP) when the dialect has no such thing."""
        if not self._to:
            return number
        if number >= FOREIGN:
            return number - FOREIGN
        theirs = self._to.get(number, number)
        if theirs is None:
            raise PfKeyError(field, f"{number} has no number there", errno.EOPNOTSUPP)
        return theirs

    def of(self, number: int) -> int:
        return self._of.get(number, number)


@dataclass(frozen=True, slots=True)
class Dialect:
    """One kernel's PF_KEY. `extensions` holds what differs from `ExtensionType`, None for what it does not have."""

    name: str
    af_inet6: int
    sockaddr_length_octet: bool = False  # sockaddrs begin with their length (4.4BSD)
    short_requests: bool = False  # sadb_x_ipsecrequest of 8 octets with a reqid of 16 bits (KAME), not of 16 with 32
    plain_addresses: bool = False  # sadb_address without protocol and prefix length (OpenBSD)
    numbered_proposals: bool = False  # sadb_prop begins with its number (OpenBSD)
    extensions: Mapping[int, int | None] = field(default_factory=dict)
    messages: Numbering = field(default_factory=Numbering)
    sa_types: Numbering = field(default_factory=Numbering)
    auth: Numbering = field(default_factory=Numbering)
    encrypt: Numbering = field(default_factory=Numbering)

    def number(self, extension: ExtensionType) -> int | None:
        return self.extensions.get(extension, int(extension))


_X: Final = ExtensionType
_M: Final = MessageType
_ONLY_BSD: Final = (_X.X_NAT_T_OAR, _X.X_NAT_T_FRAG, _X.X_SA_REPLAY, _X.X_NEW_ADDRESS_SRC, _X.X_NEW_ADDRESS_DST, _X.X_UDPENCAP)
_ONLY_LINUX: Final = (_X.X_SEC_CTX, _X.X_KMADDRESS, _X.X_FILTER)
_OURS: Final = tuple(kind for kind in _X if kind >= _X.X_HELLO)
_OUR_MESSAGES: Final = tuple(kind for kind in _M if kind >= _M.X_BIND)
_NO_CCM: Final = (EncryptAlgorithm.X_AES_CCM_ICV8, EncryptAlgorithm.X_AES_CCM_ICV12, EncryptAlgorithm.X_AES_CCM_ICV16)
_NO_LATE_CIPHERS: Final = (*_NO_CCM, EncryptAlgorithm.X_SM4CBC, EncryptAlgorithm.X_SERPENTCBC, EncryptAlgorithm.X_TWOFISHCBC)


def _without(*absent: tuple[int, ...]) -> dict[int, int | None]:
    return {number: None for group in absent for number in group}


LINUX: Final = Dialect("linux", af_inet6=10, extensions=_without(_ONLY_BSD))
FREEBSD: Final = Dialect(
    "freebsd",
    af_inet6=28,
    sockaddr_length_octet=True,
    short_requests=True,
    extensions=_without(_ONLY_LINUX, _OURS)
    | {_X.X_NAT_T_OAR: 24, _X.X_NAT_T_FRAG: 25, _X.X_SA_REPLAY: 26, _X.X_NEW_ADDRESS_SRC: 27, _X.X_NEW_ADDRESS_DST: 28, _X.X_UDPENCAP: None},
    messages=Numbering(_without(_OUR_MESSAGES, (_M.X_NAT_T_NEW_MAPPING, _M.X_MIGRATE))),
    auth=Numbering(_without((AuthAlgorithm.X_SM3_256HMAC,))),
    encrypt=Numbering(_without(_NO_LATE_CIPHERS, (EncryptAlgorithm.X_CHACHA20_POLY1305,))),
)
NETBSD: Final = Dialect(
    "netbsd",
    af_inet6=24,
    sockaddr_length_octet=True,
    short_requests=True,
    extensions=_without(_ONLY_LINUX, _OURS, _ONLY_BSD) | {_X.X_NAT_T_OAR: 24, _X.X_NAT_T_FRAG: 25},
    messages=Numbering(_without(_OUR_MESSAGES, (_M.X_MIGRATE,))),
    auth=Numbering(_without((AuthAlgorithm.X_SM3_256HMAC,))),
    encrypt=Numbering(_without(_NO_LATE_CIPHERS, (EncryptAlgorithm.X_CHACHA20_POLY1305,))),
)
# OpenBSD has flows in place of policies (SADB_X_ADDFLOW and DELFLOW); what is there under the numbers of others means something else.
OPENBSD: Final = Dialect(
    "openbsd",
    af_inet6=24,
    sockaddr_length_octet=True,
    plain_addresses=True,
    numbered_proposals=True,
    extensions=_without(_ONLY_LINUX, _OURS, _ONLY_BSD, tuple(range(_X.X_KMPRIVATE, _X.X_SEC_CTX))) | {_X.X_UDPENCAP: 31},
    messages=Numbering(_without(_OUR_MESSAGES, tuple(range(_M.X_PCHANGE, _M.X_MIGRATE + 1)))),
    sa_types=Numbering({SaType.AH: 1, SaType.ESP: 2, SaType.RSVP: 3, SaType.OSPFV2: 4, SaType.RIPV2: 5, SaType.MIP: 6}),
    auth=Numbering(_without((AuthAlgorithm.X_AES_XCBC_MAC, AuthAlgorithm.X_SM3_256HMAC, AuthAlgorithm.X_NULL))),
    encrypt=Numbering(
        _without(_NO_LATE_CIPHERS, (EncryptAlgorithm.DESCBC, EncryptAlgorithm.X_CAMELLIACBC))
        | {EncryptAlgorithm.X_NULL_AES_GMAC: 21, EncryptAlgorithm.X_CHACHA20_POLY1305: 22}
    ),
)
DIALECTS: Final[Mapping[str, Dialect]] = {dialect.name: dialect for dialect in (LINUX, FREEBSD, NETBSD, OPENBSD)}
