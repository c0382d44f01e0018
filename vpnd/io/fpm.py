"""Where a routing daemon connects and says its routes (FRR: zebra with `-M dplane_fpm_nl`), and the host's VRF devices that it speaks of."""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import structlog
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kernel_shim.model import IPAddress
from kernel_shim.mpls.fpm import FpmError
from vpnd.io.tcp_owner import Place, owner, place
from vpnd.mpls.fpm_feed import FpmFeed
from vpnd.telemetry.counters import Counters
from vpnd.telemetry.throttle import Throttle

READ_AT_ONCE: Final = 16384  # octets: some 250 routes, a few milliseconds of the event loop
MAX_ASKED: Final = 8  # connections of which it is not known yet whose they are

log = structlog.get_logger("fpm")


class FpmServer:
    """Listens for one routing daemon at a time; a newer connection takes the place of an older one. `changed` is called when there is something to take.

    From this host only root, the user of this process and `users` (names, or numbers) may connect.
    """

    def __init__(self, feed: FpmFeed, changed: Callable[[], None], counters: Counters, users: Sequence[str] = ()) -> None:
        self._feed, self._changed, self._counters, self._users = feed, changed, counters, users
        self._asked = 0
        self._server: asyncio.Server | None = None
        self._current: asyncio.StreamWriter | None = None
        self._complaints = Throttle(burst=5, rate=0.1)

    async def open(self, address: IPAddress, port: int) -> None:
        """Raises OSError."""
        self._server = await asyncio.start_server(self._serve, str(address), port, limit=READ_AT_ONCE)

    @property
    def port(self) -> int:
        """Where it listens; 0 when it does not."""
        return int(self._server.sockets[0].getsockname()[1]) if self._server is not None and self._server.sockets else 0

    async def close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        if self._current is not None:
            self._current.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not await self._may_speak(writer) or self._server is None:
            writer.transport.abort()
            return
        now = asyncio.get_running_loop().time
        older, self._current = self._current, writer
        if older is not None:
            older.transport.abort()
            self._end(now())
        self._feed.begin(now())
        self._counters.add("fpm_connections")
        self._say("a routing daemon is connected", peer=str(writer.get_extra_info("peername")))
        self._changed()
        try:
            while data := await reader.read(READ_AT_ONCE):
                if self._current is not writer:
                    return
                heard = self._feed.hear(data, now())
                self._counters.add("fpm_changes", heard.changes)
                self._counters.add("fpm_beyond_bounds", heard.beyond_bounds)
                self._counters.add("fpm_unresolved", heard.unresolved)
                self._changed()
                await asyncio.sleep(0)  # what is buffered is read without a pause
        except FpmError as error:
            self._counters.add("fpm_garbage")
            self._say("what the routing daemon says cannot be read", error=str(error))
        except OSError as error:
            self._say("the routing daemon's connection broke", error=str(error))
        finally:
            writer.transport.abort()
            if self._current is writer:
                self._current = None
                self._end(now())
                self._say("the routing daemon is gone", routes=len(self._feed))
                self._changed()

    def _end(self, now: float) -> None:
        if self._feed.end(now):
            self._counters.add("fpm_cut_off")

    async def _may_speak(self, writer: asyncio.StreamWriter) -> bool:
        if self._asked == MAX_ASKED:
            self._counters.add("fpm_refused")
            return False
        self._asked += 1
        try:
            refused = await asyncio.to_thread(_refusal, place(writer.get_extra_info("peername")), place(writer.get_extra_info("sockname")), self._users)
        except (OSError, TypeError, ValueError) as error:  # a connection that is gone has no name
            refused = str(error)
        finally:
            self._asked -= 1
        if refused:
            self._counters.add("fpm_refused")
            self._say("a connection of no routing daemon is refused", reason=refused)
        return not refused

    def _say(self, what: str, **details: object) -> None:
        if (untold := self._complaints.admit(asyncio.get_running_loop().time())) is not None:
            log.info(what, untold=untold, **details)


def _refusal(theirs: Place, ours: Place, users: Sequence[str]) -> str:
    """Why a peer may not say routes; empty when it may. One of another host got past the firewall that such an address needs."""
    uid = owner(theirs, ours)
    if uid is None:
        return f"nobody here holds {theirs[0]} port {theirs[1]}" if theirs[0].is_loopback or theirs[0] == ours[0] else ""
    allowed = {0, os.geteuid()}
    for user in users:
        with suppress(KeyError):  # its package is not installed
            allowed.add(int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid)
    return "" if uid in allowed else f"user {uid} is none of fpm_users"


@dataclass(frozen=True, slots=True)
class Link:
    """An interface of the host; `table` is that of the VRF device which it is or belongs to, 0 for none."""

    name: str
    table: int = 0


async def links() -> Mapping[int, Link]:
    """By index. OSError when they cannot be read."""
    found: dict[int, tuple[str, int, int]] = {}
    try:
        async with AsyncIPRoute() as route:
            async for message in await route.get_links():
                table, info = 0, message.get("IFLA_LINKINFO")
                if info is not None and info.get("IFLA_INFO_KIND") == "vrf":
                    with suppress(AttributeError):
                        table = info.get("IFLA_INFO_DATA").get("IFLA_VRF_TABLE") or 0
                found[message["index"]] = (message.get("IFLA_IFNAME") or "", table, message.get("IFLA_MASTER") or 0)
    except NetlinkError as error:
        raise OSError(error.code, str(error)) from error
    return {index: Link(name, table or found.get(master, ("", 0, 0))[1]) for index, (name, table, master) in found.items()}
