"""The configuration file is read again: only what changed is touched, all of it or nothing, and what was done is said.

Connections and credentials that came over the control socket are not the file's, and stay.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, fields

from vpnd.auth.credentials import CredentialError, CredentialStore
from vpnd.config.capabilities import refused
from vpnd.config.errors import ConfigErrors
from vpnd.config.model import ConnectionConfig, DaemonConfig, LoadedConfiguration
from vpnd.control.backend import ControlError
from vpnd.daemon.label_synchroniser import describe
from vpnd.daemon.loading import Loading, clashing_reqids
from vpnd.daemon.manager import Manager
from vpnd.daemon.mpls import Mpls
from vpnd.telemetry.wording import counted


@dataclass(frozen=True, slots=True)
class Changes:
    """Names of connections, how many credentials and entries of the label node came, went or changed, and daemon options that count only after a restart."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    credentials: int = 0
    label_entries: int = 0
    restart: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        said = [
            f"{what} {', '.join(names)}"
            for what, names in (("added", self.added), ("changed", self.changed), ("removed", self.removed), ("failed:", self.failed))
            if names
        ]
        said += [f"{counted(self.credentials, 'credential')} changed"] if self.credentials else []
        said += [f"{counted(self.label_entries, 'entry', 'entries')} of the label node changed"] if self.label_entries else []
        said += [f"after a restart: {', '.join(f'vpnd.{name}' for name in self.restart)}"] if self.restart else []
        return [*said, f"{counted(len(self.unchanged), 'connection')} unchanged"]


class Reloading:
    """`read` reads the file; ConfigErrors from it change nothing."""

    def __init__(self, manager: Manager, loading: Loading, mpls: Mpls, read: Callable[[], Awaitable[LoadedConfiguration]], loaded: LoadedConfiguration) -> None:
        self._manager = manager
        self._loading = loading
        self._mpls = mpls
        self._read = read
        self._loaded = loaded
        self._credentials = CredentialStore.of(loaded.configuration)

    async def reload(self) -> Changes:
        """ConfigErrors, with file, line and column, or ControlError: then nothing has changed."""
        loaded = await self._read()
        new, old = loaded.configuration.connections, self._loaded.configuration.connections
        if errors := refused(loaded.configuration, self._manager.capabilities, loaded.tree):
            raise ConfigErrors(list(errors))
        others = {name: connection for name, connection in self._manager.connections.items() if name not in old}
        if clash := clashing_reqids({**others, **new}):
            raise ControlError(clash)
        try:
            credentials = CredentialStore.of(loaded.configuration)
        except CredentialError as error:
            raise ControlError(str(error)) from error
        self._mpls.plan(loaded.configuration.mpls)
        # from here on everything is carried out
        exchanged = self._manager.credentials.exchange(self._credentials, credentials)
        failed = [*await self._remove(old, new), *await self._load(new)]
        label_entries = await self._mpls.load(loaded.configuration.mpls)
        failed += [f"{describe(key)} ({why})" for key, why in self._mpls.labels.refused.items()]
        changes = Changes(
            added=tuple(name for name in new if name not in old),
            changed=tuple(name for name in new if name in old and new[name] != old[name]),
            removed=tuple(name for name in old if name not in new),
            unchanged=tuple(name for name in new if old.get(name) == new[name]),
            credentials=exchanged,
            label_entries=label_entries,
            restart=_options_that_differ(self._loaded.daemon, loaded.daemon),
            failed=tuple(failed),
        )
        self._loaded, self._credentials = loaded, credentials
        for warning in loaded.warnings:
            self._manager.say(warning, group="CFG", warning=True)
        for line in changes.lines():
            self._manager.say(f"configuration reloaded: {line}", group="CFG")
        return changes

    async def _remove(self, old: Mapping[str, ConnectionConfig], new: Mapping[str, ConnectionConfig]) -> list[str]:
        failed = []
        for name in old:
            if name not in new and name in self._manager.connections:
                try:
                    await self._loading.unload_connection(name)
                except ControlError as error:
                    failed.append(f"{name} ({error})")
        return failed

    async def _load(self, new: Mapping[str, ConnectionConfig]) -> list[str]:
        failed = []
        for name, connection in new.items():
            try:
                await self._loading.load_connection(connection)
            except ControlError as error:
                failed.append(f"{name} ({error})")
        return failed


def _options_that_differ(old: DaemonConfig, new: DaemonConfig) -> tuple[str, ...]:
    return tuple(each.name for each in fields(DaemonConfig) if getattr(old, each.name) != getattr(new, each.name))
