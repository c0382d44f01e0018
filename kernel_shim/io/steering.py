"""Which socket of a port 4500 group gets a datagram: a classic BPF program on the SO_REUSEPORT group."""

from __future__ import annotations

import ctypes
import socket
import struct
from typing import Final

SO_ATTACH_REUSEPORT_CBPF: Final = 51  # asm-generic/socket.h
IKE_MEMBER: Final = 0  # the order in which the sockets of a group are bound
ESP_MEMBER: Final = 1

# linux/bpf_common.h
_LOAD_WORD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_LOAD_LENGTH: Final = 0x80  # BPF_LD | BPF_W | BPF_LEN
_JUMP_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_GREATER_EQUAL: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K

# (code, jump if true, jump if false, constant). Data begins after the UDP header; a load beyond the end would return 0.
PROGRAM: Final = (
    (_LOAD_LENGTH, 0, 0, 0),
    (_JUMP_GREATER_EQUAL, 0, 3, 4),  # RFC 3948 section 2.3: a keepalive is one byte, 0xFF
    (_LOAD_WORD, 0, 0, 0),
    (_JUMP_EQUAL, 0, 1, 0),  # RFC 3948 section 2.2: four zero bytes, the non-ESP marker
    (_RETURN, 0, 0, IKE_MEMBER),
    (_RETURN, 0, 0, ESP_MEMBER),
)


def attach(member: socket.socket) -> None:
    """Attach the program to the group that `member` belongs to."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in PROGRAM))
    member.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, struct.pack("@HP", len(PROGRAM), ctypes.addressof(code)))
