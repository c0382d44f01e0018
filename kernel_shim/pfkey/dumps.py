"""What a dump holds, and how each entry of it looks."""

from __future__ import annotations

from collections.abc import Iterable

from kernel_shim.inspection import CachedBundle, PendingQueue
from kernel_shim.model import Policy, SaStatus
from kernel_shim.pfkey.constants import SaType
from kernel_shim.pfkey.messages import Extension, Filter, Message, PfKeyError
from kernel_shim.pfkey.policy_messages import policy_extensions
from kernel_shim.pfkey.private import BundleExtension, LabelEntries, PendingExtension
from kernel_shim.pfkey.sa_messages import passes, status_extensions


def holds_esp(sa_type: int) -> bool:
    """Whether a dump of this SA type shows SAs of ESP. EINVAL for a type that Linux does not know here."""
    if sa_type not in (SaType.UNSPEC, SaType.AH, SaType.ESP, SaType.X_IPCOMP):
        raise PfKeyError("sadb_msg_satype", str(sa_type))
    return sa_type in (SaType.UNSPEC, SaType.ESP)


def filtered(statuses: Iterable[SaStatus], message: Message) -> Iterable[SaStatus]:
    """Those that X_FILTER of the request, if there is one, lets through."""
    wanted = message.find(Filter)
    return statuses if wanted is None else (status for status in statuses if passes(wanted, status.sa))


def entry_extensions(entry: SaStatus | Policy | PendingQueue | CachedBundle | LabelEntries, *, private: bool) -> Iterable[Extension]:
    if isinstance(entry, LabelEntries):
        return (entry,)
    if isinstance(entry, SaStatus):
        return status_extensions(entry, private=private)
    if isinstance(entry, Policy):
        return policy_extensions(entry, private=private)
    return (PendingExtension(entry),) if isinstance(entry, PendingQueue) else (BundleExtension(entry),)
