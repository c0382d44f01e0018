"""The C structures of linux/xfrm.h as named tuples, in the host's byte order where C has it so.

Addresses are 16 octets, an IPv4 address in the first four; SPIs and ports are converted from network byte order.
"""

from __future__ import annotations

import errno
import struct
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final, NamedTuple

from kernel_shim.model import IPAddress, KernelError
from kernel_shim.xfrm.constants import AF_INET, AF_INET6

_NO_ADDRESS: Final = bytes(16)


class MalformedMessage(KernelError):
    """What came over netlink is not what linux/xfrm.h describes."""

    def __init__(self, detail: str) -> None:
        super().__init__(errno.EBADMSG, detail)


def family_of(version: int) -> int:
    return AF_INET if version == 4 else AF_INET6


def version_of(family: int) -> int:
    if family == AF_INET:
        return 4
    if family == AF_INET6:
        return 6
    raise MalformedMessage(f"address family {family}")


def pack_address(address: IPAddress | None) -> bytes:
    """None is the unspecified address, of either family."""
    return address.packed.ljust(16, b"\0") if address is not None else _NO_ADDRESS


def unpack_address(data: bytes, family: int) -> IPAddress:
    return IPv4Address(data[:4]) if version_of(family) == 4 else IPv6Address(data[:16])


def _unpack(layout: struct.Struct, data: bytes, offset: int, what: str) -> tuple[Any, ...]:
    try:
        return layout.unpack_from(data, offset)
    except struct.error:
        raise MalformedMessage(f"{what}: {len(data) - offset} octets, {layout.size} needed") from None


class SelectorStruct(NamedTuple):
    """struct xfrm_selector."""

    daddr: bytes
    saddr: bytes
    dport: int
    dport_mask: int
    sport: int
    sport_mask: int
    family: int
    prefixlen_d: int
    prefixlen_s: int
    proto: int
    ifindex: int = 0
    user: int = 0

    def pack(self) -> bytes:
        ports = (_port(self.dport), _port(self.dport_mask), _port(self.sport), _port(self.sport_mask))
        return SELECTOR.pack(self.daddr, self.saddr, *ports, self.family, self.prefixlen_d, self.prefixlen_s, self.proto, self.ifindex, self.user)

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> SelectorStruct:
        daddr, saddr, dport, dport_mask, sport, sport_mask, *rest = _unpack(SELECTOR, data, offset, "selector")
        ports = (int.from_bytes(port, "big") for port in (dport, dport_mask, sport, sport_mask))
        return cls(daddr, saddr, *ports, *rest)


SELECTOR: Final = struct.Struct("=16s16s2s2s2s2sHBBB3xiI")
NO_SELECTOR: Final = SelectorStruct(_NO_ADDRESS, _NO_ADDRESS, 0, 0, 0, 0, 0, 0, 0, 0)


def _port(value: int) -> bytes:
    return value.to_bytes(2, "big")


class LifetimeStruct(NamedTuple):
    """struct xfrm_lifetime_cfg: limits of octets and packets are INFINITE where there is none, those of seconds 0."""

    soft_octets: int
    hard_octets: int
    soft_packets: int
    hard_packets: int
    soft_seconds: int
    hard_seconds: int
    soft_use_seconds: int = 0
    hard_use_seconds: int = 0


LIFETIME: Final = struct.Struct("=8Q")


class SaStruct(NamedTuple):
    """struct xfrm_usersa_info."""

    selector: SelectorStruct
    daddr: bytes
    spi: int
    proto: int
    saddr: bytes
    lifetime: LifetimeStruct
    octets: int
    packets: int
    add_time: int
    use_time: int
    seq: int
    reqid: int
    family: int
    mode: int
    replay_window: int
    flags: int

    def pack(self) -> bytes:
        head = self.selector.pack() + SA_ID.pack(self.daddr, self.spi.to_bytes(4, "big"), self.proto)
        used = (self.octets, self.packets, self.add_time, self.use_time)
        return head + SA_REST.pack(self.saddr, *self.lifetime, *used, 0, 0, 0, self.seq, self.reqid, self.family, self.mode, self.replay_window, self.flags)

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> SaStruct:
        selector = SelectorStruct.unpack(data, offset)
        daddr, spi, proto = unpack_id(data, offset + SELECTOR.size)
        rest = _unpack(SA_REST, data, offset + SELECTOR.size + SA_ID.size, "usersa_info")
        return cls(selector, daddr, spi, proto, rest[0], LifetimeStruct(*rest[1:9]), *rest[9:13], *rest[16:])


