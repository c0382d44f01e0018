"""An IKE SA as the daemon keeps it, and who hears what becomes of it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Final, Protocol

from kernel_shim.model import Endpoint
from vpnd.ike.effects import ChildFailed, ChildSa, Effect, IkeClosed, Reason, RekeyFailed
from vpnd.ike.sa import IkeSa, IkeSaState

USABLE: Final = (IkeSaState.CONNECTING, IkeSaState.ESTABLISHED, IkeSaState.REKEYING)

ChildKey = tuple[str, str]  # connection, child


@dataclass(slots=True, eq=False)
class Entry:
    """An IKE SA and what is still to be done for it."""

    sa: IkeSa
    steps: deque[deque[Effect]] = field(default_factory=deque)
    task: asyncio.Task[None] | None = None
    advancing: bool = False
    superseded: bool = False  # its peer came back with a new IKE SA
    leaving: bool = False  # a reauthentication of ours makes the one that takes its place
    owners: set[int] = field(default_factory=set)  # children whose policies are claimed
    installing: dict[int, int] = field(default_factory=dict)  # reqid by child whose SA in stands and whose SA out does not yet
    init_key: tuple[int, Endpoint] | None = None  # of a responder: the initiator's SPI and address
    half_open: bytes | None = None  # counted for this origin
    endpoints: tuple[Endpoint, Endpoint] | None = None  # ours and the peer's, as listeners know them
    heir: Entry | None = None  # rekeyed: has its children
    awaits: Entry | None = None  # whose steps, from before it handed over, come first

    @property
    def current(self) -> Entry:
        """The one that has the children now."""
        entry = self
        while entry.heir is not None:
            entry = entry.heir
        return entry

    @property
    def usable(self) -> bool:
        """It stands, or is being brought up by us."""
        return not self.sa.closed and self.sa.state in USABLE


class Listener(Protocol):
    """Hears what becomes of IKE and CHILD_SAs."""

    def ike_established(self, entry: Entry) -> None: ...
    def ike_rekeyed(self, old: Entry, new: Entry) -> None: ...
    def ike_moved(self, entry: Entry, local: Endpoint, remote: Endpoint) -> None:
        """It was between `local` and `remote` before."""

    def reauthentication_due(self, entry: Entry) -> None: ...
    def child_established(self, entry: Entry, child: ChildSa) -> None: ...
    def child_rekeyed(self, entry: Entry, old: ChildSa, child: ChildSa) -> None: ...
    def rekey_failed(self, entry: Entry, effect: RekeyFailed) -> None: ...
    def child_closed(self, entry: Entry, child: ChildSa, reason: Reason) -> None: ...
    def child_denied(self, entry: Entry, reason: Reason) -> None: ...
    def child_failed(self, entry: Entry, effect: ChildFailed) -> None: ...
    def ike_closed(self, entry: Entry, effect: IkeClosed) -> None: ...
