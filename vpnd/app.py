"""Composition root of the key manager: build, wire, run, drain, stop."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import structlog

from kernel_shim.channel import af_key_socket, xfrm
from kernel_shim.channel.af_key import AfKeyChannel
from kernel_shim.channel.api import KernelChannel
from kernel_shim.channel.pfkey import PfKeyChannel
from kernel_shim.channel.sysctl import Sysctls
from kernel_shim.channel.xfrm import XfrmChannel
from kernel_shim.core_dumps import forbid_core_dumps
from kernel_shim.logs import configure_logs
from kernel_shim.model import SOCKET_MARK, Endpoint, KernelError
from kernel_shim.service import notify
from vpnd.auth.credentials import CredentialError, CredentialStore
from vpnd.config import load
from vpnd.config.capabilities import beyond_labels
from vpnd.config.errors import ConfigErrors
from vpnd.config.label_tunnels import unprotected
from vpnd.config.model import DaemonConfig, KernelChoice, LoadedConfiguration
from vpnd.control.backend import ControlError
from vpnd.control.server import ControlServer
from vpnd.daemon.background import Background
from vpnd.daemon.demands import Demands
from vpnd.daemon.fpm import RoutingFeed
from vpnd.daemon.interfaces import Interfaces
from vpnd.daemon.kernel_side import KernelSide
from vpnd.daemon.manager import Manager
from vpnd.daemon.mpls import LABEL_FILE, Mpls
from vpnd.daemon.operations import Operations
from vpnd.gate import GateSettings
from vpnd.ike.context import IkeSettings, Retransmission
from vpnd.ike.effects import Reason
from vpnd.ike.exchanges.crash_detection import SECRET_LENGTH, TokenMaker
from vpnd.io.kernel_choice import Verdict, choose
from vpnd.io.listening import HostView, Listening, SocketTable
from vpnd.io.shim import ShimStartError, shim_listens, start_shim
from vpnd.io.state import kept_secret
from vpnd.telemetry.counters import Counters
from vpnd.telemetry.wording import explained

MINIMUM_ACQUIRE: Final = 30  # s, what the kernel does by itself
MAXIMUM_ACQUIRE: Final = 3600  # s

log = structlog.get_logger("vpnd")


class StartError(RuntimeError):
    """The daemon cannot start; the text is for the user."""


@dataclass(frozen=True, slots=True)
class Source:
    """A configuration file, and what it said."""

    path: Path
    loaded: LoadedConfiguration


class Daemon:
    """One key manager with its kernel, sockets and control server."""

    def __init__(self, loaded: LoadedConfiguration, verdicts: Sequence[Verdict] = (), source: Source | None = None) -> None:
        """`verdicts`: why this kernel, where `kernel = auto` was to find one. `source`: the file to read again when asked."""
        config = loaded.daemon
        self._config = config
        self._configuration, self._tree = loaded.configuration, loaded.tree
        self._counters = Counters()
        self._kernel = KernelSide(self._connect, self._counters)
        self._sockets = SocketTable(self._datagram, self._counters)
        bypass = af_key_socket.bypass_policies if config.kernel is KernelChoice.PFKEY else xfrm.bypass_policies
        self._listening = Listening(self._sockets, config.listen, bypass)
        self._shim: subprocess.Popen[bytes] | None = None
        settings = IkeSettings(
            retransmission=_retransmission(config),
            half_open_timeout=config.half_open_timeout,
            keepalive=config.keep_alive,
            follow_redirects=config.follow_redirects,
            fragment_size=config.fragment_size,
        )
        gate = GateSettings(config.cookie_threshold, config.cookie_threshold_ip, config.block_threshold, config.half_open_limit)
        tokens, host = _tokens(config), HostView(self._sockets, SOCKET_MARK)
        credentials = CredentialStore.of(loaded.configuration)
        self._manager = Manager(self._kernel, self._sockets, credentials, settings, gate, self._counters, host, tokens)
        self._demands = Demands(self._manager, SOCKET_MARK)
        self._interfaces = Interfaces()
        self._routing = RoutingFeed(self._kernel.labels, self._counters)
        self._mpls = Mpls(self._kernel, config.state_dir / LABEL_FILE, self._routing, guards=config.kernel is KernelChoice.XFRM)
        self._operations = Operations(self._manager, self._demands, config, self._interfaces, [str(verdict) for verdict in verdicts], self._mpls)
        if source is not None:
            self._operations.reload_from(lambda: asyncio.to_thread(load, source.path), source.loaded)
        self._background = Background()
        self._control = ControlServer(self._operations, config)

    def _datagram(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        self._manager.datagram(local, remote, data)

    # Start

    async def start(self) -> None:
        self._kernel.event = self._demands.kernel_event
        self._kernel.lost = self._demands.ends.sas_lost
        self._control.bind()  # first: a second daemon must not touch the kernel of the one that runs
        if self._config.kernel is KernelChoice.USERSPACE:
            Sysctls(_settings_file(self._config)).restore()  # an earlier run may have had the host's own kernel, and was killed
        await self._mpls.load(self._configuration.mpls)  # before the kernel is read: what is right in it stays
        await self._kernel.open()
        if errors := beyond_labels(self._configuration, self._kernel.capabilities(), self._tree):
            raise StartError("; ".join(map(str, errors)))
        self._listening.follow(lambda: self._kernel.channel, self._addresses_changed)
        await self._operations.load(self._configuration)
        await self._control.start()

    async def _connect(self) -> KernelChannel:
        """A channel to the kernel, started if need be, with the IKE sockets of every address open.

        Sockets of a kernel that is gone are closed first: they would stand in the way of the new ones.
        """
        config = self._config
        await self._sockets.clear()
        if config.kernel is KernelChoice.XFRM:
            return await self._opened(XfrmChannel(acquire_seconds=_negotiation_seconds(config), settings_file=_settings_file(config)))
        if config.kernel is KernelChoice.PFKEY:
            return await self._opened(AfKeyChannel(acquire_seconds=_negotiation_seconds(config), settings_file=_settings_file(config)))
        if not shim_listens(config.shim_socket):
            if not config.start_shim:
                raise ConnectionRefusedError(errno.ECONNREFUSED, f"no userspace kernel listens at {config.shim_socket}")
            if self._shim is not None:
                self._shim.poll()  # reaps it
            log.info("starting the userspace kernel", socket=str(config.shim_socket))
            self._shim = await start_shim(config.shim_socket, [])
        return await self._opened(PfKeyChannel(config.shim_socket))

    async def _opened(self, channel: KernelChannel) -> KernelChannel:
        await channel.open()
        try:
            await self._listening.open(channel)
        except BaseException:
            await channel.close()
            raise
        return channel

    def _addresses_changed(self) -> None:
        self._manager.addresses_changed()
        self._routing.links_changed()

    # Reload

    def reload(self) -> None:
        """Read the configuration file again, in the background; what came of it is in the log."""
        self._background.start(self._reload())

    async def _reload(self) -> None:
        try:
            await self._operations.reload()
        except (ConfigErrors, ControlError) as error:
            log.error("configuration not reloaded, nothing has changed", error=str(error))

    # Stop

    async def stop(self, hurry: asyncio.Event | None = None) -> None:
        """Delete what stands, with a deadline, or until `hurry`; give back what the kernel holds; the shim that we started ends too."""
        notify("STOPPING=1")
        self._demands.stop()
        self._manager.drain()
        await self._control.stop()
        now = asyncio.get_running_loop().time()
        for entry in self._manager.entries():
            self._manager.run(entry, entry.sa.delete(now, Reason.SHUTDOWN))
        waiting = [asyncio.create_task(self._manager.registry.all_closed()), asyncio.create_task((hurry or asyncio.Event()).wait())]
        await asyncio.wait(waiting, timeout=self._config.shutdown_timeout, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if len(self._manager):
            log.warning("peers did not answer our deletes", left=len(self._manager))
        await self.abandon()

    async def abandon(self) -> None:
        """Close everything at once."""
        await self._control.stop()
        await self._listening.close()
        await self._interfaces.close()
        await self._routing.close()
        await self._kernel.close()
        if self._shim is not None and self._shim.poll() is None:
            self._shim.terminate()
            await asyncio.get_running_loop().run_in_executor(None, self._shim.wait)


def _settings_file(config: DaemonConfig) -> Path:
    """Which kernel settings we changed; beside the control socket, so that daemons of several network namespaces keep apart."""
    return config.control_socket.with_name(config.control_socket.name + ".settings")


def _tokens(config: DaemonConfig) -> TokenMaker | None:
    """Crash tokens that outlive us (RFC 6290); without a place to keep their secret they would prove nothing."""
    if not config.crash_detection:
        return None
    try:
        return TokenMaker(kept_secret(config.state_dir, "crash-tokens", SECRET_LENGTH, os.urandom))
    except OSError as error:
        log.warning("no quick crash detection", state_dir=str(config.state_dir), error=explained(error))
        return None


def _negotiation_seconds(config: DaemonConfig) -> int:
    """How long one exchange may take before it is given up: the kernel's larval SAs stand as long."""
    return max(MINIMUM_ACQUIRE, math.ceil(min(_retransmission(config).total(), MAXIMUM_ACQUIRE)))


