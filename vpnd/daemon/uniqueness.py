"""One IKE SA between two identities, or several: swanctl.conf's `unique`, and INITIAL_CONTACT (RFC 7296 section 2.4).

Only identities that are authenticated count, and only a responder judges: who initiates wants what he does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Final

from kernel_shim.model import IPAddress
from vpnd.config.model import ConnectionConfig, UniquePolicy
from vpnd.daemon.entry import Entry
from vpnd.daemon.registry import Identities, Registry
from vpnd.ike.identity import Identity

REAUTHENTICATION_GRACE: Final = 10.0  # s, for which what was perhaps reauthenticated stays: its CHILD_SAs are made anew meanwhile


def admits(registry: Registry, connection: ConnectionConfig, local: Identity, remote: Identity, address: IPAddress) -> bool:
    """Whether a peer that proved to be `remote` may have another IKE SA. One that comes from the same address is perhaps reauthenticating."""
    if connection.unique is not UniquePolicy.KEEP:
        return True
    others = (entry for entry in registry.of_peer((local, remote)) if entry.usable and entry.sa.connection.name == connection.name)
    return all(entry.sa.remote.address == address for entry in others)


def after_initial_contact(registry: Registry, entry: Entry, identities: Identities) -> list[Entry]:
    """Those of the same identities that the peer of `entry` knows no more. Who proved itself by other means, weaker ones perhaps, has no say over them."""
    if entry.sa.connection.unique is UniquePolicy.NEVER:
        return []
    return [other for other in registry.of_peer(identities) if other is not entry and _same_proof(entry.sa.connection, other.sa.connection)]


def _same_proof(one: ConnectionConfig, other: ConnectionConfig) -> bool:
    """Whether both connections have their peer prove itself alike, whatever its identity."""
    return one.name == other.name or [(each.auth, each.certs, each.cacerts) for each in one.remote] == [
        (each.auth, each.certs, each.cacerts) for each in other.remote
    ]


def replace(registry: Registry, entry: Entry, delete: Callable[[Entry], None]) -> None:
    """Now that `entry` is established: delete those that it replaces."""
    for other in _replaced(registry, entry):
        if other.sa.remote.address == entry.sa.remote.address:
            asyncio.get_running_loop().call_later(REAUTHENTICATION_GRACE, _delete_if_both_stand, entry, other, delete)
        else:
            other.superseded = True
            delete(other)


def _replaced(registry: Registry, entry: Entry) -> Iterator[Entry]:
    if entry.sa.initiator or entry.sa.connection.unique not in (UniquePolicy.REPLACE, UniquePolicy.KEEP):
        return
    for other in registry.of_peer((entry.sa.local_id, entry.sa.remote_id)):
        if other is not entry and not other.sa.closed and other.sa.connection.name == entry.sa.connection.name:
            yield other


def _delete_if_both_stand(entry: Entry, other: Entry, delete: Callable[[Entry], None]) -> None:
    if not entry.current.sa.closed and not other.current.sa.closed and entry.current is not other.current:
        other.current.superseded = True
        delete(other.current)
