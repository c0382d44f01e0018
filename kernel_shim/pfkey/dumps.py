"""Dumps: what can be dumped, and the messages of one."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Final

from kernel_shim.inspection import CachedBundle, Inspectable, PendingQueue
from kernel_shim.kernel import Kernel, LabelKernel
from kernel_shim.model import KernelError, Policy, SaStatus
from kernel_shim.pfkey.constants import MessageType, SaType
from kernel_shim.pfkey.messages import Extension, Filter, Message, PfKeyError
from kernel_shim.pfkey.outbox import Dump, Entries
from kernel_shim.pfkey.policy_messages import policy_extensions
from kernel_shim.pfkey.private import BundleExtension, DumpPosition, LabelEntries, PendingExtension
from kernel_shim.pfkey.sa_messages import passes, status_extensions

LABELS_OF_A_DUMP: Final = 64  # entries of one message

_PRIVATE: Final = frozenset({MessageType.X_PENDINGDUMP, MessageType.X_BUNDLEDUMP, MessageType.X_LABELDUMP})
DUMPS: Final = frozenset({MessageType.DUMP, MessageType.X_SPDDUMP}) | _PRIVATE
"""The requests that a dump answers."""


class Tables:
    """What can be dumped. `inspected` and `labels` as of `server.ServerSession`."""

    def __init__(self, kernel: Kernel, inspected: Inspectable | None, labels: LabelKernel | None) -> None:
        self._kernel, self._inspected, self._labels = kernel, inspected, labels

    def entries(self, request: Message, *, private: bool) -> Entries:
        """A snapshot of what `request` asks for, maybe empty; `private` when its client speaks our extensions. KernelError for what there is not."""
        if request.type == MessageType.X_SPDDUMP:
            return tuple(self._kernel.policies())
        if request.type == MessageType.DUMP:
            return tuple(_filtered(self._kernel.sas(), request)) if _holds_esp(request.sa_type) else ()
        if private and self._labels is not None and request.type == MessageType.X_LABELDUMP:
            labels = tuple(self._labels.label_entries())
            return tuple(LabelEntries(labels[at : at + LABELS_OF_A_DUMP]) for at in range(0, len(labels), LABELS_OF_A_DUMP))
        if private and self._inspected is not None and request.type != MessageType.X_LABELDUMP:
            return self._inspected.pending_queues() if request.type == MessageType.X_PENDINGDUMP else self._inspected.cached_bundles()
        raise KernelError(errno.EOPNOTSUPP, f"message type {request.type}")


def next_message(dump: Dump, *, private: bool) -> Message:
    """Takes the next entry. The last message has sadb_msg_seq 0 (RFC 2367 section 3.1.10), the others count up as Linux' do."""
    entry = dump.entries[dump.position]
    dump.position += 1
    extensions = tuple(_extensions(entry, private=private))
    if private:
        extensions += (DumpPosition(dump.request, dump.remaining, len(dump.entries)),)
    sequence = dump.position if dump.remaining else 0
    sa_type = SaType.ESP if dump.type == MessageType.DUMP else SaType.UNSPEC
    return Message(dump.type, sa_type, 0, sequence, dump.pid, extensions)


def _holds_esp(sa_type: int) -> bool:
    """Whether a dump of this SA type shows SAs of ESP. EINVAL for a type that Linux does not know here."""
    if sa_type not in (SaType.UNSPEC, SaType.AH, SaType.ESP, SaType.X_IPCOMP):
        raise PfKeyError("sadb_msg_satype", str(sa_type))
    return sa_type in (SaType.UNSPEC, SaType.ESP)


def _filtered(statuses: Iterable[SaStatus], message: Message) -> Iterable[SaStatus]:
    """Those that X_FILTER of the request, if there is one, lets through."""
    wanted = message.find(Filter)
    return statuses if wanted is None else (status for status in statuses if passes(wanted, status.sa))


def _extensions(entry: SaStatus | Policy | PendingQueue | CachedBundle | LabelEntries, *, private: bool) -> Iterable[Extension]:
    if isinstance(entry, LabelEntries):
        return (entry,)
    if isinstance(entry, SaStatus):
        return status_extensions(entry, private=private)
    if isinstance(entry, Policy):
        return policy_extensions(entry, private=private)
    return (PendingExtension(entry),) if isinstance(entry, PendingQueue) else (BundleExtension(entry),)
