"""The key manager's half of PF_KEY, without I/O: requests that all end, and events.

`request` gives a ticket; what becomes of it is an event later: `Replied`, `Refused` or `TimedOut`. A reply is known by message type,
sadb_msg_seq and sadb_msg_pid (RFC 2367 section 2.1), an entry of a dump by X_DUMP where our extensions are spoken. A request that is not answered
in time is sent again unchanged, with growing pauses (`REPEAT_AFTER`): the shim recognises it and does not carry it out twice. A dump of which
an entry is missing is asked for again when it has ended.

An edge drives it thus: send what `next_output` gives and say `output_sent`; pass datagrams to `receive` while `wants_read`; call `tick`
when `next_deadline` is due; then empty `next_event`. Descriptors in an event are the caller's to close.
"""

from __future__ import annotations

import errno
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Final, NewType

from kernel_shim.model import KernelError, KernelEvent
from kernel_shim.pfkey.codec import Codec, header_of
from kernel_shim.pfkey.constants import MessageType
from kernel_shim.pfkey.dialects import LINUX, Dialect
from kernel_shim.pfkey.event_messages import event_from
from kernel_shim.pfkey.messages import Message, PfKeyError
from kernel_shim.pfkey.private import DumpPosition, ErrorText

Ticket = NewType("Ticket", int)

REPEAT_AFTER: Final = (0.2, 0.6, 2.0, 4.0, 8.0)  # s without an answer; a kernel that is busy for longer loses nothing by it
ATTEMPTS: Final = len(REPEAT_AFTER)
BUSY_PAUSE: Final = 0.05  # s until a dump is asked for again that the kernel refused because of another one; doubles
DUMP_TIMEOUT: Final = 5.0  # s without another entry of a dump
MAX_UNDER_WAY: Final = 32  # requests sent and not answered; fewer than outbox.MAX_QUEUED_REPLIES, so that the shim always reads
MAX_DUMP_ENTRIES: Final = 1_000_000
MAX_OUTPUT: Final = 1024  # messages not yet sent
MAX_EVENTS: Final = 65536  # not yet taken; at the bound `wants_read` is false

_LAST_SEQUENCE: Final = 0xFFFFFFFF
_PID_BITS: Final = 22  # of a process id of Linux (PID_MAX_LIMIT)
_DUMPS: Final = frozenset({MessageType.DUMP, MessageType.X_SPDDUMP, MessageType.X_PENDINGDUMP, MessageType.X_BUNDLEDUMP, MessageType.X_LABELDUMP})


@dataclass(frozen=True, slots=True)
class Replied:
    """`messages` is one, or all of a dump."""

    ticket: Ticket
    messages: tuple[Message, ...]
    descriptors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """The kernel said no, or its reply was malformed (PfKeyError). `repeated`: perhaps not to the first request, which had its effect."""

    ticket: Ticket
    error: KernelError
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class TimedOut:
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Reported:
    """The kernel tells something of its own accord."""

    event: KernelEvent


@dataclass(frozen=True, slots=True)
class Overrun:
    """The kernel side had to forget events: look at the tables."""


@dataclass(frozen=True, slots=True)
class Unclaimed:
    """Descriptors came with a message that nobody waits for."""

    descriptors: tuple[int, ...]


SessionEvent = Replied | Refused | TimedOut | Reported | Overrun | Unclaimed


@dataclass(slots=True)
class _Request:
    ticket: Ticket
    type: int
    sequence: int
    data: bytes = field(repr=False)  # may hold keys
    deadline: float = 0.0
    attempts: int = 0
    entries: list[Message] = field(default_factory=list)  # of a dump
    pid: int = 0  # sadb_msg_pid
    remaining: int | None = None  # what the last entry of a dump said
    gaps: bool = False  # entries of it are missing
    busy: bool = False  # it waits until the kernel is done with another one