def _retransmission(config: DaemonConfig) -> Retransmission:
    return Retransmission(config.retransmit_timeout, config.retransmit_base, config.retransmit_tries, limit=config.retransmit_limit)


async def _with_kernel(loaded: LoadedConfiguration) -> tuple[LoadedConfiguration, Sequence[Verdict]]:
    """With `kernel = auto` replaced by the kernel that it means here. StartError when there is none."""
    if loaded.daemon.kernel is not KernelChoice.AUTO:
        return loaded, ()
    verdicts = await choose(loaded.daemon, loaded.configuration)
    for verdict in verdicts:
        log.info("kernel chosen" if verdict.usable else "kernel passed over", kernel=verdict.kernel.value, reason=verdict.reason)
    if not verdicts[-1].usable:
        raise StartError("kernel = auto finds no kernel: " + "; ".join(map(str, verdicts)))
    return replace(loaded, daemon=replace(loaded.daemon, kernel=verdicts[-1].kernel)), verdicts


async def _serve(loaded: LoadedConfiguration, path: Path) -> int:
    loop = asyncio.get_running_loop()
    ended, hurry = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (hurry if ended.is_set() else ended).set())
    loop.add_signal_handler(signal.SIGHUP, lambda: log.warning("not reloaded: the start is not complete"))
    source = Source(path, loaded)
    try:
        loaded, verdicts = await _with_kernel(loaded)
        daemon = Daemon(loaded, verdicts, source)
    except StartError as error:
        log.error("cannot start", error=str(error))
        return 1
    except CredentialError as error:
        log.error("configuration refused", error=str(error))
        return 1
    starting = asyncio.create_task(daemon.start(), name="start")
    ending = asyncio.create_task(ended.wait(), name="signals")
    await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        log.info("stopping before the start is complete")
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await daemon.stop(hurry)
        return 0
    try:
        starting.result()
    except (StartError, ShimStartError, ControlError, KernelError, OSError) as error:
        log.error("cannot start", error=explained(error))
        ending.cancel()
        await daemon.abandon()
        return 1
    loop.add_signal_handler(signal.SIGHUP, daemon.reload)
    notify("READY=1")
    log.info("ready", control=str(loaded.daemon.control_socket))
    await ending
    log.info("stopping")
    await daemon.stop(hurry)
    return 0


def run(config_path: Path) -> int:
    """Run the daemon until SIGTERM or SIGINT; a second one ends it at once, SIGHUP reloads the file.

    The exit status: 0 after an orderly stop, 1 when it could not start.
    """
    forbid_core_dumps()
    try:
        loaded = load(config_path)
    except ConfigErrors as error:
        print(error, file=sys.stderr)
        return 1
    configure_logs(loaded.daemon.log_level, loaded.daemon.log_format.value)
    for warning in (*loaded.warnings, *map(str, unprotected(loaded.configuration, loaded.tree))):
        log.warning(warning)
    return asyncio.run(_serve(loaded, config_path.absolute()))


__all__ = ["Daemon", "DaemonConfig", "run"]
