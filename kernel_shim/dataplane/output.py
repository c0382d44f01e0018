"""What the data plane needs of the world outside: four ways out, and the rules of the buffers that go through them.

A *frame* is what a TUN with IFF_VNET_HDR reads and writes: a `virtio_net_hdr` of 10 bytes (little-endian, TUNSETVNETHDRSZ 10),
then one IP packet or one super-packet that the header says how to cut.

Every buffer handed to a sink belongs to the data plane: it is valid during the call only, and a sink that keeps
packets copies them. A sink never raises and never calls back into the engine; what it could not send it counts itself.
"""

from __future__ import annotations

from typing import Protocol

from kernel_shim.model import Endpoint


class Sink(Protocol):
    """Where packets leave. `kernel_shim.io` implements it on a TUN and UDP sockets, tests in memory."""

    def send_esp(self, local: Endpoint, remote: Endpoint, buffer: memoryview, segment_size: int, *, whole: bool = True, traffic_class: int = 0) -> None:
        """Send ESP as UDP datagrams from `local` to `remote`, as IP packets where the ports are 0: one sendmsg, or one each without UDP.

        `buffer` holds datagrams of `segment_size` bytes each, the last may be shorter (UDP_SEGMENT); at most 64 of them and
        65,507 bytes. One datagram when `len(buffer) <= segment_size`. DF is set on an IPv4 outer header by socket option,
        unless `whole` is false: then the one datagram may travel in fragments, over IPv6 too.
        `traffic_class` goes into the outer header.
        A datagram over the path's MTU (EMSGSIZE) is lost; the caller of the engine reports the MTU with `Engine.path_mtu`.
        """

    def write_tun(self, frame: memoryview) -> None:
        """Write one frame to the TUN: a packet for the host, or one that it forwards."""

    def write_vrf(self, vrf: str, frame: memoryview) -> None:
        """Write one frame to the interface of this VRF."""

    def bypass(self, frame: memoryview) -> None:
        """Let a frame that a policy leaves in clear out again, past the capture routes. It is the frame as read from the TUN."""
