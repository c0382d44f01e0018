"""IKE fragments of one size arrive joined on a socket with UDP_GRO; each is an IKE message of its own."""

from __future__ import annotations

import asyncio
import socket
import struct
from ipaddress import ip_address

from kernel_shim.model import PORT_NAT_T, Endpoint
from vpnd.io.udp import NON_ESP_MARKER, SOL_UDP, UDP_GRO, IkeSockets

UDP_SEGMENT = 103  # linux/udp.h
HERE = ip_address("127.0.0.1")


async def test_each_fragment_is_a_message() -> None:
    plain, natt, sender = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3))
    for each in (plain, natt):
        each.bind((str(HERE), 0))
    natt.setsockopt(SOL_UDP, UDP_GRO, 1)
    target = natt.getsockname()
    came: list[tuple[Endpoint, bytes]] = []
    done = asyncio.Event()

    def receive(local: Endpoint, remote: Endpoint, data: bytes) -> None:
        came.append((local, data))
        if len(came) == 4:
            done.set()

    sockets = IkeSockets(HERE, (plain.detach(), natt.detach()), receive, lambda: None)
    await sockets.open()
    try:
        pieces = [bytes([number]) * 1000 for number in range(3)] + [b"short"]
        joined = b"".join(NON_ESP_MARKER + piece for piece in pieces)
        sender.sendmsg([joined], [(SOL_UDP, UDP_SEGMENT, struct.pack("H", 1004))], 0, target)
        async with asyncio.timeout(60):
            await done.wait()
        assert came == [(Endpoint(HERE, PORT_NAT_T), piece) for piece in pieces]
    finally:
        sender.close()
        await sockets.close()
