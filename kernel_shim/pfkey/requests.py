"""What each PF_KEY request does to the kernel: one method a message type, one table of them.

Errors are `KernelError`, with the errno that Linux' net/key/af_key.c gives.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from kernel_shim.kernel import IkeSocketProvider, Kernel, LabelKernel
from kernel_shim.model import Direction, IPAddress, KernelError, Policy, PolicyIndex, SaStatus
from kernel_shim.pfkey.constants import MAX_STATISTIC_NAME, MAX_STATISTICS, ExtensionType, MessageType, SaType
from kernel_shim.pfkey.messages import Address, Extension, Key, KmAddress, Message, PfKeyError, PolicyExtension, UnknownExtension
from kernel_shim.pfkey.policy_messages import direction_from, migration_from, policy_extensions, policy_from, selector_from
from kernel_shim.pfkey.private import LabelEntries, SaExtension, Statistics
from kernel_shim.pfkey.sa_messages import sa_from, sa_id_from, spi_request_from, status_extensions

_PRIVATE_REQUESTS: Final = frozenset({MessageType.X_BIND, MessageType.X_UNBIND, MessageType.X_STATISTICS, MessageType.X_LABELPUT, MessageType.X_LABELDELETE})
_OTHER_PROTOCOLS: Final = frozenset({SaType.AH, SaType.X_IPCOMP})


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply, in the two forms that clients with and without our extensions get. `notify`: every other client gets it too."""

    plain: tuple[Extension, ...]
    private: tuple[Extension, ...]
    notify: bool = False
    descriptors: tuple[int, ...] = ()

    def extensions(self, *, private: bool) -> tuple[Extension, ...]:
        return self.private if private else self.plain

    @classmethod
    def same(cls, extensions: Iterable[Extension], *, notify: bool = False, descriptors: tuple[int, ...] = ()) -> Answer:
        both = tuple(extensions)
        return cls(both, both, notify, descriptors)