SA_ID: Final = struct.Struct("=16s4sB3x")  # struct xfrm_id
SA_REST: Final = struct.Struct("=16s8Q4Q3IIIHBBB7x")  # saddr, lft, curlft, stats, seq, reqid, family, mode, replay_window, flags
SA_SIZE: Final = SELECTOR.size + SA_ID.size + SA_REST.size
SPI_RANGE: Final = struct.Struct("=II")  # what follows usersa_info in userspi_info


def unpack_id(data: bytes, offset: int) -> tuple[bytes, int, int]:
    """daddr, SPI and protocol of a struct xfrm_id."""
    daddr, spi, proto = _unpack(SA_ID, data, offset, "xfrm_id")
    return daddr, int.from_bytes(spi, "big"), proto


class SaIdStruct(NamedTuple):
    """struct xfrm_usersa_id."""

    daddr: bytes
    spi: int
    family: int
    proto: int

    def pack(self) -> bytes:
        return USERSA_ID.pack(self.daddr, self.spi.to_bytes(4, "big"), self.family, self.proto)

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> SaIdStruct:
        daddr, spi, family, proto = _unpack(USERSA_ID, data, offset, "usersa_id")
        return cls(daddr, int.from_bytes(spi, "big"), family, proto)


USERSA_ID: Final = struct.Struct("=16s4sHBx")


class PolicyStruct(NamedTuple):
    """struct xfrm_userpolicy_info."""

    selector: SelectorStruct
    lifetime: LifetimeStruct
    priority: int
    number: int  # its index
    dir: int
    action: int
    flags: int = 0
    share: int = 0

    def pack(self) -> bytes:
        return self.selector.pack() + POLICY_REST.pack(*self.lifetime, 0, 0, 0, 0, self.priority, self.number, self.dir, self.action, self.flags, self.share)

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> PolicyStruct:
        selector = SelectorStruct.unpack(data, offset)
        rest = _unpack(POLICY_REST, data, offset + SELECTOR.size, "userpolicy_info")
        return cls(selector, LifetimeStruct(*rest[:8]), *rest[12:])


POLICY_REST: Final = struct.Struct("=8Q4QIIBBBB4x")
POLICY_SIZE: Final = SELECTOR.size + POLICY_REST.size


class PolicyIdStruct(NamedTuple):
    """struct xfrm_userpolicy_id."""

    selector: SelectorStruct
    number: int  # its index
    dir: int

    def pack(self) -> bytes:
        return self.selector.pack() + POLICY_ID_REST.pack(self.number, self.dir)

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> PolicyIdStruct:
        selector = SelectorStruct.unpack(data, offset)
        number, direction = _unpack(POLICY_ID_REST, data, offset + SELECTOR.size, "userpolicy_id")
        return cls(selector, number, direction)


POLICY_ID_REST: Final = struct.Struct("=IB3x")
POLICY_ID_SIZE: Final = SELECTOR.size + POLICY_ID_REST.size


class TemplateStruct(NamedTuple):
    """struct xfrm_user_tmpl."""

    daddr: bytes
    spi: int
    proto: int
    family: int
    saddr: bytes
    reqid: int
    mode: int
    share: int = 0
    optional: int = 0
    aalgos: int = 0xFFFFFFFF  # all bits: any algorithm
    ealgos: int = 0xFFFFFFFF
    calgos: int = 0xFFFFFFFF

    def pack(self) -> bytes:
        return TEMPLATE.pack(self.daddr, self.spi.to_bytes(4, "big"), *self[2:])

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> TemplateStruct:
        daddr, spi, *rest = _unpack(TEMPLATE, data, offset, "user_tmpl")
        return cls(daddr, int.from_bytes(spi, "big"), *rest)


TEMPLATE: Final = struct.Struct("=16s4sB3xH2x16sIBBBxIII")


class AcquireStruct(NamedTuple):
    """struct xfrm_user_acquire."""

    daddr: bytes
    proto: int
    saddr: bytes
    selector: SelectorStruct  # the flow
    policy: PolicyStruct
    seq: int

    def pack(self) -> bytes:
        head = SA_ID.pack(self.daddr, bytes(4), self.proto) + self.saddr
        return head + self.selector.pack() + self.policy.pack() + ACQUIRE_REST.pack(0, 0, 0, self.seq)

    @classmethod
    def unpack(cls, data: bytes) -> AcquireStruct:
        *_, seq = _unpack(ACQUIRE_REST, data, ACQUIRE_SIZE - ACQUIRE_REST.size, "user_acquire")
        daddr, _spi, proto = unpack_id(data, 0)
        saddr = data[SA_ID.size : SA_ID.size + 16]
        at = SA_ID.size + 16
        return cls(daddr, proto, saddr, SelectorStruct.unpack(data, at), PolicyStruct.unpack(data, at + SELECTOR.size), seq)


