"""TUN devices with the kernel's offloads: one read gives up to 64 KB of one flow."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

import structlog
from pyroute2 import IPRoute

from kernel_shim.io.settings import TRANSMIT_QUEUE
from kernel_shim.model import KernelError

# linux/if_tun.h
TUNSETIFF: Final = 0x400454CA
TUNSETOFFLOAD: Final = 0x400454D0
TUNSETVNETHDRSZ: Final = 0x400454D8
TUNSETVNETLE: Final = 0x400454DC
IFF_TUN: Final = 0x0001
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
IFF_TUN_EXCL: Final = 0x8000  # never join a device that somebody else made
TUN_F_CSUM: Final = 0x01
TUN_F_TSO4: Final = 0x02
TUN_F_TSO6: Final = 0x04
TUN_F_USO4: Final = 0x20
TUN_F_USO6: Final = 0x40

VNET_HEADER: Final = 10  # bytes of virtio_net_hdr without num_buffers
ADDR_GEN_MODE_NONE: Final = "1"

log = structlog.get_logger("kernel_shim.tun")


class Tun:
    """One TUN device, up, as long as this object is open; it vanishes with its descriptor, and takes its routes along.

    `segmentation` says whether UDP super-packets come too (USO, Linux 6.2). Raises KernelError when it cannot be had.
    """

    def __init__(self, name: str, mtu: int) -> None:
        self.name: Final = name
        try:
            self.descriptor: Final = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError.of(error, "/dev/net/tun does not open") from error
        try:
            fcntl.ioctl(self.descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR | IFF_TUN_EXCL))
            fcntl.ioctl(self.descriptor, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER))
            fcntl.ioctl(self.descriptor, TUNSETVNETLE, struct.pack("i", 1))
            self.segmentation: Final = self._offload()
            self._configure(mtu)
            with IPRoute() as route:
                self.index: Final[int] = route.link_lookup(ifname=name)[0]
                # gso_max_size stays what it is: a smaller one makes the kernel cut every larger super-packet that it forwards into single packets.
                route.link("set", index=self.index, mtu=mtu, txqlen=TRANSMIT_QUEUE, state="up")
        except OSError as error:
            os.close(self.descriptor)
            raise KernelError.of(error, f"interface {name}", needs="CAP_NET_ADMIN") from error

    def _offload(self) -> bool:
        basic = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6
        try:
            fcntl.ioctl(self.descriptor, TUNSETOFFLOAD, basic | TUN_F_USO4 | TUN_F_USO6)
        except OSError:
            fcntl.ioctl(self.descriptor, TUNSETOFFLOAD, basic)
            return False
        return True

    def _configure(self, mtu: int) -> None:
        # Before it is up: no link-local address, so no router solicitations and no MLD of its own come out of it.
        write_sysctl(f"ipv6/conf/{self.name}/addr_gen_mode", ADDR_GEN_MODE_NONE)
        write_sysctl(f"ipv6/conf/{self.name}/accept_ra", "0")
        for family in ("ipv4", "ipv6"):
            write_sysctl(f"{family}/conf/{self.name}/accept_redirects", "0")
        write_sysctl(f"ipv4/conf/{self.name}/send_redirects", "0")
        # What leaves the TUN may come from an address of this host: a bypassed packet, or one to ourselves through a tunnel.
        if not write_sysctl(f"ipv4/conf/{self.name}/accept_local", "1"):
            log.warning("sysctls are read-only: bypassed packets of this host's own do not leave", interface=self.name)
        # The larger of `all` and the interface counts; where strict checking is on, loose is the least that lets bypassed packets out.
        strict = read_sysctl("ipv4/conf/all/rp_filter") == "1"
        write_sysctl(f"ipv4/conf/{self.name}/rp_filter", "2" if strict else "0")

    def allow_forwarding(self) -> None:
        """Let what this host bypassed out again although it is no router: a bypassed packet of its own counts as forwarded."""
        write_sysctl(f"ipv4/conf/{self.name}/forwarding", "1")
        write_sysctl(f"ipv6/conf/{self.name}/forwarding", "1")
        write_sysctl(f"ipv6/conf/{self.name}/force_forwarding", "1")  # Linux 6.17; before it, `all` decides

    def fileno(self) -> int:
        return self.descriptor

    def read_into(self, buffer: memoryview) -> int:
        """Bytes of one frame. BlockingIOError when there is none."""
        return os.readv(self.descriptor, (buffer,))

    def write(self, frame: memoryview) -> None:
        """Raises OSError: EINVAL for a header that the kernel does not like, EIO when the interface is down."""
        os.write(self.descriptor, frame)

    def close(self) -> None:
        os.close(self.descriptor)


def read_sysctl(name: str) -> str | None:
    """A setting below /proc/sys/net; None when this kernel has no such."""
    try:
        with open(f"/proc/sys/net/{name}") as file:
            return file.read().strip()
    except OSError:
        return None


def write_sysctl(name: str, value: str) -> bool:
    """Whether it took; containers often mount /proc/sys read-only, and IPv6 may be off."""
    try:
        with open(f"/proc/sys/net/{name}", "w") as file:
            file.write(value)
    except OSError:
        return False
    return True