class Requests:
    """`is_local` and `labels` as for `ServerSession`; `own_statistics` is added to the kernel's."""

    def __init__(
        self,
        kernel: Kernel,
        sockets: IkeSocketProvider,
        is_local: Callable[[IPAddress], bool] | None,
        own_statistics: Callable[[], Mapping[str, int]],
        labels: LabelKernel | None = None,
    ) -> None:
        self._kernel = kernel
        self._sockets = sockets
        self._is_local = is_local
        self._own_statistics = own_statistics
        self._labels = labels
        self._table: Final[Mapping[int, Callable[[Message, float], Answer]]] = {
            MessageType.UPDATE: self._update,
            MessageType.ADD: self._add,
            MessageType.DELETE: self._delete,
            MessageType.GET: self._get,
            MessageType.FLUSH: self._flush,
            MessageType.X_SPDADD: self._add_policy,
            MessageType.X_SPDUPDATE: self._update_policy,
            MessageType.X_SPDSETIDX: self._add_policy,  # the same in Linux
            MessageType.X_SPDDELETE: self._delete_policy,
            MessageType.X_SPDDELETE2: self._delete_policy_index,
            MessageType.X_SPDGET: self._get_policy,
            MessageType.X_SPDFLUSH: self._flush_policies,
            MessageType.X_MIGRATE: self._migrate,
            MessageType.X_BIND: self._bind,
            MessageType.X_UNBIND: self._unbind,
            MessageType.X_STATISTICS: self._statistics,
            MessageType.X_LABELPUT: self._put_labels,
            MessageType.X_LABELDELETE: self._delete_labels,
        }

    def answer(self, message: Message, now: float, *, private: bool) -> Answer:
        """Carries the request out. EINVAL for an unknown type, EOPNOTSUPP for a known one that has no meaning here."""
        if message.type == MessageType.GETSPI:
            return self._get_spi(message, now, private=private)
        handler = self._table.get(message.type)
        if handler is None or (message.type in _PRIVATE_REQUESTS and not private):
            known = MessageType.RESERVED < message.type <= MessageType.X_MIGRATE
            raise KernelError(errno.EOPNOTSUPP if known else errno.EINVAL, f"message type {message.type}")
        return handler(message, now)

    # SAD

    def _get_spi(self, message: Message, now: float, *, private: bool) -> Answer:
        _require_esp(message)
        return _status(self._kernel.get_spi(spi_request_from(message, private=private), now))

    def _add(self, message: Message, now: float) -> Answer:
        _require_esp(message)
        sa = sa_from(message, self._direction(message), keys=True)
        return _status(self._kernel.add_sa(sa, now), notify=True)

    def _direction(self, message: Message) -> Direction:
        """Of an SA whose client does not say it. Who says it is spared the look at the host's addresses."""
        if message.find(SaExtension) is not None or self._is_local is None:
            return Direction.OUT
        destination = message.require(Address, ExtensionType.ADDRESS_DST).address
        return Direction.IN if self._is_local(destination) else Direction.OUT

    def _update(self, message: Message, now: float) -> Answer:
        # An UPDATE completes a GETSPI, which is for inbound SAs; one without keys changes lifetimes or ports of a mature SA.
        _require_esp(message)
        sa = sa_from(message, Direction.IN, keys=message.find(Key) is not None)
        return _status(self._kernel.update_sa(sa, now), notify=True)

    def _delete(self, message: Message, _now: float) -> Answer:
        sa = sa_id_from(message)
        _require_known(message)
        return _status(self._kernel.delete_sa(sa), notify=True)

    def _get(self, message: Message, _now: float) -> Answer:
        sa = sa_id_from(message)
        _require_known(message)
        return _status(self._kernel.get_sa(sa))

    def _flush(self, message: Message, _now: float) -> Answer:
        flushed = 0
        if message.sa_type in (SaType.UNSPEC, SaType.ESP):
            flushed = self._kernel.flush_sas()
        elif message.sa_type not in _OTHER_PROTOCOLS:
            raise PfKeyError("sadb_msg_satype", str(message.sa_type))
        return Answer.same((), notify=flushed > 0)

    # SPD

    def _add_policy(self, message: Message, now: float) -> Answer:
        _require_direction(message)
        policy = self._kernel.add_policy(policy_from(message), now)
        return _policy(policy, notify=True)

    def _update_policy(self, message: Message, now: float) -> Answer:
        _require_direction(message)
        policy = self._kernel.update_policy(policy_from(message), now)
        return _policy(policy, notify=True)

    def _delete_policy(self, message: Message, _now: float) -> Answer:
        _require_direction(message)
        direction = direction_from(message.require(PolicyExtension))
        policy = self._kernel.delete_policy(direction, selector_from(message))
        return _policy(policy, notify=True)

    def _delete_policy_index(self, message: Message, _now: float) -> Answer:
        extension = message.require(PolicyExtension)
        policy = self._kernel.delete_policy_index(direction_from(extension), PolicyIndex(extension.id))
        return _policy(policy, notify=True)

    def _get_policy(self, message: Message, _now: float) -> Answer:
        extension = message.require(PolicyExtension)
        policy = self._kernel.get_policy(direction_from(extension), PolicyIndex(extension.id))
        return _policy(policy)

    def _flush_policies(self, _message: Message, _now: float) -> Answer:
        return Answer.same((), notify=self._kernel.flush_policies() > 0)

    def _migrate(self, message: Message, now: float) -> Answer:
        """The answer is the request: what else there is to know, the key managers know already."""
        self._kernel.migrate(migration_from(message), now)
        told = tuple(it for it in message.extensions if isinstance(it, Address | PolicyExtension | KmAddress))
        return Answer(told, tuple(it for it in message.extensions if not isinstance(it, UnknownExtension)), notify=True)

    # Our own

    def _bind(self, message: Message, _now: float) -> Answer:
        address = message.require(Address, ExtensionType.ADDRESS_SRC)
        return Answer.same((address,), descriptors=self._sockets.bind(address.address))

    def _unbind(self, message: Message, _now: float) -> Answer:
        address = message.require(Address, ExtensionType.ADDRESS_SRC)
        self._sockets.unbind(address.address)
        return Answer.same((address,))

    def _statistics(self, _message: Message, _now: float) -> Answer:
        counters = {**self._kernel.statistics(), **self._own_statistics()}
        fitting = [(name, value) for name, value in sorted(counters.items()) if len(name.encode()) <= MAX_STATISTIC_NAME and 0 <= value < 1 << 64]
        return Answer.same((Statistics(tuple(fitting[:MAX_STATISTICS])),))

    def _put_labels(self, message: Message, now: float) -> Answer:
        """One after the other: those before one that is refused stand."""
        for entry in message.require(LabelEntries).entries:
            self._label_kernel().put_label_entry(entry, now)
        return Answer.same(())

    def _delete_labels(self, message: Message, now: float) -> Answer:
        """What is not there any more is no error: the wish is fulfilled."""
        for entry in message.require(LabelEntries).entries:
            try:
                self._label_kernel().remove_label_entry(entry.key, now)
            except KernelError as error:
                if error.errno != errno.ESRCH:
                    raise
        return Answer.same(())

    def _label_kernel(self) -> LabelKernel:
        if self._labels is None:
            raise KernelError(errno.EOPNOTSUPP, "this kernel forwards no labels")
        return self._labels


def _status(status: SaStatus, *, notify: bool = False) -> Answer:
    return Answer(tuple(status_extensions(status, private=False)), tuple(status_extensions(status, private=True)), notify)


def _policy(policy: Policy, *, notify: bool = False) -> Answer:
    return Answer(tuple(policy_extensions(policy, private=False)), tuple(policy_extensions(policy, private=True)), notify)


def _require_esp(message: Message) -> None:
    if message.sa_type in _OTHER_PROTOCOLS:
        raise PfKeyError("sadb_msg_satype", str(message.sa_type), errno.EPROTONOSUPPORT)
    if message.sa_type != SaType.ESP:
        raise PfKeyError("sadb_msg_satype", str(message.sa_type))


def _require_known(message: Message) -> None:
    """Of other protocols there is no SA."""
    if message.sa_type != SaType.ESP:
        raise KernelError(errno.ESRCH, f"no SA of type {message.sa_type}")


def _require_direction(message: Message) -> None:
    """Only a request that names a policy by its index may leave the direction to it."""
    if not message.require(PolicyExtension).direction:
        raise PfKeyError("X_POLICY.dir", "0")
