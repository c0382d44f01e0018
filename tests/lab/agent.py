"""The lab's small servers and senders. Run as a program, standard library only: `agent.py ROLE JSON`.

An agent speaks JSON lines over the SOCK_SEQPACKET descriptor that its settings name: first {"ready": ...}, then its answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import socket
import struct
import sys
import time
from typing import Any, Final

DATAGRAM: Final = struct.Struct("!IIQ")  # flow, number, nanoseconds of CLOCK_MONOTONIC at the sender
BUFFER_BYTES: Final = 8 << 20
SO_RCVBUFFORCE: Final = 33
SO_SNDBUFFORCE: Final = 32
LOST_SECONDS: Final = 10.0  # without an acknowledgement, and what is under way counts as lost
LAST_SECONDS: Final = 1.0  # likewise for a stream that ended early: its last datagrams are acknowledged only if they complete a number
ROUNDS: Final = 16  # between looks whether a stream is to end
LISTED: Final = 50  # numbers that a report lists of what is missing or out of order
PATTERN_BYTES: Final = 1 << 20

Settings = dict[str, Any]


def _say(control: int, **message: Any) -> None:
    os.write(control, json.dumps(message).encode())


def _pattern(size: int) -> bytes:
    return hashlib.shake_128(b"lab").digest(size)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def tcp_server(control: int, settings: Settings) -> None:
    """Connections one after another: count and digest all bytes until the client's end, answer with both."""
    with socket.create_server((settings["address"], settings["port"]), family=_family(settings["address"]), backlog=128) as server:
        _say(control, ready=server.getsockname()[1])
        buffer = bytearray(1 << 20)
        while True:
            connection, _ = server.accept()
            with connection:
                digest, total = hashlib.blake2b(digest_size=16), 0
                try:
                    while count := connection.recv_into(buffer):
                        total += count
                        digest.update(memoryview(buffer)[:count])
                    connection.sendall(f"{total} {digest.hexdigest()}\n".encode())
                except OSError:
                    continue


def tcp_client(control: int, settings: Settings) -> None:
    """Connect, send `size` bytes (or for `seconds`), end, read the server's count and digest."""
    pattern = _pattern(PATTERN_BYTES)
    digest, total = hashlib.blake2b(digest_size=16), 0
    begin = time.monotonic()
    with socket.create_connection((settings["address"], settings["port"]), timeout=settings["timeout"]) as connection:
        connected = time.monotonic() - begin
        _say(control, ready=connected)
        size, until = settings["size"], begin + settings["seconds"] if settings["seconds"] else None
        while total < size and (until is None or time.monotonic() < until):
            chunk = pattern[: min(PATTERN_BYTES, size - total)]
            connection.sendall(chunk)
            digest.update(chunk)
            total += len(chunk)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(4096):  # until its end: no segment is to be under way any more when we say that we are done
            answer += part
    count, theirs = answer.decode().split()
    _say(control, bytes=int(count), seconds=time.monotonic() - begin, connect=connected, intact=int(count) == total and theirs == digest.hexdigest())


