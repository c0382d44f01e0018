"""Runs a key manager whose AF_KEY socket is a connection to the PF_KEY socket of a kernel-shim: `af_key_stand_in.py SOCKET PROGRAM [ARGUMENT...]`.

For kernels without AF_KEY, on x86-64. A seccomp filter (seccomp_unotify(2)) hands these system calls to a process beside the program; all others
go their way, and the pid stays the program's.

- socket(AF_KEY) is given the connection.
- setsockopt(IP_IPSEC_POLICY, IPV6_IPSEC_POLICY), by which key managers keep their own sockets out of tunnels, succeeds and does nothing.
- poll() of one descriptor for a millisecond goes on when the connection can be read: OpenIKED waits no longer for an answer, because Linux gives
  it within the call that asks.

Standard library only.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

AF_KEY: Final = 15
POLICY_OPTIONS: Final = ((0, 16), (41, 34))  # level and option: IP_IPSEC_POLICY, IPV6_IPSEC_POLICY
ANSWER_MILLISECONDS: Final = 5000

# linux/seccomp.h, linux/audit.h, asm/unistd_64.h
SECCOMP: Final = 317
SECCOMP_SET_MODE_FILTER: Final = 1
SECCOMP_FILTER_FLAG_NEW_LISTENER: Final = 1 << 3
SECCOMP_RET_ALLOW: Final = 0x7FFF0000
SECCOMP_RET_USER_NOTIF: Final = 0x7FC00000
SECCOMP_RET_SUCCESS: Final = 0x00050000  # SECCOMP_RET_ERRNO of no error
SECCOMP_IOCTL_NOTIF_RECV: Final = 0xC0502100
SECCOMP_IOCTL_NOTIF_SEND: Final = 0xC0182101
SECCOMP_IOCTL_NOTIF_ADDFD: Final = 0x40182103
SECCOMP_USER_NOTIF_FLAG_CONTINUE: Final = 1
SECCOMP_ADDFD_FLAG_SEND: Final = 1 << 1
PR_SET_NO_NEW_PRIVS: Final = 38
X86_64: Final = 0xC000003E
POLL, SOCKET, SETSOCKOPT = 7, 41, 54

NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")  # id, pid, flags; seccomp_data: number, architecture, instruction, arguments
RESPONSE: Final = struct.Struct("=QqiI")
ADD_DESCRIPTOR: Final = struct.Struct("=QIIII")

# linux/bpf_common.h: load a word; jump if equal; return. Offsets in seccomp_data.
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
CALL, ARCHITECTURE, ARGUMENT = 0, 4, (16, 24, 32, 40)

Step = tuple[int, int, int, int]


def _where(conditions: list[tuple[int, int]], verdict: int) -> list[Step]:
    """Returns `verdict` when every word at an offset has its value; else goes on."""
    steps: list[Step] = []
    for number, (offset, value) in enumerate(conditions):
        steps += [(LOAD, 0, 0, offset), (EQUAL, 0, 2 * (len(conditions) - number) - 1, value)]
    return [*steps, (RETURN, 0, 0, verdict)]


def _filter() -> bytes:
    here = (ARCHITECTURE, X86_64)
    steps = _where([here, (CALL, SOCKET), (ARGUMENT[0], AF_KEY)], SECCOMP_RET_USER_NOTIF)
    steps += _where([here, (CALL, POLL), (ARGUMENT[1], 1), (ARGUMENT[2], 1)], SECCOMP_RET_USER_NOTIF)
    for level, option in POLICY_OPTIONS:
        steps += _where([here, (CALL, SETSOCKOPT), (ARGUMENT[1], level), (ARGUMENT[2], option)], SECCOMP_RET_SUCCESS)
    return b"".join(struct.pack("=HBBI", *step) for step in [*steps, (RETURN, 0, 0, SECCOMP_RET_ALLOW)])


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def _listen() -> int:
    """The descriptor that calls of this process and its children wait at from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    steps = _filter()
    program = _Program(len(steps) // 8, steps)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    listener = libc.syscall(SECCOMP, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(listener)


def _answer(listener: int, path: Path) -> None:
    """Until nobody is left who could call."""
    client: socket.socket | None = None
    waiting = select.poll()
    waiting.register(listener, select.POLLIN)
    while waiting.poll()[0][1] & select.POLLIN:
        notification = bytearray(NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, notification)
        except OSError:
            continue  # the caller is gone
        identifier, _, _, call, *_ = NOTIFICATION.unpack(notification)
        error = 0
        if call == SOCKET:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                client.connect(str(path))
                fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_ADDFD, ADD_DESCRIPTOR.pack(identifier, SECCOMP_ADDFD_FLAG_SEND, client.fileno(), 0, 0))
                continue
            except OSError as refused:
                error = refused.errno or 1
        elif client is not None:
            answer = select.poll()
            answer.register(client, select.POLLIN)
            answer.poll(ANSWER_MILLISECONDS)
        with suppress(OSError):
            flags = 0 if error else SECCOMP_USER_NOTIF_FLAG_CONTINUE
            fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, bytearray(RESPONSE.pack(identifier, 0, -error, flags)))


def main() -> None:
    path, argv = Path(sys.argv[1]), sys.argv[2:]
    listener = _listen()
    if os.fork() == 0:
        _answer(listener, path)
        os._exit(0)
    os.close(listener)
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main()
