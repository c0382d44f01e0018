"""Whose a TCP connection of this host is: what SO_PEERCRED says of a UNIX socket, of the peer of a connection over IP."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address
from pathlib import Path
from struct import unpack
from typing import Final

from kernel_shim.model import IPAddress

TABLES: Final = ("tcp", "tcp6")  # an IPv6 socket may speak IPv4
ESTABLISHED: Final = "01"  # include/net/tcp_states.h; closed ones are listed as root's
DIRECTORY: Final = Path("/proc/self/net")

_UID, _INODE = 7, 9  # columns (Linux: net/ipv4/tcp_ipv4.c, get_tcp4_sock)

Place = tuple[IPAddress, int]


def owner(theirs: Place, ours: Place) -> int | None:
    """The user of the socket at the other end of the established connection between these; None when no process of this network namespace holds it.

    Reads a table of all connections: some 150 octets each. OSError when there is none.
    """
    for table in TABLES:
        try:
            file = (DIRECTORY / table).open()
        except FileNotFoundError:
            if table == TABLES[0]:
                raise
            continue  # a host without IPv6
        wanted = f" {_written(*theirs, wide=table != TABLES[0])} {_written(*ours, wide=table != TABLES[0])} {ESTABLISHED} "
        with file:
            for line in file:
                if wanted in line:
                    columns = line.split()
                    # An orphan, which its process has closed, has no inode, and nobody's uid.
                    return int(columns[_UID]) if columns[_INODE] != "0" else None
    return None


def place(name: tuple[object, ...]) -> Place:
    """From a socket's name."""
    address = ip_address(str(name[0]).partition("%")[0])
    return (address.ipv4_mapped or address) if address.version == 6 else address, int(str(name[1]))


def _written(address: IPAddress, port: int, *, wide: bool) -> str:
    """As the kernel does: words of the address as numbers of this host, the port as people do."""
    packed = address.packed
    if wide and isinstance(address, IPv4Address):
        packed = bytes(10) + b"\xff\xff" + packed
    return "".join(f"{word:08X}" for word in unpack(f"={len(packed) // 4}I", packed)) + f":{port:04X}"