def udp_sink(control: int, settings: Settings) -> None:
    """Account numbered datagrams by flow. Asked {"expect": n, "timeout": s}, it answers once n distinct ones are here or time is up.

    With `acknowledge` every so many datagrams, and the last of `whole`, are answered with how many are here.
    """
    acknowledge, whole = settings["acknowledge"], settings["whole"]
    sock = socket.socket(_family(settings["address"]), socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    sock.bind((settings["address"], settings["port"]))
    sock.setblocking(False)
    seen: dict[int, set[int]] = {}
    last: dict[int, int] = {}
    reordered: list[tuple[int, int]] = []
    duplicates = total = 0
    slowest = 0
    expected, deadline = -1, 0.0
    _say(control, ready=sock.getsockname()[1])
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.register(control, select.POLLIN)
    while True:
        asked = expected >= 0
        if asked and (total >= expected or time.monotonic() >= deadline):
            missing = [(flow, number) for flow, numbers in seen.items() for number in sorted(set(range(max(numbers) + 1)) - numbers)[:LISTED]]
            _say(
                control,
                received=total,
                duplicates=duplicates,
                reordered=len(reordered),
                reordered_first=reordered[:LISTED],
                missing_first=missing[:LISTED],
                flows={str(flow): len(numbers) for flow, numbers in list(seen.items())[:LISTED]},
                slowest=slowest / 1e9,
            )
            expected, asked = -1, False
        for fd, _ in poller.poll(max(1, int((deadline - time.monotonic()) * 1000)) if asked else None):
            if fd == control:
                line = os.read(control, 4096)
                if not line:
                    return
                question = json.loads(line)
                expected, deadline = question["expect"], time.monotonic() + question["timeout"]
                continue
            for _ in range(256):
                try:
                    datagram, sender = sock.recvfrom(65535)
                except BlockingIOError:
                    break
                flow, number, sent = DATAGRAM.unpack_from(datagram)
                numbers = seen.setdefault(flow, set())
                if number in numbers:
                    duplicates += 1
                    continue
                numbers.add(number)
                total += 1
                slowest = max(slowest, time.monotonic_ns() - sent)
                if number < last.get(flow, -1):
                    reordered.append((flow, number))
                last[flow] = max(number, last.get(flow, -1))
                if acknowledge and (total % acknowledge == 0 or total == whole):
                    sock.sendto(DATAGRAM.pack(flow, total, sent), sender)


def udp_source(control: int, settings: Settings) -> None:
    """Send `count` numbered datagrams a flow at `rate` a second in all; flows go round robin. A refused send counts as sent.

    Any message ends it early, after a round.
    With `window` no more than so many are under way to a sink that acknowledges; it waits for the next word of it as long as a busy machine may take.
    """
    window, acknowledged, lost = settings["window"], 0, 0
    address, size = settings["address"], max(settings["size"], DATAGRAM.size)
    flows: list[tuple[str, int]] = [(target, port) for target, port in settings["targets"]]
    socks = []
    for _ in flows:
        sock = socket.socket(_family(flows[0][0]), socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER_BYTES)
        if address:
            sock.bind((address, 0))
        socks.append(sock)
    filler = _pattern(size - DATAGRAM.size)
    refused = sent = 0
    _say(control, ready=True)
    begin = time.monotonic()
    patience = LOST_SECONDS
    for number in range(settings["count"]):
        if number % ROUNDS == 0 and select.select([control], [], [], 0)[0]:
            os.read(control, 4096)
            patience = LAST_SECONDS
            break
        for flow, target in enumerate(flows):
            due = begin + sent / settings["rate"]
            if (ahead := due - time.monotonic()) > 0.0005:
                time.sleep(ahead)
            while window and sent - acknowledged - lost >= window:
                if told := _acknowledgement(socks[flow], LOST_SECONDS):
                    acknowledged = told
                else:
                    lost = sent - acknowledged
            try:
                socks[flow].sendto(DATAGRAM.pack(flow, number, time.monotonic_ns()) + filler, target)
            except OSError:
                refused += 1
            sent += 1
    while window and acknowledged + lost < sent and (told := _acknowledgement(socks[0], patience)):
        acknowledged = told
    _say(control, sent=sent, refused=refused, seconds=time.monotonic() - begin)


def _acknowledgement(sock: socket.socket, patience: float) -> int:
    """How many the sink says are there; 0 when it says nothing for `patience` seconds."""
    sock.settimeout(patience)
    try:
        return int(DATAGRAM.unpack(sock.recv(DATAGRAM.size))[1])
    except (TimeoutError, OSError, struct.error):
        return 0


ROLES: Final = {"tcp-server": tcp_server, "tcp-client": tcp_client, "udp-sink": udp_sink, "udp-source": udp_source}

if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    ROLES[sys.argv[1]](given.pop("control"), given)
