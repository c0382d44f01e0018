"""The numbers of IKEv2: number, name and RFC on a line (IANA "Internet Key Exchange Version 2 (IKEv2) Parameters").

Payloads carry plain integers, so a number that is not listed here is a value like any other; `name_of` prints it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Exchange(IntEnum):
    IKE_SA_INIT = 34  # RFC 7296
    IKE_AUTH = 35  # RFC 7296
    CREATE_CHILD_SA = 36  # RFC 7296
    INFORMATIONAL = 37  # RFC 7296
    IKE_SESSION_RESUME = 38  # RFC 5723
    GSA_AUTH = 39  # RFC 9838
    GSA_REGISTRATION = 40  # RFC 9838
    GSA_REKEY = 41  # RFC 9838
    IKE_INTERMEDIATE = 43  # RFC 9242
    IKE_FOLLOWUP_KE = 44  # RFC 9370


class Payload(IntEnum):
    NONE = 0  # RFC 7296
    SA = 33  # RFC 7296
    KE = 34  # RFC 7296
    IDI = 35  # RFC 7296
    IDR = 36  # RFC 7296
    CERT = 37  # RFC 7296
    CERTREQ = 38  # RFC 7296
    AUTH = 39  # RFC 7296
    NONCE = 40  # RFC 7296
    NOTIFY = 41  # RFC 7296
    DELETE = 42  # RFC 7296
    VENDOR_ID = 43  # RFC 7296
    TSI = 44  # RFC 7296
    TSR = 45  # RFC 7296
    SK = 46  # RFC 7296
    CP = 47  # RFC 7296
    EAP = 48  # RFC 7296
    GSPM = 49  # RFC 6467
    IDG = 50  # RFC 9838
    GSA = 51  # RFC 9838
    KD = 52  # RFC 9838
    SKF = 53  # RFC 7383
    PS = 54  # RFC 8019


class ProtocolId(IntEnum):
    NONE = 0  # RFC 7296
    IKE = 1  # RFC 7296
    AH = 2  # RFC 7296
    ESP = 3  # RFC 7296


class TransformType(IntEnum):
    ENCR = 1  # RFC 7296
    PRF = 2  # RFC 7296
    INTEG = 3  # RFC 7296
    KE = 4  # RFC 7296, RFC 9370
    ESN = 5  # RFC 7296, RFC 9827
    AKE1 = 6  # RFC 9370
    AKE2 = 7  # RFC 9370
    AKE3 = 8  # RFC 9370
    AKE4 = 9  # RFC 9370
    AKE5 = 10  # RFC 9370
    AKE6 = 11  # RFC 9370
    AKE7 = 12  # RFC 9370


class Encryption(IntEnum):
    """Transform type 1."""

    DES_IV64 = 1  # obsolete
    DES_CBC = 2  # RFC 2405
    TRIPLE_DES_CBC = 3  # RFC 2451
    CAST_CBC = 6  # RFC 2451
    BLOWFISH_CBC = 7  # RFC 2451
    NULL = 11  # RFC 2410
    AES_CBC = 12  # RFC 3602
    AES_CTR = 13  # RFC 3686, RFC 5930
    AES_CCM_8 = 14  # RFC 4309, RFC 5282
    AES_CCM_12 = 15  # RFC 4309, RFC 5282
    AES_CCM_16 = 16  # RFC 4309, RFC 5282
    AES_GCM_8 = 18  # RFC 4106, RFC 5282
    AES_GCM_12 = 19  # RFC 4106, RFC 5282
    AES_GCM_16 = 20  # RFC 4106, RFC 5282
    NULL_AUTH_AES_GMAC = 21  # RFC 4543
    CAMELLIA_CBC = 23  # RFC 5529
    CAMELLIA_CTR = 24  # RFC 5529
    CAMELLIA_CCM_8 = 25  # RFC 5529
    CAMELLIA_CCM_12 = 26  # RFC 5529
    CAMELLIA_CCM_16 = 27  # RFC 5529
    CHACHA20_POLY1305 = 28  # RFC 7634
    AES_CCM_8_IIV = 29  # RFC 8750
    AES_GCM_16_IIV = 30  # RFC 8750
    CHACHA20_POLY1305_IIV = 31  # RFC 8750


class PrfId(IntEnum):
    """Transform type 2."""

    HMAC_MD5 = 1  # RFC 2104
    HMAC_SHA1 = 2  # RFC 2104
    AES128_XCBC = 4  # RFC 4434
    HMAC_SHA2_256 = 5  # RFC 4868
    HMAC_SHA2_384 = 6  # RFC 4868
    HMAC_SHA2_512 = 7  # RFC 4868
    AES128_CMAC = 8  # RFC 4615


class Integrity(IntEnum):
    """Transform type 3."""

    NONE = 0  # RFC 7296
    HMAC_MD5_96 = 1  # RFC 2403
    HMAC_SHA1_96 = 2  # RFC 2404
    AES_XCBC_96 = 5  # RFC 3566
    AES_CMAC_96 = 8  # RFC 4494
    AES_128_GMAC = 9  # RFC 4543
    AES_192_GMAC = 10  # RFC 4543
    AES_256_GMAC = 11  # RFC 4543
    HMAC_SHA2_256_128 = 12  # RFC 4868
    HMAC_SHA2_384_192 = 13  # RFC 4868
    HMAC_SHA2_512_256 = 14  # RFC 4868


class Group(IntEnum):
    """Transform types 4 and 6 to 12: key exchange methods."""

    NONE = 0  # RFC 7296
    MODP_768 = 1  # RFC 7296
    MODP_1024 = 2  # RFC 7296
    MODP_1536 = 5  # RFC 3526
    MODP_2048 = 14  # RFC 3526
    MODP_3072 = 15  # RFC 3526
    MODP_4096 = 16  # RFC 3526
    MODP_6144 = 17  # RFC 3526
    MODP_8192 = 18  # RFC 3526
    ECP_256 = 19  # RFC 5903
    ECP_384 = 20  # RFC 5903
    ECP_521 = 21  # RFC 5903
    MODP_1024_160 = 22  # RFC 5114
    MODP_2048_224 = 23  # RFC 5114
    MODP_2048_256 = 24  # RFC 5114
    ECP_192 = 25  # RFC 5114
    ECP_224 = 26  # RFC 5114
    ECP_224_BP = 27  # RFC 6954
    ECP_256_BP = 28  # RFC 6954
    ECP_384_BP = 29  # RFC 6954
    ECP_512_BP = 30  # RFC 6954
    CURVE_25519 = 31  # RFC 8031
    CURVE_448 = 32  # RFC 8031
    ML_KEM_512 = 35  # draft-ietf-ipsecme-ikev2-mlkem
    ML_KEM_768 = 36  # draft-ietf-ipsecme-ikev2-mlkem
    ML_KEM_1024 = 37  # draft-ietf-ipsecme-ikev2-mlkem


class Esn(IntEnum):
    """Transform type 5."""

    NONE = 0  # RFC 7296
    EXTENDED = 1  # RFC 7296


class TransformAttribute(IntEnum):
    KEY_LENGTH = 14  # RFC 7296


class IdType(IntEnum):
    ANY = 0  # not on the wire: matches every identity
    IPV4_ADDR = 1  # RFC 7296
    FQDN = 2  # RFC 7296
    RFC822_ADDR = 3  # RFC 7296
    IPV6_ADDR = 5  # RFC 7296
    DER_ASN1_DN = 9  # RFC 7296
    DER_ASN1_GN = 10  # RFC 7296
    KEY_ID = 11  # RFC 7296
    FC_NAME = 12  # RFC 4595
    NULL = 13  # RFC 7619


class CertEncoding(IntEnum):
    PKCS7 = 1  # RFC 7296
    PGP = 2  # RFC 7296
    DNS_SIGNED_KEY = 3  # RFC 7296
    X509_SIGNATURE = 4  # RFC 7296
    KERBEROS_TOKEN = 6  # RFC 7296
    CRL = 7  # RFC 7296
    ARL = 8  # RFC 7296
    SPKI = 9  # RFC 7296
    X509_ATTRIBUTE = 10  # RFC 7296
    HASH_AND_URL_X509 = 12  # RFC 7296
    HASH_AND_URL_BUNDLE = 13  # RFC 7296
    OCSP_CONTENT = 14  # RFC 4806
    RAW_PUBLIC_KEY = 15  # RFC 7670


class AuthenticationMethod(IntEnum):
    RSA_SIGNATURE = 1  # RFC 7296
    SHARED_KEY = 2  # RFC 7296
    DSS_SIGNATURE = 3  # RFC 7296
    ECDSA_SHA256_P256 = 9  # RFC 4754
    ECDSA_SHA384_P384 = 10  # RFC 4754
    ECDSA_SHA512_P521 = 11  # RFC 4754
    GENERIC_SECURE_PASSWORD = 12  # RFC 6467
    NULL = 13  # RFC 7619
    DIGITAL_SIGNATURE = 14  # RFC 7427


class HashAlgorithm(IntEnum):
    """Values of SIGNATURE_HASH_ALGORITHMS."""

    SHA1 = 1  # RFC 7427
    SHA2_256 = 2  # RFC 7427
    SHA2_384 = 3  # RFC 7427
    SHA2_512 = 4  # RFC 7427
    IDENTITY = 5  # RFC 8420
    STREEBOG_256 = 6  # RFC 9385
    STREEBOG_512 = 7  # RFC 9385


class NotifyType(IntEnum):
    # Errors: 0 to 16383.
    UNSUPPORTED_CRITICAL_PAYLOAD = 1  # RFC 7296
    INVALID_IKE_SPI = 4  # RFC 7296
    INVALID_MAJOR_VERSION = 5  # RFC 7296
    INVALID_SYNTAX = 7  # RFC 7296
    INVALID_MESSAGE_ID = 9  # RFC 7296
    INVALID_SPI = 11  # RFC 7296
    NO_PROPOSAL_CHOSEN = 14  # RFC 7296
    INVALID_KE_PAYLOAD = 17  # RFC 7296
    AUTHENTICATION_FAILED = 24  # RFC 7296
    SINGLE_PAIR_REQUIRED = 34  # RFC 7296
    NO_ADDITIONAL_SAS = 35  # RFC 7296
    INTERNAL_ADDRESS_FAILURE = 36  # RFC 7296
    FAILED_CP_REQUIRED = 37  # RFC 7296
    TS_UNACCEPTABLE = 38  # RFC 7296
    INVALID_SELECTORS = 39  # RFC 7296
    UNACCEPTABLE_ADDRESSES = 40  # RFC 4555
    UNEXPECTED_NAT_DETECTED = 41  # RFC 4555
    USE_ASSIGNED_HOA = 42  # RFC 5026
    TEMPORARY_FAILURE = 43  # RFC 7296
    CHILD_SA_NOT_FOUND = 44  # RFC 7296
    INVALID_GROUP_ID = 45  # RFC 9838
    AUTHORIZATION_FAILED = 46  # RFC 9838
    STATE_NOT_FOUND = 47  # RFC 9370
    TS_MAX_QUEUE = 48  # RFC 9611
    # Status: 16384 and up.
    INITIAL_CONTACT = 16384  # RFC 7296
    SET_WINDOW_SIZE = 16385  # RFC 7296
    ADDITIONAL_TS_POSSIBLE = 16386  # RFC 7296
    IPCOMP_SUPPORTED = 16387  # RFC 7296
    NAT_DETECTION_SOURCE_IP = 16388  # RFC 7296
    NAT_DETECTION_DESTINATION_IP = 16389  # RFC 7296
    COOKIE = 16390  # RFC 7296
    USE_TRANSPORT_MODE = 16391  # RFC 7296
    HTTP_CERT_LOOKUP_SUPPORTED = 16392  # RFC 7296
    REKEY_SA = 16393  # RFC 7296
    ESP_TFC_PADDING_NOT_SUPPORTED = 16394  # RFC 7296
    NON_FIRST_FRAGMENTS_ALSO = 16395  # RFC 7296
    MOBIKE_SUPPORTED = 16396  # RFC 4555
    ADDITIONAL_IP4_ADDRESS = 16397  # RFC 4555
    ADDITIONAL_IP6_ADDRESS = 16398  # RFC 4555
    NO_ADDITIONAL_ADDRESSES = 16399  # RFC 4555
    UPDATE_SA_ADDRESSES = 16400  # RFC 4555
    COOKIE2 = 16401  # RFC 4555
    NO_NATS_ALLOWED = 16402  # RFC 4555
    AUTH_LIFETIME = 16403  # RFC 4478
    MULTIPLE_AUTH_SUPPORTED = 16404  # RFC 4739
    ANOTHER_AUTH_FOLLOWS = 16405  # RFC 4739
    REDIRECT_SUPPORTED = 16406  # RFC 5685
    REDIRECT = 16407  # RFC 5685
    REDIRECTED_FROM = 16408  # RFC 5685
    TICKET_LT_OPAQUE = 16409  # RFC 5723
    TICKET_REQUEST = 16410  # RFC 5723
    TICKET_ACK = 16411  # RFC 5723
    TICKET_NACK = 16412  # RFC 5723
    TICKET_OPAQUE = 16413  # RFC 5723
    LINK_ID = 16414  # RFC 5739
    USE_WESP_MODE = 16415  # RFC 5840
    ROHC_SUPPORTED = 16416  # RFC 5857
    EAP_ONLY_AUTHENTICATION = 16417  # RFC 5998
    CHILDLESS_IKEV2_SUPPORTED = 16418  # RFC 6023
    QUICK_CRASH_DETECTION = 16419  # RFC 6290
    IKEV2_MESSAGE_ID_SYNC_SUPPORTED = 16420  # RFC 6311
    IPSEC_REPLAY_COUNTER_SYNC_SUPPORTED = 16421  # RFC 6311
    IKEV2_MESSAGE_ID_SYNC = 16422  # RFC 6311
    IPSEC_REPLAY_COUNTER_SYNC = 16423  # RFC 6311
    SECURE_PASSWORD_METHODS = 16424  # RFC 6467
    PSK_PERSIST = 16425  # RFC 6631
    PSK_CONFIRM = 16426  # RFC 6631
    ERX_SUPPORTED = 16427  # RFC 6867
    IFOM_CAPABILITY = 16428  # 3GPP TS 24.303
    SENDER_REQUEST_ID = 16429  # RFC 9838
    IKEV2_FRAGMENTATION_SUPPORTED = 16430  # RFC 7383
    SIGNATURE_HASH_ALGORITHMS = 16431  # RFC 7427
    CLONE_IKE_SA_SUPPORTED = 16432  # RFC 7791
    CLONE_IKE_SA = 16433  # RFC 7791
    PUZZLE = 16434  # RFC 8019
    USE_PPK = 16435  # RFC 8784
    PPK_IDENTITY = 16436  # RFC 8784
    NO_PPK_AUTH = 16437  # RFC 8784
    INTERMEDIATE_EXCHANGE_SUPPORTED = 16438  # RFC 9242
    IP4_ALLOWED = 16439  # RFC 8983
    IP6_ALLOWED = 16440  # RFC 8983
    ADDITIONAL_KEY_EXCHANGE = 16441  # RFC 9370
    USE_AGGFRAG = 16442  # RFC 9347
    SUPPORTED_AUTH_METHODS = 16443  # RFC 9593
    SA_RESOURCE_INFO = 16444  # RFC 9611
    USE_PPK_INT = 16445  # RFC 9867
    PPK_IDENTITY_KEY = 16446  # RFC 9867


class TsType(IntEnum):
    IPV4_ADDR_RANGE = 7  # RFC 7296
    IPV6_ADDR_RANGE = 8  # RFC 7296
    FC_ADDR_RANGE = 9  # RFC 4595
    SECLABEL = 10  # RFC 9478


class ConfigType(IntEnum):
    CFG_REQUEST = 1  # RFC 7296
    CFG_REPLY = 2  # RFC 7296
    CFG_SET = 3  # RFC 7296
    CFG_ACK = 4  # RFC 7296


class ConfigAttribute(IntEnum):
    INTERNAL_IP4_ADDRESS = 1  # RFC 7296
    INTERNAL_IP4_NETMASK = 2  # RFC 7296
    INTERNAL_IP4_DNS = 3  # RFC 7296
    INTERNAL_IP4_NBNS = 4  # RFC 7296
    INTERNAL_IP4_DHCP = 6  # RFC 7296
    APPLICATION_VERSION = 7  # RFC 7296
    INTERNAL_IP6_ADDRESS = 8  # RFC 7296
    INTERNAL_IP6_DNS = 10  # RFC 7296
    INTERNAL_IP6_DHCP = 12  # RFC 7296
    INTERNAL_IP4_SUBNET = 13  # RFC 7296
    SUPPORTED_ATTRIBUTES = 14  # RFC 7296
    INTERNAL_IP6_SUBNET = 15  # RFC 7296
    MIP6_HOME_PREFIX = 16  # RFC 5026
    INTERNAL_IP6_LINK = 17  # RFC 5739
    INTERNAL_IP6_PREFIX = 18  # RFC 5739
    HOME_AGENT_ADDRESS = 19  # 3GPP TS 24.302
    P_CSCF_IP4_ADDRESS = 20  # RFC 7651
    P_CSCF_IP6_ADDRESS = 21  # RFC 7651
    FTT_KAT = 22  # 3GPP TS 24.302
    EXTERNAL_SOURCE_IP4_NAT_INFO = 23  # 3GPP TS 29.139
    TIMEOUT_PERIOD_FOR_LIVENESS_CHECK = 24  # 3GPP TS 24.302
    INTERNAL_DNS_DOMAIN = 25  # RFC 8598
    INTERNAL_DNSSEC_TA = 26  # RFC 8598
    ENCDNS_IP4 = 27  # RFC 9464
    ENCDNS_IP6 = 28  # RFC 9464
    ENCDNS_DIGEST_INFO = 29  # RFC 9464


class EapCode(IntEnum):
    REQUEST = 1  # RFC 3748
    RESPONSE = 2  # RFC 3748
    SUCCESS = 3  # RFC 3748
    FAILURE = 4  # RFC 3748


FIRST_STATUS_NOTIFY: Final = 16384  # RFC 7296 section 3.10.1: lower types are errors

ADDITIONAL_KEY_EXCHANGE_TYPES: Final = tuple(TransformType(number) for number in range(TransformType.AKE1, TransformType.AKE7 + 1))
KEY_EXCHANGE_TYPES: Final = frozenset({TransformType.KE, *ADDITIONAL_KEY_EXCHANGE_TYPES})

_TRANSFORM_REGISTRIES: Final[dict[int, type[IntEnum]]] = {
    TransformType.ENCR: Encryption,
    TransformType.PRF: PrfId,
    TransformType.INTEG: Integrity,
    TransformType.ESN: Esn,
    **dict.fromkeys(KEY_EXCHANGE_TYPES, Group),
}


def name_of(registry: type[IntEnum], number: int) -> str:
    """The name that `registry` gives `number`; the decimal number when it gives none."""
    try:
        return registry(number).name
    except ValueError:
        return str(number)


def transform_name(transform_type: int, number: int) -> str:
    """The name of a transform id, whose registry depends on the transform's type."""
    registry = _TRANSFORM_REGISTRIES.get(transform_type)
    return str(number) if registry is None else name_of(registry, number)


def is_error(notify_type: int) -> bool:
    """RFC 7296 section 3.10.1: whether a notification reports an error (as opposed to a status)."""
    return notify_type < FIRST_STATUS_NOTIFY