ACQUIRE_REST: Final = struct.Struct("=IIII")
ACQUIRE_SIZE: Final = SA_ID.size + 16 + SELECTOR.size + POLICY_SIZE + ACQUIRE_REST.size

EXPIRE_SIZE: Final = SA_SIZE + 8  # usersa_info and one octet, aligned


class MappingStruct(NamedTuple):
    """struct xfrm_user_mapping."""

    id: SaIdStruct
    reqid: int
    old_saddr: bytes
    new_saddr: bytes
    old_sport: int
    new_sport: int

    def pack(self) -> bytes:
        return self.id.pack() + MAPPING_REST.pack(self.reqid, self.old_saddr, self.new_saddr, _port(self.old_sport), _port(self.new_sport))

    @classmethod
    def unpack(cls, data: bytes) -> MappingStruct:
        reqid, old, new, old_port, new_port = _unpack(MAPPING_REST, data, USERSA_ID.size, "user_mapping")
        ports = (int.from_bytes(old_port, "big"), int.from_bytes(new_port, "big"))
        return cls(SaIdStruct.unpack(data), reqid, old, new, *ports)


MAPPING_REST: Final = struct.Struct("=I16s16s2s2s")
MAPPING_SIZE: Final = USERSA_ID.size + MAPPING_REST.size


class EventStruct(NamedTuple):
    """struct xfrm_aevent_id."""

    id: SaIdStruct
    saddr: bytes
    flags: int
    reqid: int

    def pack(self) -> bytes:
        return self.id.pack() + AEVENT_REST.pack(*self[1:])

    @classmethod
    def unpack(cls, data: bytes) -> EventStruct:
        return cls(SaIdStruct.unpack(data), *_unpack(AEVENT_REST, data, USERSA_ID.size, "aevent_id"))


AEVENT_REST: Final = struct.Struct("=16sII")  # what follows usersa_id in xfrm_aevent_id
AEVENT_SIZE: Final = USERSA_ID.size + AEVENT_REST.size


class MoveStruct(NamedTuple):
    """struct xfrm_user_migrate."""

    old_daddr: bytes
    old_saddr: bytes
    new_daddr: bytes
    new_saddr: bytes
    proto: int
    mode: int
    reqid: int
    old_family: int
    new_family: int

    def pack(self) -> bytes:
        return MOVE.pack(*self)

    @classmethod
    def unpack(cls, data: bytes, offset: int = 0) -> MoveStruct:
        return cls(*_unpack(MOVE, data, offset, "user_migrate"))


MOVE: Final = struct.Struct("=16s16s16s16sBB2xIHH")
REPORT_HEAD: Final = struct.Struct("=B3x")  # of struct xfrm_user_report, before its selector
REPORT_SIZE: Final = REPORT_HEAD.size + SELECTOR.size
LIFETIME_CURRENT: Final = struct.Struct("=4Q")  # struct xfrm_lifetime_cur: octets, packets, add time, use time
OFFLOAD: Final = struct.Struct("=iB3x")  # struct xfrm_user_offload: device, flags
SPD_COUNTS: Final = struct.Struct("=6I")  # struct xfrmu_spdinfo: in, out, forward; the same of sockets
HASH_SIZES: Final = struct.Struct("=II")  # struct xfrmu_spdhinfo and xfrmu_sadhinfo: buckets, most buckets
HASH_THRESHOLD: Final = struct.Struct("=BB")  # struct xfrmu_spdhthresh: local and remote prefix bits
ALGORITHM: Final = struct.Struct("=64sI")  # struct xfrm_algo, before the key
ALGORITHM_SIZED: Final = struct.Struct("=64sII")  # struct xfrm_algo_aead and xfrm_algo_auth, before the key
ENCAPSULATION: Final = struct.Struct("=H2s2s2x16s")  # struct xfrm_encap_tmpl
REPLAY: Final = struct.Struct("=III")  # struct xfrm_replay_state: oseq, seq, bitmap
REPLAY_ESN: Final = struct.Struct("=IIIIII")  # struct xfrm_replay_state_esn: bmp_len, oseq, seq, oseq_hi, seq_hi, replay_window
MARK: Final = struct.Struct("=II")
NUMBER: Final = struct.Struct("=I")
OCTET: Final = struct.Struct("=B")


def unpack(layout: struct.Struct, data: bytes, what: str) -> tuple[Any, ...]:
    """The fields of a structure at the beginning of `data`."""
    return _unpack(layout, data, 0, what)
