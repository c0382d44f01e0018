"""The commands of VICI, carried out on a `ControlBackend`. Answers have strongSwan's keys (vici_control.c, vici_cred.c, vici_query.c)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Final

import structlog

from vpnd.config.credentials import validate_certificate, validate_key, validate_shared
from vpnd.config.errors import ConfigErrors
from vpnd.config.tree import Items, Scalar, Section
from vpnd.config.validate import validate_connection
from vpnd.control.backend import ControlBackend, ControlError, LogLine
from vpnd.control.server import mpls, queries
from vpnd.control.server.messages import failure, flag, matched, name_list, number, required, success, terminated, timeout_of
from vpnd.control.vici import formats
from vpnd.control.vici.codec import TooLong
from vpnd.ike.gateway_id import GatewayId
from vpnd.ike.identity import Identity

Stream = Callable[[str, Section], Awaitable[None]]
"""Sends an event of the running command to its client, if that is registered for it."""

Handler = Callable[[Section, Stream], Coroutine[object, object, Section]]

INTERRUPTIBLE: Final = frozenset({"list-sas", "list-conns", "list-policies", "list-certs", "x-mpls", "initiate", "terminate", "x-wait"})
"""Commands that end when their client goes away; what they have set in motion goes on."""

MAX_BACKGROUND: Final = 1000  # requests with `timeout = -1` that still go on

EVENTS: Final = frozenset(
    {
        "log",
        "control-log",
        "list-sa",
        "list-conn",
        "list-policy",
        "list-cert",
        "list-authority",
        "ike-updown",
        "ike-rekey",
        "ike-update",
        "child-updown",
        "child-rekey",
        "alert",
        "x-events-lost",
        "x-mpls-row",
    }
)
"""What a client may register for. Ours are `x-events-lost`, how many events were dropped because the client did not read them, and `x-mpls-row`."""

NOT_IMPLEMENTED: Final = (
    "load-token",
    "load-pool",
    "unload-pool",
    "load-authority",
    "unload-authority",
)

_log = structlog.get_logger("vpnd.control")


class Commands:
    """All commands by name; one for all clients."""

    def __init__(self, backend: ControlBackend) -> None:
        self._backend = backend
        self._background: set[asyncio.Task[None] | asyncio.Task[Section]] = set()
        self._handlers: dict[str, Handler] = {
            "version": self._version,
            "stats": self._stats,
            "list-sas": self._list_sas,
            "list-policies": self._list_policies,
            "list-conns": self._list_conns,
            "list-authorities": self._nothing,
            "list-certs": lambda request, stream: queries.certificates(self._backend, request, stream),
            "get-algorithms": lambda _request, _stream: queries.algorithms(),
            "get-counters": lambda request, _stream: queries.counters(self._backend, request.text("name"), everything=flag(request, "all")),
            "reset-counters": lambda request, _stream: queries.reset_counters(self._backend, request.text("name"), everything=flag(request, "all")),
            "reload-settings": self._reload_settings,
            "get-conns": self._get_conns,
            "get-pools": self._nothing,
            "get-authorities": self._get_authorities,
            "get-keys": self._get_keys,
            "get-shared": self._get_shared,
            "load-conn": self._load_conn,
            "unload-conn": self._unload_conn,
            "load-cert": self._load_cert,
            "load-key": self._load_key,
            "unload-key": self._unload_key,
            "load-shared": self._load_shared,
            "unload-shared": self._unload_shared,
            "clear-creds": self._clear_creds,
            "flush-certs": self._flush_certs,
            "initiate": self._initiate,
            "terminate": self._terminate,
            "rekey": self._rekey,
            "redirect": self._redirect,
            "install": self._install,
            "uninstall": self._uninstall,
            "x-wait": self._wait,
            "x-reload": self._reload,
            "x-stats": self._counters,
            "x-mpls": lambda request, stream: mpls.rows(self._backend, request, stream),
            "x-mpls-trace": lambda request, _stream: mpls.trace(self._backend, request),
        }

    def known(self, name: str) -> bool:
        return name in self._handlers or name in NOT_IMPLEMENTED

    async def handle(self, name: str, request: Section, stream: Stream) -> Section:
        """The answer. What goes wrong becomes `success = no` and `errmsg`; only a connection that broke in `stream` raises."""
        if name in NOT_IMPLEMENTED:
            return failure(f"'{name}' is not implemented yet")
        try:
            if name in INTERRUPTIBLE:
                return await self._handlers[name](request, stream)
            return await self._to_the_end(self._handlers[name](request, stream))
        except ControlError as error:
            return failure(str(error))
        except ConfigErrors as invalid:
            return failure("; ".join(str(error) for error in invalid.errors))
        except TooLong as error:
            return failure(f"the answer is {error}")
        except ConnectionError:
            raise
        except Exception:
            # A fault of ours costs this one answer, not the daemon.
            _log.exception("a control command failed", command=name)
            return failure("internal error, see the log")

    async def close(self) -> None:
        """Cancels what goes on in the background."""
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Information

    async def _version(self, _request: Section, _stream: Stream) -> Section:
        return formats.version()

    async def _stats(self, _request: Section, _stream: Stream) -> Section:
        return formats.stats(self._backend.stats())

    async def _counters(self, _request: Section, _stream: Stream) -> Section:
        """Ours: every counter of the daemon, by name, and which kernel it has and why."""
        figures = self._backend.stats()
        return Section.of(
            {"kernel": figures.kernel, "kernel-reasons": list(figures.kernel_reasons), "policies": figures.policies, "counters": dict(figures.counters)}
        )

    async def _list_sas(self, request: Section, stream: Stream) -> Section:
        sas = await self._backend.list_sas(
            ike=request.text("ike"), ike_id=number(request, "ike-id"), child=request.text("child"), child_id=number(request, "child-id")
        )
        for ike in sas:
            for event in formats.list_sa_events(ike):
                await stream("list-sa", event)
        return Section()

    async def _list_policies(self, request: Section, stream: Stream) -> Section:
        wanted = {"TUNNEL": "trap", "TRANSPORT": "trap", "PASS": "pass", "DROP": "drop"}
        asked = {kind for kind in ("trap", "pass", "drop") if flag(request, kind)}
        policies = self._backend.list_policies(trap="trap" in asked, shunt=bool(asked & {"pass", "drop"}), child=request.text("child"), ike=request.text("ike"))
        for policy in policies:
            if wanted.get(policy.mode, "trap") in asked:
                await stream("list-policy", formats.list_policy_event(policy))
        return Section()

    async def _list_conns(self, request: Section, stream: Stream) -> Section:
        name = request.text("ike")
        for connection in list(self._backend.connections().values()):
            if name is None or name == connection.name:
                for event in formats.list_conn_events(connection):
                    await stream("list-conn", event)
        return Section()

    async def _reload_settings(self, _request: Section, _stream: Stream) -> Section:
        raise ControlError("options of the section 'vpnd' count after a restart; 'x-reload' (vpnctl reload) reads connections and secrets again")

    async def _nothing(self, _request: Section, _stream: Stream) -> Section:
        return Section()

    async def _get_conns(self, _request: Section, _stream: Stream) -> Section:
        return name_list("conns", self._backend.connections())

    async def _get_authorities(self, _request: Section, _stream: Stream) -> Section:
        return name_list("authorities", ())

    async def _get_keys(self, _request: Section, _stream: Stream) -> Section:
        return name_list("keys", self._backend.key_ids())

    async def _get_shared(self, _request: Section, _stream: Stream) -> Section:
        return name_list("keys", (name for name in self._backend.shared_names() if not name.startswith("~")))

    # Configuration

    async def _load_conn(self, request: Section, _stream: Stream) -> Section:
        connection = validate_connection(request)
        # As strongSwan: what a connection names is known to the whole daemon.
        for each in (*connection.local, *connection.remote):
            for der in each.certs:
                self._backend.load_certificate(der, authority=False)
            for der in each.cacerts:
                self._backend.load_certificate(der, authority=True)
        await self._backend.load_connection(connection)
        return success()

    async def _unload_conn(self, request: Section, _stream: Stream) -> Section:
        await self._backend.unload_connection(required(request, "name", "connection name missing"))
        return success()

    async def _reload(self, _request: Section, _stream: Stream) -> Section:
        """Ours: read the configuration file again; `changes` says what was done."""
        lines = await self._backend.reload()
        return Section({**success().entries, "changes": Items(tuple(Scalar(line.encode()) for line in lines))})

    async def _load_cert(self, request: Section, _stream: Stream) -> Section:
        der, authority = validate_certificate(request)
        self._backend.load_certificate(der, authority=authority)
        return success()

    async def _load_key(self, request: Section, _stream: Stream) -> Section:
        identifier = self._backend.load_key(validate_key(request))
        return Section.of({"success": "yes", "id": identifier})

    async def _unload_key(self, request: Section, _stream: Stream) -> Section:
        identifier = required(request, "id", "key id missing").replace(":", "").lower()
        if identifier not in self._backend.key_ids():
            raise ControlError("key not found")
        self._backend.unload_key(identifier)
        return success()

    async def _load_shared(self, request: Section, _stream: Stream) -> Section:
        self._backend.load_shared(validate_shared(request))
        return success()

    async def _unload_shared(self, request: Section, _stream: Stream) -> Section:
        self._backend.unload_shared(required(request, "id", "unique identifier missing"))
        return success()

    async def _clear_creds(self, _request: Section, _stream: Stream) -> Section:
        self._backend.clear_credentials()
        return success()

    async def _flush_certs(self, _request: Section, _stream: Stream) -> Section:
        return success()  # nothing is cached

    # Control

    async def _initiate(self, request: Section, stream: Stream) -> Section:
        child, ike = request.text("child"), request.text("ike")
        if child is None and ike is None:
            raise ControlError("missing configuration name")
        timeout = timeout_of(request)
        lines = self._backend.initiate(child=child, ike=ike, timeout=max(timeout, 0.0))
        if timeout < 0:
            self._in_background(lines)
        else:
            await _relay(lines, request, stream)
        return success()

    async def _terminate(self, request: Section, stream: Stream) -> Section:
        child, ike = request.text("child"), request.text("ike")
        child_id, ike_id = number(request, "child-id"), number(request, "ike-id")
        if child is None and ike is None and child_id is None and ike_id is None:
            raise ControlError("missing terminate selector")
        of_children = child is not None or child_id is not None
        sas = await self._backend.list_sas(ike=ike, ike_id=ike_id, child=child, child_id=child_id)
        matches = sum(len(each.children) for each in sas) if of_children else len(sas)
        if not matches:
            return terminated(0, 0, "no matching SAs to terminate found")
        timeout = timeout_of(request)
        lines = self._backend.terminate(child=child, ike=ike, child_id=child_id, ike_id=ike_id, force=flag(request, "force"), timeout=max(timeout, 0.0))
        if timeout < 0:
            self._in_background(lines)
            return terminated(matches, matches)
        try:
            await _relay(lines, request, stream)
        except ControlError as error:
            return terminated(matches, 0, str(error))
        return terminated(matches, matches)

    async def _rekey(self, request: Section, _stream: Stream) -> Section:
        """As strongSwan: answers once the rekeyings are begun."""
        child, ike = request.text("child"), request.text("ike")
        child_id, ike_id = number(request, "child-id"), number(request, "ike-id")
        if child is None and ike is None and child_id is None and ike_id is None:
            raise ControlError("missing rekey selector")
        matches = self._backend.rekey(child=child, ike=ike, child_id=child_id, ike_id=ike_id, reauth=flag(request, "reauth"))
        return matched("rekey", matches)

    async def _redirect(self, request: Section, _stream: Stream) -> Section:
        """As strongSwan: answers once the clients are being told."""
        ike, ike_id, peer_ip, peer_id = request.text("ike"), number(request, "ike-id"), request.text("peer-ip"), request.text("peer-id")
        if ike is None and ike_id is None and peer_ip is None and peer_id is None:
            raise ControlError("missing redirect selector")
        try:
            gateway = GatewayId.parse(required(request, "gateway", "missing gateway"))
            identity = Identity.parse(peer_id) if peer_id is not None else None
        except ValueError as error:
            raise ControlError(str(error)) from error
        matches = self._backend.redirect(gateway, ike=ike, ike_id=ike_id, peer_ip=peer_ip, peer_id=identity)
        return matched("redirect", matches)

    async def _install(self, request: Section, _stream: Stream) -> Section:
        await self._backend.install(required(request, "child", "missing configuration name"), request.text("ike"))
        return success()

    async def _uninstall(self, request: Section, _stream: Stream) -> Section:
        await self._backend.uninstall(required(request, "child", "missing configuration name"), request.text("ike"))
        return success()

    async def _wait(self, request: Section, _stream: Stream) -> Section:
        """Ours: answers once the CHILD_SA `child` stands, or `timeout` (ms, 0 none) is over."""
        await self._backend.wait(required(request, "child", "missing configuration name"), max(timeout_of(request), 0.0))
        return success()

    async def _to_the_end(self, command: Coroutine[object, object, Section]) -> Section:
        """A change is carried out even if the client goes away meanwhile."""
        task = asyncio.create_task(command)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return await asyncio.shield(task)

    def _in_background(self, lines: AsyncIterator[LogLine]) -> None:
        if len(self._background) >= MAX_BACKGROUND:
            raise ControlError(f"more than {MAX_BACKGROUND} requests without waiting are under way")
        task = asyncio.create_task(_exhaust(lines))
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _relay(lines: AsyncIterator[LogLine], request: Section, stream: Stream) -> None:
    level = number(request, "loglevel", -1)
    async for line in lines:
        if line.level <= (1 if level is None else level):
            await stream("control-log", formats.log_event(line, thread=False))


async def _exhaust(lines: AsyncIterator[LogLine]) -> None:
    try:
        async for _ in lines:
            pass
    except ControlError as error:
        _log.warning("a request that nobody waits for failed", reason=str(error))
    except Exception:
        _log.exception("a request that nobody waits for failed")
