"""Numbers and names of NETLINK_XFRM."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

from kernel_shim.algorithms import EncryptionId, IntegrityId

# --- linux/netlink.h

NETLINK_XFRM: Final = 6


class NetlinkType(IntEnum):
    NOOP = 1
    ERROR = 2
    DONE = 3
    OVERRUN = 4


class NetlinkFlag(IntFlag):
    REQUEST = 0x001
    MULTI = 0x002
    ACK = 0x004
    DUMP_INTR = 0x010
    REPLACE = 0x100
    ACK_TLVS = 0x200  # of an NLMSG_ERROR
    EXCL = 0x200
    DUMP = 0x300
    CREATE = 0x400


# --- linux/xfrm.h


class MessageType(IntEnum):
    """`XFRM_MSG_*`."""

    NEWSA = 0x10
    DELSA = 0x11
    GETSA = 0x12
    NEWPOLICY = 0x13
    DELPOLICY = 0x14
    GETPOLICY = 0x15
    ALLOCSPI = 0x16
    ACQUIRE = 0x17
    EXPIRE = 0x18
    UPDPOLICY = 0x19
    UPDSA = 0x1A
    POLEXPIRE = 0x1B
    FLUSHSA = 0x1C
    FLUSHPOLICY = 0x1D
    NEWAE = 0x1E
    GETAE = 0x1F
    REPORT = 0x20
    MIGRATE = 0x21
    NEWSADINFO = 0x22
    GETSADINFO = 0x23
    NEWSPDINFO = 0x24
    GETSPDINFO = 0x25
    MAPPING = 0x26
    SETDEFAULT = 0x27
    GETDEFAULT = 0x28


class Attribute(IntEnum):
    """`XFRMA_*`."""

    ALG_AUTH = 1
    ALG_CRYPT = 2
    ALG_COMP = 3
    ENCAP = 4
    TMPL = 5
    SA = 6
    POLICY = 7
    SEC_CTX = 8
    LTIME_VAL = 9
    REPLAY_VAL = 10
    REPLAY_THRESH = 11
    ETIMER_THRESH = 12
    SRCADDR = 13
    COADDR = 14
    LASTUSED = 15
    POLICY_TYPE = 16
    MIGRATE = 17
    ALG_AEAD = 18
    KMADDRESS = 19
    ALG_AUTH_TRUNC = 20
    MARK = 21
    TFCPAD = 22
    REPLAY_ESN_VAL = 23
    SA_EXTRA_FLAGS = 24
    PROTO = 25
    ADDRESS_FILTER = 26
    PAD = 27
    OFFLOAD_DEV = 28
    SET_MARK = 29
    SET_MARK_MASK = 30
    IF_ID = 31
    MTIMER_THRESH = 32
    SA_DIR = 33  # Linux 6.10
    NAT_KEEPALIVE_INTERVAL = 34
    SA_PCPU = 35
    IPTFS_DROP_TIME = 36
    IPTFS_REORDER_WINDOW = 37
    IPTFS_DONT_FRAG = 38
    IPTFS_INIT_DELAY = 39
    IPTFS_MAX_QSIZE = 40
    IPTFS_PKT_SIZE = 41


class PolicyDirection(IntEnum):
    """`XFRM_POLICY_*`. Numbers beyond are policies of single sockets."""

    IN = 0
    OUT = 1
    FORWARD = 2


class PolicyAction(IntEnum):
    ALLOW = 0
    BLOCK = 1


class XfrmMode(IntEnum):
    TRANSPORT = 0
    TUNNEL = 1


class StateFlag(IntFlag):
    """`XFRM_STATE_*` of a usersa_info."""

    NO_ECN = 1
    DECAP_DSCP = 2
    NO_PMTU_DISCOVERY = 4
    AF_UNSPEC = 32  # an SA without selector takes packets of either family
    ESN = 128


class ExtraFlag(IntFlag):
    """`XFRM_SA_XFLAG_*`."""

    DONT_ENCAP_DSCP = 1


class EventFlag(IntFlag):
    """`XFRM_AE_*`: what an AE message asks for or tells, and why the kernel sent it."""

    REPLAY_THRESHOLD = 1
    REPLAY = 2
    LIFETIME = 4
    TIMER_THRESHOLD = 8
    BY_REQUEST = 16
    BY_TIMER = 32
    BY_UPDATE = 64


class OffloadFlag(IntFlag):
    """`XFRM_OFFLOAD_*`."""

    IPV6 = 1
    INBOUND = 2
    PACKET = 4


class DatabaseAttribute(IntEnum):
    """`XFRMA_SPD_*` of an SPD information message, whose attributes have numbers of their own."""

    SPD_COUNTS = 1
    SPD_HASH = 2
    SPD_THRESHOLD_4 = 3
    SPD_THRESHOLD_6 = 4


SAD_COUNT: Final = 1  # XFRMA_SAD_CNT
SAD_HASH: Final = 2  # XFRMA_SAD_HINFO


class SaDirection(IntEnum):
    IN = 1
    OUT = 2


class Group(IntEnum):
    """`XFRMNLGRP_*`."""

    ACQUIRE = 1
    EXPIRE = 2
    SA = 3
    POLICY = 4
    AEVENTS = 5
    REPORT = 6
    MIGRATE = 7
    MAPPING = 8


INFINITE: Final = 0xFFFFFFFFFFFFFFFF  # XFRM_INF
UDP_ENCAP_ESPINUDP: Final = 2  # linux/udp.h
AF_INET: Final = 2
AF_INET6: Final = 10

# --- crypto API names, as net/xfrm/xfrm_algo.c lists them

AEAD_NAMES: Final = {
    EncryptionId.AES_GCM_8: "rfc4106(gcm(aes))",
    EncryptionId.AES_GCM_12: "rfc4106(gcm(aes))",
    EncryptionId.AES_GCM_16: "rfc4106(gcm(aes))",
    EncryptionId.AES_CCM_8: "rfc4309(ccm(aes))",
    EncryptionId.AES_CCM_12: "rfc4309(ccm(aes))",
    EncryptionId.AES_CCM_16: "rfc4309(ccm(aes))",
    EncryptionId.CHACHA20_POLY1305: "rfc7539esp(chacha20,poly1305)",
}
CIPHER_NAMES: Final = {
    EncryptionId.NULL: "ecb(cipher_null)",
    EncryptionId.AES_CBC: "cbc(aes)",
    EncryptionId.AES_CTR: "rfc3686(ctr(aes))",
}
INTEGRITY_NAMES: Final = {
    IntegrityId.HMAC_SHA1_96: "hmac(sha1)",
    IntegrityId.HMAC_SHA2_256_128: "hmac(sha256)",
    IntegrityId.HMAC_SHA2_384_192: "hmac(sha384)",
    IntegrityId.HMAC_SHA2_512_256: "hmac(sha512)",
}

# --- of this implementation

MAX_MOVES: Final = 6  # of one MIGRATE message; XFRM_MAX_DEPTH
OURS: Final = 0x80000000  # the top bit of reqids and policy indexes; the kernel, strongSwan and libreswan count from small numbers up
MAX_REPLAY_WINDOW: Final = 4096  # XFRMA_REPLAY_ESN_MAX
MAX_TEMPLATES: Final = 6  # XFRM_MAX_DEPTH
