"""An AF_KEY in memory: it works a request off within the call that sends it, keeps what it is told, and loses what a test wants lost."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from kernel_shim.model import IPAddress, SaState
from kernel_shim.pfkey.codec import Codec
from kernel_shim.pfkey.constants import ExtensionType, MessageType, SaType
from kernel_shim.pfkey.messages import Address, Algorithm, Extension, LifetimeExtension, Message, PolicyExtension, Sa, Sa2, SpiRange, Supported

_Name = tuple[IPAddress, int]
_SUPPORTED = (
    Supported(ExtensionType.SUPPORTED_AUTH, (Algorithm(3, 0, 160, 160), Algorithm(7, 0, 512, 512))),
    Supported(ExtensionType.SUPPORTED_ENCRYPT, (Algorithm(12, 8, 128, 256), Algorithm(13, 8, 160, 288))),
)


class _Refused(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Socket(socket.socket):
    """Whose `send` is the kernel's work."""

    kernel: FakeAfKey

    def send(self, data: object, flags: int = 0) -> int:
        assert isinstance(data, bytes)
        self.kernel.take(data)
        return len(data)


@dataclass
class FakeAfKey:
    """A `Transport`, too. `loses` says which of its messages are dropped."""

    loses: Callable[[Message], bool] = lambda _message: False
    answers_at_once: bool = True
    answered: Callable[[MessageType], None] = lambda _kind: None  # called when a request was worked off, before its answer is read
    dropped: bool = False  # whether `overrun` says so, once
    sas: dict[_Name, tuple[Extension, ...]] = field(default_factory=dict)
    larval: dict[tuple[IPAddress, IPAddress, Sa2], int] = field(default_factory=dict)  # of ACQUIREs, with when they came
    policies: dict[tuple[Extension, ...], tuple[Extension, ...]] = field(default_factory=dict)
    asked: list[MessageType] = field(default_factory=list)
    spi: int = 0x5000
    acquires: int = 0
    seconds: int = 1_700_000_000  # its clock

    async def connect(self) -> socket.socket:
        own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._socket = theirs
        opened = _Socket(fileno=own.detach())
        opened.kernel = self
        opened.setblocking(False)
        return opened

    def receive(self, opened: socket.socket, buffer: bytearray) -> tuple[int, tuple[int, ...]]:
        return opened.recv_into(buffer), ()

    def overrun(self, opened: socket.socket) -> bool:
        dropped, self.dropped = self.dropped, False
        return dropped

    def close(self) -> None:
        self._socket.close()

    def tell(self, message: Message) -> None:
        if self.loses(message):
            self.dropped = True
        else:
            self._socket.send(Codec().encode(message))

    def take(self, data: bytes) -> None:
        request = Codec().decode(data)
        self.asked.append(MessageType(request.type))
        try:
            if request.type in (MessageType.DUMP, MessageType.X_SPDDUMP):
                self._dump(request)
            else:
                self.tell(replace(request, extensions=self._answer(request)))
        except _Refused as refused:
            self.tell(replace(request, errno=refused.number, extensions=()))
        self.answered(MessageType(request.type))

    def acquire(self, index: int, source: IPAddress, destination: IPAddress, sa2: Sa2) -> None:
        """A packet met the policy of that index."""
        self.larval.setdefault((source, destination, sa2), self.seconds)
        self.acquires += 1
        ends = _ends(source, destination)
        self.tell(Message(MessageType.ACQUIRE, SaType.ESP, 0, self.acquires, 0, (*ends, PolicyExtension(2, 2, index))))

    def _answer(self, request: Message) -> tuple[Extension, ...]:
        match request.type:
            case MessageType.REGISTER:
                return _SUPPORTED
            case MessageType.GETSPI:
                return self._get_spi(request)
            case MessageType.ADD | MessageType.UPDATE:
                standing = self.sas.get(_name(request))
                if request.type == MessageType.UPDATE and standing is None:
                    raise _Refused(errno.ESRCH)
                if request.type == MessageType.ADD and standing is not None:
                    raise _Refused(errno.EEXIST)
                self.sas[_name(request)] = request.extensions
                return request.extensions
            case MessageType.DELETE | MessageType.GET:
                if _name(request) not in self.sas:
                    raise _Refused(errno.ESRCH)
                return self.sas.pop(_name(request)) if request.type == MessageType.DELETE else self.sas[_name(request)]
            case _:
                return self._policy(request)

    def _get_spi(self, request: Message) -> tuple[Extension, ...]:
        source, destination = request.require(Address, ExtensionType.ADDRESS_SRC).address, request.require(Address, ExtensionType.ADDRESS_DST).address
        sa2, spis = request.require(Sa2), request.require(SpiRange)
        larval = (source, destination, sa2)
        self.larval.setdefault(larval, self.seconds)
        if spis.minimum == spis.maximum:
            spi = spis.minimum
        else:
            self.spi += 1
            spi = self.spi
        if (destination, spi) in self.sas:
            raise _Refused(errno.ENOENT)
        del self.larval[larval]
        self.sas[destination, spi] = (Sa(spi, state=SaState.LARVAL), *_ends(source, destination), sa2)
        return self.sas[destination, spi]

    def _policy(self, request: Message) -> tuple[Extension, ...]:
        told = request.require(PolicyExtension)
        key = (
            request.require(Address, ExtensionType.ADDRESS_SRC),
            request.require(Address, ExtensionType.ADDRESS_DST),
            PolicyExtension(0, told.direction),
        )
        if request.type == MessageType.X_SPDDELETE:
            if key not in self.policies:
                raise _Refused(errno.ENOENT)
            return self.policies.pop(key)
        if request.type == MessageType.X_SPDADD and key in self.policies:
            raise _Refused(errno.EEXIST)
        standing = self.policies.get(key, ())
        index = next((it.id for it in standing if isinstance(it, PolicyExtension)), 8 * (len(self.asked) + 1) + told.direction - 1)
        self.policies[key] = tuple(replace(it, id=index) if isinstance(it, PolicyExtension) else it for it in request.extensions)
        return self.policies[key]

    def _dump(self, request: Message) -> None:
        entries = list(self.policies.values() if request.type == MessageType.X_SPDDUMP else self.sas.values())
        if request.type == MessageType.DUMP:
            current = ExtensionType.LIFETIME_CURRENT
            entries += [
                (Sa(0, state=SaState.LARVAL), LifetimeExtension(current, addtime=added), *_ends(source, destination), sa2)
                for (source, destination, sa2), added in self.larval.items()
            ]
        if not entries:
            raise _Refused(errno.ENOENT)
        for number, extensions in enumerate(entries, 1):
            self.tell(replace(request, sequence=number if number < len(entries) else 0, extensions=extensions))


def _ends(source: IPAddress, destination: IPAddress) -> tuple[Extension, ...]:
    return tuple(
        Address(kind, address, 0, address.max_prefixlen) for kind, address in ((ExtensionType.ADDRESS_SRC, source), (ExtensionType.ADDRESS_DST, destination))
    )


def _name(message: Message) -> _Name:
    return message.require(Address, ExtensionType.ADDRESS_DST).address, message.require(Sa).spi


def mark_of(extensions: tuple[Extension, ...]) -> int:
    return max((it.usetime for it in extensions if isinstance(it, LifetimeExtension)), default=0)
