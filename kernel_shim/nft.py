"""Runs nftables commands: in this process when libnftables is there (0.1 ms a command), else through the `nft` program."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
from collections import deque
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from kernel_shim.model import IPAddress, KernelError

LIBRARY: Final = "libnftables.so.1"
PROGRAM_SECONDS: Final = 30
PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_.@+~=,-]{1,15}")  # of an interface
RECENT_PROCESSES: Final = 256  # more than one wake-up runs

# Words of the language, by IP version.
FAMILY: Final = {4: "ip", 6: "ip6"}
ADDRESS_TYPE: Final = {4: "ipv4_addr", 6: "ipv6_addr"}
# RFC 4861 section 6.1: hop limit 255.
NEIGHBOUR_DISCOVERY: Final = "ip6 hoplimit 255 icmpv6 type { nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, nd-redirect }"


class Nft:
    """Each `run` is one transaction: all of it or nothing."""

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        self._processes: deque[int] = deque((os.getpid(),), RECENT_PROCESSES)
        try:
            library = ctypes.CDLL(LIBRARY)
        except OSError:
            return
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_new.argtypes = (ctypes.c_uint32,)
        library.nft_ctx_free.argtypes = (ctypes.c_void_p,)
        library.nft_run_cmd_from_buffer.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
        for name in ("output", "error"):
            getattr(library, f"nft_ctx_buffer_{name}").argtypes = (ctypes.c_void_p,)
            getter = getattr(library, f"nft_ctx_get_{name}_buffer")
            getter.argtypes, getter.restype = (ctypes.c_void_p,), ctypes.c_char_p
        context = library.nft_ctx_new(0)
        if context:
            library.nft_ctx_buffer_output(context)
            library.nft_ctx_buffer_error(context)
            self._library, self._context = library, context

    def run(self, commands: str) -> str:
        """What the commands print. KernelError(EINVAL) with nftables' own complaint."""
        if not commands or commands.isspace():
            return ""
        if self._library is None:
            return self._run_program(commands)
        library = self._library
        status = library.nft_run_cmd_from_buffer(self._context, commands.encode())
        output: bytes = library.nft_ctx_get_output_buffer(self._context) or b""
        complaint: bytes = library.nft_ctx_get_error_buffer(self._context) or b""
        if status != 0:
            raise KernelError(errno.EINVAL, f"nftables: {_first_line(complaint.decode(errors='replace'))}")
        return output.decode(errors="replace")

    def is_ours(self, process: int) -> bool:
        """Whether that process acted for us of late."""
        return process in self._processes

    def _run_program(self, commands: str) -> str:
        try:
            with subprocess.Popen(("nft", "-f", "-"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
                self._processes.append(program.pid)
                try:
                    output, complaint = program.communicate(commands, PROGRAM_SECONDS)
                except subprocess.TimeoutExpired:
                    program.kill()
                    raise
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelError(errno.ENOSYS, "nftables: neither libnftables nor the nft program is usable") from error
        if program.returncode != 0:
            raise KernelError(errno.EINVAL, f"nftables: {_first_line(complaint)}")
        return output

    def close(self) -> None:
        if self._library is not None:
            self._library.nft_ctx_free(self._context)
            self._library = None


def interface_set(names: Iterable[str]) -> str:
    """The elements of a set. The kernel takes names that would end the string here, or be a pattern: no rule lets the packets of those pass."""
    return ", ".join(f'"{name}"' for name in sorted(names) if PLAIN_NAME.fullmatch(name))


def prefix_mask(version: int, length: int) -> IPAddress:
    """What to `&` an address with to compare it with a prefix."""
    if version == 4:
        return IPv4Address(0xFFFFFFFF << (32 - length) & 0xFFFFFFFF)
    return IPv6Address(((1 << 128) - 1) << (128 - length) & ((1 << 128) - 1))


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "refused"
