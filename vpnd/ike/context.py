"""What an IKE SA needs from its daemon, and the settings that bound it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from kernel_shim.model import AcquireSequence, Capabilities, Endpoint, Flow, IPAddress
from vpnd.auth.credentials import CredentialStore
from vpnd.config.model import ChildConfig, ConnectionConfig
from vpnd.ike.effects import NO_ACQUIRE, ChildSa
from vpnd.ike.fragments import ReassemblyBudget
from vpnd.ike.identity import Identity
from vpnd.ike.marking import Marking, SharedIfIds
from vpnd.ike.resumption import Resumption
from vpnd.ike.twins import Twins

if TYPE_CHECKING:
    from vpnd.ike.session import Session


@dataclass(frozen=True, slots=True)
class Retransmission:
    """As strongSwan's (`charon.retransmit_*`): the n-th copy follows after `timeout * base ** n` seconds, with `jitter` (0 to 1) taken off at random.

    After `tries` copies and one more interval the peer counts as silent. RFC 7296 section 2.4 asks for a dozen copies over
    several minutes: unlike strongSwan's five, they reach a peer behind a path that loses every fifth packet.
    """

    timeout: float = 4.0
    base: float = 1.8
    tries: int = 12
    jitter: float = 0.0
    limit: float = 14.0  # s, of an interval; 0: none

    def delay(self, copy: int, random: float) -> float:
        """Seconds until copy number `copy` (0 is the first); `random` is in [0, 1)."""
        interval = self.timeout * self.base**copy
        return (min(interval, self.limit) if self.limit else interval) * (1.0 - self.jitter * random)

    def total(self) -> float:
        """Seconds, at most, until the peer counts as silent."""
        return sum(self.delay(copy, 0.0) for copy in range(self.tries + 1))


@dataclass(frozen=True, slots=True)
class IkeSettings:
    """Times in seconds."""

    retransmission: Retransmission = field(default_factory=Retransmission)
    half_open_timeout: float = 30.0  # a responder waits this long for IKE_AUTH
    keepalive: float = 20.0  # NAT keepalives, RFC 3948 section 4; 0 is off
    vendor_id: bytes = b""  # ours; empty: none is sent
    initial_contact: bool = True
    follow_redirects: bool = True  # RFC 5685, as a client
    fragment_size: int = 1280  # octets of an IP packet that IKE fragments may fill; 0: 576 for IPv4, 1280 for IPv6
    rekeyed_delay: float = 5.0  # the SA in of a CHILD_SA that is rekeyed, or has a twin, still takes packets under way (strongSwan's `delete_rekeyed_delay`)


class IkeContext(Protocol):
    """`vpnd.daemon.manager.Manager` implements it; tests bring their own. Every call is synchronous and quick."""

    @property
    def settings(self) -> IkeSettings: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def credentials(self) -> CredentialStore: ...

    def entropy(self, octets: int) -> bytes: ...

    def utc(self, now: float) -> datetime:
        """The wall clock (aware, UTC) at the monotonic time `now`; certificates are checked against it."""

    def exchanged(self, connection: str, exchange: int, *, incoming: bool, response: bool) -> None:
        """An IKE message of that connection went out, or came in and is the peer's; for counters."""

    def new_ike_spi(self, holder: Session) -> int:
        """An SPI of 64 bits, not 0, that no other IKE SA of this daemon uses; `holder` is the one that gets it."""

    def new_ike_id(self) -> int:
        """`unique_id` of the next IKE SA."""

    def new_child_id(self) -> int:
        """`ChildSa.id` of the next CHILD_SA."""

    def candidates(self, local: Endpoint, remote: Endpoint) -> Sequence[ConnectionConfig]:
        """Connections whose addresses fit an IKE_SA_INIT request that came from `remote` to `local`, best first."""

    @property
    def reassembly(self) -> ReassemblyBudget: ...

    @property
    def resumption(self) -> Resumption: ...

    @property
    def twins(self) -> Twins: ...

    def addresses(self) -> Sequence[IPAddress]:
        """Our own addresses, on which a peer can reach us."""

    def source_towards(self, remote: IPAddress) -> IPAddress | None:
        """The address of ours by which the host's routing reaches `remote`; None without a route."""

    def crash_token(self, spi_i: bytes, spi_r: bytes) -> bytes:
        """Our token of an IKE SA (RFC 6290); empty when we make none."""

    def admits_redirect(self, connection: ConnectionConfig) -> bool:
        """Whether an IKE SA of the connection may be sent to another gateway now."""

    def path_mtu(self, local: IPAddress, remote: IPAddress) -> int:
        """What is known of the longest IP packet, in octets, that passes from `local` to `remote`; 0: nothing is."""

    def reqid(self, connection: ConnectionConfig, child: ChildConfig) -> int:
        """The reqid of a CHILD_SA that the peer asked for: that of its installed trap, or a new one."""

    def marking(self, connection: ConnectionConfig, child: ChildConfig, shared: SharedIfIds) -> Marking:
        """Marks and interface ids of a CHILD_SA that comes up; `shared`: those of its IKE SA. NumbersExhausted when none are left to give."""

    def first_contact(self, connection: ConnectionConfig) -> bool:
        """Whether no other IKE SA stands with the peer of this connection, so that INITIAL_CONTACT may be said."""

    def admits(self, connection: ConnectionConfig, local: Identity, remote: Identity, address: IPAddress) -> bool:
        """Whether the peer, who proved to be `remote` and is at `address`, may have this IKE SA beside those that stand."""


@dataclass(frozen=True, slots=True)
class ChildRequest:
    """A CHILD_SA that we are to bring up. `flow` is the packet that asked for it, `acquire` the kernel's number of that, `reqid` 0: ask the context.

    `like`: with the selectors of that one.
    """

    child: ChildConfig
    flow: Flow | None = None
    acquire: AcquireSequence = NO_ACQUIRE
    reqid: int = 0
    like: ChildSa | None = None
