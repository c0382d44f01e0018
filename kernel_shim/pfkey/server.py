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

from collections.abc import Callable
from dataclasses import dataclass
from typing import NewType

from kernel_shim.kernel import IkeSocketProvider, Kernel
from kernel_shim.model import IPAddress

ClientId = NewType("ClientId", int)


@dataclass(frozen=True, slots=True)
class Output:
    """One datagram for a client, with the descriptors to pass along (SCM_RIGHTS)."""

    data: bytes
    descriptors: tuple[int, ...] = ()


class ServerSession:
    """`is_local` tells the direction of an SA that a client without our extensions adds; without it, UPDATE is inbound and ADD outbound."""

    def __init__(self, kernel: Kernel, sockets: IkeSocketProvider, *, is_local: Callable[[IPAddress], bool] | None = None) -> None:
        raise NotImplementedError

    def accept(self, client: ClientId, *, pid: int, uid: int, now: float) -> None:
        """A new connection. KernelError(EMFILE) beyond `MAX_CLIENTS`; who may connect is the socket file's mode."""
        raise NotImplementedError

    def receive(self, client: ClientId, data: bytes, now: float) -> None:
        """One datagram from a client. Never raises for what is in it: a malformed one is answered with its errno."""
        raise NotImplementedError

    def wants_read(self, client: ClientId) -> bool:
        """False while the client leaves `MAX_QUEUED_REPLIES` replies unread."""
        raise NotImplementedError

    def take_ready(self) -> frozenset[ClientId]:
        """The clients that got something to send since the last call."""
        raise NotImplementedError

    def next_output(self, client: ClientId, now: float) -> Output | None:
        """What to send next; the same until `output_sent`. None for a client that is not connected."""
        raise NotImplementedError

    def output_sent(self, client: ClientId, now: float) -> None:
        """The last `next_output` went into the socket."""
        raise NotImplementedError

    def disconnect(self, client: ClientId, now: float) -> None:
        """The client is gone; its registrations go with it, its SAs, policies and IKE sockets stay."""
        raise NotImplementedError

    def next_deadline(self) -> float | None:
        """When `tick` is due (monotonic seconds)."""
        raise NotImplementedError

    def tick(self, now: float) -> None:
        raise NotImplementedError

    def statistics(self) -> dict[str, int]:
        """Counters of the channel itself, names begin with `pfkey.`."""
        raise NotImplementedError
