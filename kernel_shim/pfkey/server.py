"""The shim's half of PF_KEY: one `ServerSession` serves every client of the listening socket. No I/O happens here.

How an edge drives it (one datagram of the SOCK_SEQPACKET socket is one PF_KEY message):

1. `accept(client, pid=..., uid=..., now=...)` for a new connection; `client` is any number that the edge does not use twice
   at a time (its descriptor will do). KernelError: refuse the connection and close it.
2. While `wants_read(client)`: read a datagram and pass it to `receive(client, data, now)`. When it is false, take the
   descriptor out of the read set: the client does not read its replies, so it is not read from, and nothing is dropped.
3. After every batch of work (datagrams, packets, timers), for each client of `take_ready()`, and for each client whose
   socket became writable::

       while (output := session.next_output(client, now)) is not None:
           try: sendmsg(output.data, SCM_RIGHTS of output.descriptors)
           except BlockingIOError: wait for the socket to become writable; break
           session.output_sent(client, now)

   `next_output` gives the same output until `output_sent`. Dumps and events are encoded only when they are asked for here.
   The descriptors stay the property of the `IkeSocketProvider`; the edge sends them and does not close them.
   Then look at `wants_read(client)` again: it may have changed either way.
4. `disconnect(client, now)` when the client is gone or its socket failed.
5. `next_deadline()` and `tick(now)` as everywhere.

Kernel events reach the session through `Kernel.subscribe`, which the constructor calls; they only mark state, so that they may come
in the middle of the data plane's work. `IkeSocketProvider.bind` of an address that is bound already gives the same descriptors again.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Final, NewType

from kernel_shim.inspection import Inspectable
from kernel_shim.kernel import IkeSocketProvider, Kernel, LabelKernel
from kernel_shim.model import AcquireSequence, IPAddress, KernelError, KernelEvent
from kernel_shim.pfkey.codec import Codec, header_of
from kernel_shim.pfkey.constants import MAX_ERROR_TEXT, PRIVATE_VERSION, ExtensionType, MessageType, SaType
from kernel_shim.pfkey.dumps import DUMPS, Tables, next_message
from kernel_shim.pfkey.event_messages import event_message, proposal_of, supported_extensions
from kernel_shim.pfkey.messages import Address, Extension, Message, PfKeyError
from kernel_shim.pfkey.outbox import Dump, Outbox, Output
from kernel_shim.pfkey.private import CapabilitiesExtension, ErrorText, Hello
from kernel_shim.pfkey.requests import Answer, Requests
from kernel_shim.pfkey.watch import EVENT_OCTETS, Copy, Watch, encode_copy, reply_copy, without_keys

__all__ = ["ACQUIRE_REPEAT", "MAX_CLIENTS", "MAX_REMEMBERED_REPLIES", "ClientId", "Output", "ServerSession"]

ClientId = NewType("ClientId", int)

MAX_CLIENTS: Final = 32  # key managers, monitors and tools
MAX_REMEMBERED_REPLIES: Final = 8192  # to repeated requests of one client; as many as it makes while one of them is repeated (client.REPEAT_AFTER)
ACQUIRE_REPEAT: Final = 1.0  # s between two calls for ACQUIREs that did not fit

# These may be carried out again: the others are answered from memory when they are repeated.
_REPEATABLE: Final = frozenset({MessageType.X_BIND, MessageType.X_UNBIND, MessageType.X_STATISTICS, MessageType.GET, MessageType.X_SPDGET})


@dataclass(slots=True)
class _Client:
    id: ClientId
    pid: int
    uid: int
    private: bool = False
    registered: set[int] = field(default_factory=set)
    outbox: Outbox = field(default_factory=Outbox)
    current: Output | None = None  # given out by next_output, not yet sent
    remembered: OrderedDict[tuple[int, int], tuple[bytes, Output]] = field(default_factory=OrderedDict)
    acquires_due: float = 0.0  # when the kernel may be asked to repeat
    watch: Watch | None = None  # of a promiscuous one

    @property
    def listens(self) -> bool:
        return SaType.ESP in self.registered

    @property
    def wants_acquires(self) -> bool:
        return self.outbox.missed_acquires and self.outbox.acquires_drained


class ServerSession:
    """`is_local` tells the direction of an SA that a client without our extensions adds; without it, UPDATE is inbound and ADD outbound.

    `inspected` is what X_PENDINGDUMP and X_BUNDLEDUMP show, `labels` what X_LABELPUT and its like work on; without it they are refused.
    """

    def __init__(
        self,
        kernel: Kernel,
        sockets: IkeSocketProvider,
        *,
        is_local: Callable[[IPAddress], bool] | None = None,
        inspected: Inspectable | None = None,
        labels: LabelKernel | None = None,
    ) -> None:
        self._kernel = kernel
        self._tables = Tables(kernel, inspected, labels)
        self._watchers: list[_Client] = []
        self._watch_lost = 0
        self._codec = Codec()
        self._requests = Requests(kernel, sockets, is_local, self.statistics, labels)
        self._clients: dict[ClientId, _Client] = {}
        self._ready: set[ClientId] = set()
        self._descriptors: dict[IPAddress, tuple[int, ...]] = {}
        self._capabilities = kernel.capabilities()
        self._proposal = proposal_of(self._capabilities)
        self._malformed = self._refused = self._repeated = self._overruns = 0
        kernel.subscribe(self._on_event)

    # Connections

    def accept(self, client: ClientId, *, pid: int, uid: int, now: float) -> None:
        """A new connection. KernelError(EMFILE) beyond `MAX_CLIENTS`; who may connect is for the edge to say."""
        if len(self._clients) >= MAX_CLIENTS:
            raise KernelError(errno.EMFILE, f"more than {MAX_CLIENTS} PF_KEY clients")
        self._clients[client] = _Client(client, pid, uid)

    def disconnect(self, client: ClientId, now: float) -> None:
        """The client is gone; its registrations go with it, its SAs, policies and IKE sockets stay."""
        gone = self._clients.pop(client, None)
        self._ready.discard(client)
        if gone is None:
            return
        self._overruns += gone.outbox.overruns
        self._set_promiscuous(gone, False)
        if gone.listens and not any(other.listens for other in self._clients.values()):
            self._kernel.key_manager_listens(False, now)

    # Input

    def wants_read(self, client: ClientId) -> bool:
        """False while the client leaves `outbox.MAX_QUEUED_REPLIES` replies unread."""
        it = self._clients.get(client)
        return it is not None and not it.outbox.full

    def receive(self, client: ClientId, data: bytes, now: float) -> None:
        """One datagram from a client. Never raises for what is in it: a malformed one is answered with its errno."""
        it = self._clients.get(client)
        if it is None:
            return
        try:
            message = self._codec.decode(data)
        except PfKeyError as error:
            self._malformed += 1
            self._reply(it, self._refusal(it, header_of(data), error))
            return
        if self._watchers:
            self._copy(without_keys(message), len(data), origin=it)
        try:
            self._serve(it, message, data, now)
        except KernelError as error:
            self._reply(it, self._refusal(it, message, error))

    def _serve(self, client: _Client, message: Message, data: bytes, now: float) -> None:
        if message.type == MessageType.REGISTER:
            self._register(client, message, now)
        elif message.type in DUMPS:
            self._start_dump(client, message)
        elif message.type == MessageType.ACQUIRE:
            self._acquire_failed(message, now)
        elif message.type == MessageType.X_PROMISC:
            self._promiscuous(client, message)
        else:
            self._request(client, message, data, now)

    def _request(self, client: _Client, message: Message, data: bytes, now: float) -> None:
        """A client of ours uses a sadb_msg_seq once; the same message again is one whose reply came late."""
        digest = sha256(data).digest()  # not the request itself, which may hold keys
        known = client.remembered.get((message.type, message.sequence))
        if known is not None and known[0] == digest:
            self._repeated += 1
            self._reply(client, known[1])
            return
        output = self._carry_out(client, message, now)
        self._reply(client, output)
        if client.private and message.type not in _REPEATABLE:
            client.remembered[message.type, message.sequence] = (digest, output)
            if len(client.remembered) > MAX_REMEMBERED_REPLIES:
                client.remembered.popitem(last=False)

    def _carry_out(self, client: _Client, message: Message, now: float) -> Output:
        try:
            answer = self._requests.answer(message, now, private=client.private)
        except KernelError as error:
            return self._refusal(client, message, error)
        if message.type == MessageType.X_BIND:
            self._descriptors[message.require(Address, ExtensionType.ADDRESS_SRC).address] = answer.descriptors
        elif message.type == MessageType.X_UNBIND:
            self._forget_descriptors(message.require(Address, ExtensionType.ADDRESS_SRC).address)
        if answer.notify:
            self._notify_others(client, message, answer)
        return Output(self._encode(message, answer.extensions(private=client.private)), answer.descriptors)

    def _register(self, client: _Client, message: Message, now: float) -> None:
        """RFC 2367 section 3.1.7. UNSPEC only asks what there is, as in Linux."""
        if message.sa_type not in tuple(SaType):
            raise PfKeyError("sadb_msg_satype", str(message.sa_type))
        hello = message.find(Hello)
        if message.sa_type in client.registered and hello is None:
            raise KernelError(errno.EEXIST, f"already registered for {SaType(message.sa_type).name}")
        extensions = list(supported_extensions(self._capabilities))
        if hello is not None and hello.version >= PRIVATE_VERSION:
            client.private = True
            extensions += (Hello(PRIVATE_VERSION), CapabilitiesExtension(self._capabilities))
        if message.sa_type != SaType.UNSPEC:
            client.registered.add(message.sa_type)
        self._reply(client, Output(self._encode(message, extensions)))
        if message.sa_type == SaType.ESP:
            self._kernel.key_manager_listens(True, now)

    def _acquire_failed(self, message: Message, now: float) -> None:
        """RFC 2367 section 3.1.6: a base header with an errno from the key manager. No reply; an ACQUIRE that is over is no error."""
        if message.extensions:
            raise KernelError(errno.EOPNOTSUPP, "ACQUIRE from a client with extensions")
        sequence = AcquireSequence(message.sequence)
        for client in self._clients.values():
            client.outbox.forget_acquire(sequence)
        try:
            self._kernel.acquire_failed(sequence, message.errno or errno.EHOSTUNREACH, now)
        except KernelError as error:
            if error.errno != errno.ESRCH:
                raise

    def _start_dump(self, client: _Client, message: Message) -> None:
        """Linux' EBUSY while one is under way; a client of ours may start another, which ends the first, or repeat its request."""
        running = client.outbox.dump
        if running is not None:
            if not client.private:
                raise KernelError(errno.EBUSY, "a dump is under way")
            if (running.type, running.request) == (message.type, message.sequence):
                return
        entries = self._tables.entries(message, private=client.private)
        if not entries:
            raise KernelError(errno.ENOENT, "nothing to dump")
        client.outbox.dump = Dump(message.type, message.sequence, message.pid, entries)
        self._ready.add(client.id)

    # Promiscuous clients

    def _promiscuous(self, client: _Client, message: Message) -> None:
        """RFC 2367 section 3.1.11, in the form that Linux gives it: copies come as they are, without a second header."""
        if message.extensions:
            raise KernelError(errno.EOPNOTSUPP, "X_PROMISC with a message inside")
        if message.sa_type not in (0, 1):
            raise PfKeyError("sadb_msg_satype", str(message.sa_type))
        self._set_promiscuous(client, bool(message.sa_type))
        self._reply(client, Output(self._encode(message, ())))

    def _set_promiscuous(self, client: _Client, wanted: bool) -> None:
        if wanted and client.watch is None:
            client.watch = Watch()
            self._watchers.append(client)
        elif not wanted and client.watch is not None:
            self._watch_lost += client.watch.lost
            client.watch = None
            self._watchers.remove(client)

    def _copy(self, copy: Copy, octets: int, origin: _Client | None) -> None:
        """To every promiscuous client but the one whose conversation it is."""
        for watcher in self._watchers:
            if watcher is not origin and watcher.watch is not None:
                watcher.watch.add(copy, octets)
                self._ready.add(watcher.id)

    # Output

    def take_ready(self) -> frozenset[ClientId]:
        """The clients that got something to send since the last call."""
        ready, self._ready = frozenset(self._ready), set()
        return ready

    def next_output(self, client: ClientId, now: float) -> Output | None:
        """What to send next; the same until `output_sent`. None for a client that is not connected."""
        it = self._clients.get(client)
        if it is None:
            return None
        if it.current is None:
            it.current = self._next(it)
        return it.current

    def output_sent(self, client: ClientId, now: float) -> None:
        """The last `next_output` went into the socket."""
        it = self._clients.get(client)
        if it is not None:
            it.current = None

    def _next(self, client: _Client) -> Output | None:
        """Replies, then events and the dump in turns, then what others changed."""
        outbox = client.outbox
        if outbox.replies:
            return outbox.replies.popleft()
        if outbox.overrun:
            outbox.overrun = False
            if client.private:
                return Output(self._codec.encode(Message(MessageType.X_OVERRUN, SaType.ESP)))
        if outbox.dump is None or not outbox.dump_is_next:
            event = outbox.next_event()
            if event is not None:
                outbox.dump_is_next = True
                return Output(self._codec.encode(event_message(event, self._proposal, private=client.private)))
        if outbox.dump is not None:
            outbox.dump_is_next = False
            data = self._codec.encode(next_message(outbox.dump, private=client.private))
            outbox.dump = outbox.dump if outbox.dump.remaining else None
            return Output(data)
        return Output(outbox.notices.popleft()) if outbox.notices else self._next_copy(client)

    def _next_copy(self, client: _Client) -> Output | None:
        while client.watch is not None and (copy := client.watch.next()) is not None:
            data = encode_copy(copy, self._codec, self._proposal, private=client.private)
            if data is not None:
                return Output(data)
        return None

    def _encode(self, request: Message, extensions: Iterable[Extension], number: int = 0) -> bytes:
        return self._codec.encode(replace(request, errno=number, extensions=tuple(extensions)))

    def _reply(self, client: _Client, output: Output) -> None:
        client.outbox.replies.append(output)
        self._ready.add(client.id)
        if self._watchers:
            self._copy(reply_copy(header_of(output.data), output.data), len(output.data), origin=client)

    def _refusal(self, client: _Client, request: Message, error: KernelError) -> Output:
        """As Linux' pfkey_error: the base header with the errno, to the one who asked."""
        self._refused += 1
        text = error.detail.encode(errors="replace")[:MAX_ERROR_TEXT].decode(errors="ignore")
        return Output(self._encode(request, (ErrorText(text),) if client.private else (), error.errno & 0xFF))

    def _notify_others(self, requester: _Client, message: Message, answer: Answer) -> None:
        """RFC 2367 section 3.1: what changes the tables is sent to all; Linux does so for the SPD too."""
        for other in self._clients.values():
            if other is not requester and other.watch is None:
                other.outbox.add_notice(self._encode(message, answer.extensions(private=other.private)))
                self._ready.add(other.id)

    def _forget_descriptors(self, address: IPAddress) -> None:
        """The provider closed them: their numbers may soon be others', and must not leave with a reply that still waits."""
        closed = set(self._descriptors.pop(address, ()))

        def checked(output: Output) -> Output:
            if not closed & set(output.descriptors):
                return output
            return Output(self._encode(header_of(output.data), (), errno.EADDRNOTAVAIL))

        for client in self._clients.values():
            client.current = checked(client.current) if client.current is not None else None
            for at, output in enumerate(client.outbox.replies):
                client.outbox.replies[at] = checked(output)

    # Events and time

    def _on_event(self, event: KernelEvent) -> None:
        for client in self._clients.values():
            if client.listens:
                client.outbox.add_event(event)
                self._ready.add(client.id)
        if self._watchers:
            self._copy(event, EVENT_OCTETS, origin=None)

    def next_deadline(self) -> float | None:
        """When `tick` is due (monotonic seconds): a client that missed ACQUIREs has room for them again."""
        return min((client.acquires_due for client in self._clients.values() if client.wants_acquires), default=None)

    def tick(self, now: float) -> None:
        for client in list(self._clients.values()):
            if client.wants_acquires and now >= client.acquires_due:
                client.outbox.missed_acquires = False
                client.acquires_due = now + ACQUIRE_REPEAT
                self._kernel.key_manager_listens(True, now)

    def statistics(self) -> dict[str, int]:
        """Counters of the channel itself; their names begin with `pfkey.`."""
        clients = self._clients.values()
        return {
            "pfkey.clients": len(clients),
            "pfkey.registered": sum(client.listens for client in clients),
            "pfkey.malformed": self._malformed,
            "pfkey.refused": self._refused,
            "pfkey.repeated": self._repeated,
            "pfkey.overruns": self._overruns + sum(client.outbox.overruns for client in clients),
            "pfkey.promiscuous": len(self._watchers),
            "pfkey.copies-lost": self._watch_lost + sum(watcher.watch.lost for watcher in self._watchers if watcher.watch is not None),
        }
