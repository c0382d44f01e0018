"""Linux's label table and routing tables over a netlink socket, in slices: neither a large table nor a large change holds the event loop for long."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Final, Self

from kernel_shim.channel.linux_mpls.messages import Answer, Route, answers, delete_message, dump_message, put_message
from kernel_shim.channel.netlink import NETLINK_CAP_ACK, READ_SIZE, REPLY_TIMEOUT, SOL_NETLINK
from kernel_shim.model import ROUTE_PROTOCOL, KernelError
from kernel_shim.xfrm.structs import MalformedMessage

NETLINK_GET_STRICT_CHK: Final = 12  # linux/netlink.h: a dump is of what it names alone

# Choices of this implementation
BATCH: Final = 64  # changes a send: the kernel works them off within it, and their acknowledgements fit the receive buffer
DUMPS: Final = 3  # of a table that changes under them; the last one counts


class RouteTables:
    """In the network namespace of the calling thread. One user at a time. KernelError; TimeoutError when the kernel does not answer."""

    def __init__(self) -> None:
        self._sequence = secrets.randbelow(1 << 30)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        for option in (NETLINK_CAP_ACK, NETLINK_GET_STRICT_CHK):
            with suppress(OSError):
                self._socket.setsockopt(SOL_NETLINK, option, 1)
        self._socket.bind((0, 0))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()

    async def put(self, routes: Sequence[Route], *, replace: bool) -> list[int]:
        """An errno for each, 0 where it took. EEXIST unless it may `replace`."""
        return await self._change(routes, lambda route, sequence: put_message(route, sequence, replace=replace))

    async def delete(self, routes: Sequence[Route]) -> list[int]:
        """Likewise; their ways do not count."""
        return await self._change(routes, delete_message)

    async def dump(self, family: int, table: int = 0) -> list[Route]:
        """The unicast routes of our protocol, of one table or of all."""
        for left in reversed(range(DUMPS)):
            found, interrupted = [], False
            async for answer in self._answers(self._send(lambda sequence: dump_message(family, ROUTE_PROTOCOL, sequence, table))):
                interrupted |= answer.interrupted
                if answer.route is not None and (answer.route.family, answer.route.protocol) == (family, ROUTE_PROTOCOL):
                    found.append(answer.route)
                elif answer.error == errno.ENOENT:
                    return []  # there is no such table
                elif answer.error:
                    raise KernelError(answer.error, f"routes: {os.strerror(answer.error)}")
            if not interrupted or left == 0:
                return found
        raise AssertionError("unreachable")

    async def _change(self, routes: Sequence[Route], message: Callable[[Route, int], bytes]) -> list[int]:
        found: list[int] = []
        for start in range(0, len(routes), BATCH):
            batch = routes[start : start + BATCH]
            first, self._sequence = self._sequence + 1, self._sequence + len(batch)
            await self._loop.sock_sendall(self._socket, b"".join(message(route, first + at) for at, route in enumerate(batch)))
            missing = {first + at: at for at in range(len(batch))}
            errors = [0] * len(batch)
            while missing:
                for answer in await self._read():
                    at = missing.pop(answer.sequence, None)
                    if at is not None:
                        errors[at] = answer.error
            found += errors
            await asyncio.sleep(0)
        return found

    def _send(self, message: Callable[[int], bytes]) -> int:
        self._sequence += 1
        self._socket.send(message(self._sequence))
        return self._sequence

    async def _answers(self, sequence: int) -> AsyncIterator[Answer]:
        while True:
            for answer in await self._read():
                if answer.sequence == sequence:
                    yield answer
                    if answer.done or answer.error:
                        return
            await asyncio.sleep(0)

    async def _read(self) -> list[Answer]:
        async with asyncio.timeout(REPLY_TIMEOUT):
            datagram = await self._loop.sock_recv(self._socket, READ_SIZE)
        try:
            return list(answers(datagram))
        except MalformedMessage as error:
            raise KernelError(errno.EBADMSG, f"routes: {error}") from error
