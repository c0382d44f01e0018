"""Runs nftables commands: in this process when libnftables is there (0.1 ms a command), else through the `nft` program."""

from __future__ import annotations

import ctypes
import errno
import subprocess
from typing import Final

from kernel_shim.model import KernelError

LIBRARY: Final = "libnftables.so.1"
PROGRAM_SECONDS: Final = 30


class Nft:
    """Each `run` is one transaction: all of it or nothing."""

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
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
            return _run_program(commands)
        library = self._library
        status = library.nft_run_cmd_from_buffer(self._context, commands.encode())
        output: bytes = library.nft_ctx_get_output_buffer(self._context) or b""
        complaint: bytes = library.nft_ctx_get_error_buffer(self._context) or b""
        if status != 0:
            raise KernelError(errno.EINVAL, f"nftables: {_first_line(complaint.decode(errors='replace'))}")
        return output.decode(errors="replace")

    def close(self) -> None:
        if self._library is not None:
            self._library.nft_ctx_free(self._context)
            self._library = None


def _run_program(commands: str) -> str:
    try:
        done = subprocess.run(("nft", "-f", "-"), input=commands, capture_output=True, text=True, timeout=PROGRAM_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(errno.ENOSYS, "nftables: neither libnftables nor the nft program is usable") from error
    if done.returncode != 0:
        raise KernelError(errno.EINVAL, f"nftables: {_first_line(done.stderr)}")
    return done.stdout


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "refused"
