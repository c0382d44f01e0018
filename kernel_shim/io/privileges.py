"""Keeps the capabilities that the shim needs while it runs, and drops the rest."""

from __future__ import annotations

import ctypes
import struct
from typing import Final

import structlog

from kernel_shim.core_dumps import forbid_core_dumps

# linux/capability.h
CAP_NET_BIND_SERVICE: Final = 10  # UDP 500 of addresses that come later
CAP_NET_ADMIN: Final = 12  # routes, rules, nftables, SO_MARK
CAP_NET_RAW: Final = 13  # ESP without UDP
NEEDED: Final = (1 << CAP_NET_BIND_SERVICE) | (1 << CAP_NET_ADMIN) | (1 << CAP_NET_RAW)
_VERSION_3: Final = 0x20080522
# linux/prctl.h
_PR_SET_NO_NEW_PRIVS: Final = 38

log = structlog.get_logger("kernel_shim")


def drop_privileges() -> None:
    """From here on only CAP_NET_ADMIN, CAP_NET_BIND_SERVICE and CAP_NET_RAW, as far as we have them; and no core dump, for it would hold keys."""
    library = ctypes.CDLL(None, use_errno=True)
    forbid_core_dumps()
    library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = struct.pack("=Ii", _VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    if library.capget(header, data) != 0:
        return
    low_effective, low_permitted, _, _, _, _ = struct.unpack("=6I", data.raw)
    kept = struct.pack("=6I", low_effective & NEEDED, low_permitted & NEEDED, 0, 0, 0, 0)
    if library.capset(header, kept) != 0:
        log.warning("capabilities not dropped", errno=ctypes.get_errno())
