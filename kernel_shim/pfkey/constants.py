"""The numbers of PF_KEY v2: RFC 2367, the `SADB_X_` ones of Linux (include/uapi/linux/pfkeyv2.h, linux/ipsec.h), and our own.

The enumerations have Linux' numbers; where other kernels differ is in `dialects`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from kernel_shim.algorithms import EncryptionId, IntegrityId
from kernel_shim.model import Unresolved

# The specification.

PF_KEY_V2: Final = 2
WORD: Final = 8  # octets; lengths count words of 64 bits (RFC 2367 section 2.2)
HEADER_LENGTH: Final = 16
EXTENSION_HEADER_LENGTH: Final = 4


class MessageType(IntEnum):
    """RFC 2367 section 3.1; from X_PROMISC on KAME and Linux; from X_BIND on ours (docs/pfkey-extensions.md)."""

    RESERVED = 0
    GETSPI = 1
    UPDATE = 2
    ADD = 3
    DELETE = 4
    GET = 5
    ACQUIRE = 6
    REGISTER = 7
    EXPIRE = 8
    FLUSH = 9
    DUMP = 10
    X_PROMISC = 11
    X_PCHANGE = 12
    X_SPDUPDATE = 13
    X_SPDADD = 14
    X_SPDDELETE = 15  # by selector
    X_SPDGET = 16
    X_SPDACQUIRE = 17
    X_SPDDUMP = 18
    X_SPDFLUSH = 19
    X_SPDSETIDX = 20
    X_SPDEXPIRE = 21
    X_SPDDELETE2 = 22  # by index
    X_NAT_T_NEW_MAPPING = 23
    X_MIGRATE = 24
    X_BIND = 200
    X_UNBIND = 201
    X_STATISTICS = 202
    X_OVERRUN = 203
    X_PENDINGDUMP = 204
    X_BUNDLEDUMP = 205
    X_LABELPUT = 206
    X_LABELDELETE = 207
    X_LABELDUMP = 208


class ExtensionType(IntEnum):
    """RFC 2367 section 2.3 and Linux; from X_NAT_T_OAR on those that only a BSD has (`dialects`); from X_HELLO on ours (docs/pfkey-extensions.md)."""

    RESERVED = 0
    SA = 1
    LIFETIME_CURRENT = 2
    LIFETIME_HARD = 3
    LIFETIME_SOFT = 4
    ADDRESS_SRC = 5
    ADDRESS_DST = 6
    ADDRESS_PROXY = 7
    KEY_AUTH = 8
    KEY_ENCRYPT = 9
    IDENTITY_SRC = 10
    IDENTITY_DST = 11
    SENSITIVITY = 12
    PROPOSAL = 13
    SUPPORTED_AUTH = 14
    SUPPORTED_ENCRYPT = 15
    SPIRANGE = 16
    X_KMPRIVATE = 17
    X_POLICY = 18
    X_SA2 = 19
    X_NAT_T_TYPE = 20
    X_NAT_T_SPORT = 21
    X_NAT_T_DPORT = 22
    X_NAT_T_OA = 23
    X_SEC_CTX = 24
    X_KMADDRESS = 25
    X_FILTER = 26
    X_NAT_T_OAR = 0x7000
    X_NAT_T_FRAG = 0x7001
    X_SA_REPLAY = 0x7002
    X_NEW_ADDRESS_SRC = 0x7003
    X_NEW_ADDRESS_DST = 0x7004
    X_UDPENCAP = 0x7005
    X_HELLO = 0x8000
    X_CAPABILITIES = 0x8001
    X_SA = 0x8002
    X_SA_STATUS = 0x8003
    X_SA_SOURCES = 0x8004
    X_SA_DESTINATIONS = 0x8005
    X_SELECTOR = 0x8006
    X_UNRESOLVED = 0x8007
    X_FLOW = 0x8008
    X_SA_DESTINATION = 0x8009
    X_STATISTICS = 0x800A
    X_DUMP = 0x800B
    X_ERROR = 0x800C
    X_ACQUIRE = 0x800D
    X_PENDING = 0x800E
    X_BUNDLE = 0x800F
    X_LOST = 0x8010
    X_LABELS = 0x8011


PRIVATE_EXTENSIONS: Final = 0x8000  # the first of our own extension types
PRIVATE_MESSAGES: Final = 200  # the first of our own message types


class SaType(IntEnum):
    """RFC 2367 section 3.2 and Linux."""

    UNSPEC = 0
    AH = 2
    ESP = 3
    RSVP = 5
    OSPFV2 = 6
    RIPV2 = 7
    MIP = 8
    X_IPCOMP = 9


class AuthAlgorithm(IntEnum):
    """RFC 2367 section 3.5 and Linux."""

    NONE = 0
    MD5HMAC = 2
    SHA1HMAC = 3
    X_SHA2_256HMAC = 5
    X_SHA2_384HMAC = 6
    X_SHA2_512HMAC = 7
    X_RIPEMD160HMAC = 8
    X_AES_XCBC_MAC = 9
    X_SM3_256HMAC = 10
    X_NULL = 251


class EncryptAlgorithm(IntEnum):
    """RFC 2367 section 3.5 and Linux; X_CHACHA20_POLY1305 is ours, as no number was ever given."""

    NONE = 0
    DESCBC = 2
    TRIPLE_DESCBC = 3
    X_CASTCBC = 6
    X_BLOWFISHCBC = 7
    NULL = 11
    X_AESCBC = 12
    X_AESCTR = 13
    X_AES_CCM_ICV8 = 14
    X_AES_CCM_ICV12 = 15
    X_AES_CCM_ICV16 = 16
    X_AES_GCM_ICV8 = 18
    X_AES_GCM_ICV12 = 19
    X_AES_GCM_ICV16 = 20
    X_CAMELLIACBC = 22
    X_NULL_AES_GMAC = 23
    X_SM4CBC = 24
    X_CHACHA20_POLY1305 = 28
    X_SERPENTCBC = 252
    X_TWOFISHCBC = 253


AUTH_OF_INTEGRITY: Final[Mapping[IntegrityId, int]] = {
    IntegrityId.NONE: AuthAlgorithm.NONE,
    IntegrityId.HMAC_SHA1_96: AuthAlgorithm.SHA1HMAC,
    IntegrityId.HMAC_SHA2_256_128: AuthAlgorithm.X_SHA2_256HMAC,
    IntegrityId.HMAC_SHA2_384_192: AuthAlgorithm.X_SHA2_384HMAC,
    IntegrityId.HMAC_SHA2_512_256: AuthAlgorithm.X_SHA2_512HMAC,
}
INTEGRITY_OF_AUTH: Final[Mapping[int, IntegrityId]] = {number: integrity for integrity, number in AUTH_OF_INTEGRITY.items()}
# PF_KEY took over IKE's transform numbers for every cipher that we know.
ENCRYPT_OF_ENCRYPTION: Final[Mapping[EncryptionId, int]] = {cipher: int(cipher) for cipher in EncryptionId}
ENCRYPTION_OF_ENCRYPT: Final[Mapping[int, EncryptionId]] = {number: cipher for cipher, number in ENCRYPT_OF_ENCRYPTION.items()}

IPSEC_PROTO_ANY: Final = 255  # what an address extension says for "any protocol" (linux/ipsec.h)
IPSEC_MODE_ANY: Final = 0
IPSEC_MODE_BEET: Final = 3
IPSEC_POLICY_IPSEC: Final = 2
UDP_ENCAP_ESPINUDP: Final = 2  # include/uapi/linux/udp.h
REPLAY_WINDOW_MAX_BASE: Final = 255  # sadb_sa_replay is 8 bits wide
AF_UNSPEC: Final = 0
AF_INET: Final = 2


# Our own.

NUMBER_OF_UNRESOLVED: Final = {Unresolved.QUEUE: 1, Unresolved.EAGAIN: 2, Unresolved.BLOCK: 3, Unresolved.DROP: 4}
UNRESOLVED_OF_NUMBER: Final = {number: mode for mode, number in NUMBER_OF_UNRESOLVED.items()}
PRIVATE_VERSION: Final = 1  # of our extensions, spoken in X_HELLO
MAX_MESSAGE: Final = 0xFFFF * WORD  # octets: what sadb_msg_len can say
MAX_TEMPLATES: Final = 6  # a policy's; Linux' XFRM_MAX_DEPTH
MAX_REQUESTS: Final = 2 * MAX_TEMPLATES  # of an X_POLICY: MIGRATE has each twice, old and new
MAX_SELECTORS: Final = 255  # a side's of an SA: as many as a TS payload can carry (RFC 7296 section 3.13)
MAX_ALGORITHMS: Final = 256
MAX_COMBINATIONS: Final = 256  # of a proposal
MAX_STATISTICS: Final = 4096
MAX_STATISTIC_NAME: Final = 255  # octets
MAX_ERROR_TEXT: Final = 512  # octets
MAX_LABEL: Final = 4096  # octets of an identity, sensitivity label or security context: an SA keeps them
MAX_LABEL_ENTRIES: Final = 256  # of a label node, in one message
MAX_LABEL_NAME: Final = 63  # octets
MAX_LABEL_RANGES: Final = 512
MAX_EXTENSIONS: Final = 64  # of a message
