"""What others do to the host that concerns us: addresses, our rules and routes, our interface, our nftables table.

A restarted network manager takes foreign rules and routes away, a reloaded firewall flushes the rule set: what lets nothing
in clear is then put again at once.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Callable, Iterator
from enum import Flag, auto
from typing import Final

# linux/rtnetlink.h, linux/netlink.h, linux/if.h
RTM_NEWLINK: Final = 16
RTM_NEWADDR: Final = 20
RTM_DELADDR: Final = 21
RTM_DELROUTE: Final = 25
RTM_DELRULE: Final = 33
_GROUPS: Final = 0x1 | 0x10 | 0x100 | 0x40 | 0x400 | 0x80 | 0x40000  # links; addresses, routes and rules of both families
_IFF_UP: Final = 1
_ROUTE_PROTOCOL: Final = 21  # rtmsg.rtm_protocol behind the netlink header
_IFINFO: Final = struct.Struct("=BxHiII")  # family, type, index, flags, change

# linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
NETLINK_NETFILTER: Final = 12
_NFT_GROUP: Final = 1 << 6  # NFNLGRP_NFTABLES is 7
_NFT: Final = 10 << 8  # NFNL_SUBSYS_NFTABLES
_NFT_GONE: Final = frozenset(_NFT | message for message in (2, 5, 8, 11, 14))  # DELTABLE, DELCHAIN, DELRULE, DELSET, DELSETELEM
_NFT_GENERATION: Final = _NFT | 15
_NFTA_TABLE: Final = 1  # the table's name in each of them
_NFTA_GENERATION_PROCESS: Final = 2

_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE: Final = struct.Struct("=HH")
_ATTRIBUTE_TYPE: Final = 0x3FFF
_NFGEN: Final = 4  # struct nfgenmsg

SO_ATTACH_FILTER: Final = 26
NOTICE_BYTES: Final = 65_536
NOTICE_READS: Final = 64  # datagrams a wake-up


class Notice(Flag):
    """What is to be looked after."""

    NOTHING = 0
    ADDRESSES = auto()
    RULES = auto()
    ROUTES = auto()
    GUARD = auto()


class HostNotices:
    """Addresses, rules and routes. `ours` is the netlink port of our own route changes, `tun` an interface index."""

    def __init__(self, ours: int, tun: int, protocol: int) -> None:
        self._ours, self._tun = ours, tun
        self._up = True
        self._socket: Final = _open(socket.NETLINK_ROUTE)
        _attach(self._socket, protocol)
        self._socket.bind((0, _GROUPS))

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> Notice:
        found = Notice.NOTHING
        for message in _messages(self._socket):
            if message is None:  # ENOBUFS: some were lost, and we look anyway
                found |= Notice.ADDRESSES | Notice.RULES | Notice.ROUTES
                continue
            kind, port, body = message
            if kind in (RTM_NEWADDR, RTM_DELADDR):
                found |= Notice.ADDRESSES
            elif kind == RTM_DELRULE:
                found |= Notice.RULES
            elif kind == RTM_DELROUTE and port != self._ours:
                found |= Notice.ROUTES
            elif kind == RTM_NEWLINK and len(body) >= _IFINFO.size and _IFINFO.unpack_from(body)[2] == self._tun:
                up = bool(_IFINFO.unpack_from(body)[3] & _IFF_UP)
                if up and not self._up:  # its routes went when it went down
                    found |= Notice.ROUTES
                self._up = up
        return found

    def close(self) -> None:
        self._socket.close()


class GuardNotices:
    """Whether somebody else took anything of the nftables table `table`. `is_ours` knows the processes that act for us."""

    def __init__(self, table: str, is_ours: Callable[[int], bool]) -> None:
        self._table: Final = table.encode() + b"\0"
        self._is_ours: Final = is_ours
        self._touched = False
        self._socket: Final = _open(NETLINK_NETFILTER)
        self._socket.bind((0, _NFT_GROUP))

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> Notice:
        found = Notice.NOTHING
        for message in _messages(self._socket):
            if message is None:
                found |= Notice.GUARD
                continue
            kind, _, body = message
            if kind in _NFT_GONE:
                self._touched |= _attributes(body).get(_NFTA_TABLE) == self._table
            elif kind == _NFT_GENERATION:  # the end of a transaction, and whose it was
                process = _attributes(body).get(_NFTA_GENERATION_PROCESS, b"")
                if self._touched and not self._is_ours(int.from_bytes(process, "big")):
                    found |= Notice.GUARD
                self._touched = False
        return found

    def close(self) -> None:
        self._socket.close()


def _open(protocol: int) -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)


def _messages(source: socket.socket) -> Iterator[tuple[int, int, bytes] | None]:
    """Type, port of who asked for it, and body; None where the kernel lost some."""
    for _ in range(NOTICE_READS):
        try:
            data = source.recv(NOTICE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            yield None
            continue
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, _, _, port = _HEADER.unpack_from(data, offset)
            if length < _HEADER.size:
                break
            yield kind, port, data[offset + _HEADER.size : offset + length]
            offset += (length + 3) & ~3


def _attributes(body: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    offset = _NFGEN
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _ATTRIBUTE_TYPE] = body[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


def _attach(source: socket.socket, protocol: int) -> None:
    """A host with a million routes of others does not wake us: of routes only those that go and are of our protocol pass."""
    load_half, load_byte, jump_equal, give_back = 0x28, 0x30, 0x15, 0x06  # linux/bpf_common.h, absolute addressing
    types = [int.from_bytes(struct.pack("=H", kind), "big") for kind in (RTM_NEWADDR, RTM_DELADDR, RTM_DELRULE, RTM_NEWLINK, RTM_DELROUTE)]
    program = (
        (load_half, 0, 0, 4),  # nlmsghdr.nlmsg_type
        (jump_equal, 6, 0, types[0]),
        (jump_equal, 5, 0, types[1]),
        (jump_equal, 4, 0, types[2]),
        (jump_equal, 3, 0, types[3]),
        (jump_equal, 0, 3, types[4]),
        (load_byte, 0, 0, _ROUTE_PROTOCOL),
        (jump_equal, 0, 1, protocol),
        (give_back, 0, 0, 0xFFFFFFFF),
        (give_back, 0, 0, 0),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    source.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(code)))
