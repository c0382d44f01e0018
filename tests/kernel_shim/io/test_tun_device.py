"""The TUN device: offloads there and back, and what it leaves on the host."""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from lab.namespaces import Lab, Namespace
from lab.process import PATIENCE
from scapy.layers.inet import IP, UDP
from scapy.packet import Raw

from kernel_shim.io.settings import TRANSMIT_QUEUE, ShimSettings, tunnel_mtu
from kernel_shim.io.tun import VNET_HEADER, Tun, read_sysctl
from kernel_shim.model import KernelError
from kernel_shim.packet.coalesce import Joiner, format_of
from kernel_shim.packet.virtio import MAX_UDP_SEGMENTS

VNET = struct.Struct("<BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
NEEDS_CSUM, GSO_TCPV4 = 1, 1


@pytest.fixture
def network() -> Iterator[Namespace]:
    with Lab() as lab:
        namespace = lab.namespace("tun")
        yield namespace


def read_frame(tun: Tun, buffer: memoryview) -> memoryview:
    poll = select.poll()
    poll.register(tun.fileno(), select.POLLIN)
    assert poll.poll(PATIENCE * 1000), "no frame came"
    return buffer[: tun.read_into(buffer)]


@pytest.mark.root
def test_a_large_send_is_one_frame_and_goes_back_as_one(network: Namespace) -> None:
    tun = network.call(lambda: Tun("vpn0", 1400))
    try:
        network.ip("addr add 10.9.0.1/24 dev vpn0")
        # Else TCP sends less at once where its peer answers slowly, as all do on a busy machine.
        network.sysctl(ipv4__tcp_congestion_control="reno", ipv4__tcp_min_tso_segs=32)
        with network.socket(socket.AF_INET, socket.SOCK_STREAM) as server, network.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            server.bind(("10.9.0.1", 0))
            server.listen()
            client.setblocking(False)
            # The peer 10.9.0.2 is a mirror: swapping the addresses of each frame connects the client to our own server.
            assert client.connect_ex(("10.9.0.2", server.getsockname()[1])) == errno.EINPROGRESS
            buffer = memoryview(bytearray(VNET_HEADER + 65535))
            largest = 0
            payload = bytes(200_000)
            accepted: socket.socket | None = None
            received = sent = 0
            while received < len(payload):
                frame = read_frame(tun, buffer)
                _, kind, _, size, _, _ = VNET.unpack_from(frame)
                if kind == GSO_TCPV4:
                    assert size <= 1400 - 40
                    largest = max(largest, len(frame))
                packet = frame[VNET_HEADER:]
                packet[12:16], packet[16:20] = bytes(packet[16:20]), bytes(packet[12:16])
                tun.write(frame)
                if accepted is None and select.select((server,), (), (), 0)[0]:
                    accepted = server.accept()[0]
                    accepted.setblocking(False)
                if sent < len(payload) and select.select((), (client,), (), 0)[1]:
                    sent += client.send(payload[sent:])
                while accepted is not None and select.select((accepted,), (), (), 0)[0]:
                    received += len(accepted.recv(1 << 20))
            assert accepted is not None
            accepted.close()
            assert 20_000 < largest <= 65535 + VNET_HEADER
    finally:
        tun.close()


@pytest.mark.root
@pytest.mark.parametrize("count", [2, MAX_UDP_SEGMENTS])
def test_joined_datagrams_are_taken_in_one_write(network: Namespace, count: int) -> None:
    tun = network.call(lambda: Tun("vpn0", 1400))
    try:
        network.ip("addr add 10.9.0.1/24 dev vpn0")
        with network.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
            receiver.bind(("10.9.0.1", 0))
            receiver.settimeout(PATIENCE)
            datagrams = [number.to_bytes(4, "big") for number in range(count)]
            headers = IP(src="10.9.0.2", dst="10.9.0.1", flags="DF") / UDP(sport=7, dport=receiver.getsockname()[1])
            packets = [bytes(headers / Raw(datagram)) for datagram in datagrams]
            form = format_of(memoryview(packets[0]), len(packets[0]), udp=tun.segmentation)
            if form is None:
                pytest.skip("this kernel takes no UDP super-packets")
            joiner = Joiner(32)
            joiner.begin(form, np.frombuffer(b"".join(packets), np.uint8).reshape(count, -1))
            tun.write(joiner.frame())
            assert [receiver.recv(100) for _ in datagrams] == datagrams
    finally:
        tun.close()


@pytest.mark.root
def test_the_device_is_quiet_and_set_up_for_the_data_plane(network: Namespace) -> None:
    tun = network.call(lambda: Tun("vpn0", 1438))
    try:
        shown = network.run(["ip", "-d", "link", "show", "dev", "vpn0"]).stdout
        assert "mtu 1438" in shown
        assert f"qlen {TRANSMIT_QUEUE}" in shown
        # A super-packet of a forwarded flow is as large as its sender's interface allows.
        assert "gso_max_size 65536" in shown
        assert network.run(["ip", "addr", "show", "dev", "vpn0"]).stdout.count("inet") == 0
        assert network.call(lambda: read_sysctl("ipv4/conf/vpn0/accept_local")) == "1"
        with pytest.raises(BlockingIOError):
            tun.read_into(memoryview(bytearray(100)))
    finally:
        tun.close()
    assert "vpn0" not in network.interfaces()


@pytest.mark.root
def test_a_name_that_is_taken_is_refused(network: Namespace) -> None:
    first = network.call(lambda: Tun("vpn0", 1438))
    try:
        with pytest.raises(KernelError) as refused:
            network.call(lambda: Tun("vpn0", 1438))
        assert refused.value.errno == errno.EBUSY
    finally:
        first.close()


def test_the_default_mtu_fills_an_ethernet_frame_with_gcm_over_ipv4() -> None:
    assert ShimSettings().mtu == tunnel_mtu(1500) == 1438
    # IPv4 20, UDP 8, SPI and sequence 8, IV 8, packet, padding to 4 with 2 bytes of trailer, ICV 16
    padded = -(-(1438 + 2) // 4) * 4
    assert 20 + 8 + 8 + 8 + padded + 16 == 1500


@pytest.mark.parametrize("wrong", [{"tun": "a name"}, {"tun": "tenletters"}, {"mtu": 1000}, {"table": 254}, {"rule_priority": 32_700}, {"mark": 0}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        ShimSettings(**wrong)  # type: ignore[arg-type]
