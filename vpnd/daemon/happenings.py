"""What becomes of IKE and CHILD_SAs: shown on the control socket, and passed on to whom it concerns."""

from __future__ import annotations

from dataclasses import replace

from kernel_shim.model import Endpoint
from vpnd.control.backend import Alert, ChildRekeyed, ChildUpDown, IkeRekeyed, IkeUpdated, IkeUpDown
from vpnd.daemon import alerts
from vpnd.daemon.demands import Demands
from vpnd.daemon.entry import Entry
from vpnd.daemon.inactivity import Inactivity
from vpnd.daemon.manager import Manager
from vpnd.daemon.reauthentication import Reauthentications
from vpnd.daemon.status import NO_USAGE, child_event_status, ike_status
from vpnd.ike.effects import ChildFailed, ChildSa, IkeClosed, Reason, RekeyFailed


class Happenings:
    """The manager's listener."""

    def __init__(self, manager: Manager, demands: Demands, reauthentications: Reauthentications, inactivity: Inactivity) -> None:
        self._manager = manager
        self._demands = demands
        self._reauthentications = reauthentications
        self._inactivity = inactivity
        manager.listener = self

    def ike_established(self, entry: Entry) -> None:
        self._manager.news.publish(IkeUpDown(True, ike_status(entry, NO_USAGE)))
        self._demands.ike_sas.established(entry)
        self._demands.duplicates.ike_established(entry)
        if not entry.sa.children:
            self._reauthentications.settled(entry)

    def ike_rekeyed(self, old: Entry, new: Entry) -> None:
        self._manager.news.publish(IkeRekeyed(ike_status(old, NO_USAGE, children=()), ike_status(new, NO_USAGE, children=())))
        self._manager.exchanges.add("ike-rekey-init" if new.sa.initiator else "ike-rekey-resp", new.sa.connection.name)
        self._demands.ike_rekeyed(old, new)
        self._reauthentications.ike_rekeyed(old, new)

    def ike_moved(self, entry: Entry, local: Endpoint, remote: Endpoint) -> None:
        before = replace(ike_status(entry, NO_USAGE, children=()), local=local, remote=remote)
        self._manager.news.publish(IkeUpdated(before, entry.sa.local, entry.sa.remote))

    def reauthentication_due(self, entry: Entry) -> None:
        self._reauthentications.begin(entry)

    def child_rekeyed(self, entry: Entry, old: ChildSa, child: ChildSa) -> None:
        before, after = child_event_status(entry, old), child_event_status(entry, child)
        self._manager.news.publish(ChildRekeyed(ike_status(entry, NO_USAGE, children=()), before, after))
        self._manager.exchanges.add("child-rekey", entry.sa.connection.name)
        self._demands.ends.rekeyed(entry, old, child)
        self._inactivity.child_established(entry, child, old)

    def rekey_failed(self, entry: Entry, effect: RekeyFailed) -> None:
        self._demands.ends.rekey_failed(entry, effect.child_id)

    def child_established(self, entry: Entry, child: ChildSa) -> None:
        self._publish_child(True, entry, child)
        self._demands.child_established(entry, child)
        self._inactivity.child_established(entry, child)
        self._reauthentications.settled(entry)

    def child_closed(self, entry: Entry, child: ChildSa, reason: Reason) -> None:
        if reason is not Reason.REKEYED:  # its successor stands: nothing went down
            self._publish_child(False, entry, child)
        self._inactivity.child_closed(child)
        self._demands.ends.child_closed(entry, child, reason)

    def child_denied(self, entry: Entry, reason: Reason) -> None:
        self._alert(alerts.OF_CHILD_SAS.get(reason), entry)

    def child_failed(self, entry: Entry, effect: ChildFailed) -> None:
        if not entry.sa.closed:  # else it says so itself
            self._alert(alerts.OF_CHILD_SAS.get(effect.reason), entry)
        self._demands.child_failed(entry, effect)
        self._reauthentications.settled(entry)

    def ike_closed(self, entry: Entry, effect: IkeClosed) -> None:
        if entry.sa.established_at is not None and effect.reason is not Reason.REKEYED:
            self._manager.news.publish(IkeUpDown(False, ike_status(entry, NO_USAGE)))
        self._alert(alerts.OF_IKE_SAS.get(effect.reason), entry)
        if effect.reason is Reason.PEER_SILENT and entry.sa.established_at is None:
            self._alert(alerts.PEER_INIT_UNREACHABLE, entry)
        self._demands.ike_sas.closed(entry, effect)
        self._demands.ike_closed(entry, effect)
        self._reauthentications.ike_closed(entry)

    def _alert(self, kind: str | None, entry: Entry) -> None:
        if kind is not None:
            self._manager.news.publish(Alert(kind, ike_status(entry, NO_USAGE, children=())))

    def _publish_child(self, up: bool, entry: Entry, child: ChildSa) -> None:
        self._manager.news.publish(ChildUpDown(up, ike_status(entry, NO_USAGE, children=[child_event_status(entry, child)])))