class ClientSession:
    """`pid` goes into sadb_msg_pid; `first_sequence` sets this session's numbers apart from those of another one of the same process.

    `numbered_dumps` is for Linux' AF_KEY, where entries of a dump count up from 1 and say nothing of the request: each dump then
    has a sadb_msg_pid of its own, which every entry repeats, so that the rest of an abandoned dump is not taken for the next one.
    """

    def __init__(self, pid: int, *, first_sequence: int = 1, dialect: Dialect = LINUX, numbered_dumps: bool = False) -> None:
        self._pid = pid
        self._numbered_dumps = numbered_dumps
        self._dumps = 0
        self._first_sequence = self._sequence = first_sequence
        self._codec = Codec(dialect)
        self._tickets = 0
        self._waiting: deque[_Request] = deque()  # not yet sent, for MAX_UNDER_WAY; bounded by the callers that wait
        self._under_way: dict[tuple[int, int], _Request] = {}
        self._dump: _Request | None = None
        self._output: deque[bytes] = deque()
        self._events: deque[SessionEvent] = deque()
        self.malformed = 0
        self.repeated = 0

    # Requests

    def request(self, message: Message, now: float) -> Ticket:
        """Sends `message` as soon as it may be; its sadb_msg_seq is set here unless it has one. PfKeyError when it cannot be encoded."""
        sequence = message.sequence or self._next_sequence()
        pid = self._dump_pid() if message.type in _DUMPS and self._numbered_dumps else self._pid
        data = self._codec.encode(replace(message, sequence=sequence, pid=pid))
        self._tickets += 1
        request = _Request(Ticket(self._tickets), message.type, sequence, data, pid=pid)
        self._waiting.append(request)
        self._send_waiting(now)
        return request.ticket

    def notify(self, message: Message) -> None:
        """Sends a message that has no reply; its sequence is its own. KernelError(ENOBUFS) when the kernel side has long not read."""
        if len(self._output) >= MAX_OUTPUT:
            raise KernelError(errno.ENOBUFS, "the kernel side does not read")
        self._output.append(self._codec.encode(replace(message, pid=self._pid)))

    def cancel(self, ticket: Ticket, now: float) -> None:
        """Nobody waits any more; the request may have had its effect. A reply that comes later is dropped."""
        for request in self._waiting:
            if request.ticket == ticket:
                self._waiting.remove(request)
                return
        for request in self._all_under_way():
            if request.ticket == ticket:
                self._finish(request, now)
                return

    def _dump_pid(self) -> int:
        self._dumps = self._dumps % ((1 << 32 - _PID_BITS) - 1) + 1
        return self._dumps << _PID_BITS | self._pid & (1 << _PID_BITS) - 1

    def _next_sequence(self) -> int:
        self._sequence = self._sequence + 1 if self._sequence < _LAST_SEQUENCE else self._first_sequence  # never 0, which ends a dump
        return self._sequence

    def _send_waiting(self, now: float) -> None:
        """Oldest first; a dump waits for the one under way, and what came after it does not wait for it."""
        held: list[_Request] = []
        while self._waiting and len(self._under_way) < MAX_UNDER_WAY:
            request = self._waiting.popleft()
            key = (request.type, request.sequence)
            if request.type in _DUMPS:
                if self._dump is not None:
                    held.append(request)
                    continue
                self._dump = request
            elif key in self._under_way:
                held.append(request)
                continue
            else:
                self._under_way[key] = request
            self._transmit(request, now)
        self._waiting.extendleft(reversed(held))

    def _transmit(self, request: _Request, now: float) -> None:
        if self._numbered_dumps:
            request.entries.clear()  # the shim goes on with a dump that is asked for again; Linux begins anew
            request.gaps = request.busy = False
        request.deadline = now + (DUMP_TIMEOUT if request.type in _DUMPS else REPEAT_AFTER[request.attempts])
        request.attempts += 1
        if request.data not in self._output:
            self._output.append(request.data)

    def _all_under_way(self) -> list[_Request]:
        return [*self._under_way.values(), *([self._dump] if self._dump is not None else [])]

    def _finish(self, request: _Request, now: float) -> None:
        if request.data in self._output:
            self._output.remove(request.data)  # it never left, and need not any more
        if request is self._dump:
            self._dump = None
        else:
            del self._under_way[request.type, request.sequence]
        self._send_waiting(now)

    # Output

    def next_output(self) -> bytes | None:
        """What to send next; the same until `output_sent`."""
        return self._output[0] if self._output else None

    def output_sent(self) -> None:
        self._output.popleft()

    def output_refused(self, error: KernelError, now: float) -> None:
        """The kernel did not take the message of `next_output`; other messages it may take."""
        data = self._output.popleft()
        for request in self._all_under_way():
            if request.data == data:
                self._finish(request, now)
                self._events.append(Refused(request.ticket, error, request.attempts > 1))

    # Input

    def wants_read(self) -> bool:
        return len(self._events) < MAX_EVENTS

    def receive(self, data: bytes, descriptors: tuple[int, ...], now: float) -> None:
        """One datagram of the kernel side. A malformed one is counted, and ends the request that it is the reply to."""
        claimed = False
        try:
            claimed = self._receive(self._codec.decode(data, from_kernel=True), descriptors, now)
        except PfKeyError as error:
            self.malformed += 1
            self._fail(header_of(data), error, now)
        if descriptors and not claimed:
            self._events.append(Unclaimed(descriptors))

    def _receive(self, message: Message, descriptors: tuple[int, ...], now: float) -> bool:
        if message.type == MessageType.X_OVERRUN:
            self._events.append(Overrun())
            return False
        event = event_from(message)
        if event is not None:
            self._events.append(Reported(event))
            return False
        if message.type in _DUMPS:
            if self._dump is not None and message.pid == self._dump.pid:
                self._receive_dump(message, now)
            return False
        if message.pid != self._pid:
            return False  # what another client did
        request = self._under_way.get((message.type, message.sequence))
        if request is None:
            return False
        self._finish(request, now)
        if message.errno:
            self._events.append(Refused(request.ticket, _error_of(message), request.attempts > 1))
            return False
        self._events.append(Replied(request.ticket, (message,), descriptors))
        return True

    def _fail(self, header: Message, error: PfKeyError, now: float) -> None:
        request = self._under_way.get((header.type, header.sequence))
        if self._dump is not None and self._dump.type == header.type:
            request = self._dump
        if request is not None and header.pid == request.pid:
            self._finish(request, now)
            self._events.append(Refused(request.ticket, error))

    def _receive_dump(self, message: Message, now: float) -> None:
        dump, position = self._dump, message.find(DumpPosition)
        if dump is None or dump.type != message.type or (position is not None and position.request != dump.sequence):
            return
        if message.errno:
            # Linux has no empty dump; and its last entry may carry the errno of a failure.
            if position is None and message.sequence not in (0, dump.sequence):
                return
            if message.errno == errno.EBUSY and self._numbered_dumps:
                dump.deadline = now + BUSY_PAUSE * 2**dump.attempts
                dump.busy = True
                return
            self._finish(dump, now)
            is_empty = message.errno == errno.ENOENT and not dump.entries
            self._events.append(Replied(dump.ticket, ()) if is_empty else Refused(dump.ticket, _error_of(message)))
            return
        if position is not None:
            if dump.remaining is not None and position.remaining >= dump.remaining:
                dump.entries.clear()  # the shim began anew
                dump.gaps = False
            dump.remaining = position.remaining
            # An older shim does not say the total.
            dump.gaps |= bool(position.total) and position.total - position.remaining != len(dump.entries) + 1
        elif self._numbered_dumps:
            dump.gaps |= message.sequence not in (0, len(dump.entries) + 1)
        dump.entries.append(message)
        dump.deadline = now + DUMP_TIMEOUT
        if message.sequence == 0 and dump.gaps:
            self._dump_again(dump, now)
        elif message.sequence == 0:
            self._finish(dump, now)
            self._events.append(Replied(dump.ticket, tuple(dump.entries)))
        elif len(dump.entries) >= MAX_DUMP_ENTRIES:
            self._finish(dump, now)
            self._events.append(Refused(dump.ticket, KernelError(errno.EMSGSIZE, f"a dump of more than {MAX_DUMP_ENTRIES} entries")))

    def _dump_again(self, dump: _Request, now: float) -> None:
        """Entries are missing: the table as a whole is asked for once more."""
        dump.entries.clear()
        dump.remaining, dump.gaps = None, False
        self._again(dump, now)

    def next_event(self) -> SessionEvent | None:
        return self._events.popleft() if self._events else None

    # Losses

    def overrun(self) -> None:
        """Messages were lost, nobody knows which: a dump under way is not believed."""
        if self._dump is not None:
            self._dump.gaps = True
        self._events.append(Overrun())

    def nothing_left(self, now: float) -> None:
        """For a kernel that answers within the call: what was sent, and has no answer although all was read, is sent again at once."""
        for request in self._all_under_way():
            if request.data not in self._output and not request.busy:
                self._again(request, now)

    # Time

    def next_deadline(self) -> float | None:
        """When `tick` is due (monotonic seconds)."""
        return min((request.deadline for request in self._all_under_way()), default=None)

    def tick(self, now: float) -> None:
        for request in self._all_under_way():
            if now >= request.deadline:
                self._again(request, now)

    def _again(self, request: _Request, now: float) -> None:
        if request.attempts < ATTEMPTS:
            self.repeated += 1
            self._transmit(request, now)
        else:
            self._finish(request, now)
            self._events.append(TimedOut(request.ticket))


def _error_of(message: Message) -> KernelError:
    text = message.find(ErrorText)
    return KernelError(message.errno, text.text if text is not None else "refused by the kernel")
